"""The real worker, with faults of ours for prompts that ask for one: `celery -A tests.faulty_worker worker …`."""

from typing import Any

import worker.backends.dataoorts
from worker.app import app
from worker.backends.base import Request
from worker.generation import Generation
from worker.sender import Sender

__all__ = ["app"]

_content = worker.backends.dataoorts._content
_give_back = Generation._give_back
_write = Sender._write


def fails_in_the_backend(request: Request) -> bytes:
    if "[fault:backend]" in request.input["prompt"]:
        raise ValueError(f"can't draw {request.input['prompt']!r}")
    return _content(request)


def fails_beyond_the_attempt(self: Generation, claim: Any, failure: Any, verdict: Any) -> None:
    if "[fault:beyond]" in claim.input["prompt"]:
        raise KeyError(claim.input["prompt"])
    _give_back(self, claim, failure, verdict)


def fails_in_the_sender(self: Sender, claim: Any) -> Any:
    if claim.url.endswith("/fault"):
        secret = _write(self, claim).secrets[0]  # type: ignore[union-attr]
        raise ValueError(f"can't sign with {secret}")
    return _write(self, claim)


worker.backends.dataoorts._content = fails_in_the_backend
Generation._give_back = fails_beyond_the_attempt  # type: ignore[method-assign]
Sender._write = fails_in_the_sender  # type: ignore[method-assign]
