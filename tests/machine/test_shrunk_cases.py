"""What the machine found in the product, shrunk, and kept."""

from tests.machine.house import House
from tests.machine.stepping import Answer, Fate


def test_a_claim_whose_commit_failed_is_nobodys_and_calls_nobody(house: House) -> None:
    """It was worked at: a paid call without an attempt's row, and the next worker's call for the same attempt."""
    house.submits(None)
    house.a_worker_starts("host:7")
    hand = house.alive[0].takes_a_ticket()
    house.goes_on(hand, 1, Fate.is_rolled_back)
    assert hand.ended
    house.goes_on(house.alive[0].takes_a_ticket(), 9, answer=Answer.no_money)
    house.promises.after_a_rule()
    house.settles()


def test_a_claim_whose_commit_was_made_and_never_confirmed_is_rescued(house: House) -> None:
    house.submits(None)
    house.a_worker_starts("host:7")
    hand = house.alive[0].takes_a_ticket()
    house.goes_on(hand, 1, Fate.answer_is_lost)
    assert hand.ended
    house.promises.after_a_rule()
    house.settles()
