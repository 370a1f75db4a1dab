"""What a drill is, and how one is held."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from redis import RedisError
from requests import RequestException

from shared.database import AWAY
from tests.drills.count import Count
from tests.drills.run import Run, Size, Stuck
from tests.drills.systems import Drilled

PICTURE_BYTES = 20_000


@dataclass(frozen=True)
class Drill:
    """`do` breaks something. `databases`: those that `./dev test` holds the short one on; the first is the long one's.

    `possible`: those that it can be held on at all.
    """

    name: str
    promise: str
    do: Callable[[Run], None]
    long: Size
    short: Size
    databases: tuple[str, ...] = ("sqlite",)
    possible: tuple[str, ...] = ("sqlite", "postgresql")
    redis_behind_proxy: bool = False
    #: What is made ready before the system starts; `system.at_end` undoes it.
    prepare: Callable[[Drilled], None] = lambda system: None
    #: Why it can't be held on this machine.
    hindrance: Callable[[], str | None] = lambda: None

    def hold(self, system: Drilled, size: Size, seed: int, quiet_seconds: float) -> Count:
        """Start the system, break it, wait for the end, count, and end it."""
        system.redis_appends = True
        if self.redis_behind_proxy:
            system.put_redis_behind_proxy()
        try:
            self.prepare(system)
        except BaseException:
            system.close()
            raise
        with system:
            system.vendor.wish(size.delay, PICTURE_BYTES)
            run = Run(system, size, Random(f"{seed} {self.name}"), quiet_seconds)
            try:
                self.do(run)
            except (Stuck, RuntimeError, RedisError, RequestException, *AWAY) as error:
                run.expect(False, f"the drill goes to its end ({type(error).__name__}: {error})")
            run.settle()
            return run.count()
