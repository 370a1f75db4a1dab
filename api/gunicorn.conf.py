# ruff: noqa: N999  gunicorn's name for it
"""How the API is served: `gunicorn -c api/gunicorn.conf.py "api.app:create_app()" --bind ...`."""

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from gunicorn.config import Config  # type: ignore[import-untyped]
from gunicorn.glogging import Logger  # type: ignore[import-untyped]

import api.app  # loaded once, before the processes are forked: they share its memory and its second of CPU
from api.server import Worker
from shared import logs, settings

worker_class = Worker  # gunicorn's gthread, and a request comes in time
# Threads wait for jobs or for the database most of the time: 300 of each process may wait for jobs, 300 more may tell
# streams (WAITING_PLACES, STREAM_PLACES), and the rest answer.
workers = 2
threads = 632
# A worker whose main thread says nothing for so long is replaced. Requests have limits of their own (server.py).
timeout = 60
# After SIGTERM, for what is being answered. Answers take less than a second, unless the database is slow.
graceful_timeout = 30
# Longer than clients wait between two polls (Retry-After: 1).
keepalive = 2
# Where /tmp is a disk, the workers' heartbeat file may block them.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None
# Its default place is shared by all of this user's gunicorns.
control_socket_disable = True
accesslog = None  # api/request_log.py writes a line a request, without what gunicorn's would repeat
# The longest there is: a list may be asked for by 2 kB of metadata, three times as long in a URL.
limit_request_line = 8190
# Nothing here grows with time, so nothing needs to be started afresh.
max_requests = 0


class OurLog(Logger):  # type: ignore[misc]  # gunicorn comes without types
    """Gunicorn's lines, by way of ours. Any `logconfig` would switch its access log on, with paths and queries."""

    def setup(self, cfg: Config) -> None:
        super().setup(cfg)
        logs.configure(settings.log_format(), "api")


logger_class = OurLog


def on_starting(arbiter: Any) -> None:
    """Wrong settings end it before there are workers. gunicorn takes the code of the first one that refuses to start,
    but if two of them have by the time it looks, it falls over the second one, with a traceback and another code."""
    api.app.load_settings()


def pre_request(worker: Any, request: Any) -> None:
    """Of two Idempotency-Keys, gunicorn would make a third one, with a comma. With a blank too, it is refused."""
    keys = [value for name, value in request.headers if name == "IDEMPOTENCY-KEY"]
    if len(keys) > 1:
        rest = [header for header in request.headers if header[0] != "IDEMPOTENCY-KEY"]
        request.headers[:] = [*rest, ("IDEMPOTENCY-KEY", ", ".join(keys))]


def post_worker_init(worker: Any) -> None:
    """The first process says what is not as it should be; nobody waits for that."""
    if worker.age == 1:
        look_around = worker.wsgi.extensions["darkroom.look_around"]
        threading.Thread(target=look_around, args=(logging.getLogger("gunicorn.error").warning,), daemon=True).start()
    _end_waits_at_sigterm(worker)


def _end_waits_at_sigterm(worker: Any) -> None:
    """Waits and streams would otherwise use up the grace."""
    waiting = worker.wsgi.extensions["darkroom.waiting"]
    stop: Any = signal.getsignal(signal.SIGTERM)

    def end_waits_and_stop(number: int, frame: FrameType | None) -> None:
        waiting.close()
        stop(number, frame)

    signal.signal(signal.SIGTERM, end_waits_and_stop)
