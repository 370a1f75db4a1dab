"""The API's wiring: settings, what the routes work with, the routes."""

import sys
from collections.abc import Callable
from functools import partial

from flask_openapi3.models.info import Info
from flask_openapi3.openapi import OpenAPI

from api import (
    attempts,
    auth,
    deliveries,
    endpoints,
    errors,
    events,
    health,
    images,
    job_list,
    jobs,
    metrics,
    models,
    openapi,
    provenance,
    queue,
    request_log,
    strict,
    webhook_secret,
)
from api.auth import Keys
from api.breaker_watch import BreakerWatch
from api.compat import dataoorts
from api.compat.shapes import call_body
from api.depth import Depth
from api.forecast import Forecast
from api.routing import Router
from api.services import Services
from api.submission import submission_body
from api.waiting import Waiting, standing
from api.webhook_shapes import BODIES
from shared import guards, logs, progress
from shared.announcements import Announcer, Listener, client
from shared.breaker import BreakerBoard
from shared.database import Database
from shared.image_store import open_image_store
from shared.inspector import Inspector
from shared.settings import Settings, SettingsError, load
from shared.tickets import Bell, broker
from shared.version import VERSION

#: Gunicorn's code for "this will not start, don't try again".
CANNOT_START = 4

#: Connections to the database a process. A request holds one for a millisecond or so; the other threads wait.
CONNECTIONS = 10

#: How many requests of a process may wait for a job at once, and how many streams of events may be open beside them:
#: together fewer than its threads (api/gunicorn.conf.py), so that those who wait never keep others from being answered.
WAITING_PLACES = 300
STREAM_PLACES = 300


def create_app(settings: Settings | None = None) -> OpenAPI:
    """The application, for `gunicorn "api.app:create_app()"`. Ends the process if the settings are wrong."""
    settings = settings or load_settings()
    logs.hide(settings.secrets)
    return build(open_services(settings))


def load_settings() -> Settings:
    """The settings. Ends the process if they are wrong, and says which."""
    try:
        return load()
    except SettingsError as error:
        sys.stderr.write(f"darkroom api can't start:\n{error}\n")
        sys.exit(CANNOT_START)


def open_services(settings: Settings) -> Services:
    """What the routes work with. Nothing here waits: the database and Redis may be away."""
    database = Database(settings.database_url, connections=CONNECTIONS, wait_seconds=5)
    announcer = Announcer(client(settings))
    redis = client(settings, timeout_seconds=0.5)
    breakers = BreakerBoard(redis)
    watch = BreakerWatch(breakers, settings.backends)
    forecast = Forecast(database, watch, settings.backends, settings.lease_seconds)
    depth = Depth(database, forecast, settings.backends, settings.max_queued)
    waiting = Waiting(
        lambda heard, progressed: Listener(client(settings), heard, {progress.CHANNEL: progressed}),
        partial(standing, database),
        WAITING_PLACES,
        STREAM_PLACES,
    )

    def tell(moved: list[str]) -> None:
        announcer.tell(moved)
        for subject in moved:
            waiting.wake(subject)  # those who wait here are told even while Redis is away

    database.after_commit = tell
    return Services(
        settings=settings,
        database=database,
        images=open_image_store(settings.image_store, database),
        inspector=Inspector(),  # its children are started when the first image comes
        bell=Bell(broker(settings)),
        announcer=announcer,
        waiting=waiting,
        forecast=forecast,
        depth=depth,
        router=Router(settings, depth, forecast, watch),
        keys=Keys(database, settings),
        progress=progress.ProgressBoard(redis),
        breakers=breakers,
        redis=redis,
    )


def look_around(services: Services, say: Callable[[str], object]) -> None:
    """Say what the guards find. The API starts all the same: what keeps it from its work stands at /readyz."""
    refusals, warnings = guards.at_start(guards.Place(services.settings, services.database, services.redis), guards.API)
    for line in (*refusals, *warnings):
        say(line)


def build(services: Services) -> OpenAPI:
    """The routes, and what stands before each of them: an id for the request, the key, strictness."""
    app = OpenAPI(
        "darkroom",
        info=Info(title="Darkroom", version=VERSION, description="Images from prompts, through a queue."),
        security_schemes=openapi.SECURITY_SCHEMES,
        validation_error_callback=errors.raise_for_validation,
        doc_ui=False,
        static_folder=None,
    )
    request_log.install(app)
    errors.install(app)
    auth.install(app, services.keys, services.settings.secret_key)
    strict.install(app, jobs.larger_bodies(services.settings.backends), images.MAY_BE_EMPTY)
    webhooks = (endpoints, deliveries, webhook_secret)
    for resource in (jobs, job_list, attempts, events, images, provenance, *webhooks, queue, models, health, dataoorts):
        openapi.register(app, resource.routes(services))
    openapi.register(app, metrics.routes(services, VERSION))
    app.extensions["darkroom.waiting"] = services.waiting  # for gunicorn.conf.py: waits end when the process stops
    app.extensions["darkroom.look_around"] = partial(look_around, services)
    backends = services.settings.backends
    openapi.install(app, submission_body(backends), call_body(backends), *BODIES)
    return app
