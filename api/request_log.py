"""One line a request, once it is answered: who asked for which route, and how it went.

The route's template and not the path, which is whatever somebody sent; no query, which may hold a link's signature; no
headers and no body.
"""

import logging
import time

from flask import Flask, Response, g, request

from shared import logs
from shared.ids import is_id

log = logging.getLogger("api.requests")

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def install(app: Flask) -> None:
    """Before everything else, so that the time is the whole one and the status the last one."""

    @app.before_request
    def start_the_clock() -> None:
        g.started = time.monotonic()

    @app.after_request
    def tell(response: Response) -> Response:
        its_id = (request.view_args or {}).get("id", "")
        if is_id("job", its_id):
            logs.note(job_id=its_id)
        method = request.method if request.method in _METHODS else "another method"
        route = None if request.url_rule is None else request.url_rule.rule
        started = g.started
        fields = {"method": method, "route": route, "status": response.status_code, "project_id": g.get("project_id")}

        def write() -> None:
            seconds = round(time.monotonic() - started, 4)
            log.info("%s %s %d", method, route, fields["status"], extra={**fields, "seconds": seconds})

        if response.is_streamed:
            response.call_on_close(write)  # a stream of events ends in minutes; its line says how many
        else:
            write()
        return response
