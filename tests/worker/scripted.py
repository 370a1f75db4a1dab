"""A backend whose answers and judgements the test decides."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from worker.backends.base import (
    Canceled,
    Capabilities,
    Failure,
    Kind,
    Picture,
    Progress,
    Read,
    Request,
    Unjudged,
)

DATA = b"a picture's bytes"

Answer = Picture | Failure | Callable[[], Picture | Failure]


def picture_of(data: bytes) -> Picture:
    return Picture.of(data, "image/png", 512, 512)


PICTURE = picture_of(DATA)


class ScriptedBackend:
    """Answers what the test says, in turn; the last answer stays. So it does with `judgements`, if there are any.

    What came from the vendor as bytes is handed to `received`; an answer that is called does that itself.
    """

    name = "dataoorts"
    attempt_seconds = 60.0
    capabilities = Capabilities(256, 2048, 8, 20, True, False, False, False, 1)

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.judgements: list[Answer] = []
        self.seen: list[Request] = []
        self.judged: list[bytes] = []

    def load(self) -> None: ...

    def health(self) -> str | None:
        return None

    def compatible(self, in_hand: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], bool] | None:
        return None

    def generate(self, requests: Sequence[Request], progress: Progress, canceled: Canceled) -> list[Picture | Failure]:
        self.seen += requests
        answer = _next(self.answers)
        if callable(answer):
            return [answer()]
        if isinstance(answer, Picture):
            return [replace(answer, read=self.receive(answer.read()))]
        if isinstance(answer, Unjudged) or answer.kind == Kind.bad_output:
            self.receive(DATA)
        return [answer]

    def receive(self, data: bytes = DATA) -> Read:
        """As a backend does the moment it has a picture's bytes."""
        return self.seen[-1].received(data)

    def judge(self, request: Request, data: bytes) -> Picture:
        self.judged.append(data)
        judgement = _next(self.judgements) if self.judgements else picture_of(data)
        judgement = judgement() if callable(judgement) else judgement
        if isinstance(judgement, Failure):
            raise judgement
        return judgement

    def close(self) -> None: ...


def _next(answers: list[Answer]) -> Answer:
    return answers.pop(0) if len(answers) > 1 else answers[0]
