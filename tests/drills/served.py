"""What the web side serves at the end is held against what the vendor sent."""

import requests

from tests.drills.run import Run


def expect_served(run: Run, picture: bytes) -> None:
    """Every job that succeeded has the vendor's picture, byte for byte; no other job has one."""
    wrong: list[str] = []
    with requests.Session() as http:
        http.trust_env = False
        for job_id, end in run.ends.items():
            served = run.system.image(http, job_id)
            if served != (picture if end.succeeded else None):
                wrong.append(run.accepted[job_id])
    run.expect(not wrong, f"what is served is what the vendor sent (not so for {len(wrong)}: {wrong[:3]})")
