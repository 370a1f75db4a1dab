"""The watchdog: one thread a process that sees its lack of progress, says so in the worker's row, and ends it.

A supervisor sees whether a process is there, not whether it works. So a process that is stuck ends itself, with exit
code 70, and whatever restarts what ends (compose, systemd, `./dev up`) restarts it. First it claims nothing more, and
lets the calls that are within their time come to their end: they are paid for.

It asks neither the database nor any lock that others hold, and writes to stderr past `logging`: it must work where the
others don't. A process that is stopped (SIGSTOP), or whose interpreter stands still, can't see itself: its row is not
renewed any more, and that is what `python -m worker.health` looks at.
"""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress

from worker.slots import Slot, Slots

log = logging.getLogger(__name__)

#: EX_SOFTWARE of sysexits.h: the fault is ours.
STUCK = 70

#: Its number: Celery puts something of its own in place of sys.stderr, which writes by `logging`.
STDERR = 2

TICK_SECONDS = 2.0
#: Nothing has moved in any slot for so long, and one of them is over its time.
QUIET_SECONDS = 40.0
#: The heartbeat has not come round for so long. A single statement, with all its waiting, is limited to less.
BEAT_SECONDS = 60.0
#: Celery's consumer has heard nothing of Redis for so long. It hears every second, and by itself mends a half-open
#: connection within 21 s; after an outage it may take 32 s to try again.
DEAF_SECONDS = 50.0
#: And for so long, whoever's fault it is: no reason to end, but it counts as not there.
UNTOLD_SECONDS = 35.0
#: From which silence on Redis is asked whether it is the one that says nothing.
ASK_SECONDS = 6.0
#: So long, beyond what calls may take, a worker that is stuck holds what it can't store. It may itself be the reason.
HELD_SECONDS = 600.0
#: Tickets have lain in the queue for so long, and none has come here although a slot is free.
IGNORED_SECONDS = 40.0


class Ages:
    """How long values have stood still, in time that this process was running: a pause (SIGSTOP) is no progress lost.

    So after a pause of minutes nothing is over its time before it had the time to go on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._latest = clock()
        self._running = 0.0
        self._since: dict[Hashable, tuple[object, float]] = {}

    def tick(self) -> None:
        moment = self._clock()
        self._running += min(moment - self._latest, 2 * TICK_SECONDS)
        self._latest = moment

    def of(self, name: Hashable, value: object) -> float:
        """For how many seconds `name` has had this value."""
        before, since = self._since.get(name, (None, 0.0))
        if name not in self._since or before != value:
            since = self._running
            self._since[name] = (value, since)
        return self._running - since

    def forget_all_but(self, kind: type, names: set[Hashable]) -> None:
        """Of the names of this kind, keep these."""
        for name in [name for name in self._since if isinstance(name, kind) and name not in names]:
            del self._since[name]


class Watchdog:
    """Looks every two seconds. `trouble` says what is wrong; some troubles end the process."""

    def __init__(
        self,
        *,
        turns: Callable[[], int],
        stopping: threading.Event,
        slots: Slots | None = None,
        heard: Callable[[], int] | None = None,
        tickets: Callable[[], int | None] = lambda: 0,
        end: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """What it looks at: numbers that change as long as all is well, and questions.

        `turns`: of the heartbeat, or of the loop that is all this process does. `heard`: of Celery's consumer.
        `tickets`: how many lie in the queues; None: Redis does not answer. `end`: ends the process at once.
        """
        self.trouble: str | None = None
        self.quiet_seconds = 0.0
        self.deaf_seconds: float | None = None if heard is None else 0.0
        self._turns = turns
        self._stopping = stopping
        self._slots = slots
        self._heard = heard
        self._tickets = tickets
        self._end = end
        self._ages = Ages(clock)
        self._failed_asks = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def look(self) -> str | None:
        """One look; returns why the process must end, if it must."""
        self._ages.tick()
        stuck = self._heartbeat() or self._stuck_slots() or self._deaf()
        self.trouble = stuck or self._untold()
        return stuck

    def _heartbeat(self) -> str | None:
        # As long as the database is away, a heartbeat may queue behind all who wait for it.
        away = self._slots.away if self._slots is not None else 0
        seconds = self._ages.of("heartbeat", (self._turns(), away))
        return f"the heartbeat has stood still for {seconds:.0f} s" if seconds > BEAT_SECONDS else None

    def _stuck_slots(self) -> str | None:
        if self._slots is None:
            return None
        late = self._late()
        quiet = self._ages.of("moves", self._slots.moves)
        self.quiet_seconds = quiet if self._slots.at_work() else 0.0
        if late and quiet > QUIET_SECONDS:
            held = sum(slot.holds_one for slot in late)
            return f"{len(late)} slots are over their time ({held} hold a job), and nothing has moved for {quiet:.0f} s"
        return None

    def _late(self) -> list[Slot]:
        """The slots whose step has taken longer than it may."""
        assert self._slots is not None
        at_work = self._slots.at_work()
        self._ages.forget_all_but(Slot, set(at_work))
        return [slot for slot in at_work if self._ages.of(slot, slot.step) > slot.limit_seconds]

    def _deaf(self) -> str | None:
        """Whether tickets reach this process, if Redis does."""
        if self._heard is None:
            return None
        assert self._slots is not None
        deaf = self.deaf_seconds = self._ages.of("heard", self._heard())
        idle = self._ages.of("asked", self._slots.asked) > ASK_SECONDS and self._slots.in_hand() < self._slots.count
        tickets = self._tickets() if deaf > ASK_SECONDS or idle else 0
        if tickets is None:
            self._failed_asks += 1
        answering = self._ages.of("answers", self._failed_asks)
        # One that is about to connect again is not deaf, and one that is deaf ignores nothing.
        ignores = bool(tickets) and idle and deaf <= ASK_SECONDS
        ignoring = self._ages.of("ignores", (ignores, self._slots.asked))
        if min(deaf, answering) > DEAF_SECONDS:
            return f"Celery's consumer has heard nothing for {deaf:.0f} s although Redis answers"
        if ignores and ignoring > IGNORED_SECONDS:
            return f"tickets lie in the queue, a slot is free, and none has come for {ignoring:.0f} s"
        return None

    def _untold(self) -> str | None:
        if self.deaf_seconds is not None and self.deaf_seconds > UNTOLD_SECONDS:
            return f"this worker has heard nothing of Redis for {self.deaf_seconds:.0f} s: no ticket reaches it"
        return None

    def _run(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            if self._stopping.is_set():
                continue  # whoever asked it to stop waits no longer than its grace
            try:
                stuck = self.look()
            except Exception:
                log.exception("the watchdog could not look")
                continue
            if stuck is not None:
                self._bark(stuck)
                self._stopping.set()
                self._let_calls_end()
                self._end(STUCK)

    def _bark(self, stuck: str) -> None:
        line = f"WARNING this worker is stuck: {stuck}; it ends with exit code {STUCK}\n"
        with suppress(OSError):
            os.write(STDERR, line.encode())
            faulthandler.dump_traceback(STDERR)

    def _let_calls_end(self) -> None:
        """Those that are within their time; `stopping` is set, so that nothing more is claimed.

        A slot that holds a picture until the database is back begins its step again and again, and is never late: so
        all of it has an end.
        """
        if self._slots is None:
            return
        longest = max((slot.limit_seconds for slot in self._slots.at_work()), default=0.0) + HELD_SECONDS
        while self._ages.of("ending", True) < longest and not self._closed.wait(TICK_SECONDS):
            self._ages.tick()
            late = self._late()
            if not [slot for slot in self._slots.at_work() if slot.holds_one and slot not in late]:
                return
