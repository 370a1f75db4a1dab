"""In place of pictures the vendor sends what is none: HTML, bombs, halves, other formats. Among them are good ones."""

from bench.processes import watched_memory
from bench.vendor import picture
from shared.errors import JobErrorCode
from tests.drills.drill import PICTURE_BYTES, Drill
from tests.drills.run import Run, Size
from tests.drills.served import expect_served
from tests.shared.test_picture import HOSTILE
from worker.backends.base import Billed, Failure
from worker.backends.dataoorts_answers import judge_answer

#: Larger ones make the stand-in slow.
LARGEST = 2_000_000


def is_paid(data: bytes) -> bool:
    """What reads as the words of an error is none of the pictures that the vendor takes money for."""
    try:
        judge_answer(200, {}, data, str)
    except Failure as failure:
        return failure.billed != Billed.no
    return True


BAD = {f"bad {number}": data for number, data in enumerate(HOSTILE.values()) if len(data) <= LARGEST and is_paid(data)}
#: Calls that a job may cost without getting a picture: the default of DARKROOM_MAX_ATTEMPTS.
MAX_ATTEMPTS = 3
#: What worker and its children may grow by, in bytes, in a drill of at least so many jobs: short ones only warm up.
MAY_GROW = 200_000_000
LONG = 1000


def bad_pictures(run: Run) -> None:
    system = run.system
    for kind, data in BAD.items():
        system.vendor.answer_with(kind, data)
    rounds = max(1, run.size.jobs // 2 // len(BAD))
    with watched_memory([system.processes.running[system.worker]]) as memory:
        run.until("its memory is seen", lambda: memory.rss)
        before = memory.rss
        fault = run.fault()
        run.submit(run.size.jobs - rounds * len(BAD))
        for kind in BAD:
            run.submit(rounds, kind)
        run.all_submitted()
        run.doomed |= {job_id for job_id, prompt in run.accepted.items() if prompt.rpartition(" ")[0] in BAD}
        run.settle()
    calls = system.vendor.book()["by_prompt"]
    spoilt = {prompt: count for prompt, count in calls.items() if prompt.rpartition(" ")[0] in BAD}
    fault.spoilt = sum(spoilt.values())
    run.expect(max(spoilt.values()) <= MAX_ATTEMPTS, f"a job is called {MAX_ATTEMPTS} times at most")
    codes = {system.failed_with(job_id) for job_id in run.doomed} - {None}
    run.expect(codes <= {JobErrorCode.bad_output}, f"bad pictures end as bad_output ({codes})")
    books = system.books(run.accepted)
    run.expect(books is None or not books.unknown, "nothing about their cost is unknown")
    grown = memory.rss - before
    run.notes.append(f"the worker and its children grew by {grown / 1e6:,.0f} MB to {memory.rss / 1e6:,.0f} MB")
    run.expect(run.size.jobs < LONG or grown < MAY_GROW, f"the worker grows by less than {MAY_GROW / 1e6:,.0f} MB")
    expect_served(run, picture(PICTURE_BYTES))


DRILL = Drill(
    "bad_pictures",
    "What is no whole picture is neither stored nor served, and harms no other job",
    bad_pictures,
    long=Size(2000, faults=1, submitting=1),
    short=Size(2 * len(BAD), faults=1, submitting=0.5, delay=0.1),
)
