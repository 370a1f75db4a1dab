"""The server as HTTP sees it: calls with a total deadline each, answers of bounded length, and nobody in between."""

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import requests
from requests.auth import HTTPBasicAuth
from urllib3.exceptions import HTTPError

from worker.backends.automatic1111_answers import State, state_of
from worker.backends.json_answers import read_json
from worker.backends.redaction import RedactingFilter, Redaction
from worker.deadline import Call, Watchdog, WatchedSession

_LIBRARY_LOG = logging.getLogger("urllib3.connection")  # warns about malformed headers, and shows them

LONGEST_ANSWER = 64 * 1024 * 1024  # bytes: the longest picture in base64, and a mask
LONGEST_ERROR = 64 * 1024  # bytes that are read of an answer that is not 2xx
#: The longest that a question beside a picture may take, in seconds.
QUESTION_SECONDS = 3.0


class NoAnswer(Exception):
    """The call ended without one. What of it was sent, and whether it was cut off, is known by its Call."""


class AnswerTooLong(Exception):
    """More than LONGEST_ANSWER bytes."""


class Server:
    """The server behind `url`; `auth` is `user:password`, as its `--api-auth`. Safe to use from many threads."""

    def __init__(self, url: str, auth: str | None, connect_seconds: float, redact: Redaction) -> None:
        self._url = url.rstrip("/")
        self._connect_seconds = connect_seconds
        self.watchdog = Watchdog()
        self._log_filter = RedactingFilter(redact)
        _LIBRARY_LOG.addFilter(self._log_filter)
        self._session = WatchedSession(4)
        self._session.trust_env = False  # it is a machine of ours: no proxy gets what is meant for it, no .netrc counts
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        if auth is not None:
            self._session.auth = HTTPBasicAuth(*auth.split(":", 1))
        self._session.headers.clear()
        self._session.headers.update(
            {"User-Agent": "darkroom", "Accept": "application/json", "Accept-Encoding": "identity"}
        )

    def post(self, path: str, content: Mapping[str, Any], call: Call) -> tuple[int, Mapping[str, str], bytes]:
        """The answer, whatever it says. Raises NoAnswer, AnswerTooLong.

        Errors of the HTTP libraries are not repeated: their texts and attributes hold what we sent.
        """
        return self._ask("POST", path, json.dumps(content).encode(), call)

    def question(self, method: str, path: str, began: Callable[[Call], None] = lambda call: None) -> tuple[int, Any]:
        """A short one: its status and JSON. Raises NoAnswer, AnswerTooLong. `began` is given what can cut it off."""
        with self.watchdog.call(QUESTION_SECONDS) as call:
            began(call)
            status, _, body = self._ask(method, path, b"" if method == "POST" else None, call)
        return status, read_json(body)

    def state(self, began: Callable[[Call], None] = lambda call: None, *, preview: bool = False) -> State | None:
        """What it is at; None if it does not say."""
        skip = "false" if preview else "true"
        with suppress(NoAnswer, AnswerTooLong):
            status, content = self.question("GET", f"/sdapi/v1/progress?skip_current_image={skip}", began)
            return state_of(content) if status == 200 else None
        return None

    def interrupt(self) -> bool:
        """Whether it heard."""
        with suppress(NoAnswer, AnswerTooLong):
            return self.question("POST", "/sdapi/v1/interrupt")[0] == 200
        return False

    def close(self) -> None:
        self.watchdog.close()
        self._session.close()
        _LIBRARY_LOG.removeFilter(self._log_filter)

    def _ask(self, method: str, path: str, content: bytes | None, call: Call) -> tuple[int, Mapping[str, str], bytes]:
        try:
            with self._session.request(
                method,
                self._url + path,
                data=content,
                headers={} if content is None else {"Content-Type": "application/json"},
                stream=True,
                allow_redirects=False,
                timeout=(min(self._connect_seconds, call.seconds_left or 0.001), call.seconds_left or 0.001),
            ) as response:
                return response.status_code, response.headers, _read(response, call)
        except (requests.RequestException, HTTPError, OSError) as error:
            problem = type(error).__name__
        raise NoAnswer(problem)


def _read(response: requests.Response, call: Call) -> bytes:
    successful = 200 <= response.status_code < 300
    limit = LONGEST_ANSWER if successful else LONGEST_ERROR
    body = bytearray()
    try:
        # One byte more than allowed, and decompressed in bounded steps: a bomb does not get to go off.
        while len(body) <= limit and (
            part := response.raw.read(min(65536, limit + 1 - len(body)), decode_content=True)
        ):
            body += part
    except (HTTPError, OSError):
        # An error whose text broke off is told by its status all the same.
        if successful:
            raise
    if successful and call.expired:
        raise TimeoutError  # without a Content-Length, being cut off looks like the end
    if successful and len(body) > limit:
        raise AnswerTooLong
    return bytes(body)
