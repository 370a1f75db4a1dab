"""A backend's breaker as its workers ask it: one in Redis for all of them, and each one's own memory of it.

Whoever changes it reads it with Redis' clock, makes one of the steps of `worker/breaker.py`, and writes it if nobody
else did meanwhile. Where nothing is to be changed, what was read within the last second is good enough: as long as the
backend is well, Redis is asked once a second. While Redis is away a process makes the same steps on its own memory;
what has turned more often wins when it is back, so an emptied Redis is told again what it knew.
"""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar
from uuid import uuid4

import redis

from shared import breaker as shape
from shared.breaker import PROBE_SECONDS, Breaker
from worker import breaker as rules
from worker.backends.base import Failure
from worker.breaker import Permit, Verdict

log = logging.getLogger(__name__)

T = TypeVar("T")

#: What nobody has touched for so long is forgotten, in milliseconds.
KEPT_MS = 3_600_000
#: Writes it unless somebody else did since it was read ('' stands for nothing).
_WRITE = """
local found = redis.call('GET', KEYS[1]) or ''
if found ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""


class SharedBreaker:
    """Asked before each claim, told of each end of a call; by hundreds of threads."""

    #: What was read is believed for so long.
    BELIEVED_SECONDS = 1.0
    #: After a failure Redis is left alone for this long: one thread waits for it now and then, not all of them always.
    AWAY_SECONDS = 5.0
    #: Writers that are faster than we. Beyond it the next change finds out.
    TRIES = 10

    def __init__(
        self,
        backend: str,
        redis: redis.Redis | None = None,
        *,
        closed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`redis`: None: its own memory is all there is. `closed`: called when this process has closed it."""
        self._backend = backend
        self._redis = redis
        self._key = shape.key(backend)
        self._script = None if redis is None else redis.register_script(_WRITE)
        self._closed = closed
        self._clock = clock
        self._ahead = time.time() - clock()  # of Redis' clock; until it was asked, ours must do
        self._own = Breaker()
        self._fresh_until = self._away_until = -1.0
        self._lock = threading.Lock()
        self._probing: dict[str, threading.Event] = {}

    def admit(self, wanted: int, in_hand: int) -> Permit:
        """How many jobs may be claimed now. A permit for a probe must be used, or given back with `withdraw`."""
        permit = self._change(partial(rules.admit, wanted=wanted, in_hand=in_hand, name=uuid4().hex))
        if permit.probe is not None:
            self._keep(permit.probe)
        return permit

    def ended(self, permit: Permit, failure: Failure | None, job_id: str) -> Verdict:
        """A call for this job that had this permit ended, with a picture or with this failure."""
        before = self._own.turns
        verdict = self._change(partial(rules.ended, permit=permit, failure=failure, job_id=job_id))
        self._stop_keeping(permit)
        if permit.probe is not None and not self._own.is_open and self._own.turns > before:
            self._closed()
        return verdict

    def withdraw(self, permit: Permit) -> None:
        """Nothing was sent under this permit. No harm after `ended`."""
        if permit.probe is not None and self._stop_keeping(permit):
            self._change(partial(rules.withdraw, name=permit.probe))

    # -- The probe's lease --------------------------------------------------------------------------------------------

    def _keep(self, probe: str) -> None:
        """Renew the probe until it has ended: a call may take minutes, and a dead worker's must not keep others out."""
        over = self._probing[probe] = threading.Event()

        def renew() -> None:
            while not over.wait(PROBE_SECONDS / 3):
                if not self._change(partial(rules.renew, name=probe)):
                    return

        threading.Thread(target=renew, name="probe", daemon=True).start()

    def _stop_keeping(self, permit: Permit) -> bool:
        over = self._probing.pop(permit.probe or "", None)
        if over is not None:
            over.set()
        return over is not None

    # -- The one in Redis, and our own --------------------------------------------------------------------------------

    def _change(self, step: Callable[[Breaker, float], tuple[Breaker, T]]) -> T:
        with self._lock:
            moment = self._clock()
            changed, answer = step(self._own, moment + self._ahead)
            away = self._redis is None or moment < self._away_until
            if not away and not (changed == self._own and moment < self._fresh_until):
                try:
                    changed, answer = self._change_shared(step)
                    self._fresh_until = self._clock() + self.BELIEVED_SECONDS
                except (redis.RedisError, OSError) as error:
                    self._away_until = self._clock() + self.AWAY_SECONDS
                    log.warning("%s: Redis can't be asked for the breaker (%s)", self._backend, type(error).__name__)
            self._remember(changed)
            return answer

    def _change_shared(self, step: Callable[[Breaker, float], tuple[Breaker, T]]) -> tuple[Breaker, T]:
        assert self._redis is not None and self._script is not None
        for _ in range(self.TRIES):
            with self._redis.pipeline() as pipe:
                pipe.get(self._key)
                pipe.time()
                stored, moment = pipe.execute()
            now = shape.clock_of_redis(moment)
            self._ahead = now - self._clock()
            found = shape.read(stored) or Breaker()
            known = found if found.turns >= self._own.turns else self._own
            changed, answer = step(known, now)
            if changed == found or self._script(
                keys=[self._key], args=[stored or b"", shape.written(changed), KEPT_MS]
            ):
                return changed, answer
        raise redis.RedisError("others write all the time")

    def _remember(self, now_known: Breaker) -> None:
        before, self._own = self._own, now_known
        if now_known.is_open and (not before.is_open or before.reason != now_known.reason):
            left = now_known.open_for(self._clock() + self._ahead)
            log.warning(
                "%s: the breaker is open (%s): no job is claimed; the next probe in %.0f s",
                self._backend,
                now_known.reason,
                left,
            )
        elif before.is_open and not now_known.is_open:
            log.warning("%s: the breaker is closed again (it was %s)", self._backend, before.reason)
