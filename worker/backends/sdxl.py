"""SDXL on a card: what the engine asks of a model. `sdxl_loading.py` makes one.

It follows diffusers' StableDiffusionXLPipeline so closely that a picture drawn among others is the one that the
pipeline would draw alone, to 2 of 255 (tests/gpu/test_same_pictures.py). What the pipeline keeps for a whole call is
kept here for each canvas: texts, noise, sigmas, guidance. Euler's method has no other memory.

The noise is drawn on the CPU, so that a seed means the same on every card; sigmas stay there, so that no step waits
for the card to read one number back.
"""

import gc
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import EulerDiscreteScheduler
from numpy.typing import NDArray

from worker.backends.base import Billed, Failure, Kind, PictureWarning
from worker.backends.batch_room import BatchRoom, Size, size_of
from worker.backends.model_folder import ModelFolder
from worker.backends.step_engine import Trouble

log = logging.getLogger(__name__)

TILED_ABOVE = 1536 * 1536  # pixels; the decoder takes more memory than all the rest above it
WARM_UP: Mapping[str, Any] = {"prompt": "warm up", "width": 256, "height": 256, "num_steps": 1, "seed": 0}

#: What cuDNN, cuBLAS and Metal say when memory ran out, in errors that have no type of their own.
_NO_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|can't allocate memory", re.IGNORECASE)
_CARD = re.compile(r"CUDA|cuBLAS|cuDNN|device-side assert", re.IGNORECASE)


@dataclass
class Canvas:
    """One unfinished picture. All tensors have one row."""

    size: Size
    steps: int
    guidance: float
    texts: Any
    pooled: Any
    negative_texts: Any  # None: drawn without guidance
    negative_pooled: Any
    timesteps: Sequence[float]
    sigmas: Sequence[float]
    latents: Any  # float32, whatever the model computes in
    clean: Any  # where the latents are heading, as far as the last step could tell
    warnings: tuple[PictureWarning, ...] = ()
    step: int = 0


class Sdxl:
    """`device`: cuda, mps or cpu. `dtype`: of the weights, but for the decoder's, which may need float32.

    `low_memory`: what is not in use waits in the machine's memory.
    """

    def __init__(self, pipeline: Any, folder: ModelFolder, device: str, dtype: Any, *, low_memory: bool) -> None:
        self.folder = folder
        self.device = torch.device(device)
        self.dtype = dtype
        self._pipeline = pipeline
        self._unet = pipeline.unet
        self._vae = pipeline.vae
        self._low_memory = low_memory
        self._frugal: set[Size] = set()
        self.scheduler = _euler(pipeline.scheduler)

    # -- What the engine asks -----------------------------------------------------------------------------------------

    def begin(self, input: Mapping[str, Any]) -> Canvas:
        size = _size(input, int(self._pipeline.vae_scale_factor))
        guidance = float(input.get("guidance", 7.5))
        negative = input.get("negative_prompt") or None  # "" means none, as everywhere in the API
        self._make_room_for("texts")
        with torch.inference_mode():
            texts, negative_texts, pooled, negative_pooled = self._pipeline.encode_prompt(
                input["prompt"],
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guidance > 1,
                negative_prompt=negative,
            )
            steps = int(input["num_steps"])
            self.scheduler.set_timesteps(steps)
            shape = (
                1,
                self._unet.config.in_channels,
                *(side // self._pipeline.vae_scale_factor for side in size[::-1]),
            )
            generator = torch.Generator("cpu").manual_seed(int(input["seed"]))
            # In the texts' type, as the pipeline draws it: in another one, some sizes get another noise.
            noise = torch.randn(shape, generator=generator, dtype=texts.dtype)
            latents = (noise * self.scheduler.init_noise_sigma).to(self.device, torch.float32)
        return Canvas(
            size=size,
            steps=len(self.scheduler.timesteps),
            guidance=guidance,
            texts=texts,
            pooled=pooled,
            negative_texts=negative_texts,
            negative_pooled=negative_pooled,
            timesteps=self.scheduler.timesteps.tolist(),
            sigmas=self.scheduler.sigmas.tolist(),
            latents=latents,
            clean=latents,
            warnings=self._warnings(input["prompt"], negative if guidance > 1 else None),
        )

    def step(self, canvases: Sequence[Canvas]) -> None:
        self._make_room_for("unet")
        with torch.inference_mode():
            latents = torch.cat([canvas.latents for canvas in canvases])
            sigma = self._column(canvas.sigmas[canvas.step] for canvas in canvases)
            sigma_next = self._column(canvas.sigmas[canvas.step + 1] for canvas in canvases)
            noise = self._guided_noise(canvases, latents / (sigma**2 + 1) ** 0.5)
            clean = self._clean(latents, noise, sigma)
            latents = latents + (latents - clean) / sigma * (sigma_next - sigma)
            self._wait_for_the_card()
        # Only now, so that a step that failed can be done again.
        for row, canvas in enumerate(canvases):
            canvas.latents, canvas.clean = latents[row : row + 1], clean[row : row + 1]
            canvas.step += 1

    def finish(self, canvas: Canvas) -> NDArray[np.uint8]:
        """Height x width x 3. Raises Failure for a picture that is none."""
        self._make_room_for("vae")
        with torch.inference_mode():
            if not torch.isfinite(canvas.latents).all():
                raise Failure(Kind.bad_output, Billed.no, "the model drew no numbers (NaN); nothing could be decoded")
            tiled = canvas.size[0] * canvas.size[1] > TILED_ABOVE or canvas.size in self._frugal or self._low_memory
            (self._vae.enable_tiling if tiled else self._vae.disable_tiling)()
            pixels = self._decode(canvas.latents)
            if pixels is None and self._vae.dtype != torch.float32:
                log.warning("the decoder drew no picture in %s: decoding it again in float32", self._vae.dtype)
                dtype = self._vae.dtype
                try:
                    pixels = self._decode(canvas.latents, self._vae.to(torch.float32))
                finally:
                    self._vae.to(dtype)
        if pixels is None:
            raise Failure(Kind.bad_output, Billed.no, "the model drew a black picture, or no numbers (NaN)")
        return pixels

    def glimpse(self, canvas: Canvas) -> NDArray[Any]:
        latents: NDArray[Any] = canvas.clean[0].float().cpu().numpy()
        return latents

    def trouble(self, error: Exception) -> Trouble:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return Trouble.out_of_memory
        if isinstance(error, RuntimeError) and _NO_MEMORY.search(text):
            return Trouble.out_of_memory
        if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and _CARD.search(text)):
            return Trouble.poisoned
        return Trouble.fault

    def free_memory(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def save_memory(self, size: Size) -> bool:
        if size in self._frugal:
            return False
        self._frugal.add(size)
        return True

    # -- What an operator asks ----------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """The card and its memory, in bytes; None where there is no card."""
        name, total, free, peak = "CPU", None, None, None
        if self.device.type == "cuda":
            name = torch.cuda.get_devicedtype_name(self.device)
            free, total = torch.cuda.mem_get_info(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "mps":
            name, peak = "Apple GPU", torch.mps.driver_allocated_memory()
        return {
            "device": str(self.device),
            "name": name,
            "memory_bytes": total,
            "free_bytes": free,
            "peak_bytes": peak,
            "dtype": dtype_name(self.dtype),
            "decoder_dtype": dtype_name(self._vae.dtype),
            "scheduler": type(self.scheduler).__name__,
            "revision": self.folder.revision,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }

    def warm_up(self, compile_sizes: Sequence[Size], room: BatchRoom) -> None:
        """One step and one decoding, and each shape that is to be compiled. Raises what the card raises."""
        canvas = self.begin(WARM_UP)
        self.step([canvas])
        with suppress(Failure):  # one step of noise need not be a picture
            self.finish(canvas)
        if compile_sizes:
            self._unet.compile_repeated_blocks(fullgraph=True)
        for width, height in compile_sizes:
            # The second number of rows makes torch compile for any number of them.
            for count in sorted({1, min(2, room.cap((width, height))), room.cap((width, height))}):
                self.step([self.begin({**WARM_UP, "width": width, "height": height}) for _ in range(count)])

    # -- The mathematics ----------------------------------------------------------------------------------------------

    def _guided_noise(self, canvases: Sequence[Canvas], latents: Any) -> Any:
        """The noise that the model sees in each canvas, guided by its texts, in float32."""
        guided = [row for row, canvas in enumerate(canvases) if canvas.negative_texts is not None]
        rows = [*guided, *range(len(canvases))]  # first what the negative texts say, then what the texts say
        texts = [canvases[row].negative_texts for row in guided] + [canvas.texts for canvas in canvases]
        pooled = [canvases[row].negative_pooled for row in guided] + [canvas.pooled for canvas in canvases]
        latents = latents.to(self.dtype)
        together = 1 if canvases[0].size in self._frugal else len(rows)
        parts = []
        for first in range(0, len(rows), together):
            some = rows[first : first + together]
            parts.append(
                self._call_unet(
                    latents[some],
                    [canvases[row] for row in some],
                    torch.cat(texts[first : first + together]),
                    torch.cat(pooled[first : first + together]),
                )
            )
        noise = torch.cat(parts).float()
        unguided, noise = noise[: len(guided)], noise[len(guided) :]
        if guided:
            scale = self._column(canvases[row].guidance for row in guided)
            noise[guided] = unguided + scale * (noise[guided] - unguided)
        return noise

    def _call_unet(self, latents: Any, canvases: Sequence[Canvas], texts: Any, pooled: Any) -> Any:
        width, height = canvases[0].size
        # Original size, crop, target size: the picture is whole and meant to be of this size.
        time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(canvases), dtype=texts.dtype)
        if latents.is_cuda:
            latents = latents.contiguous(memory_format=torch.channels_last)
        return self._unet(
            latents,
            torch.tensor([canvas.timesteps[canvas.step] for canvas in canvases], device=self.device),
            encoder_hidden_states=texts.to(self.dtype),
            added_cond_kwargs={"text_embeds": pooled.to(self.dtype), "time_ids": time_ids.to(self.device)},
            return_dict=False,
        )[0]

    def _clean(self, latents: Any, noise: Any, sigma: Any) -> Any:
        """The latents without the noise that the model saw, by what the model was trained to say."""
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            return noise * (-sigma / (sigma**2 + 1) ** 0.5) + latents / (sigma**2 + 1)
        if kind == "epsilon":
            return latents - sigma * noise
        return noise  # `sample`: the model says it outright

    def _decode(self, latents: Any, vae: Any = None) -> NDArray[np.uint8] | None:
        """The pixels; None if they are not numbers, or all black."""
        vae = self._vae if vae is None else vae
        latents = latents.to(vae.dtype)
        mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
        if mean is not None and deviation is not None:
            mean, deviation = (
                torch.tensor(of).view(1, -1, 1, 1).to(self.device, latents.dtype) for of in (mean, deviation)
            )
            latents = latents * deviation / vae.config.scaling_factor + mean
        else:
            latents = latents / vae.config.scaling_factor
        image = vae.decode(latents, return_dict=False)[0][0].float()
        if not torch.isfinite(image).all():
            return None
        pixels: NDArray[np.uint8] = (
            ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        )
        return pixels if pixels.any() else None

    def _column(self, numbers: Any) -> Any:
        """One number a row, in the shape that multiplies latents."""
        return torch.tensor(list(numbers), dtype=torch.float32, device=self.device)[:, None, None, None]

    def _warnings(self, prompt: str, negative: str | None) -> tuple[PictureWarning, ...]:
        found = []
        for name, text in (("prompt", prompt), ("negative prompt", negative)):
            if text is None:
                continue
            dropped, limit = 0, 0
            for tokenizer in (self._pipeline.tokenizer, self._pipeline.tokenizer_2):
                tokens, most = len(tokenizer(text).input_ids), tokenizer.model_max_length
                if tokens - most > dropped:
                    dropped, limit = tokens - most, most - 2  # two of them mark the beginning and the end
            if dropped:
                message = f"the {name} is too long: the model reads {limit} tokens, the last {dropped} were dropped"
                found.append(PictureWarning("prompt_truncated", message))
        return tuple(found)

    def _make_room_for(self, part: str) -> None:
        """Where memory is low: bring this part to the card, and send those away that it can't share it with."""
        if not self._low_memory:
            return
        texts, unet = [self._pipeline.text_encoder, self._pipeline.text_encoder_2], [self._unet]
        coming, going = {"texts": (texts, unet), "unet": (unet, texts), "vae": ([self._vae], texts)}[part]
        for module in going:
            module.to("cpu")
        for module in coming:
            module.to(self.device)

    def _wait_for_the_card(self) -> None:
        """So that what went wrong in a step is raised in that step, and not in whatever comes next."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def _euler(scheduler: Any) -> Any:
    if isinstance(scheduler, EulerDiscreteScheduler):
        return scheduler
    log.warning("the model asks for %s; drawing with EulerDiscreteScheduler", type(scheduler).__name__)
    return EulerDiscreteScheduler.from_config(scheduler.config)


def _size(input: Mapping[str, Any], multiple_of: int) -> Size:
    width, height = size_of(input)
    if width % multiple_of or height % multiple_of or min(width, height) < multiple_of:
        message = f"width and height must be multiples of {multiple_of}, not {width}x{height}"
        raise Failure(Kind.rejected, Billed.no, message)
    return width, height


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
