"""The hosted backend: one POST to the vendor a picture, paid by the picture, without an idempotency key.

So every outcome says what is known about the bill. Before any part of the request was sent, nothing was taken
(`not_accepted`, not billed). After that, without a readable answer, it is `unknown`. With an answer,
`dataoorts_answers.py` has the table. What came with a 2xx and is no whole picture was delivered: `bad_output`, billed.

Progress is not reported and cancellation not asked: the vendor knows neither, and a call that is cut off is paid.
"""

import hashlib
import ipaddress
import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import DecodeError, HTTPError

from shared.catalogue import MODELS, SIDE, Number
from shared.inspector import Inspector, InspectorAway
from shared.picture import Unfit
from shared.settings import CALL_SECONDS
from worker.backends.base import (
    Billed,
    Canceled,
    Capabilities,
    Failure,
    Kind,
    Picture,
    PictureWarning,
    Progress,
    Read,
    Request,
    Unjudged,
    one_line,
)
from worker.backends.dataoorts_answers import judge_answer, vendor_words
from worker.backends.redaction import RedactingFilter, Redaction, without_words_of
from worker.deadline import Call, Watchdog, WatchedSession
from worker.room import Room

log = logging.getLogger(__name__)
_LIBRARY_LOG = logging.getLogger("urllib3.connection")  # warns about malformed headers, and shows them

LONGEST_ANSWER = 32 * 1024 * 1024  # bytes, after decompression
LONGEST_ERROR = 64 * 1024  # bytes that are read of an answer that is not 2xx
#: So many pictures are received at once, and how long the others wait for that. Two cores receive and write down some
#: hundreds a second: more at once are no faster.
RECEIVED_AT_ONCE, PATIENCE_SECONDS = 16, 1.0
SLACK_SECONDS = 5.0  # for everything of ours that is neither waiting for the vendor nor judging


class Dataoorts:
    """The vendor behind `url`. `slots`: how many calls are expected at once; any number of threads may call.

    `deadline_seconds` bounds a whole call from the name's resolution to the last byte of the answer,
    `connect_seconds` the part before the request is sent. Raises ValueError for a key that no header can carry.
    """

    #: The longest that one call may take, if nobody says otherwise.
    DEADLINE_SECONDS = CALL_SECONDS["dataoorts"]

    name = "dataoorts"
    capabilities = Capabilities(
        smallest_side=int(SIDE.minimum),
        largest_side=int(SIDE.maximum),
        side_multiple_of=SIDE.multiple_of or 1,
        most_steps=20,
        seed=True,
        progress=False,
        cancel=False,
        image_to_image=False,
        most_at_once=1,
    )

    def __init__(
        self,
        url: str,
        key: str,
        *,
        slots: int = 200,
        deadline_seconds: float = DEADLINE_SECONDS,
        connect_seconds: float = 10.0,
        inspector: Inspector | None = None,
    ) -> None:
        key = key.strip()
        if not key or not re.fullmatch(r"[\x21-\x7e]+", key):
            raise ValueError("the vendor key must be of visible ASCII characters, without blanks")
        self._url = url
        self._deadline_seconds = deadline_seconds
        self._connect_seconds = connect_seconds
        self._inspector = inspector or Inspector()
        self._room = Room(RECEIVED_AT_ONCE)
        self._watchdog = Watchdog()
        self._redact = Redaction(key)
        self._log_filter = RedactingFilter(self._redact)
        _LIBRARY_LOG.addFilter(self._log_filter)
        self._session = WatchedSession(slots)
        # A proxy for the outside world must not get what is meant for this machine.
        self._session.trust_env = not _is_loopback(url)
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))

        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            request.headers["Authorization"] = f"Bearer {key}"
            return request

        # Not a header of the session: requests would let a matching line of ~/.netrc replace it.
        self._session.auth = authorize
        self._session.headers.clear()
        self._session.headers.update(
            {
                "User-Agent": "darkroom",
                "Accept": "image/png, image/jpeg, image/webp, application/json",
                "Accept-Encoding": "identity",  # a picture does not get smaller
                "Content-Type": "application/json",
            }
        )

    @property
    def attempt_seconds(self) -> float:
        return self._deadline_seconds + self._inspector.bound_seconds + SLACK_SECONDS

    def load(self) -> None:
        """Start the processes that judge pictures; raises InspectorAway. The vendor is not asked: each call costs."""
        self._inspector.load()

    def health(self) -> str | None:
        return self._inspector.health()

    def compatible(self, in_hand: Sequence[Mapping[str, Any]]) -> None:
        return None

    def generate(self, requests: Sequence[Request], progress: Progress, canceled: Canceled) -> list[Picture | Failure]:
        if len(requests) > self.capabilities.most_at_once:
            raise ValueError("the vendor makes one picture a call")
        return [self._outcome(request) for request in requests]

    def judge(self, request: Request, data: bytes) -> Picture:
        return self._judge(request, lambda: data)

    def _judge(self, request: Request, read: Read) -> Picture:
        sha256 = hashlib.sha256()

        def read_and_sum() -> bytes:
            data = read()
            sha256.update(data)
            return data

        try:
            facts = self._inspector.inspect_in_turn(read_and_sum)
        except Unfit as unfit:
            log.warning("the vendor's picture is unfit: %s", one_line(str(unfit)))
            raise Failure(Kind.bad_output, Billed.yes, f"the vendor's picture is unfit: {unfit}") from None
        except InspectorAway as away:
            raise Unjudged(Kind.transient, Billed.yes, f"the picture could not be judged: {away}") from None
        warnings = _warnings(request, facts.width, facts.height)
        return Picture(read, facts.content_type, facts.width, facts.height, sha256.hexdigest(), warnings)

    def close(self) -> None:
        self._watchdog.close()
        self._session.close()
        self._inspector.close()
        _LIBRARY_LOG.removeFilter(self._log_filter)

    def _outcome(self, request: Request) -> Picture | Failure:
        with self._watchdog.call(self._deadline_seconds) as call:
            try:
                return self._picture(request, call)
            except Failure as failure:
                # Without its traceback and causes: they hold the answer's bytes, and our key in the request.
                return failure.bare()
            except Exception:  # a fault of ours must not be raised: the outcome says what is known of the bill
                log.exception("a fault in the backend")
                billed = Billed.unknown if call.sent else Billed.no
                return Failure(Kind.internal, billed, "the backend failed; the fault is ours")

    def _picture(self, request: Request, call: Call) -> Picture:
        content = _content(request)
        texts = [str(text) for name in ("prompt", "negative_prompt") if (text := request.input.get(name))]

        def redact(words: str) -> str:
            return self._redact(words, *texts)

        with ExitStack() as held:
            status, headers, body = self._ask(content, call, held)
            try:
                data = judge_answer(status, headers, body, redact, texts)
            except Failure as failure:
                told, words = (
                    without_words_of(texts, one_line(redact(said))) for said in (failure.message, vendor_words(body))
                )
                log.warning("%s, billed %s. The vendor said: %s", told, failure.billed, words)
                raise
            read = request.received(data)
            del body, data  # from here on it takes no memory until its turn comes to be judged
        return self._judge(request, read)

    def _ask(self, content: bytes, call: Call, held: ExitStack) -> tuple[int, Mapping[str, str], bytes]:
        """The answer, whatever it says. Raises Failure if there is none. `held` takes the place that its bytes need.

        Errors of the HTTP libraries are not repeated: their texts and attributes hold what we sent.
        """
        try:
            with self._session.post(
                self._url,
                data=content,
                stream=True,
                allow_redirects=False,
                timeout=(min(self._connect_seconds, self._deadline_seconds), self._deadline_seconds),
            ) as response:
                status = response.status_code
                # The vendor's time runs on meanwhile: half of what is left of it is the body's.
                held.enter_context(self._room.place(min(PATIENCE_SECONDS, call.seconds_left / 2)))
                body = self._read(response, call)
                return status, response.headers, body
        except (requests.RequestException, HTTPError, OSError) as error:
            problem = type(error).__name__
        if not call.sent:
            raise Failure(Kind.not_accepted, Billed.no, f"the vendor could not be reached ({problem})")
        if call.expired:
            message = f"the vendor gave no whole answer in {self._deadline_seconds:g} seconds"
            raise Failure(Kind.transient, Billed.unknown, message)
        raise Failure(Kind.transient, Billed.unknown, f"the connection to the vendor broke ({problem})")

    def _read(self, response: requests.Response, call: Call) -> bytes:
        successful = 200 <= response.status_code < 300
        limit = LONGEST_ANSWER if successful else LONGEST_ERROR
        body = bytearray()
        try:
            # One byte more than allowed, and decompressed in bounded steps: a bomb does not get to go off.
            while len(body) <= limit and (
                part := response.raw.read(min(65536, limit + 1 - len(body)), decode_content=True)
            ):
                body += part
        except DecodeError:
            if successful:
                raise Failure(Kind.bad_output, Billed.yes, "the vendor's answer is wrongly compressed") from None
        except (HTTPError, OSError):
            # An error whose text broke off is told by its status all the same.
            if successful:
                raise
        if successful and call.expired:
            raise TimeoutError  # without a Content-Length, being cut off looks like the end
        if successful and len(body) > limit:
            raise Failure(Kind.bad_output, Billed.yes, f"the vendor's answer has more than {LONGEST_ANSWER} bytes")
        return bytes(body)


def _content(request: Request) -> bytes:
    """The body of the POST, in the vendor's names. Raises Failure (rejected) for what the model does not take."""
    model = MODELS.get(request.model)
    if model is None:
        raise Failure(Kind.rejected, Billed.no, f"there is no model {request.model} any more", asked=False)
    unknown = sorted(set(request.input) - set(model.parameters))
    if any(request.input[name] is not None for name in unknown):
        raise Failure(Kind.rejected, Billed.no, f"{request.model} does not take {', '.join(unknown)}", asked=False)
    data: dict[str, Any] = {}
    for name, limits in model.parameters.items():
        value = request.input.get(name)
        if value is None and isinstance(limits, Number):
            value = limits.default  # the vendor's own defaults, the size's above all, are not documented
        if value is not None and value != "":
            data[model.vendor_names.get(name, name)] = value
    return json.dumps({"model": request.model, "data": data}).encode()


def _warnings(request: Request, width: int, height: int) -> tuple[PictureWarning, ...]:
    model = MODELS.get(request.model)  # None: it was taken from the catalogue while the picture lay on a spool
    asked = (model and model.fixed_size) or (request.input.get("width", width), request.input.get("height", height))
    if asked == (width, height):
        return ()
    message = f"asked for {asked[0]}x{asked[1]} pixels, got {width}x{height}"
    return (PictureWarning("size_differs", message),)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
