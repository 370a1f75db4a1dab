"""Pictures: put first, read back byte for byte, and found again by job."""

from shared.database import Database
from shared.image_store import DatabaseImageStore
from tests.lives import an_image, claim_one, submit


def test_a_picture_is_read_back_byte_for_byte(database: Database) -> None:
    store = DatabaseImageStore(database)
    submit(database)
    claim = claim_one(database)
    data = bytes(range(256)) * 5000
    image = an_image(claim, data, warnings=[{"code": "size_differs", "message": "300x200"}])
    store.put(image, data)
    assert store.get(claim.job_id, claim.attempt) == data
    assert store.of_job(claim.job_id) == [image]


def test_putting_the_same_picture_again_changes_nothing(database: Database) -> None:
    store = DatabaseImageStore(database)
    submit(database)
    claim = claim_one(database)
    store.put(an_image(claim, b"first"), b"first")
    store.put(an_image(claim, b"again"), b"again")
    assert store.get(claim.job_id, claim.attempt) == b"first"


def test_a_removed_picture_is_gone_and_removing_it_again_is_fine(database: Database) -> None:
    store = DatabaseImageStore(database)
    submit(database)
    claim = claim_one(database)
    store.put(an_image(claim, b"x"), b"x")
    store.remove(claim.job_id, claim.attempt)
    store.remove(claim.job_id, claim.attempt)
    assert store.get(claim.job_id, claim.attempt) is None
    assert store.of_job(claim.job_id) == []


def test_pages_walk_over_every_picture_once(database: Database) -> None:
    store = DatabaseImageStore(database)
    for _ in range(7):
        submit(database)
        claim = claim_one(database)
        store.put(an_image(claim, b"x"), b"x")
    walked: list[tuple[str, int]] = []
    after = ("", 0)
    while page := store.page(after, 3):
        walked += page
        after = page[-1]
    assert len(walked) == len(set(walked)) == 7
    assert walked == sorted(walked)
