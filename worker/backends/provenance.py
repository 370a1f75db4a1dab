"""The pictures that we encode ourselves say what they are made with, in texts of the PNG; a vendor's stay as they came.

`parameters` is Automatic1111's text, which most tools of the field read (its form: stable-diffusion-webui,
modules/infotext_utils.py). That cannot hold every prompt, so beside it stands `darkroom`: JSON, exact. No time stands
in either: the same job drawn again is the same file.
"""

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shared.provenance import KEYWORD
from shared.version import VERSION
from worker.backends.base import Request

COMPRESSION = 4  # of zlib: 3 takes half the time and a sixth more bytes, 6 and 9 save nothing (measured at 1024x1024)

#: Fields of `parameters`, and what they are in our inputs.
_FIELDS: Mapping[str, str] = {"Steps": "num_steps", "CFG scale": "guidance", "Seed": "seed"}


def png(
    pixels: NDArray[np.uint8], request: Request, backend: str, revision: str | None, *, sampler: str | None = None
) -> bytes:
    """A PNG of height x width x 3 pixels. `revision`: of the model; `sampler`: as the field calls it."""
    height, width = pixels.shape[:2]
    texts = PngInfo()
    # Pillow writes what is not Latin-1 as iTXt.
    texts.add_text("parameters", parameters(request.model, request.input, (width, height), sampler))
    texts.add_text(
        KEYWORD,
        json.dumps(
            {
                "job_id": request.job_id,
                "model": request.model,
                "revision": revision,
                "backend": backend,
                "input": request.input,
                "version": VERSION,
            },
            sort_keys=True,
        ),
    )
    with BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG", compress_level=COMPRESSION, pnginfo=texts)
        return file.getvalue()


def parameters(model: str, input: Mapping[str, Any], size: tuple[int, int], sampler: str | None) -> str:
    """Automatic1111's text: the prompt, the negative one, and a line of fields. What is not known is left out."""
    fields = {name: input.get(ours) for name, ours in _FIELDS.items()}
    fields |= {"Size": "{}x{}".format(*size), "Model": model, "Denoising strength": input.get("strength")}
    fields = {"Steps": fields.pop("Steps"), "Sampler": sampler} | fields  # the order that people know
    line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items() if value is not None)
    negative = f"Negative prompt: {input['negative_prompt']}\n" if input.get("negative_prompt") else ""
    return f"{input['prompt']}\n{negative}{line}"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value
