# ruff: noqa: N999  gunicorn's name for it
"""How the API is served: `gunicorn -c api/gunicorn.conf.py "api.app:create_app()" --bind ...`."""

from pathlib import Path

worker_class = "gthread"
# Threads wait for the database most of the time. 128 answers at once, over 2 x 10 connections to the database.
workers = 2
threads = 64
# A worker whose main thread says nothing for so long is replaced; requests have no limit of their own.
timeout = 60
# After SIGTERM, for what is being answered. Answers take less than a second, unless the database is slow.
graceful_timeout = 30
# Longer than clients wait between two polls (Retry-After: 1); an idle connection delays the end by as much.
keepalive = 2
# Where /tmp is a disk, the workers' heartbeat file may block them.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None
# Its default place is shared by all of this user's gunicorns.
control_socket_disable = True
accesslog = None
# Nothing here grows with time, so nothing needs to be started afresh.
max_requests = 0
