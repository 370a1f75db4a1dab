"""What makes images, seen from the worker: one small contract, one word for failure.

A backend gets requests and gives back one outcome for each, in order: a `Picture` or a `Failure`. It never raises
for a bad job, keeps nothing about jobs, and decides nothing about retries: `worker/retry.py` does, from the kind.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, Protocol, Self

# What a failed call costs is stored as it is said here: one list for both.
from shared.tables import Billed as Billed  # noqa: PLC0414 - part of this contract

MESSAGE_LIMIT = 300  # characters


class Kind(StrEnum):
    """What went wrong, by what can be done about it (`worker/retry.py` holds what is done)."""

    transient = "transient"  # the backend failed; the same request may well succeed later
    rate_limited = "rate_limited"  # not now; the request was not taken
    not_accepted = "not_accepted"  # the request never reached the backend
    bad_output = "bad_output"  # an answer that is not one whole picture
    rejected = "rejected"  # the request is wrong and will stay wrong
    unsafe = "unsafe"  # the backend's content rules forbid it
    quota_exhausted = "quota_exhausted"  # the operator's account is spent
    auth_failed = "auth_failed"  # the operator's key or address is wrong
    out_of_memory = "out_of_memory"  # the backend had too little memory for this request
    canceled = "canceled"  # nobody wants it any more, and the backend could stop
    internal = "internal"  # our own code broke


#: Reads the bytes of a picture: from the disk once they are safe there. Hundreds of pictures wait to be judged and
#: stored, and only those whose turn it is take memory.
Read = Callable[[], bytes]


def _in_memory(data: bytes) -> Read:
    return lambda: data


@dataclass(frozen=True)
class Request:
    """One picture to make. `input` has our parameter names, is complete, and names the seed where the model has one.

    `image`: what to start from, as the client sent it, judged and not turned upright; then `input` has `strength`, and
    `image` and `mask` there only describe them. `mask`: white where the image may change. `source.py` reads both.

    A backend that is paid for its pictures hands the bytes of one to `received`, once, the moment it has them: as they
    came, before anything is done with them that can fail. That never raises, and returns when they are safe, with what
    reads them from there.
    """

    job_id: str
    model: str
    input: Mapping[str, Any]
    received: Callable[[bytes], Read] = field(default=_in_memory, repr=False, compare=False)
    image: bytes | None = field(default=None, repr=False)
    mask: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class PictureWarning:
    """Something about a picture that its owner should know. `code` is for programs (`size_differs`)."""

    code: str
    message: str


@dataclass(frozen=True)
class Picture:
    """One whole picture, judged: what `read` gives is as it was received, the rest as the decoder saw it, not as it was
    announced. Sizes in pixels; `sha256` of the bytes, in hex."""

    read: Read = field(repr=False, compare=False)
    content_type: str
    width: int
    height: int
    sha256: str
    warnings: tuple[PictureWarning, ...] = ()

    @classmethod
    def of(
        cls, data: bytes, content_type: str, width: int, height: int, warnings: tuple[PictureWarning, ...] = ()
    ) -> Self:
        """One that is in memory."""
        return cls(_in_memory(data), content_type, width, height, hashlib.sha256(data).hexdigest(), warnings)


class Failure(Exception):
    """Why a request has no picture.

    `message` may be shown to the client: one line of at most 300 characters, never a secret. `retry_after` is what
    the backend asked for, in seconds, unbounded; None if it asked for nothing. `asked`: False if the request was
    refused before anybody was called: that says nothing of the backend.
    """

    def __init__(
        self, kind: Kind, billed: Billed, message: str, retry_after: float | None = None, *, asked: bool = True
    ) -> None:
        message = one_line(message)
        super().__init__(message)
        self.kind = kind
        self.billed = billed
        self.message = message
        self.retry_after = retry_after
        self.asked = asked

    def bare(self) -> Self:
        """The same without its traceback and causes: they may hold what was sent and what came."""
        return type(self)(self.kind, self.billed, self.message, self.retry_after, asked=self.asked)

    def __repr__(self) -> str:
        return f"Failure({self.kind}, billed={self.billed}, {self.message!r}, retry_after={self.retry_after})"

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), asked=self.asked), (self.kind, self.billed, self.message, self.retry_after)


class CannotLoad(Exception):
    """A backend can't be made ready. The message says why, and what to do about it."""


class Unjudged(Failure):
    """A picture came, `received` has it, and nobody could look at it: no fault of its own. `judge` may, later."""


def one_line(text: str) -> str:
    """The text as one printable line of at most MESSAGE_LIMIT characters."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= MESSAGE_LIMIT else line[: MESSAGE_LIMIT - 1] + "…"


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do at most; a model's own limits (the catalogue) may be narrower."""

    smallest_side: int  # pixels
    largest_side: int  # pixels
    side_multiple_of: int
    most_steps: int
    seed: bool
    progress: bool  # whether `progress` is ever called
    cancel: bool  # whether `canceled` is ever asked
    image_to_image: bool
    most_at_once: int  # requests in one generate() call
    hosted: bool = True  # whether somebody else runs it, whose outages no job is to answer for


#: Called with (index of the request, steps done, steps in all, a small preview as JPEG or None).
Progress = Callable[[int, int, int, bytes | None], None]
#: Asked with the index of a request.
Canceled = Callable[[int], bool]


class Backend(Protocol):
    """The contract. A hosted backend's `generate` is called by hundreds of threads at once."""

    @property
    def name(self) -> str:
        """As in the setting BACKENDS and in the API."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def attempt_seconds(self) -> float:
        """The hard limit of one generate() call, judging the pictures included. A lease is not renewed past it."""

    def load(self) -> None:
        """Get ready: once, in the process that generates. Raises CannotLoad for what an operator must mend."""

    def health(self) -> str | None:
        """None if fit to work, else what is wrong, in one line. Costs nothing and does not wait."""

    def compatible(self, in_hand: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], bool] | None:
        """Which further jobs may be claimed beside those in hand, by their inputs. None: any.

        What it returns is asked in the queue's order, and counts each input that it says yes to as taken.
        """

    def generate(self, requests: Sequence[Request], progress: Progress, canceled: Canceled) -> list[Picture | Failure]:
        """One outcome a request, in order. Raises ValueError for more than `most_at_once`, nothing for a bad job."""

    def judge(self, request: Request, data: bytes) -> Picture:
        """What `generate` says of a picture, for bytes that it gave to `received` then or in another process.

        Raises Failure if they are not one whole picture; Unjudged if that can't be told now.
        """

    def close(self) -> None:
        """Let go of everything. Calls that are running may fail."""
