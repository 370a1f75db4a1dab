"""What the tests of the backend `automatic1111` share: requests, and pictures to start from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shared.catalogue import DEFAULT_MODEL
from shared.inspector import Inspector
from worker.backends import automatic1111_server, automatic1111_watch
from worker.backends.automatic1111 import Automatic1111
from worker.backends.base import Billed, Failure, Kind, Picture, Request

AUTH = "darkroom:canary-4+f9Q=&x7Z1mP0aB"
INPUT: dict[str, Any] = {
    "prompt": "a lighthouse at dusk",
    "negative_prompt": None,
    "width": 256,
    "height": 256,
    "num_steps": 20,
    "guidance": 7.5,
    "seed": 7,
}

Connect = Callable[..., Automatic1111]


@pytest.fixture(scope="module")
def inspector() -> Iterator[Inspector]:
    inspector = Inspector()
    inspector.load()
    yield inspector
    inspector.close()


@pytest.fixture
def connect(inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Backends that share one inspector, and look at their server often."""
    monkeypatch.setattr(inspector, "close", lambda: None)
    monkeypatch.setattr(automatic1111_watch, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(automatic1111_watch, "WANTED_SECONDS", 0.01)
    # A server that stands still for a few seconds answers all the same: else nobody would know whose picture it draws.
    monkeypatch.setattr(automatic1111_server, "QUESTION_SECONDS", 60.0)
    made: list[Automatic1111] = []

    def make(url: str, *credentials: str, **given: Any) -> Automatic1111:
        options: dict[str, Any] = {"inspector": inspector, "deadline_seconds": 30.0, **given}
        made.append(Automatic1111(url, *credentials, **options))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def request(image: bytes | None = None, mask: bytes | None = None, **changes: Any) -> Request:
    return Request("job_1", DEFAULT_MODEL, INPUT | changes, image=image, mask=mask)


@dataclass
class Told:
    """What a call told of its progress, and whether it is wanted."""

    news: list[tuple[int, int, bytes | None]] = field(default_factory=list)
    canceled: Callable[[], bool] = lambda: False

    def progress(self, index: int, step: int, steps: int, preview: bytes | None) -> None:
        assert index == 0
        self.news.append((step, steps, preview))


def ask(backend: Automatic1111, asked: Request | None = None, told: Told | None = None) -> Picture | Failure:
    told = told or Told()
    (outcome,) = backend.generate([asked or request()], told.progress, lambda _: told.canceled())
    return outcome


def picture(outcome: Picture | Failure) -> Picture:
    assert isinstance(outcome, Picture), outcome
    return outcome


def failure(outcome: Picture | Failure) -> Kind:
    assert isinstance(outcome, Failure), outcome
    assert outcome.billed == Billed.no, "nobody sends a bill for a card of one's own"
    return outcome.kind


def pixels(data: bytes) -> NDArray[np.uint8]:
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def png(content: NDArray[np.uint8]) -> bytes:
    with BytesIO() as file:
        Image.fromarray(content).save(file, "PNG")
        return file.getvalue()


def some_pixels(height: int = 256, width: int = 256) -> NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)
