"""Hundreds of streams and of long-polls at one process of the API: what it takes, and how soon they are told."""

import psutil

from bench.outside import eventually
from bench.systems import System
from local.web import free_port

#: What the process is called that is asked.
ALONE = "api-alone"


def streams(system: System, clients: int) -> dict[str, float]:
    """At one more process of the API, beside those of the system. Its memory is that of the process that answers."""
    port = free_port()
    # Gunicorn's own variable: it counts more than the configuration file.
    system.start_beside("api", ALONE, PORT=str(port), GUNICORN_CMD_ARGS="--workers 1")
    try:
        eventually("one more process of the API", system.processes, lambda: system.answers(port))
        alone = system.processes.running[ALONE]
        at_rest = sum(child.memory_info().rss for child in psutil.Process(alone.pid).children())
        told = system.load("streams", within=120, port=port, control=system.port, clients=clients)
        used = sum(child.memory_info().rss for child in psutil.Process(alone.pid).children())
    finally:
        system.processes.kill(ALONE)
    system.vendor.release()
    values = {name: told[name] * 1000 for name in ("stream_p50", "stream_p99", "wait_p50", "wait_p99", "asked_p99")}
    return values | {"stream_places": told["places"], "stream_rss": used / 1e6, "stream_rest": at_rest / 1e6}
