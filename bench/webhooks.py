"""How soon webhooks arrive, and whether those who take them well notice those who don't.

A submitted job is an event already, so nothing is drawn. Every endpoint hears of every job; the hostile ones each
misbehave in their own way. The time is from the event to the moment in which the delivery is written down.
"""

import threading
import time
from collections.abc import Mapping, Sequence

import requests
from sqlalchemy import func, select

from bench.figures import percentile
from bench.load.dialects import API_KEY
from bench.outside import eventually
from bench.systems import Darkroom
from shared.database import Database
from shared.tables import DeliveryStatus, deliveries, events
from tests.receiver import Behaviour, Receiver, drips, floods, hangs, resets, says

#: One endpoint each.
HOSTILE: Mapping[str, Behaviour] = {
    "hangs": hangs,
    "drips": drips,
    "redirects": says(302, Location="http://127.0.0.1:1/"),
    "floods": floods,
    "resets": resets,
    "gone": says(410),
    "fails": says(500),
}
GOOD = 28
TOLD = "job.queued"
#: Jobs before anything is measured.
WARMTH = 10
#: Jobs a second: 28 good deliveries each.
RATE = 2.0


def webhooks(system: Darkroom, jobs: int) -> dict[str, float]:
    """In milliseconds, first with the good endpoints alone and then with a fifth of hostile ones beside them."""
    receiver = Receiver()
    database = Database(system.database_url, connections=2)
    url = f"http://127.0.0.1:{system.port}"

    def arrived(jobs: int) -> None:
        with_all = jobs * len(good)
        eventually("the deliveries to the good", system.processes, lambda: _count(database, good) >= with_all)

    try:
        with requests.Session() as http:
            http.trust_env = False
            http.headers["Authorization"] = f"Bearer {API_KEY}"
            good = [_register(http, url, f"{receiver.url}/good/{number}") for number in range(GOOD)]
            _tell(http, url, WARMTH)  # as in any service that has run for a while, the good have proved themselves
            arrived(WARMTH)
            _tell(http, url, jobs)
            arrived(WARMTH + jobs)
            alone = _times(database, good, jobs)
            receiver.behaviours = {f"/{name}": behaviour for name, behaviour in HOSTILE.items()}
            for path in receiver.behaviours:
                _register(http, url, receiver.url + path)
            _tell(http, url, jobs)
            arrived(WARMTH + 2 * jobs)
            among = _times(database, good, jobs)
            for endpoint in http.get(f"{url}/v1/endpoints", timeout=30).json()["data"]:  # what comes after tells nobody
                http.delete(f"{url}/v1/endpoints/{endpoint['id']}", timeout=30).raise_for_status()
    finally:
        receiver.close()
        database.close()
    return {
        "webhooks_p50": percentile(alone, 50),
        "webhooks_p95": percentile(alone, 95),
        "hostile_p50": percentile(among, 50),
        "hostile_p95": percentile(among, 95),
    }


def _register(http: requests.Session, url: str, receiver: str) -> str:
    answer = http.post(f"{url}/v1/endpoints", json={"url": receiver, "events": [TOLD]}, timeout=30)
    answer.raise_for_status()
    return str(answer.json()["id"])


def _tell(http: requests.Session, url: str, jobs: int) -> None:
    began = time.monotonic()
    for number in range(jobs):
        threading.Event().wait(max(0, began + number / RATE - time.monotonic()))
        body = {"input": {"prompt": "a red fox", "width": 256, "height": 256}}
        http.post(f"{url}/v1/jobs", json=body, timeout=30).raise_for_status()


def _count(database: Database, good: Sequence[str]) -> int:
    """The deliveries that these endpoints took."""
    theirs = deliveries.c.endpoint_id.in_(good) & (deliveries.c.status == DeliveryStatus.delivered)
    with database.read() as connection:
        return connection.scalar(select(func.count()).select_from(deliveries).where(theirs)) or 0


def _times(database: Database, good: Sequence[str], jobs: int) -> list[float]:
    """What the deliveries of the latest jobs to these endpoints took, in milliseconds."""
    newest = select(events.c.id).where(events.c.type == TOLD).order_by(events.c.created_at.desc()).limit(jobs)
    took = (
        select(events.c.created_at, deliveries.c.completed_at)
        .join(deliveries, deliveries.c.event_id == events.c.id)
        .where(events.c.id.in_(newest), deliveries.c.endpoint_id.in_(good))
    )
    with database.read() as connection:
        return [(row.completed_at - row.created_at).total_seconds() * 1000 for row in connection.execute(took)]
