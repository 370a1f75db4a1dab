"""The API's wiring: settings, what the routes work with, the routes."""

import sys

from flask_openapi3.models.info import Info
from flask_openapi3.openapi import OpenAPI
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from api import attempts, auth, errors, health, images, jobs, models, openapi, strict
from api.auth import Keys
from api.services import Services
from api.submission import submission_body
from shared.catalogue import MODELS
from shared.database import Database
from shared.image_store import open_image_store
from shared.settings import Settings, SettingsError, load
from shared.tickets import Bell, broker

#: Gunicorn's code for "this will not start, don't try again".
CANNOT_START = 4

#: Connections to the database a process. A request holds one for a millisecond or so; the other threads wait.
CONNECTIONS = 10


def create_app(settings: Settings | None = None) -> OpenAPI:
    """The application, for `gunicorn "api.app:create_app()"`. Ends the process if the settings are wrong."""
    try:
        return build(open_services(settings or load()))
    except SettingsError as error:
        sys.stderr.write(f"darkroom api can't start:\n{error}\n")
        sys.exit(CANNOT_START)


def open_services(settings: Settings) -> Services:
    """What the routes work with. Nothing here waits: the database and Redis may be away."""
    database = Database(settings.database_url, connections=CONNECTIONS, wait_seconds=5)
    return Services(
        settings=settings,
        database=database,
        images=open_image_store(settings.image_store, database),
        bell=Bell(broker(settings)),
        keys=Keys(database, settings),
        # redis-py would try three times, for up to 10 s each.
        redis=Redis.from_url(
            settings.redis_url, socket_timeout=0.5, socket_connect_timeout=0.5, retry=Retry(NoBackoff(), 0)
        ),
    )


def build(services: Services) -> OpenAPI:
    """The routes, and what stands before each of them: an id for the request, the key, strictness."""
    app = OpenAPI(
        "darkroom",
        info=Info(title="Darkroom", version="0.1.0", description="Images from prompts, through a queue."),
        security_schemes=openapi.SECURITY_SCHEMES,
        validation_error_callback=errors.raise_for_validation,
        doc_ui=False,
        static_folder=None,
    )
    errors.install(app)
    auth.install(app, services.keys)
    strict.install(app)
    for resource in (jobs, attempts, images, models, health):
        app.register_api(resource.routes(services))
    openapi.install(app, submission_body(MODELS, services.settings.backends))
    return app
