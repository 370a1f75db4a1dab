"""What the drills of webhooks share: a service without workers that draw, and receivers of what its jobs' start tells.

A submitted job is an event already, so thousands of deliveries need no picture.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from sqlalchemy import func, select

from shared.database import Database
from shared.tables import TryOutcome, deliveries, delivery_tries, events
from tests.receiver import Receiver
from tests.service import Service, service

#: What the receivers of a drill are told.
TOLD = "job.queued"
#: Submissions at once.
CLIENTS = 4


@dataclass
class Sending:
    """A service whose deliveries go to receivers of the drill."""

    service: Service
    receivers: list[Receiver] = field(default_factory=list)

    def receiver(self) -> Receiver:
        self.receivers.append(Receiver())
        return self.receivers[-1]

    def register(self, url: str) -> str:
        """An endpoint that is told of every job; its secret."""
        answer = self.service.http.post(
            f"{self.service.url}/v1/endpoints", json={"url": url, "events": [TOLD]}, timeout=30
        )
        assert answer.status_code == 201, answer.text
        return str(answer.json()["secret"])

    def submit(self, count: int, webhook: str | None = None) -> None:
        """Submit so many jobs, as fast as they are taken."""
        numbers = iter(range(count))
        taking = threading.Lock()
        body: dict[str, Any] = {"input": {"prompt": "a red fox", "width": 256, "height": 256}}
        if webhook is not None:
            body["webhook"] = {"url": webhook, "events": [TOLD]}

        def serve() -> None:
            with requests.Session() as http:
                http.trust_env = False
                http.headers.update(self.service.http.headers)
                while True:
                    with taking:
                        if next(numbers, None) is None:
                            return
                    assert http.post(f"{self.service.url}/v1/jobs", json=body, timeout=30).status_code == 202

        threads = [threading.Thread(target=serve) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    @property
    def database(self) -> Database:
        return self.service.database

    def told(self) -> set[str]:
        """The ids of the events that the receivers are to be told."""
        with self.database.read() as connection:
            return set(connection.scalars(select(events.c.id).where(events.c.type == TOLD)))

    def statuses(self) -> Counter[str]:
        """The deliveries by status."""
        with self.database.read() as connection:
            return Counter(connection.scalars(select(deliveries.c.status)))

    def unknown(self) -> int:
        """Tries whose end nobody saw."""
        with self.database.read() as connection:
            unseen = delivery_tries.c.outcome == TryOutcome.unknown
            return connection.scalar(select(func.count()).select_from(delivery_tries).where(unseen)) or 0


@contextmanager
def sending(folder: Path, database_url: str) -> Iterator[Sending]:
    """The API, the sweep and the senders, without anybody who draws."""
    with service(folder, database_url) as running:
        running.start("api", "worker-sweep", "worker-webhooks")
        drill = Sending(running)
        try:
            yield drill
        finally:
            for receiver in drill.receivers:
                receiver.close()
