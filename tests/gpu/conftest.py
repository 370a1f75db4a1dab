"""A tiny model and backends that draw with it. `./dev test gpu` runs these; without torch, nothing looks here."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    import torch

    from tests.gpu.tiny_sdxl import save_tiny_sdxl
except ImportError as error:
    raise pytest.UsageError(f"tests/gpu needs {error.name or error}: run ./dev test gpu") from None

from worker.backends.diffusers import Diffusers

Backends = Callable[..., Diffusers]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            # diffusers' schedulers hand tensors to numpy in a way that numpy 2 frowns upon.
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"))


@pytest.fixture(scope="session", autouse=True)
def one_core() -> None:
    """The same number of threads in every run: sums of floats depend on it, in the last place."""
    torch.set_num_threads(1)
    gc.freeze()  # a backend that closes collects garbage, and torch's half a million objects are none


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl")


@pytest.fixture
def a_backend(tiny_sdxl: Path) -> Iterator[Backends]:
    """Makes loaded backends, on the CPU, and closes them."""
    made: list[Diffusers] = []

    def make(model: Path = tiny_sdxl, **changes: Any) -> Diffusers:
        backend = Diffusers(str(model), **({"device": "cpu"} | changes))
        backend.load()
        made.append(backend)
        return backend

    yield make
    for backend in made:
        backend.close()


@pytest.fixture
def backend(a_backend: Backends) -> Diffusers:
    return a_backend()
