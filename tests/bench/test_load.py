"""The load generator and the vendor's stand-in, against each other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from bench.load.dialects import DIALECTS, JobFailed, completed_at, is_done
from bench.outside import Vendor, run_load
from bench.processes import Processes
from bench.vendor import HELD
from tests.service import eventually

slow = pytest.mark.slow


@pytest.fixture
def vendor(tmp_path: Path) -> Iterator[Vendor]:
    folder = tmp_path / "processes"  # it goes with them
    folder.mkdir()
    processes = Processes(folder)
    vendor = Vendor(processes)
    yield vendor
    vendor.close()
    processes.close()
    assert not folder.exists()


def call(vendor: Vendor, prompt: str, timeout: float = 60) -> requests.Response:
    wish = {"model": "any", "data": {"prompt": prompt}}
    return requests.post(vendor.url, json=wish, timeout=timeout)


@slow
def test_vendor_answers_pictures_of_the_wished_size_and_keeps_a_book(vendor: Vendor) -> None:
    vendor.wish(delay=0, size=30_000)
    answer = call(vendor, "a red fox")
    assert answer.content.startswith(b"\x89PNG") and 25_000 < len(answer.content) < 35_000
    book = vendor.book()
    assert (book["calls"], book["in_flight"], book["most_in_flight"]) == (1, 0, 1)
    assert list(book["arrivals"]) == ["a red fox"]


@slow
def test_vendor_holds_what_is_to_be_held_until_the_release(vendor: Vendor) -> None:
    with pytest.raises(requests.ReadTimeout):
        call(vendor, f"{HELD} 1", timeout=0.3)
    eventually("who hangs up is not in flight", lambda: vendor.book()["in_flight"] == 0)
    vendor.release()
    assert call(vendor, "not to be held").ok


@slow
def test_load_counts_answers_and_their_bytes(vendor: Vendor) -> None:
    def load(seconds: float) -> dict[str, Any]:
        return run_load("rate", port=vendor.port, dialect="", kind="large", connections=2, seconds=seconds)

    found = load(0.3)
    if not found["per_second"]:
        found = load(10)  # on a busy machine the short one may see no answer
    assert found["per_second"] > 0 and found["refused"] == 0
    assert found["bytes_per_second"] / found["per_second"] == pytest.approx(1_200_000, rel=0.05)


@slow
def test_load_says_in_one_line_why_it_failed(vendor: Vendor) -> None:
    with pytest.raises(RuntimeError, match="batch: RuntimeError: answered 404 in place of 202"):
        run_load("batch", port=vendor.port, dialect="darkroom", jobs=1, connections=1)


def test_a_failed_job_spoils_the_measurement() -> None:
    with pytest.raises(JobFailed, match="failed: why"):
        is_done(DIALECTS["darkroom"], {"status": "failed", "error": "why"})
    with pytest.raises(JobFailed):
        is_done(DIALECTS["baseline"], {"status": "FAILURE"})


@pytest.mark.parametrize("moment", ["2026-11-23T05:00:00.250Z", "2026-11-23 05:00:00.250000"])
def test_moments_are_utc_with_and_without_a_zone(moment: str) -> None:
    assert completed_at({"completed_at": moment}) == 1795410000.25
