"""Promise: a sender killed between POST and commit sends the same event again, never a new one and never none."""

from pathlib import Path

import pytest

from tests.drills.killed_senders import SHORT, killed_senders

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_every_event_arrives_although_their_sender_is_killed_in_the_middle(tmp_path: Path, sqlite_url: str) -> None:
    events, kills = SHORT
    tally = killed_senders(tmp_path, sqlite_url, events=events, kills=kills, seed=1, patience=90)
    assert tally.broken_promises() == []
