"""Promise: a vendor that goes out of order holds up no job of `auto` while a card is there; none is paid twice."""

import shutil
from pathlib import Path

import pytest

from tests.gpu.two_backends import CARD, VENDOR, both, outage

pytestmark = pytest.mark.slow


def test_a_vendor_that_goes_out_of_order_in_the_middle_costs_no_auto_job_its_end(
    tmp_path: Path, migrated_sqlite: Path, tiny_sdxl: Path
) -> None:
    database = shutil.copy(migrated_sqlite, tmp_path / "darkroom.db")
    # For nothing, as the card: so the first in the order of the setting gets them, as long as it is well.
    with both(tmp_path, f"sqlite:///{database}", tiny_sdxl, price="0") as running:
        tally = outage(running, jobs=40, steps=2)
    assert tally.ends == {"succeeded": tally.jobs} and tally.images == tally.jobs
    assert tally.made_by == {VENDOR: tally.pictures, CARD: tally.jobs - tally.pictures}
    assert tally.tried_at[f"{VENDOR} succeeded"] == tally.pictures, "every picture that he made was used"
    assert tally.tried_at[f"{VENDOR} failed"] == tally.in_outage > 0
    assert tally.both_shown > 0 and tally.last_at_vendor == tally.pictures, "who failed there was made at the other"
    assert tally.late > 0 and tally.late_at_vendor <= tally.probes, "none waited for the sick one, but the probes"
    assert tally.cost == 0
