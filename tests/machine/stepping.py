"""Threads that stop before each step with an effect, and go on only as they are told: one of them at a time.

So the code that runs is the real one, and who does what next, and what goes wrong with it, is the test's choice.
"""

import threading
from collections.abc import Callable
from enum import Enum

from shared.database import AWAY
from worker.backends.base import Billed, Failure, Kind


class Fate(Enum):
    """What becomes of a step."""

    goes_well = 0
    fails = 1  # the database is away, the disk is full, nobody can judge
    is_rolled_back = 2  # the commit fails; of a file, half is written, and the process dies
    answer_is_lost = 3  # it is committed, and whoever did it is told that the database is away
    dies_before = 4
    dies_after = 5

    def __repr__(self) -> str:
        return str(self)


class Answer(Enum):
    """What the vendor does with a call: whether he takes money for it, as he knows, and what the worker is told."""

    picture = True, None, "whole"
    spoilt_picture = True, None, "spoilt"
    timed_out_and_paid = True, Failure(Kind.transient, Billed.unknown, "timed out")
    timed_out = False, Failure(Kind.transient, Billed.unknown, "timed out")
    broken = False, Failure(Kind.transient, Billed.no, "HTTP 503")
    rate_limited = False, Failure(Kind.rate_limited, Billed.no, "HTTP 429", retry_after=30)
    refused = False, Failure(Kind.not_accepted, Billed.no, "connection refused")
    no_money = False, Failure(Kind.quota_exhausted, Billed.no, "no money")
    nonsense = True, Failure(Kind.bad_output, Billed.yes, "HTML")
    rejected = False, Failure(Kind.rejected, Billed.no, "too short")
    unsafe = True, Failure(Kind.unsafe, Billed.yes, "not that")
    too_large = False, Failure(Kind.out_of_memory, Billed.no, "out of memory")
    stopped = False, Failure(Kind.canceled, Billed.no, "stopped, as nobody wants it")
    our_fault = True, None, "ours"

    def __init__(self, paid: bool, failure: Failure | None, data: str = "") -> None:
        self.paid = paid
        self.failure = failure
        self.data = data

    def __repr__(self) -> str:
        return str(self)


class Died(BaseException):  # no Exception: nothing may catch it, as nothing catches SIGKILL
    """The process is gone, here and now."""


class Hand:
    """One thread of a process. It stands still at a step, or has ended."""

    PATIENCE = 60  # seconds that one step may take: more is a deadlock

    def __init__(self, work: Callable[[], object]) -> None:
        """Returns once it stands at its first step, or has ended."""
        self.at: str | None = None
        self.error: BaseException | None = None
        self._fate, self._answer = Fate.goes_well, Answer.picture
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        self._wait()

    @property
    def ended(self) -> bool:
        return self.at is None

    @property
    def died(self) -> bool:
        return isinstance(self.error, Died)

    def go_on(self, fate: Fate = Fate.goes_well, answer: Answer = Answer.picture) -> None:
        """To the next step. Raises what its thread raised, but for its death and a database that is away."""
        self._fate, self._answer = fate, answer
        self._go.release()
        self._wait()

    def _wait(self) -> None:
        assert self._stands.acquire(timeout=self.PATIENCE), "it hangs"
        if self.error is not None and not isinstance(self.error, (Died, *AWAY)):
            raise self.error

    def _run(self, work: Callable[[], object]) -> None:
        _here.hand = self
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - shown to whoever tells it to go on
            self.error = error
        self.at = None
        self._stands.release()

    def stand(self, at: str) -> tuple[Fate, Answer]:
        self.at = at
        self._stands.release()
        self._go.acquire()
        if self._fate is Fate.dies_before:
            raise Died
        return self._fate, self._answer


_here = threading.local()


def hand() -> Hand | None:
    """The hand that runs this; None outside of any, where all goes well at once."""
    return getattr(_here, "hand", None)


def step(at: str) -> tuple[Fate, Answer]:
    """Stand here until told to go on. Raises Died if that is what becomes of it."""
    mine = hand()
    return (Fate.goes_well, Answer.picture) if mine is None else mine.stand(at)


class Turn:
    """A lock for hands: who waits for it stands still, so that nobody waits for it in earnest."""

    def __init__(self) -> None:
        self.taken = False

    def __enter__(self) -> None:
        while self.taken:
            step("waits for its turn")
        self.taken = True

    def __exit__(self, *_: object) -> None:
        self.taken = False
