"""The life of jobs, in whatever order Hypothesis thinks of: submitted, claimed, canceled, rescued, adopted and deleted,
while workers, sweeps and requests fail and die at any step, clocks are set, and tickets are lost and doubled.

A short run in every `./dev test`, always the same; as long as you like, and another each time:

    ./dev test tests/machine --hypothesis-profile=long
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import pytest
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.machine.house import ELSEWHERE, House, Sweeper, Worker
from tests.machine.promises import BACKEND
from tests.machine.stepping import Answer, Fate, Hand

LONG = settings.get_current_profile_name() == "long"
EXAMPLES, STEPS = (settings().max_examples, settings().stateful_step_count) if LONG else (60, 40)
#: From its eleventh example on, Hypothesis varies those that it has: ten at a time, from another seed each, find more.
AT_A_TIME = 10

Thing = TypeVar("Thing")


@dataclass(frozen=True, repr=False)
class Work:
    """So many steps of somebody at work. What becomes of the last one is `fate`; `answer` is the vendor's.

    `freeze`: then nobody does anything until the sweep has rescued every job that has a worker.
    """

    which: int
    steps: int
    fate: Fate
    answer: Answer
    freeze: bool

    def __repr__(self) -> str:
        return f"Work({self.which}, {self.steps}, {self.fate}, {self.answer}, {self.freeze})"


WHICH = st.integers(0, 11)
SOME_STEPS = st.integers(1, 9)
FATES = st.sampled_from([*[Fate.goes_well] * 5, *Fate])
TROUBLES = st.sampled_from([*[Fate.goes_well] * 4, Fate.fails, Fate.is_rolled_back, Fate.answer_is_lost])
ANSWER = st.sampled_from([*[Answer.picture] * len(Answer), *Answer])


MEANWHILE = st.builds(Work, WHICH, st.integers(0, 9), FATES, ANSWER, st.sampled_from([False, False, False, True]))


def one_of(things: list[Thing], which: int) -> Thing:
    return things[which % len(things)]


def happens(**arguments: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """A rule, at whose end some work is done: Hypothesis leaves out half of the rules in each example."""

    def of(body: Callable[..., None]) -> Any:
        @wraps(body)
        def and_work(self: "LifeMachine", meanwhile: Work, **given: Any) -> None:
            body(self, **given)
            self.goes_on(meanwhile)

        make_rule: Any = rule  # mypy takes a dictionary's values for its other arguments
        return make_rule(**arguments, meanwhile=MEANWHILE)(and_work)

    return of


class LifeMachine(RuleBasedStateMachine):
    """Each rule is one thing that happens. Whoever stands at a step stands there until a rule lets him go on: so
    everybody is slow or frozen for as long as it takes."""

    house: House

    def __init__(self) -> None:
        super().__init__()
        self.sound = True
        self.rare = 0  # of what would soon leave nothing to do
        self.house.begins()

    def jobs(self) -> list[str]:
        return self.house.promises.jobs()

    def ended(self) -> list[str]:
        return self.house.promises.ended_jobs()

    def open_jobs(self) -> list[str]:
        return [job for job in self.jobs() if job not in self.ended()]

    def hands(self) -> list[Hand]:
        return self.house.hands()

    def workers(self) -> list[Worker]:
        return self.house.alive

    def goes_on(self, work: Work) -> None:
        """One who stands at a step, or one who takes a ticket. The house never stands empty."""
        if work.steps == 0:
            return
        if not self.open_jobs() and len(self.jobs()) < 12:
            self.house.submits(None)
        if not self.workers():
            self.house.a_worker_starts("host:7")
        workers: list[Worker | Hand] = [*self.takers(), *self.hands()]
        if workers:
            hand = one_of(workers, work.which)
            if isinstance(hand, Worker):
                [hand] = self.tickets_for(hand, 1)
            self.house.goes_on(hand, work.steps, work.fate, work.answer)
        if work.freeze:
            self.look_twice(self.house.sweepers[0])
            self.house.sweepers[0].finishes()

    def look_twice(self, sweeper: Sweeper, away: bool = False) -> None:
        """For leases that have lapsed. The last look is made, and anything may happen before it does what it found.

        `away`: the database is at the second look, and there is a third.
        """
        self.house.time_passes(21)
        sweeper.finishes()
        sweeper.repairs("rescue_lapsed")
        sweeper.finishes()
        self.house.time_passes(6)
        if away:
            self.look(sweeper, Fate.fails)
        self.look(sweeper)

    def look(self, sweeper: Sweeper, fate: Fate = Fate.goes_well) -> None:
        sweeper.repairs("rescue_lapsed")
        if sweeper.hand is not None:
            self.house.goes_on(sweeper.hand, fate=fate)

    def tickets_for(self, worker: Worker, count: int) -> list[Hand]:
        """They may be doubled ones, that nobody rang: a ticket says nothing that the database does not know better."""
        self.house.tickets.waiting = max(self.house.tickets.waiting - count, 0)
        return worker.takes_tickets(min(count, Worker.SLOTS - len(worker.slots)))

    # -- Requests -------------------------------------------------------------------------------------------------

    @initialize(jobs=st.integers(1, 3))
    def open_the_house(self, jobs: int) -> None:
        for _ in range(jobs):
            self.house.submits(None)
        self.house.tickets.ring("dataoorts", jobs)
        self.house.a_worker_starts("host:7")

    @precondition(lambda self: len(self.open_jobs()) < 4 and len(self.jobs()) < 12)
    @happens(count=st.integers(1, 2), deadline=st.sampled_from([None, None, 30.0]), rings=st.booleans())
    def submit(self, count: int, deadline: float | None, rings: bool) -> None:
        for _ in range(count):
            self.house.submits(deadline)
        if rings:
            self.house.tickets.ring("dataoorts", count)

    @precondition(lambda self: self.rare < 3 and self.open_jobs())
    @happens(which=WHICH)
    def cancel(self, which: int) -> None:
        self.rare += 1
        self.house.cancels(one_of(self.open_jobs(), which))

    @precondition(lambda self: self.ended())
    @happens(which=WHICH, again=st.booleans())
    def begin_to_delete_or_submit_again(self, which: int, again: bool) -> None:
        job = one_of(self.ended(), which)
        if again and len(self.jobs()) < 12:
            self.house.submits_again(job)
        elif len(self.house.requests) < 2:
            self.house.a_request(lambda: self.house.deletes(job))

    @precondition(lambda self: self.open_jobs() and len(self.house.requests) < 2)
    @happens(which=WHICH, back=st.booleans())
    def begin_to_move_on(self, which: int, back: bool) -> None:
        """A job to another backend, or back; what it was seen to wait for may be news of yesterday."""
        job = one_of(self.open_jobs(), which)
        self.house.a_request(lambda: self.house.moves_on(job, ELSEWHERE if back else BACKEND))

    # -- Workers --------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.workers()) < 3)
    @happens(name=st.sampled_from(["host:7", "host:7", "host:8", "other:7"]), recovers=st.booleans())
    def start_a_worker(self, name: str, recovers: bool) -> None:
        """Its name may be a dead one's: in a container, the process has the same number each time."""
        if name not in [worker.name for worker in self.workers()]:
            self.house.a_worker_starts(name)
            if recovers:
                self.workers()[-1].recovers()

    def takers(self) -> list[Worker]:
        return [worker for worker in self.workers() if len(worker.slots) < Worker.SLOTS]

    @precondition(lambda self: self.takers())
    @happens(which=WHICH, slots=st.integers(1, Worker.SLOTS), steps=SOME_STEPS, fate=FATES, answer=ANSWER)
    def take_tickets(self, which: int, slots: int, steps: int, fate: Fate, answer: Answer) -> None:
        for hand in self.tickets_for(one_of(self.takers(), which), slots):
            self.house.goes_on(hand, steps, fate, answer)

    @precondition(lambda self: self.hands() and self.takers())
    @happens(which=WHICH, taker=WHICH, steps=SOME_STEPS, later=SOME_STEPS, answer=ANSWER, stops=st.booleans())
    def oversleep(self, which: int, taker: int, steps: int, later: int, answer: Answer, stops: bool) -> None:
        """One who stands at a step goes on only after his job was rescued and is in another's hands.

        `stops`: before that, his process is asked to stop, and he takes the next step.
        """
        late = one_of(self.hands(), which)
        if stops:
            for worker in self.workers():
                if late in worker.slots:
                    worker.stopping.set()
            self.house.goes_on(late)
        self.look_twice(self.house.sweepers[1])
        self.house.sweepers[1].finishes()
        if self.takers():
            for hand in self.tickets_for(one_of(self.takers(), taker), 2):
                self.house.goes_on(hand, steps)
        self.house.goes_on(late, later, answer=answer)

    @precondition(lambda self: self.hands())
    @happens(steps=SOME_STEPS, answer=ANSWER)
    def all_go_on(self, steps: int, answer: Answer) -> None:
        for hand in self.hands():
            self.house.goes_on(hand, steps, answer=answer)

    @precondition(lambda self: self.workers())
    @happens(which=WHICH, fate=TROUBLES)
    def heartbeat(self, which: int, fate: Fate) -> None:
        one_of(self.workers(), which).renews(fate)

    @precondition(lambda self: self.workers())
    @happens(which=WHICH, steps=SOME_STEPS, fate=FATES)
    def look_for_what_the_dead_left(self, which: int, steps: int, fate: Fate) -> None:
        worker = one_of(self.workers(), which)
        if not worker.others:
            worker.recovers()
            self.house.goes_on(worker.others[0], steps, fate)

    @precondition(lambda self: self.workers())
    @happens(which=WHICH, kill=st.booleans(), later=st.booleans())
    def kill_or_stop_a_worker(self, which: int, kill: bool, later: bool) -> None:
        """`later`: its leases have lapsed by now."""
        worker = one_of(self.workers(), which)
        if kill:
            worker.dies()
        else:
            worker.stopping.set()
            self.house.tidies_up()
        if later:
            self.house.time_passes(21)

    # -- The sweep ------------------------------------------------------------------------------------------------

    @happens(which=st.integers(0, 1), repair=st.sampled_from(Sweeper.REPAIRS), steps=st.integers(0, 2), fate=FATES)
    def begin_a_repair(self, which: int, repair: str, steps: int, fate: Fate) -> None:
        sweeper = self.house.sweepers[which]
        sweeper.repairs(repair)
        if sweeper.hand is not None:
            self.house.goes_on(sweeper.hand, steps, fate)

    @happens(which=st.integers(0, 1), away=st.booleans(), renew=st.booleans())
    def look_twice_for_lapsed_leases(self, which: int, away: bool, renew: bool) -> None:
        """`away`: after an outage. `renew`: at the last moment, the workers come back."""
        self.look_twice(self.house.sweepers[which], away)
        if renew:
            for worker in self.workers():
                worker.renews()
            self.house.sweepers[which].finishes()

    @happens(which=st.integers(0, 1))
    def sweep(self, which: int) -> None:
        for repair in Sweeper.REPAIRS:
            self.house.sweepers[which].repairs(repair)
            self.house.sweepers[which].finishes()

    # -- Time and Redis -------------------------------------------------------------------------------------------

    @happens(seconds=st.sampled_from([6.0, 21.0, 31.0, 61.0, 130.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.house.time_passes(seconds)

    @precondition(lambda self: self.rare < 3)
    @happens()
    def let_an_hour_pass(self) -> None:
        self.rare += 1
        self.house.time_passes(3601)

    @happens(which=st.sampled_from([-1, -1, 0, 1]), seconds=st.sampled_from([30.0, -30.0, 600.0, -600.0]))
    def set_a_clock(self, which: int, seconds: float) -> None:
        """The database's, or a sweep's own."""
        if which < 0:
            self.house.clock_is_set(seconds)
        else:
            self.house.sweepers[which].off += seconds

    @precondition(lambda self: self.house.tickets.waiting)
    @happens()
    def empty_redis(self) -> None:
        self.house.tickets.waiting = 0

    # -------------------------------------------------------------------------------------------------------------

    @invariant()
    def every_promise_holds(self) -> None:
        self.sound = False
        self.house.promises.after_a_rule()
        self.sound = True

    def teardown(self) -> None:
        try:
            if self.sound:
                self.house.settles()
        finally:
            self.house.ends()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(0 if LONG else 600)
def test_the_promises_hold_whatever_happens_in_whatever_order(house: House) -> None:
    class Here(LifeMachine): ...

    Here.house = house
    first = random.SystemRandom().randrange(2**32) if LONG else 0
    some = settings(max_examples=AT_A_TIME, stateful_step_count=STEPS, deadline=None, database=None)
    examples = EXAMPLES if house.database.is_sqlite or LONG else EXAMPLES * 2 // 3  # it is slower
    for number in range(examples // AT_A_TIME):
        run_state_machine_as_test(seed(first + number)(Here), settings=some)
