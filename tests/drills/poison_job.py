"""One job among many crashes every process that works at it.

The drill kills the worker, with all that it has in its hands, whenever the vendor is asked for that job's picture; it
is started again, as a supervisor would. The same load is run first without that job.
"""

from collections.abc import Collection

from bench.figures import percentile
from bench.vendor import HELD
from shared.errors import JobErrorCode
from tests.drills.drill import Drill
from tests.drills.run import Run, Size
from tests.drills.spooled_pictures import answered
from tests.drills.systems import Drilled

POISON = f"{HELD} poison"
#: How many deaths its job may cost: the default of DARKROOM_MAX_CRASHES.
MAX_CRASHES = 3
#: A system that lets it kill more often is let off here, and the poison is made harmless.
MOST_DEATHS = 6


def poison_job(run: Run) -> None:
    system, others = run.system, (run.size.jobs - 1) // 2
    without = seconds_for(run, run.size.jobs - 1 - others)
    began, alone = run.now(), set(run.accepted)
    run.submit(1, POISON)
    run.submit(others)
    run.until("the poison is accepted", lambda: poison_of(run), run.quiet_seconds)
    poison = poison_of(run)
    run.doomed.add(poison)
    prompt = run.accepted[poison]
    for deaths in range(MOST_DEATHS):
        run.until(
            "the poison kills again, or ends",
            lambda: calls(system, prompt) > deaths or poison in run.ends,  # noqa: B023
            2 * run.quiet_seconds,
        )
        if poison in run.ends:
            break
        fault = run.fault()
        run.kill_worker(fault)
        fault.waits_for = run.open() - run.doomed
        fault.in_hand = set(fault.in_hand) - run.doomed
    else:
        run.notes.append(f"after {MOST_DEATHS} deaths the poison was given out again; it was made harmless then")
        run.faults[-1].waits_for = run.open()
        answered(run, run.faults[-1])
    run.settle()
    died = len(run.faults)
    run.expect(died == MAX_CRASHES, f"the poison has cost {MAX_CRASHES} deaths when it ends ({died})")
    run.expect(
        system.books([]) is None or calls(system, prompt) <= MAX_CRASHES,
        f"the vendor is asked for it {MAX_CRASHES} times at most ({calls(system, prompt)})",
    )
    run.expect(system.failed_with(poison) in (JobErrorCode.worker_crashed, None), "it failed as worker_crashed")
    neighbours = set(run.accepted) - alone - run.doomed
    last = max((run.ended_at[job_id] for job_id in run.ends if job_id not in run.doomed), default=began)
    beyond = sum(system.vendor.book()["by_prompt"].get(run.accepted[i], 0) - 1 for i in run.ends if i != poison)
    books = system.books([job_id for job_id in run.accepted if job_id != poison])
    run.notes.append(
        f"what the poison cost its {others:,} neighbours: {last - began:.1f} s until all had ended instead of "
        f"{without:.1f} s, each within {_p95(run, neighbours):.1f} s of its acceptance (p95) instead of "
        f"{_p95(run, alone):.1f} s, {beyond:,} calls beyond their images, "
        f"{books.unknown if books else 0:,} unknown attempts"
    )


def seconds_for(run: Run, jobs: int) -> float:
    began = run.now()
    run.submit(jobs)
    run.settle()
    return max(run.ended_at.values(), default=began) - began


def _p95(run: Run, jobs: Collection[str]) -> float:
    """Seconds from its acceptance to its end."""
    return percentile([run.ended_at[job_id] - run.accepted_at[job_id] for job_id in jobs if job_id in run.ends], 95)


def poison_of(run: Run) -> str:
    return next((job_id for job_id, prompt in list(run.accepted.items()) if prompt.startswith(POISON)), "")


def calls(system: Drilled, prompt: str) -> int:
    return int(system.vendor.book()["by_prompt"].get(prompt, 0))


DRILL = Drill(
    "poison_job",
    f"A job that kills its worker fails alone, after {MAX_CRASHES} deaths; every other one succeeds",
    poison_job,
    long=Size(2000, faults=MAX_CRASHES, submitting=20),
    short=Size(61, faults=MAX_CRASHES, submitting=1, delay=1),
    databases=("postgresql",),
)
