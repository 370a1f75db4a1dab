"""Closing: how many pictures are in memory while they are put."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import pytest

from shared.database import Database
from shared.image_store import Image, ImageStore
from tests.worker.scripted import DATA, PICTURE
from worker import closing
from worker.closing import Closing


def test_pictures_are_read_when_it_is_their_turn_to_be_put(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "PUT_AT_ONCE", 2)
    monkeypatch.setattr(closing, "PATIENCE_SECONDS", 60)
    lock, both = threading.Lock(), threading.Barrier(2)
    in_memory, most = 0, 0

    def read() -> bytes:
        nonlocal in_memory, most
        with lock:
            in_memory += 1
            most = max(most, in_memory)
        return DATA

    class Store:
        def put(self, image: Image, data: bytes) -> None:
            nonlocal in_memory
            both.wait(30)  # nobody is done before two are here, so a third could be seen
            with lock:
                in_memory -= 1

    closes: Any = Closing(cast(Database, None), cast(ImageStore, Store()))
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda number: closes._put(f"job_{number}", 1, replace(PICTURE, read=read)), range(10)))
    assert most == 2
