"""One drill of one system: submits jobs, and knows what became of each of them and when."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from random import Random

import requests

from bench.figures import percentile
from shared.tickets import ENOUGH, Bell
from tests.drills.count import Count
from tests.drills.systems import Drilled, End

#: Submissions at once.
CLIENTS = 8
#: A client sends a submission again until it is accepted, or for so long, in seconds; and pauses in between.
PERSISTENCE = 60.0
CLIENTS_PAUSE = 0.05
#: Between two looks at what has ended, in seconds.
LOOK_EVERY = 0.1
#: However much still moves, a drill waits no longer for the end than this, in seconds.
LONGEST_WAIT = 900.0


@dataclass(frozen=True)
class Size:
    """How much of everything. Times in seconds."""

    jobs: int
    faults: int
    submitting: float  # what the jobs of one `submit` are spread over
    delay: float = 0.5  # the vendor's
    longest_fault: float = 0.0  # where a fault has a length
    timed: bool = True  # whether times are judged; they are shown in any case


class Stuck(Exception):
    """What a drill needs to go on did not come; the message says what."""


@dataclass
class Fault:
    """Something that was broken. It is recovered from when the jobs that it waits for have ended."""

    at: float
    waits_for: Collection[str] = ()
    seconds: float | None = None  # if it is known otherwise
    in_flight: int = 0  # calls whose worker it took away
    spoilt: int = 0  # calls that the vendor answers with no picture
    killed_at: float | None = None  # when a worker was
    in_hand: Collection[str] = ()  # the jobs that it had
    uncalled: int = 0  # claims that may be committed and lead to no call: an attempt each

    def recovery(self, ends: dict[str, float]) -> float:
        """In seconds; infinite if one of the jobs has not ended."""
        if self.seconds is not None:
            return self.seconds
        return self._until_ended(self.at, self.waits_for, ends)

    def in_hand_recovery(self, ends: dict[str, float]) -> float | None:
        """In seconds from the kill of a worker to the end of all that it had in its hands; None if none was killed."""
        return None if self.killed_at is None else self._until_ended(self.killed_at, self.in_hand, ends)

    @staticmethod
    def _until_ended(moment: float, jobs: Collection[str], ends: dict[str, float]) -> float:
        return max([moment, *(ends.get(job_id, float("inf")) for job_id in jobs)]) - moment


@dataclass
class Run:
    """`quiet_seconds`: a job that has not ended when nothing has moved for so long counts as lost."""

    system: Drilled
    size: Size
    chance: Random
    quiet_seconds: float
    #: Prompts by job.
    accepted: dict[str, str] = field(default_factory=dict)
    #: How each job ended, as it was seen first, and when.
    ends: dict[str, End] = field(default_factory=dict)
    ended_at: dict[str, float] = field(default_factory=dict)
    accepted_at: dict[str, float] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: Jobs that are to fail.
    doomed: set[str] = field(default_factory=set)
    #: Seconds from a client's first try to its acceptance.
    answers: list[float] = field(default_factory=list)
    _refused: int = 0
    #: Calls by prompt that were in flight at a fault.
    _cut_off: Counter[str] = field(default_factory=Counter)
    _numbers: int = 0
    _calls: int = 0
    _moved_at: float = field(default_factory=time.monotonic)
    _clients: list[threading.Thread] = field(default_factory=list)

    # -- Submitting ---------------------------------------------------------------------------------------------------

    def submit(self, jobs: int, kind: str = "drill") -> None:
        """Submit so many jobs, each with a prompt of its own, over the time that the size says. Does not wait.

        `kind`: what their prompts begin with.
        """
        self._submit(jobs, self.size.submitting, kind)

    def pile_up(self, jobs: int) -> None:
        """Kill the idle worker, submit so many jobs at once, and wait until their messages lie in Redis."""
        with self.system.redis() as client:
            self.until("no message is left", lambda: not client.llen(self.system.queue))
            self.system.kill(self.system.worker)
            self._submit(jobs, 0)
            self.all_submitted()
            self.until("the messages wait", lambda: client.llen(self.system.queue) >= min(jobs, ENOUGH))
        self.pause(2 * Bell.FULL_PAUSE_SECONDS, 3 * Bell.FULL_PAUSE_SECONDS)  # the last ones may come so much later

    def _submit(self, jobs: int, seconds: float, kind: str = "drill") -> None:
        began = time.monotonic()
        dues = sorted(began + self.chance.uniform(0, seconds) for _ in range(jobs))
        wishes = iter([(due, f"{kind} {self._numbers + number}") for number, due in enumerate(dues)])
        self._numbers += jobs
        taking = threading.Lock()

        def serve() -> None:
            with requests.Session() as http:
                http.trust_env = False
                while True:
                    with taking:
                        wish = next(wishes, None)
                    if wish is None:
                        return
                    self._submit_one(http, *wish)

        clients = [threading.Thread(target=serve, daemon=True) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        self._clients += clients

    def _submit_one(self, http: requests.Session, due: float, prompt: str) -> None:
        pause = threading.Event()
        pause.wait(max(0, due - time.monotonic()))
        began = time.monotonic()
        while time.monotonic() - began < PERSISTENCE:
            try:
                job_id = self.system.submit(http, prompt)
            except requests.RequestException:
                job_id = None
            if job_id is not None:
                self.answers.append(time.monotonic() - began)
                self.accepted_at[job_id] = time.monotonic()
                self.accepted[job_id] = prompt
                return
            pause.wait(CLIENTS_PAUSE)
        self._refused += 1

    def all_submitted(self) -> None:
        """Wait until every submission was accepted or given up."""
        self.until("every job is submitted", lambda: not self.submits())

    def submits(self) -> bool:
        """Whether a submission is neither accepted nor given up."""
        return any(client.is_alive() for client in self._clients)

    def shares(self) -> Iterator[int]:
        """The jobs, in as many shares as there are faults."""
        for number in range(self.size.faults):
            yield self.size.jobs * (number + 1) // self.size.faults - self.size.jobs * number // self.size.faults

    def moments(self) -> Iterator[int]:
        """As many moments as there are faults, at random while the jobs are submitted, each when it comes."""
        began = time.monotonic()
        for number, moment in enumerate(
            sorted(self.chance.uniform(0.05, 0.95) * self.size.submitting for _ in range(self.size.faults))
        ):
            self._look_until(began + moment)
            yield number

    # -- Watching -----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """See what has ended, and start again what died by itself, as any supervisor would."""
        for name, process in list(self.system.processes.running.items()):
            if process.poll() is not None:
                self.expect(False, f"{name} lives through it (it ended with exit code {process.returncode})")
                self.system.kill(name)
                self.system.start(name)
        now = time.monotonic()
        for job_id, end in self.system.ended(
            [job_id for job_id in list(self.accepted) if job_id not in self.ends]
        ).items():
            self.ends[job_id], self.ended_at[job_id] = end, now
            self._moved_at = now
        if (calls := self.system.vendor.calls()) != self._calls:
            self._calls, self._moved_at = calls, now

    def open(self) -> set[str]:
        """The jobs that are accepted and have not ended."""
        self.look()
        return set(self.accepted) - set(self.ends)

    def pause(self, least: float, most: float) -> None:
        """Let any time between these go by: for faults at any moment and of any length, not a wait for anything."""
        self._look_until(time.monotonic() + self.chance.uniform(least, most))

    def _look_until(self, moment: float) -> None:
        while (left := moment - time.monotonic()) > 0:
            self.look()
            threading.Event().wait(min(LOOK_EVERY, left))

    def until(self, what: str, happens: Callable[[], object], seconds: float = LONGEST_WAIT) -> None:
        """Wait until it is true. Raises Stuck with `what` if it never is."""
        deadline = time.monotonic() + seconds
        while not happens():
            if time.monotonic() > deadline:
                raise Stuck(f"{what}: not within {seconds:g} s")
            self.look()
            threading.Event().wait(LOOK_EVERY)

    @staticmethod
    def now() -> float:
        """The clock of all times here."""
        return time.monotonic()

    # -- Faults -------------------------------------------------------------------------------------------------------

    def fault(self, in_flight: int = 0) -> Fault:
        """Something is broken now, and recovered from when every job that is open now has ended."""
        waits_for = self.open()
        self.faults.append(Fault(time.monotonic(), waits_for, in_flight=in_flight))
        return self.faults[-1]

    def kill_worker(self, fault: Fault) -> None:
        """Kill it and start it again, as any supervisor would; the fault knows what it had in its hands."""
        self.system.kill(self.system.worker)
        fault.killed_at = time.monotonic()
        before = self._cut_off.copy()
        fault.in_hand = in_hand = self.system.taken(self.accepted)
        # It may have had jobs whose clients don't know yet that they are accepted.
        self.until("what it had is accepted", lambda: in_hand <= self.accepted.keys())
        fault.in_flight = self.calls_cut_off()
        called = self._cut_off - before
        fault.uncalled = sum(1 for job_id in fault.in_hand if not called[self.accepted[job_id]])
        self.system.start(self.system.worker)

    def calls_cut_off(self) -> int:
        """Calls in flight, now that nobody works who would end them: by the vendor's book, not by the system's.

        They are those for jobs that are open, but for what was in flight at an earlier fault. Call it once a fault.
        """
        made, open_jobs = Counter(self.system.vendor.book()["by_prompt"]), self.open()
        now = Counter({self.accepted[job_id]: made[self.accepted[job_id]] for job_id in open_jobs}) - self._cut_off
        self._cut_off += now
        return now.total()

    def recovered(self, fault: Fault, at_most: float) -> None:
        """Wait until a fault is recovered from, or for so long after it: then it is not, and the drill goes on."""
        while time.monotonic() < fault.at + at_most and fault.recovery(self.ended_at) == float("inf"):
            self.look()
            threading.Event().wait(LOOK_EVERY)

    def settle(self) -> None:
        """Wait until every job has ended, or nothing has moved for a long time."""
        self.all_submitted()
        began = time.monotonic()  # what happened just before may be why it was quiet so far, and is over
        deadline = began + LONGEST_WAIT
        while self.open() and time.monotonic() < min(max(self._moved_at, began) + self.quiet_seconds, deadline):
            threading.Event().wait(LOOK_EVERY)

    def quiet(self) -> None:
        """Wait until every job has ended and no call is in flight: what is made in vain, is made by then."""
        self.settle()
        self.until("no call is in flight", lambda: not self.system.vendor.book()["in_flight"])

    def accepts_within(self, seconds: float) -> None:
        """Promise that a submission takes no longer, p99, whatever is broken; where times are judged."""
        slowest = percentile(self.answers, 99)
        self.expect(
            slowest <= seconds or not self.size.timed,
            f"a submission is accepted within {seconds:g} s, p99 (it took {slowest:.1f} s)",
        )

    def recovers_within(self, seconds: float) -> None:
        """Promise that what was open at each fault has ended so soon; where times are judged. Call it in the end."""
        slowest = max(fault.recovery(self.ended_at) for fault in self.faults)
        self.expect(
            slowest <= seconds or not self.size.timed,
            f"what is open at a fault has ended {seconds:g} s later (it took {slowest:.1f} s)",
        )

    def expect(self, holds: bool, promise: str) -> None:
        """What this drill alone promises."""
        if not holds:
            self.broken.append(promise)

    def count(self) -> Count:
        """What there is to count, when all is over."""
        ids, succeeded = list(self.accepted), [job_id for job_id, end in self.ends.items() if end.succeeded]
        notes = list(self.notes)
        calls, books = self.system.vendor.book()["by_prompt"], self.system.books_by_job(ids)
        in_hand = [fault.in_hand_recovery(self.ended_at) for fault in self.faults]
        lost = [job_id for job_id in ids if job_id not in self.ends]
        if lost and (held := self.system.still_in_redis(lost)):
            notes.append(f"{held:,} of the lost lie in Redis: somebody may find them yet")
        if forgotten := len(self.ends) - len(self.system.ended(self.ends)):
            notes.append(f"{forgotten:,} more had ended, and nobody knows it any more")
        return Count(
            accepted=len(ids),
            refused=self._refused,
            ended=len(self.ends),
            succeeded=len(succeeded),
            lost=len(lost),
            ended_twice=self.system.ended_twice(),
            images=self.system.pictures(ids),
            calls=sum(calls.values()),
            in_flight=sum(fault.in_flight for fault in self.faults),
            uncalled=sum(fault.uncalled for fault in self.faults),
            spoilt=sum(fault.spoilt for fault in self.faults),
            doomed=len(self.doomed),
            books=self.system.books(ids),
            unbooked=sum(max(calls.get(self.accepted[job_id], 0) - its.payable, 0) for job_id, its in books.items()),
            in_hand=max((seconds for seconds in in_hand if seconds is not None), default=float("nan")),
            faults=len(self.faults),
            recovery=float("inf")
            if lost
            else max((fault.recovery(self.ended_at) for fault in self.faults), default=0.0),
            answers=tuple(self.answers),
            broken=tuple(self.broken),
            notes=tuple(notes),
        )
