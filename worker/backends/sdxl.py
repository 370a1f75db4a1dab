"""SDXL on a card: what the engine asks of a model. `sdxl_loading.py` makes one.

It follows diffusers' pipelines for SDXL (the plain one, Img2Img and Inpaint) so closely that a picture drawn among
others is the one that the pipeline would draw alone, to 2 of 255 (tests/gpu/test_same_pictures.py). What a pipeline
keeps for a whole call is kept here for each canvas: texts, noise, sigmas, guidance, what lies outside of a mask.
Euler's method has no other memory.

A job that starts from an image makes the last steps of the schedule, as many as its `strength` says, on the image's
latents, noised to where those begin. They are steps like all others.

The noise is drawn on the CPU, so that a seed means the same on every card: first what encoding the image takes of it,
if there is one, then what the picture is drawn from. Sigmas stay there, so that no step waits for the card to read one
number back.
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
from worker.backends.sdxl_vae import Vae
from worker.backends.source import Source
from worker.backends.step_engine import Trouble

log = logging.getLogger(__name__)

TILED_ABOVE = 1536 * 1536  # pixels; the decoder takes more memory than all the rest above it
WARM_UP: Mapping[str, Any] = {"prompt": "warm up", "width": 256, "height": 256, "num_steps": 1, "seed": 0}

#: What cuDNN, cuBLAS and Metal say when memory ran out, in errors that have no type of their own.
_NO_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|can't allocate memory", re.IGNORECASE)
_CARD = re.compile(r"CUDA|cuBLAS|cuDNN|device-side assert", re.IGNORECASE)


@dataclass(frozen=True)
class Outside:
    """What must stay. `may_change`: a bool for each cell of the latents. `noise`: what the picture is drawn from."""

    may_change: Any
    latents: Any
    noise: Any

    def keep(self, sigma: float, latents: Any, clean: Any) -> tuple[Any, Any]:
        """After a step to `sigma`: what was drawn, and outside of the mask the image, as noisy as that."""
        return (
            torch.where(self.may_change, latents, self.latents + sigma * self.noise),
            torch.where(self.may_change, clean, self.latents),
        )


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
    may_be_black: bool
    outside: Outside | None
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
        self._vae = Vae(pipeline.vae, self.device)
        self._low_memory = low_memory
        self._frugal: set[Size] = set()
        self.scheduler = _euler(pipeline.scheduler)

    # -- What the engine asks -----------------------------------------------------------------------------------------

    def begin(self, input: Mapping[str, Any], source: Source | None) -> Canvas:
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
            # In the texts' type, as the pipelines draw noise: in another one, some sizes get another noise.
            generator, dtype = torch.Generator("cpu").manual_seed(int(input["seed"])), texts.dtype
            original = None if source is None else self._encode(source.image, size, generator, dtype)
            noise = torch.randn(self._shape(size), generator=generator, dtype=dtype)
            self.scheduler.set_timesteps(int(input["num_steps"]))
            strength = 1.0 if source is None else float(input["strength"])
            first = _first_step(len(self.scheduler.timesteps), strength)
            sigmas = self.scheduler.sigmas.tolist()[first:]
            mask = None if source is None else source.mask
            if original is None or (mask is not None and strength == 1):
                latents = (noise * self.scheduler.init_noise_sigma).to(self.device, torch.float32)
            else:
                latents = original + noise.to(self.device, torch.float32) * sigmas[0]
            outside = None
            if mask is not None:
                outside = Outside(self._may_change(mask), original, noise.to(self.device, torch.float32))
        return Canvas(
            size=size,
            steps=len(sigmas) - 1,
            guidance=guidance,
            texts=texts,
            pooled=pooled,
            negative_texts=negative_texts,
            negative_pooled=negative_pooled,
            timesteps=self.scheduler.timesteps.tolist()[first:],
            sigmas=sigmas,
            latents=latents,
            clean=latents if original is None else original,
            may_be_black=source is not None,  # as that may be
            outside=outside,
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
            drawn = [
                _keep_outside(canvas, latents[row : row + 1], clean[row : row + 1])
                for row, canvas in enumerate(canvases)
            ]
            self._wait_for_the_card()
        # Only now, so that a step that failed can be done again.
        for canvas, (latents, clean) in zip(canvases, drawn, strict=True):
            canvas.latents, canvas.clean = latents, clean
            canvas.step += 1

    def finish(self, canvas: Canvas) -> NDArray[np.uint8]:
        """Height x width x 3. Raises Failure for a picture that is none."""
        self._make_room_for("vae")
        with torch.inference_mode():
            if not torch.isfinite(canvas.latents).all():
                raise Failure(Kind.bad_output, Billed.no, "the model drew no numbers (NaN); nothing could be decoded")
            pixels = self._vae.decode(
                canvas.latents, tiled=self._in_tiles(canvas.size), may_be_black=canvas.may_be_black
            )
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
        canvas = self.begin(WARM_UP, None)
        self.step([canvas])
        with suppress(Failure):  # one step of noise need not be a picture
            self.finish(canvas)
        if compile_sizes:
            self._unet.compile_repeated_blocks(fullgraph=True)
        for width, height in compile_sizes:
            # The second number of rows makes torch compile for any number of them.
            for count in sorted({1, min(2, room.cap((width, height))), room.cap((width, height))}):
                self.step([self.begin({**WARM_UP, "width": width, "height": height}, None) for _ in range(count)])

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

    def _encode(self, image: NDArray[np.uint8], size: Size, generator: Any, dtype: Any) -> Any:
        self._make_room_for("vae")
        latents = self._vae.encode(image, generator, dtype, tiled=self._in_tiles(size))
        if latents is None:
            raise Failure(Kind.bad_output, Billed.no, "the model made no numbers (NaN) of the image to start from")
        return latents

    def _may_change(self, mask: NDArray[np.bool_]) -> Any:
        """A cell of the latents may, where one of its pixels may: nothing that was marked is lost to a coarser grid."""
        cell = int(self._pipeline.vae_scale_factor)
        height, width = (side // cell for side in mask.shape)
        cells = mask.reshape(height, cell, width, cell).any(axis=(1, 3))
        return torch.tensor(cells)[None, None].to(self.device)

    def _shape(self, size: Size) -> tuple[int, ...]:
        width, height = (side // int(self._pipeline.vae_scale_factor) for side in size)
        return 1, int(self._unet.config.in_channels), height, width

    def _in_tiles(self, size: Size) -> bool:
        return size[0] * size[1] > TILED_ABOVE or size in self._frugal or self._low_memory

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
        coming, going = {"texts": (texts, unet), "unet": (unet, texts), "vae": ([self._pipeline.vae], texts)}[part]
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
        raise Failure(Kind.rejected, Billed.no, message, asked=False)
    return width, height


def _first_step(steps: int, strength: float) -> int:
    """How many steps are left out: those made are the share that `strength` says, rounded down, and at least one."""
    return steps - max(1, min(int(steps * strength), steps))


def _keep_outside(canvas: Canvas, latents: Any, clean: Any) -> tuple[Any, Any]:
    if canvas.outside is None:
        return latents, clean
    is_last = canvas.step + 1 == canvas.steps  # the noise is gone, even where the schedule leaves a little
    return canvas.outside.keep(0.0 if is_last else canvas.sigmas[canvas.step + 1], latents, clean)


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
