"""What the engine does with jobs that come and go, and with a card that fails. No torch, no waiting."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping

import pytest

from tests.worker.paper_model import SECONDS, Bench, OutOfMemory, PaperModel, Poisoned, Sheet, gate
from worker.backends.base import Billed, Failure, Kind

Benches = Callable[..., Bench]


@pytest.fixture
def a_bench() -> Iterator[Benches]:
    made: list[Bench] = []

    def make(model: PaperModel, most_at_once: Mapping[int, int] | None = None, stuck_seconds: float = 1000.0) -> Bench:
        made.append(Bench(model, most_at_once, stuck_seconds))
        return made[-1]

    yield make
    for bench in made:
        bench.engine.close()


def failed(outcome: str | Failure, kind: Kind, words: str) -> None:
    assert isinstance(outcome, Failure), outcome
    assert (outcome.kind, outcome.billed) == (kind, Billed.no) and words in outcome.message, outcome


def test_jobs_of_one_size_share_calls_and_leave_when_they_are_done(a_bench: Benches) -> None:
    bench = a_bench(PaperModel())
    outcomes = bench.draw(bench.job("a", 3), bench.job("b", 1), bench.job("c", 2))
    assert outcomes == ["picture of a", "picture of b", "picture of c"]
    assert bench.model.calls == [["a", "b", "c"], ["a", "c"], ["a"]]
    assert bench.engine.figures()[:3] == (3, 6, 3)


def test_a_job_that_alters_an_image_shares_calls_and_counts_the_steps_that_it_makes(a_bench: Benches) -> None:
    bench = a_bench(PaperModel())
    outcomes = bench.draw(bench.job("new", 3), bench.job("altered", 4, alters=True))
    assert outcomes == ["picture of new", "picture of altered"]
    assert bench.model.calls == [["new", "altered"], ["new", "altered"], ["new"]]
    assert [(step.step, step.steps) for step in bench.steps if step.index == 1] == [(1, 2), (2, 2)]


def test_a_job_joins_at_the_next_step(a_bench: Benches) -> None:
    before_step, reached, go = gate()
    bench = a_bench(PaperModel(before_step))
    bench.submit(bench.job("a", 3))
    bench.engine.start()
    assert reached.wait(SECONDS)
    bench.submit(bench.job("late", 2))
    go.set()
    bench.outcomes(2)
    assert bench.model.calls == [["a"], ["a", "late"], ["a", "late"]]


def test_no_more_share_a_call_than_there_is_room_for_and_the_oldest_go_first(a_bench: Benches) -> None:
    bench = a_bench(PaperModel(), {512 * 512: 2})
    bench.draw(*(bench.job(name, 2) for name in "abcd"))
    assert bench.model.calls == [["a", "b"], ["a", "b"], ["c", "d"], ["c", "d"]]


def test_a_stream_of_one_size_cannot_hold_back_another(a_bench: Benches) -> None:
    """At every step of the 512s another one arrives, for ever; the 256 is drawn all the same."""
    arrivals: list[str] = []

    def another_one_arrives(names: list[str]) -> None:
        if "small" not in names and len(arrivals) < 500:
            arrivals.append(f"more {len(arrivals)}")
            bench.submit(bench.job(arrivals[-1], 4))

    bench = a_bench(PaperModel(another_one_arrives))
    bench.submit(bench.job("first", 4), bench.job("small", 4, size=(256, 256)))
    bench.engine.start()
    assert bench.outcomes(2) == ["picture of first", "picture of small"]
    oldest = [names[0] for names in bench.model.calls]
    began = oldest.index("small")
    assert oldest[began - 4 : began] == ["first"] * 4
    assert oldest[began : began + 4] == ["small"] * 4, "the 256 was the oldest, and 512s were drawn before it"


def test_the_only_job_of_a_size_that_came_first_goes_first_at_every_step(a_bench: Benches) -> None:
    bench = a_bench(PaperModel())
    bench.draw(bench.job("a", 2), bench.job("b", 2, size=(256, 256)), bench.job("c", 3))
    assert bench.model.calls == [["a", "c"], ["a", "c"], ["b"], ["b"], ["c"]]


def test_every_step_is_told_and_previews_at_most_once_a_second(a_bench: Benches) -> None:
    def half_a_second_passes(names: list[str]) -> None:
        bench.clock += 0.5

    bench = a_bench(PaperModel(half_a_second_passes))
    bench.draw(bench.job("a", 10))
    assert [(step.step, step.steps) for step in bench.steps] == [(step, 10) for step in range(1, 11)]
    # Not at step 1, which is less than 15 %, and not at step 10, when the picture itself comes.
    assert [step.step for step in bench.steps if step.glimpse] == [2, 4, 6, 8]


def test_a_preview_that_fails_costs_nothing_else(a_bench: Benches, caplog: pytest.LogCaptureFixture) -> None:
    class Blind(PaperModel):
        def glimpse(self, canvas: Sheet) -> str:
            raise KeyError(canvas.name)

    bench = a_bench(Blind())
    assert bench.draw(bench.job("a", 5)) == ["picture of a"]
    assert "KeyError" in caplog.text and not any(step.glimpse for step in bench.steps)


# -- Leaving early ----------------------------------------------------------------------------------------------------


def test_a_canceled_job_takes_part_in_no_further_call(a_bench: Benches) -> None:
    canceled = threading.Event()

    def cancel_in_the_second_call(names: list[str]) -> None:
        if len(bench.model.calls) == 1:
            canceled.set()

    bench = a_bench(PaperModel(cancel_in_the_second_call))
    kept, gone = bench.draw(bench.job("kept", 4), bench.job("gone", 4, canceled=canceled.is_set))
    assert kept == "picture of kept"
    failed(gone, Kind.canceled, "canceled")
    assert bench.model.calls == [["kept", "gone"], ["kept", "gone"], ["kept"], ["kept"]]


def test_a_job_that_is_canceled_while_it_waits_is_never_begun(a_bench: Benches) -> None:
    begun: list[str] = []
    model = PaperModel()
    model.before_begin = begun.append
    bench = a_bench(model, {512 * 512: 1})
    _, gone = bench.draw(bench.job("first"), bench.job("gone", canceled=lambda: bool(begun)))
    failed(gone, Kind.canceled, "canceled")
    assert begun == ["first"]


def test_a_job_that_is_canceled_in_its_last_step_is_not_decoded(a_bench: Benches) -> None:
    decoded: list[str] = []
    model = PaperModel()
    model.before_finish = decoded.append
    bench = a_bench(model)
    [gone] = bench.draw(bench.job("gone", 2, canceled=lambda: len(model.calls) == 2))
    failed(gone, Kind.canceled, "canceled")
    assert decoded == []


def test_a_job_out_of_time_takes_part_in_no_further_call(a_bench: Benches) -> None:
    def time_passes(names: list[str]) -> None:
        bench.clock += 25

    bench = a_bench(PaperModel(time_passes))
    [slow, quick] = bench.draw(bench.job("slow", 9), bench.job("quick", 2))
    failed(slow, Kind.transient, "the picture was not ready in 60 seconds")
    assert quick == "picture of quick" and bench.model.calls == [["slow", "quick"]] * 2 + [["slow"]]


def test_a_question_that_fails_is_not_a_cancellation(a_bench: Benches, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> bool:
        raise ConnectionError("Redis is away")

    bench = a_bench(PaperModel())
    assert bench.draw(bench.job("a", canceled=broken)) == ["picture of a"]
    assert "Redis is away" in caplog.text


# -- Trouble ----------------------------------------------------------------------------------------------------------


def test_out_of_memory_costs_no_job_and_is_remembered(a_bench: Benches) -> None:
    def room_for_two(names: list[str]) -> None:
        if len(names) > 2:
            raise OutOfMemory

    bench = a_bench(PaperModel(room_for_two))
    outcomes = bench.draw(*(bench.job(name, 2) for name in "abc"))
    assert outcomes == ["picture of a", "picture of b", "picture of c"]
    assert bench.model.calls == [["a", "b"], ["a", "b"], ["c"], ["c"]]
    assert bench.model.freed == 1 and bench.room.cap((512, 512)) == 2 and bench.room.cap((512, 504)) == 4


def test_memory_that_runs_out_in_the_middle_sends_the_youngest_to_wait(a_bench: Benches) -> None:
    def room_for_one_from_the_second_step_on(names: list[str]) -> None:
        if bench.model.calls and len(names) > 1:
            raise OutOfMemory

    bench = a_bench(PaperModel(room_for_one_from_the_second_step_on))
    bench.draw(*(bench.job(name, 2) for name in "abcd"))
    assert bench.model.calls == [["a", "b", "c", "d"], ["a"], ["b"], ["c"], ["d"]]


def test_a_job_alone_is_drawn_with_less_memory_before_it_fails(a_bench: Benches) -> None:
    def too_little(names: list[str]) -> None:
        if (512, 512) not in bench.model.frugal or names == ["huge"]:
            raise OutOfMemory

    bench = a_bench(PaperModel(too_little), {512 * 512: 1})
    fits, huge, after = bench.draw(bench.job("fits"), bench.job("huge"), bench.job("after"))
    assert (fits, after) == ("picture of fits", "picture of after")
    failed(huge, Kind.out_of_memory, "too little memory for 512x512")


@pytest.mark.parametrize("when", ["before_begin", "before_finish"])
def test_memory_that_runs_out_beside_the_steps_is_saved_too(a_bench: Benches, when: str) -> None:
    model = PaperModel()

    def once(name: str) -> None:
        if not model.frugal:
            raise OutOfMemory

    setattr(model, when, once)
    bench = a_bench(model)
    assert bench.draw(bench.job("a")) == ["picture of a"]
    assert model.freed == 1


@pytest.mark.parametrize("when", ["before_begin", "before_finish"])
def test_a_fault_in_one_job_fails_that_job_alone(a_bench: Benches, when: str, caplog: pytest.LogCaptureFixture) -> None:
    model = PaperModel()

    def broken(name: str) -> None:
        if name == "b":
            raise KeyError(name)

    setattr(model, when, broken)
    bench = a_bench(model)
    first, second, third = bench.draw(*(bench.job(name) for name in "abc"))
    assert (first, third) == ("picture of a", "picture of c")
    failed(second, Kind.internal, "the fault is ours")
    assert "KeyError" in caplog.text


def test_a_fault_in_a_shared_call_fails_the_job_whose_fault_it_is(a_bench: Benches) -> None:
    def broken(names: list[str]) -> None:
        if "b" in names:
            raise ValueError("shapes do not match")

    bench = a_bench(PaperModel(broken))
    first, second, third = bench.draw(*(bench.job(name, 2) for name in "abc"))
    assert (first, third) == ("picture of a", "picture of c")
    failed(second, Kind.internal, "the fault is ours")
    assert bench.model.calls == [["a"], ["c"], ["a", "c"]]


def test_a_failure_in_a_shared_call_is_the_outcome_of_the_job_whose_it_is(a_bench: Benches) -> None:
    def refused(names: list[str]) -> None:
        if "b" in names:
            raise Failure(Kind.rejected, Billed.no, "not this one")

    bench = a_bench(PaperModel(refused))
    first, second = bench.draw(bench.job("a"), bench.job("b"))
    assert first == "picture of a"
    failed(second, Kind.rejected, "not this one")


def test_a_failure_that_the_model_raises_is_the_outcome(a_bench: Benches) -> None:
    def black(name: str) -> None:
        raise Failure(Kind.bad_output, Billed.no, "a black picture")

    model = PaperModel()
    model.before_finish = black
    bench = a_bench(model)
    failed(bench.draw(bench.job("a"))[0], Kind.bad_output, "a black picture")


def test_a_poisoned_card_ends_the_process(a_bench: Benches, caplog: pytest.LogCaptureFixture) -> None:
    def poisoned(names: list[str]) -> None:
        raise Poisoned("an illegal memory access was encountered")

    bench = a_bench(PaperModel(poisoned))
    first, second = bench.draw(bench.job("a"), bench.job("b"))
    assert bench.exits.get(timeout=SECONDS) == 70
    [record] = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert "illegal memory access" in record.getMessage()
    # Where the process goes on all the same, nobody waits for ever.
    for outcome in (first, second):
        failed(outcome, Kind.transient, "takes no more calls")
    assert "takes no more calls" in str(bench.engine.health())


def test_a_call_that_hangs_ends_the_process(a_bench: Benches, caplog: pytest.LogCaptureFixture) -> None:
    before_step, reached, go = gate()
    bench = a_bench(PaperModel(before_step), stuck_seconds=0.1)
    bench.submit(bench.job("a"))
    bench.engine.start()
    assert reached.wait(SECONDS) and bench.exits.empty()
    bench.clock += 0.2
    assert bench.exits.get(timeout=SECONDS) == 70
    assert "has not moved for 0.1 seconds" in caplog.text and "not moved" in str(bench.engine.health())
    go.set()


def test_an_idle_engine_is_not_a_hung_one(a_bench: Benches) -> None:
    bench = a_bench(PaperModel(), stuck_seconds=1000)
    bench.draw(bench.job("a"))
    while bench.engine._at_work_since is not None:  # the end of the turn, after the news
        threading.Event().wait(0.001)
    bench.clock += 86400
    assert not bench.engine._is_stuck() and bench.engine.health() is None


def test_an_engine_that_breaks_says_so_and_leaves_nobody_waiting(
    a_bench: Benches, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(names: list[str]) -> None:
        raise SystemExit("not an Exception, so nobody expects it")

    bench = a_bench(PaperModel(breaks))
    failed(bench.draw(bench.job("a"))[0], Kind.transient, "the engine broke")
    assert "the engine broke" in str(bench.engine.health()) and "nobody expects it" in caplog.text
    bench.submit(bench.job("later"))
    failed(bench.outcomes(1)[0], Kind.not_accepted, "the engine broke")


def test_closing_fails_what_is_not_done(a_bench: Benches) -> None:
    before_step, reached, go = gate()
    bench = a_bench(PaperModel(before_step))
    bench.submit(bench.job("a", 1000))
    bench.engine.start()
    assert reached.wait(SECONDS)
    closing = threading.Thread(target=bench.engine.close)
    closing.start()
    with bench.engine._changed:
        assert bench.engine._changed.wait_for(lambda: bench.engine._closing, SECONDS)
    go.set()
    failed(bench.outcomes(1)[0], Kind.transient, "closed")
    closing.join(SECONDS)
    assert len(bench.model.calls) < 1000
