"""What keeps the backend from being ready is said at once, with what to do about it."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from tests.gpu.conftest import Backends
from tests.gpu.drawing import draw, picture, request
from tests.gpu.tiny_sdxl import save_tiny_sdxl
from worker.backends import sdxl, sdxl_loading
from worker.backends.base import CannotLoad
from worker.backends.diffusers import Diffusers
from worker.backends.model_folder import count_parameters, find_model, folder_revision


def refusal(model: object, revision: str | None = None, **changes: Any) -> str:
    backend = Diffusers(str(model), revision, **({"device": "cpu"} | changes))
    with pytest.raises(CannotLoad) as raised:
        backend.load()
    assert backend.health() is not None and "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def copy(tiny_sdxl: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be broken."""
    return Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for model in (tmp_path / "nowhere", "./nowhere", "nowhere"):
        assert f"there is no model folder {model}: give the path" in refusal(model)


def test_a_hub_id_that_is_not_on_this_machine_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal("stabilityai/stable-diffusion-xl-base-1.0", "f" * 40)
    assert f"at revision {'f' * 40} is not on this machine, and downloads are off: allow them, or" in message


def test_a_folder_of_another_pipeline(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    assert "is a StableDiffusionPipeline; this backend draws with a StableDiffusionXLPipeline" in refusal(copy)


def test_a_folder_of_anything_else(copy: Path) -> None:
    (copy / "model_index.json").write_text("[]")
    assert "model_index.json of" in refusal(copy) and "cannot be read" in refusal(copy)
    (copy / "model_index.json").unlink()
    assert "holds no model_index.json" in refusal(copy)


def test_a_folder_that_is_not_whole(copy: Path) -> None:
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded; is it whole?" in refusal(copy)
    weights.unlink()
    assert "cannot be loaded; is it whole?" in refusal(copy)


def test_weights_that_can_run_code_are_not_read(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "holds no .safetensors" in refusal(copy)


def test_a_folder_is_pinned_by_what_is_in_it(tiny_sdxl: Path, copy: Path, a_backend: Backends) -> None:
    revision = folder_revision(tiny_sdxl)
    assert revision == folder_revision(copy) and len(revision) == 16
    assert a_backend(revision=revision).describe()["revision"] == revision
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("leading", "trailing"))
    assert f"is revision {folder_revision(copy)}, not {revision}" in refusal(copy, revision)


def test_a_snapshot_in_the_cache_is_known_by_its_commit(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, a_backend: Backends
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "models--owner--tiny"
    shutil.copytree(tiny_sdxl, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(tmp_path), raising=False)
    backend = a_backend(Path("owner/tiny"))
    assert backend.describe()["revision"] == commit
    picture(draw(backend, request())[0])


def test_half_precision_takes_the_smaller_files(tmp_path: Path, a_backend: Backends) -> None:
    folder = tmp_path / "half"
    pipeline = StableDiffusionXLPipeline.from_pretrained(save_tiny_sdxl(tmp_path / "full"), dtype=torch.float16)
    pipeline.save_pretrained(folder, variant="fp16")
    picture(draw(a_backend(folder, dtype="bfloat16"), request())[0])
    picture(draw(a_backend(folder), request())[0])  # there are no others


def test_half_precision_keeps_a_decoder_that_overflows_in_single(a_backend: Backends) -> None:
    assert a_backend(dtype="float16").describe()["decoder_dtype"] == "float32"
    assert a_backend(dtype="bfloat16").describe()["decoder_dtype"] == "bfloat16"


def test_another_scheduler_is_replaced_and_it_is_said(
    tmp_path: Path, a_backend: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    backend = a_backend(save_tiny_sdxl(tmp_path / "ddim", scheduler=DDIMScheduler()))
    assert "the model asks for DDIMScheduler; drawing with EulerDiscreteScheduler" in caplog.text
    assert backend.describe()["scheduler"] == "EulerDiscreteScheduler"


def test_a_device_or_type_that_is_not_there(tiny_sdxl: Path) -> None:
    if not torch.cuda.is_available():
        assert "there is no CUDA card" in refusal(tiny_sdxl, device="cuda")
    assert "there is no device 'abacus': auto, cuda" in refusal(tiny_sdxl, device="abacus")
    assert "there is no dtype 'int3': auto, float32" in refusal(tiny_sdxl, dtype="int3")


def test_what_a_model_needs_is_known_from_the_headers_of_its_weights(tiny_sdxl: Path) -> None:
    folder = find_model(str(tiny_sdxl), None, download=False, half=False)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    parts = count_parameters(folder)
    assert parts == {name: sum(one.numel() for one in getattr(pipeline, name).parameters()) for name in parts}
    whole = sdxl_loading.bytes_needed(folder, torch.float32, low_memory=False) - sdxl_loading.SPARE
    assert whole == 4 * sum(parts.values())
    texts = parts["text_encoder"] + parts["text_encoder_2"]
    frugal = sdxl_loading.bytes_needed(folder, torch.float16, low_memory=True) - sdxl_loading.SPARE
    assert frugal == 2 * (parts["vae"] + max(texts, parts["unet"]))
    (tiny_sdxl.parent / "cut" / "unet").mkdir(parents=True)
    (tiny_sdxl.parent / "cut" / "unet" / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"{")
    with pytest.raises(CannotLoad, match=r"model\.safetensors cannot be read; is it whole\?"):
        count_parameters(folder._replace(path=tiny_sdxl.parent / "cut"))


def test_a_card_that_is_too_small_is_refused_before_weights_are_read() -> None:
    said = sdxl_loading.too_small(int(8.5 * 2**30), 8 * 2**30, low_memory=False)
    assert said.startswith("the card has 8.0 GiB and the model needs 8.5: set DARKROOM_GPU_LOW_MEMORY=1")
    assert "take a smaller model or a larger card" in sdxl_loading.too_small(2, 1, low_memory=True)


def test_the_survey_tells_what_load_would_find(tiny_sdxl: Path) -> None:
    found = dict(Diffusers(str(tiny_sdxl), device="cpu").survey())
    assert list(found) == ["gpu device", "gpu model", "gpu memory", "gpu sharing"]
    assert folder_revision(tiny_sdxl) in found["gpu model"] and "float32" in found["gpu memory"]
    with pytest.raises(CannotLoad, match="there is no model folder"):
        Diffusers("/nowhere", device="cpu").survey()


def test_without_torch_it_says_what_to_install(tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sdxl", "sdxl_loading"):
        monkeypatch.delitem(sys.modules, f"worker.backends.{module}")
        monkeypatch.delattr(f"worker.backends.{module}")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refusal(tiny_sdxl) == "torch is missing: install requirements-gpu.lock (docs/gpu.md)"


def test_a_first_step_that_fails_is_a_refusal(tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_little(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sdxl.Sdxl, "step", too_little)
    assert "the first step failed: OutOfMemoryError: CUDA out of memory" in refusal(tiny_sdxl)
