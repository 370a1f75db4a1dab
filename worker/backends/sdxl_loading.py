"""Loading SDXL, and saying what of it would fit. Imported by `Diffusers` when it is asked to: torch is heavy."""

import logging
import math
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.constants
import torch
import transformers
from diffusers import StableDiffusionXLPipeline

from worker.backends.base import CannotLoad
from worker.backends.batch_room import MOST_AT_ONCE
from worker.backends.model_folder import ModelFolder, count_parameters, find_model
from worker.backends.sdxl import Sdxl, dtype_name

log = logging.getLogger(__name__)

SPARE = 2 * 2**30  # bytes of a card that are not for weights: CUDA itself, and one picture of 1024x1024


def load(model: str, revision: str | None, *, download: bool, device: str, dtype: str, low_memory: bool) -> Sdxl:
    """The model on its device. Raises CannotLoad."""
    if not download:
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # libraries ask the hub about folders, too
    # Their warnings quote prompts, and their progress bars fill the log.
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = _device(device)
    torch_dtype = _dtype(dtype, device)
    folder = find_model(model, revision, download=download, half=torch_dtype != torch.float32)
    needed = bytes_needed(folder, torch_dtype, low_memory=low_memory)
    if device == "cuda" and needed > card_bytes():
        raise CannotLoad(too_small(needed, card_bytes(), low_memory=low_memory))
    pipeline = _pipeline(folder, torch_dtype)
    if torch_dtype == torch.float16 and pipeline.vae.config.force_upcast:
        pipeline.vae.to(torch.float32)  # overflows in half precision
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where something is left in float32
        torch.backends.cudnn.allow_tf32 = True
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if not low_memory:
        pipeline.to(device)
    pipeline.vae.enable_slicing()
    log.info("loaded %s, revision %s, in %s on %s", model, folder.revision, dtype_name(torch_dtype), device)
    return Sdxl(pipeline, folder, device, torch_dtype, low_memory=low_memory)


def _pipeline(folder: ModelFolder, dtype: Any) -> Any:
    try:
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            folder.path,
            dtype=dtype,
            variant=folder.variant,
            use_safetensors=True,
            local_files_only=True,
            add_watermarker=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # files missing, cut short, or of another model
        problem = " ".join(str(error).split())[:200]
        raise CannotLoad(f"{folder.path} cannot be loaded; is it whole? {type(error).__name__}: {problem}") from None
    if pipeline.text_encoder is None or pipeline.unet.config.time_cond_proj_dim is not None:
        raise CannotLoad(f"{folder.path} is no plain SDXL: it lacks a text encoder, or takes its guidance as an input")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _device(wanted: str) -> str:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    if wanted == "cuda" and not cuda:
        built = "its driver is missing or too old" if torch.version.cuda else f"torch {torch.__version__} knows no CUDA"
        raise CannotLoad(
            f"there is no CUDA card: {built}; nvidia-smi tells more, and device `auto` takes what there is"
        )
    if wanted == "mps" and not mps:
        raise CannotLoad("there is no Apple GPU here: device `auto` takes what there is")
    if wanted not in {"cuda", "mps", "cpu"}:
        raise CannotLoad(f"there is no device {wanted!r}: auto, cuda, mps or cpu")
    return wanted


def _dtype(wanted: str, device: str) -> Any:
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if wanted in names:
        return names[wanted]
    if wanted != "auto":
        raise CannotLoad(f"there is no dtype {wanted!r}: auto, {', '.join(names)}")
    if device == "cuda":
        # Ampere is the first that computes in bfloat16; older cards only imitate it.
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    return torch.float16 if device == "mps" else torch.float32


def bytes_needed(folder: ModelFolder, dtype: Any, *, low_memory: bool) -> int:
    """What a card must have for this model: its weights, and SPARE."""
    sizes = {part: count * int(dtype.itemsize) for part, count in count_parameters(folder).items()}
    texts, unet = sizes["text_encoder"] + sizes["text_encoder_2"], sizes["unet"]
    return SPARE + sizes["vae"] + (max(texts, unet) if low_memory else texts + unet)


def too_small(needed: int, total: int, *, low_memory: bool) -> str:
    """The words for a card that can't hold a model; both in bytes."""
    advice = "take a smaller model or a larger card"
    if not low_memory:
        advice = "set DARKROOM_GPU_LOW_MEMORY=1, or take a larger card"
    return f"the card has {total / 2**30:.1f} GiB and the model needs {needed / 2**30:.1f}: {advice}"


def card_bytes() -> int:
    return int(torch.cuda.mem_get_info()[1])


def survey(
    model: str, revision: str | None, *, download: bool, device: str, dtype: str, low_memory: bool
) -> list[tuple[str, str]]:
    """What is here, what fits and what will be done, as (name, sentence); no weights are read. Raises CannotLoad."""
    device = _device(device)
    torch_dtype = _dtype(dtype, device)
    name = f"the CPU draws, with {torch.get_num_threads()} threads: minutes a picture with the real model"
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        name = f"{torch.cuda.get_device_name()}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} of them free"
    elif device == "mps":
        name = "the Apple GPU draws"
    found = [("gpu device", f"{name}; torch {torch.__version__}, diffusers {diffusers.__version__}")]
    if download and not Path(model).is_dir():
        return [*found, ("gpu model", f"{model} is fetched from the hub if it is not here yet")]
    folder = find_model(model, revision, download=False, half=torch_dtype != torch.float32)
    needed = bytes_needed(folder, torch_dtype, low_memory=low_memory)
    if device == "cuda" and needed > card_bytes():
        raise CannotLoad(too_small(needed, card_bytes(), low_memory=low_memory))
    weights = sum(count_parameters(folder).values())
    shared = ", ".join(f"{jobs} up to {math.isqrt(pixels)} pixels square" for pixels, jobs in MOST_AT_ONCE.items())
    return [
        *found,
        ("gpu model", f"{folder.path}, revision {folder.revision}, {weights / 1e6:,.1f} million parameters"),
        ("gpu memory", f"{needed / 2**30:.1f} GiB in {dtype_name(torch_dtype)}, of which 2 are spare"),
        ("gpu sharing", f"jobs in one call: {shared}, larger ones alone; fewer once memory has run out"),
    ]
