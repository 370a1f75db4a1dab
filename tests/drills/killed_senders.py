"""The senders of webhooks are killed in the middle of their deliveries, again and again."""

import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from standardwebhooks.webhooks import Webhook

from tests.drills.webhooks import sending
from tests.receiver import Handler, Letter, takes
from tests.service import eventually

NAME = "killed_senders"
PROMISE = "A sender of webhooks that is killed sends the same event again, never a new one and never none"
#: Events, and kills.
LONG, SHORT = (2000, 20), (60, 2)

#: How long a receiver takes over a delivery, in seconds: so that kills find some in the middle.
SLOWNESS = 0.1


@dataclass(frozen=True)
class Tally:
    """What was counted when all deliveries had ended. `doubles`: POSTs beyond one for each event."""

    events: int
    arrived: int
    posts: int
    doubles: int
    most_of_one: int
    unknown_tries: int
    kills: int
    statuses: Counter[str]
    seconds: float

    def table(self) -> str:
        figures = {
            "events": f"{self.events:,}",
            "  arrived": f"{self.arrived:,}",
            "kills -9 of the sender": f"{self.kills:,}",
            "POSTs": f"{self.posts:,}",
            "  beyond one for each event": f"{self.doubles:,}",
            "  most for one event": f"{self.most_of_one:,}",
            "tries `unknown`": f"{self.unknown_tries:,}",
            "seconds until all were delivered": f"{self.seconds:.0f}",
            "promises broken": f"{len(self.broken_promises())}",
        }
        return "\n".join([f"{name:34}{figure:>8}" for name, figure in figures.items()] + self.broken_promises())

    def broken_promises(self) -> list[str]:
        promises = {
            "every event arrives": self.arrived == self.events,
            "and is known to have arrived": self.statuses == {"delivered": self.events},
            "what came twice stands in the books as a try whose end nobody saw": self.doubles <= self.unknown_tries,
        }
        return [promise for promise, kept in promises.items() if not kept]


def _came(events: int, letters: list[Letter]) -> bool:
    return len({letter.id for letter in letters}) >= events


def killed_senders(folder: Path, database_url: str, *, events: int, kills: int, seed: int, patience: float) -> Tally:
    """`events` deliveries to a slow receiver, and so many kills -9 of the process that sends them, spread over them."""
    chance = Random(seed)
    with sending(folder, database_url) as drill:
        receiver = drill.receiver()

        def slowly(handler: Handler) -> None:
            receiver.closed.wait(SLOWNESS)
            takes(handler)

        receiver.behaviour = slowly
        secret = drill.register(receiver.url)
        verified = 0

        def verify() -> None:
            """What came since the last time: a signature is good for five minutes."""
            nonlocal verified
            for letter in receiver.letters[verified:]:
                Webhook(secret).verify(letter.body, letter.headers)
                verified += 1

        began = time.monotonic()
        submitting = threading.Thread(target=drill.submit, args=(events,))
        submitting.start()
        for number in range(kills):
            at_least = events * number // (kills + 1) + chance.randrange(1, 8)
            receiver.wait_for(partial(_came, at_least), patience)
            verify()
            threading.Event().wait(chance.uniform(0, SLOWNESS))  # anywhere between a POST and its commit
            drill.service.kill("worker-webhooks")
            drill.service.start("worker-webhooks")
        submitting.join()
        receiver.wait_for(partial(_came, events), patience)
        eventually(
            f"all is written down ({drill.statuses()})", lambda: set(drill.statuses()) == {"delivered"}, patience
        )
        verify()
        seconds = time.monotonic() - began
        letters = list(receiver.letters)
        came = Counter(letter.id for letter in letters)
        assert set(came) <= drill.told()
        return Tally(
            events=events,
            arrived=len(came),
            posts=len(letters),
            doubles=len(letters) - len(came),
            most_of_one=max(came.values()),
            unknown_tries=drill.unknown(),
            kills=kills,
            statuses=drill.statuses(),
            seconds=seconds,
        )
