"""Where the model's files are, and which revision of it they are. Offline, unless downloads are allowed.

The revision is what makes a picture reproducible: of a hub id, the commit of its snapshot; of a folder, a hash of its
configuration files and of the names and sizes of its weights (reading gigabytes to hash them would take a minute).
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from worker.backends.base import CannotLoad

PIPELINE = "StableDiffusionXLPipeline"
#: Of a pipeline, what has weights.
PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")
LONGEST_HEADER = 100_000_000  # bytes; the limit of the format's own library
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ModelFolder(NamedTuple):
    """`variant`: of the weights' file names (`fp16`), or None for the plain ones."""

    path: Path
    revision: str
    variant: str | None


def find_model(model: str, revision: str | None, *, download: bool, half: bool) -> ModelFolder:
    """The folder of a path or hub id, checked to hold an SDXL text-to-image pipeline. Raises CannotLoad.

    `half`: 16-bit weights will do, so that the smaller files are taken where there are any. `revision`: of a hub id
    the one to take, of a folder the one that it must have.
    """
    given = Path(model).expanduser()
    if given.is_dir():
        path, found = given.resolve(), folder_revision(given)
        if revision is not None and revision != found:
            raise CannotLoad(f"{given} is revision {found}, not {revision}: pin this one, or put the other one there")
    elif given.is_absolute() or model.startswith((".", "~")) or not _HUB_ID.fullmatch(model):
        raise CannotLoad(f"there is no model folder {model}: give the path of one, or a hub id such as owner/name")
    else:
        path = _snapshot(model, revision, download=download, half=half)
        found = path.name  # the cache names snapshots by their commit
    check_pipeline(path, model)
    return ModelFolder(path, found, _variant(path, half=half))


def folder_revision(folder: Path) -> str:
    """16 hex digits: of the configuration's bytes, and the weights' names and sizes."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".json", ".txt", ".safetensors"} and path.is_file():
            content = b"" if path.suffix == ".safetensors" else path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode() + content)
    return digest.hexdigest()[:16]


def check_pipeline(path: Path, model: str) -> None:
    """Raises CannotLoad for what is no SDXL pipeline, before gigabytes of it are read."""
    try:
        index: Any = json.loads((path / "model_index.json").read_text())
        name = index["_class_name"]
    except FileNotFoundError:
        raise CannotLoad(f"{model} holds no model_index.json: give the folder that save_pretrained made") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CannotLoad(f"the model_index.json of {model} cannot be read ({type(error).__name__})") from None
    if name != PIPELINE:
        raise CannotLoad(f"{model} is a {name}; this backend draws with a {PIPELINE} (text to image)")


def count_parameters(folder: ModelFolder) -> dict[str, int]:
    """How many numbers each part of the pipeline holds, by the headers of its weights. Raises CannotLoad.

    The form of a header: github.com/huggingface/safetensors, README.md (8 bytes of length, little endian, then JSON).
    """
    return {part: sum(_parameters_of(file) for file in _weights(folder.path / part, folder.variant)) for part in PARTS}


def _weights(folder: Path, variant: str | None) -> list[Path]:
    files = list(folder.glob("*.safetensors"))
    chosen = [file for file in files if variant is not None and f".{variant}." in file.name]
    return chosen or [file for file in files if ".fp16." not in file.name]


def _parameters_of(file: Path) -> int:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: Any = json.loads(opened.read(min(length, LONGEST_HEADER)))
        shapes = [tensor["shape"] for name, tensor in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CannotLoad(f"{file} cannot be read; is it whole? ({type(error).__name__})") from None
    return sum(math.prod(shape) for shape in shapes)


def _snapshot(model: str, revision: str | None, *, download: bool, half: bool) -> Path:
    """The cached snapshot of a hub id."""
    from diffusers import StableDiffusionXLPipeline

    problem = "it is not in the cache"
    for variant in ("fp16", None) if half else (None,):
        try:
            return Path(
                StableDiffusionXLPipeline.download(
                    model, revision=revision, local_files_only=not download, variant=variant, use_safetensors=True
                )
            )
        except (OSError, ValueError) as error:  # what the hub's client raises for all that is missing
            problem = " ".join(str(error).split())[:200]
    at = f"{model} at revision {revision}" if revision else model
    if download:
        raise CannotLoad(f"{at} could not be downloaded: {problem}")
    raise CannotLoad(f"{at} is not on this machine, and downloads are off: allow them, or give the path of its folder")


def _variant(path: Path, *, half: bool) -> str | None:
    weights = [file.name for file in (path / "unet").glob("*.safetensors")]
    if not weights:
        raise CannotLoad(f"{path / 'unet'} holds no .safetensors: other formats can run code, and are not read")
    small, plain = any(".fp16." in name for name in weights), any(".fp16." not in name for name in weights)
    return "fp16" if small and (half or not plain) else None
