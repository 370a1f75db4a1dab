"""Celery and the worker's wiring. Started by Celery's own command; the lines stand in the Procfile.

    celery -A worker.app worker -P threads -c 200 -Q generate.dataoorts
    celery -A worker.app worker -P threads -c 16 -Q generate.diffusers
    celery -A worker.app worker -P threads -c 1 -Q generate.automatic1111
    celery -A worker.app worker -P threads -c 100 -Q deliver

Pool `threads`: a hosted backend's worker waits on the network, 200 calls at once in one process, and the pool is the
one that neither loses nor stalls at that (the measurements stand in docs/decisions.md). On a GPU they wait for the one
thread that owns the card, and the model is loaded here, before Celery says that it is ready.
"""

import logging
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from celery import Celery, signals
from sqlalchemy import Connection

from shared import catalogue, guards, logs, settings, tickets
from shared.announcements import Announcer, Listener, client
from shared.database import AWAY, Database
from shared.image_store import open_image_store
from shared.inspector import InspectorAway
from shared.progress import ProgressTeller
from shared.settings import Settings
from worker import presence, tasks
from worker.backends.base import Backend, CannotLoad
from worker.closing import Closing
from worker.generation import Generation
from worker.leases import Leases
from worker.presence import Progress
from worker.recovery import Recovery
from worker.shared_breaker import SharedBreaker
from worker.slots import Slots
from worker.spool import Spool
from worker.stop import Stop
from worker.watchdog import Watchdog

if TYPE_CHECKING:
    from worker.sender import Sender

log = logging.getLogger(__name__)

app = Celery("darkroom")


def _refuse(why: object) -> NoReturn:
    sys.exit(f"darkroom worker can't start:\n{why}")


@app.on_configure.connect
def _configure(sender: Celery, **_: Any) -> None:
    try:
        sender.conf.update(tickets.configuration(settings.load()))
    except settings.SettingsError as error:
        _refuse(error)


class Hearing:
    """How often Celery's consumer heard of Redis."""

    heard = 0

    def hear(self) -> None:
        self.heard += 1


class Worker:
    """What this process works with, made once, before it takes its first ticket."""

    def __init__(self, wanted: Settings, queues: set[str], slots: int) -> None:
        self.name = presence.own_name()
        self.slots = slots
        self.stopping = Stop()
        self.slots_at_work = Slots(slots)
        self.hearing = Hearing()
        self.database = Database(wanted.database_url, connections=10, wait_seconds=30)
        self.announcer = Announcer(client(wanted))
        self.database.after_commit = self.announcer.tell
        self.progress = ProgressTeller(client(wanted))
        self.bell = tickets.Bell(tickets.broker(wanted))
        for_breakers = client(wanted, timeout_seconds=0.5)
        images = open_image_store(wanted.image_store, self.database)
        self.leases = Leases(self.database, wanted.lease_seconds, self._present)
        self.backends = [_backend(name, wanted, slots) for name in wanted.backends if tickets.queue_of(name) in queues]
        self.spools = {backend.name: _spool(wanted.spool / backend.name) for backend in self.backends}
        self.recoveries = {
            backend.name: Recovery(
                self.database, Closing(self.database, images), backend, self.spools[backend.name], self.stopping
            )
            for backend in self.backends
        }
        self.generations = {
            backend.name: Generation(
                database=self.database,
                images=images,
                backend=backend,
                leases=self.leases,
                worker=self.name,
                prices={name: catalogue.cost(backend.name, name, wanted.prices) for name in catalogue.MODELS},
                max_attempts=wanted.max_attempts,
                max_crashes=wanted.max_crashes,
                lease_seconds=wanted.lease_seconds,
                stopping=self.stopping,
                others=[name for name in wanted.backends if name != backend.name],
                spool=self.spools[backend.name],
                breaker=SharedBreaker(
                    backend.name, for_breakers, closed=partial(self.bell.ring, backend.name, tickets.ENOUGH)
                ),
                may_claim=partial(self._may_claim, self.recoveries[backend.name]),
                more=partial(self.bell.ring, backend.name),
                tell=self.progress.tell,
                slots=self.slots_at_work,
            )
            for backend in self.backends
        }
        # A call that can be stopped is stopped at once; the others learn of a cancel from their heartbeat.
        stops = any(backend.capabilities.cancel for backend in self.backends)
        self.listener = Listener(client(wanted), self.leases.look_again) if stops else None
        self.sender = self._sender(wanted) if tickets.queue_of(tickets.DELIVERIES) in queues else None
        self.watchdog = Watchdog(
            turns=lambda: self.leases.turns,
            stopping=self.stopping,
            slots=self.slots_at_work,
            heard=lambda: self.hearing.heard,
            tickets=partial(tickets.waiting, client(wanted), sorted(queues)),
        )

    def _sender(self, wanted: Settings) -> "Sender":
        from shared.webhook_secrets import Vault
        from worker.posting import Poster
        from worker.sender import Sender

        if wanted.public_url is None:
            _refuse("DARKROOM_PUBLIC_URL: must be set, as webhooks carry links: where clients reach the API")
        return Sender(
            database=self.database,
            poster=Poster(wanted.webhook_allow, connections=self.slots),
            vault=Vault(wanted.secret_key),
            worker=self.name,
            slots=self.slots,
            base_url=wanted.public_url,
            secret_key=wanted.secret_key,
            stopping=self.stopping,
            more=partial(self.bell.ring, tickets.DELIVERIES),
            watched=self.slots_at_work,
        )

    def _may_claim(self, recovery: Recovery) -> bool:
        return recovery.done.is_set() and self.leases.steady()

    def start(self) -> None:
        for backend in self.backends:
            try:
                backend.load()
            except (CannotLoad, InspectorAway) as error:
                _refuse(error)
        self.leases.start()
        if self.listener is not None:
            self.listener.start()
        for recovery in self.recoveries.values():
            recovery.start()
        self.watchdog.start()

    def _present(self, tx: Connection) -> None:
        working, watchdog = self.slots_at_work, self.watchdog
        progress = Progress(
            working.in_hand(), working.done, watchdog.quiet_seconds, watchdog.deaf_seconds, watchdog.trouble
        )
        for generation in self.generations.values():
            presence.show(tx, self.name, generation.backend_name, self.slots, generation.mean_seconds, progress)
        if self.sender is not None:
            presence.show(tx, self.name, tickets.DELIVERIES, self.slots, None, progress)

    def close(self) -> None:
        self.stopping.set()
        if self.listener is not None:
            self.listener.close()
        self.watchdog.close()
        for recovery in self.recoveries.values():
            recovery.close()
        for spool in self.spools.values():
            spool.close()
        for backend in self.backends:
            backend.close()
        if self.sender is not None:
            self.sender.close()
        self.leases.close()
        with suppress(*AWAY), self.database.write() as tx:
            presence.leave(tx, self.name)
        self.announcer.close()
        self.progress.close()
        self.bell.close()
        self.database.close()


def _backend(name: str, wanted: Settings, slots: int) -> Backend:
    """Each brings libraries that the others' workers have no use for: they are loaded where it is served."""
    if name == "diffusers":
        from worker.backends.diffusers import local_backend

        return local_backend(wanted)
    if name == "automatic1111":
        from worker.backends.automatic1111 import server_backend

        return server_backend(wanted)
    from worker.backends.dataoorts import Dataoorts

    if not wanted.dataoorts_api_key:
        _refuse(
            "DATAOORTS_API_KEY: must be set. Without a key, let the sandbox stand in for the vendor: `./dev up` does, "
            "and docker-compose.yml says how."
        )
    try:
        return Dataoorts(
            wanted.dataoorts_url,
            wanted.dataoorts_api_key,
            slots=slots,
            deadline_seconds=wanted.call_seconds(Dataoorts.name),
        )
    except ValueError as error:
        _refuse(f"DATAOORTS_API_KEY: {error}")


def _spool(folder: Path) -> Spool:
    try:
        return Spool(folder)
    except OSError as error:
        _refuse(f"DARKROOM_SPOOL: received pictures can't be written to {folder} ({error})")


def _look_around(worker: Worker, wanted: Settings) -> None:
    """Wait for the database, then say what is not as it should be; exit if nothing should start so."""
    place = guards.Place(wanted, worker.database, client(wanted), worker.slots)
    guards.wait_for_database(place, log.warning, worker.stopping.wait)
    does = [guards.GENERATE] * bool(worker.generations) + [guards.DELIVER] * (worker.sender is not None)
    refusals, warnings = guards.at_start(place, *does)
    for line in warnings:
        log.warning(line)
    if refusals:
        _refuse("\n".join(refusals))


@signals.celeryd_init.connect
def _log(**_: Any) -> None:
    """Before Celery says its first word. What this worker does, and so its name, is known a moment later."""
    logs.configure(settings.log_format(), "worker")


@signals.setup_logging.connect
def _keep_to_it(**_: Any) -> None:
    """Celery sets up no logging of its own where somebody hears this."""


@signals.worker_init.connect
def _start(sender: Any, **_: Any) -> None:
    """Before Celery takes the first ticket.

    An exception here it would only log, and go on as a worker that has no task and tells nobody: so whatever it is ends
    the process, and whoever started it starts it again.
    """
    try:
        _get_ready(sender)
    except Exception:
        log.exception("a fault while getting ready")
        _refuse("it could not get ready; the log says where")


def _get_ready(sender: Any) -> None:
    queues = set(sender.app.amqp.queues.consume_from)
    wanted = settings.load()
    logs.hide(wanted.secrets)
    worker = Worker(wanted, queues, sender.concurrency)
    if not worker.generations and worker.sender is None:
        known = f"a backend of DARKROOM_BACKENDS, nor is it {tickets.DELIVERIES}"
        _refuse(f"none of the queues {', '.join(sorted(queues))} belongs to {known}")
    _look_around(worker, wanted)
    sender.app.conf.broker_transport_options |= {"heard": worker.hearing.hear}
    logs.rename(f"worker-{'-'.join(worker.generations) or 'webhooks'}")
    worker.start()
    tasks.register(sender.app, worker.generations, worker.sender)
    # Celery keeps weak references to receivers: these live as long as the worker does.
    signals.worker_shutting_down.connect(lambda **_: worker.stopping.set(), weak=False)
    signals.worker_shutdown.connect(lambda **_: worker.close(), weak=False)
