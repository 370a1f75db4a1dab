"""The web side is killed at any moment, under submissions, and started again."""

from tests.drills.drill import Drill
from tests.drills.run import Run, Size


def killed_api(run: Run) -> None:
    system = run.system
    run.submit(run.size.jobs)
    for _ in run.moments():
        fault = run.fault()
        system.kill(system.web)
        system.start(system.web)
        run.until("its web side answers", system.answers)
        fault.seconds = run.now() - fault.at  # whoever has no answer asks again: that long at most


DRILL = Drill(
    "killed_api",
    "What was accepted ends, whenever the API is killed; what was repeated is made once",
    killed_api,
    long=Size(2000, faults=15, submitting=75),
    short=Size(100, faults=3, submitting=6),
    databases=("sqlite", "postgresql"),
)
