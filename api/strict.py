"""Requests are read strictly: what would be guessed at, dropped or stored differently is refused instead."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from flask import Flask, Request, current_app, g, request
from werkzeug.exceptions import (
    ClientDisconnected,
    HTTPException,
    RequestEntityTooLarge,
    UnsupportedMediaType,
)

from api.errors import Refused, invalid_field, invalid_parameter, most_bytes, pointer_to
from api.room import Room

#: The largest body that is read, where a route takes no larger one.
MOST_BYTES = 1_000_000

#: After it a client whose body found no room may try again, in seconds.
RETRY_AFTER = "5"

#: What a database cannot store in a text: NUL (PostgreSQL) and half a surrogate pair (UTF-8 has no form for it).
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_MAY_BE_UNSTORABLE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")

_ROOM = "darkroom.room"
_MAY_BE_EMPTY = "darkroom.may_be_empty"


class StrictRequest(Request):
    """A request whose JSON is read by `parse_json`. Asked for silently, as flask-openapi3 does, it is refused aloud."""

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:
        is_empty = not self.content_length and "Transfer-Encoding" not in self.headers
        if is_empty and self.endpoint in current_app.extensions[_MAY_BE_EMPTY]:
            return {}
        charset = self.mimetype_params.get("charset", "utf-8").lower()
        encoding = self.headers.get("Content-Encoding", "identity").lower()
        if self.mimetype != "application/json" or charset not in ("utf-8", "utf8") or encoding != "identity":
            raise UnsupportedMediaType
        return parse_json(whole_body(self))


def whole_body(of: Request) -> bytes:
    """The body as it came; refused if it is too large, of whatever length it was said to be.

    Read once: it is not kept, as a request that waits for its job would keep it all the while.
    """
    data = _read_in_chunks(of) if "Transfer-Encoding" in of.headers else _read_at_once(of)
    if len(data) > most_bytes(of):
        raise RequestEntityTooLarge
    return data


def _read_at_once(of: Request) -> bytes:
    length = of.content_length or 0
    if MOST_BYTES < length <= most_bytes(of):  # what is too large is not read at all
        _take_room(of, length)
    return _read(lambda: of.get_data(cache=False))


def _read_in_chunks(of: Request) -> bytes:
    """Nobody knows the length before its end. Once there is more than most have, it may be as long as any."""
    parts: list[bytes] = []
    length, most = 0, most_bytes(of)
    while part := _read(lambda: of.stream.read(65_536)):
        if length <= MOST_BYTES < length + len(part) and most > MOST_BYTES:
            _take_room(of, most)
        parts.append(part)
        length += len(part)
    return b"".join(parts)


def _read(step: Callable[[], bytes]) -> bytes:
    """What a client sends, or what is said of it."""
    try:
        return step()
    except ClientDisconnected as error:
        if isinstance(error.__context__, TimeoutError):  # server.py
            raise Refused("too_slow", "Nothing was accepted.") from None
        raise
    except (HTTPException, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  each server has kinds of its own
        # Chunks that are none. The server closes the connection: nobody knows where they end.
        raise Refused("malformed", f"The body is not framed as HTTP says ({type(error).__name__}).") from None


def _take_room(of: Request, length: int) -> None:
    g.room = current_app.extensions[_ROOM].take(length)
    if g.room is None:
        while _read(lambda: of.stream.read(65_536)):  # who still sends sees no answer, but that he is cut off
            pass
        said = "Others are sending as many large bodies as are read at once. Nothing was accepted."
        raise Refused("no_room", said, headers={"Retry-After": RETRY_AFTER})


def give_room_back() -> None:
    """Nothing is left in memory of the body of this request."""
    if amount := g.pop("room", None):
        current_app.extensions[_ROOM].give_back(amount)


def parse_json(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, by RFC 8259: no NaN, no name twice in one object, UTF-8."""
    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise Refused("malformed", "The body is not UTF-8.") from None
    except RecursionError:
        raise Refused("malformed", "The body is nested too deep.") from None
    except json.JSONDecodeError as error:
        raise Refused("malformed", f"The body is not JSON: {error}.") from None
    except _Unread as error:
        raise Refused("malformed", f"The body is not JSON that we read: {error}.") from None
    except ValueError:  # Python's own limit, and in words about Python
        raise Refused("malformed", "The body is not JSON that we read: a number has thousands of digits.") from None
    if not isinstance(value, dict):
        raise invalid_field("#", "Must be an object.")
    if _MAY_BE_UNSTORABLE.search(text):
        _refuse_unstorable(value)
    return value


class _Unread(ValueError):
    """JSON to its grammar, and nothing that means one thing."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _Unread("an object has the same name twice")
    return value


def _refuse_constant(name: str) -> None:
    raise _Unread(f"{name} is no number of JSON")


def _refuse_unstorable(body: dict[str, Any]) -> None:
    places: list[tuple[tuple[str | int, ...], Any]] = [((), body)]
    while places:  # a loop: the body may be nested as deep as Python's recursion goes
        path, value = places.pop()
        if isinstance(value, str) and _UNSTORABLE.search(value):
            raise invalid_field(pointer_to(path), "Must hold no NUL and no half of a surrogate pair.")
        if isinstance(value, dict):
            if any(_UNSTORABLE.search(name) for name in value):
                raise invalid_field(pointer_to(path), "Names must hold no NUL and no half of a surrogate pair.")
            places.extend(((*path, name), item) for name, item in value.items())
        elif isinstance(value, list):
            places.extend(((*path, index), item) for index, item in enumerate(value))


def quality_of(kind: str) -> float:
    """How welcome an answer of this media type is by the header Accept: 0 if it is ruled out."""
    # Werkzeug's own test compares parameters too, and so finds no JSON in `application/json; charset=utf-8`.
    given = {value.partition(";")[0].strip().lower(): quality for value, quality in request.accept_mimetypes}
    of_its_sort = f"{kind.partition('/')[0]}/*"
    return next((given[name] for name in (kind, of_its_sort, "*/*", "*") if name in given), 0.0 if given else 1.0)


def refuse_unless_accepted(kind: str) -> None:
    """Refuse if the header Accept rules out an answer of this media type. The errors' own type is never ruled out."""
    if not quality_of(kind):
        raise Refused("not_acceptable", f"The answer is {kind}, which the header Accept does not name.")


def _check_accept() -> None:
    # An image's type is known only once its job is, events come as a list or a stream; what is served without a key is
    # for browsers and machines alike.
    rule = "" if request.url_rule is None else request.url_rule.rule
    if rule.startswith("/v1/") and not rule.endswith(("/image", "/events")) and request.method != "DELETE":
        refuse_unless_accepted("application/json")


def _check_query() -> None:
    try:
        unquote_to_bytes(request.query_string).decode()
    except UnicodeDecodeError:
        # Werkzeug would go on with what it could not read still encoded, or replaced.
        raise Refused("malformed", "The query is not UTF-8.") from None
    for name, values in request.args.lists():
        if len(values) > 1:
            raise invalid_parameter(name, "Was given more than once.")
        if _UNSTORABLE.search(name + values[0]):
            raise invalid_parameter(name.replace("\0", ""), "Must hold no NUL.")


def install(app: Flask, larger: Mapping[str, int], may_be_empty: Collection[str]) -> None:
    """Read every request strictly. After the check of the key: strangers learn nothing about parameters.

    `larger`: how many bytes are read where it is more than usual, by endpoint. `may_be_empty`: where no body is as good
    as an empty object.
    """

    def limit_body() -> None:
        # One more than is allowed: Werkzeug cuts a body of unknown length off there, without a word.
        request.max_content_length = larger.get(request.endpoint or "", MOST_BYTES) + 1

    app.request_class = StrictRequest
    app.extensions[_ROOM] = Room()
    app.extensions[_MAY_BE_EMPTY] = may_be_empty
    app.before_request(limit_body)
    app.teardown_request(lambda error: give_room_back())
    # `//v1/jobs` and OPTIONS are not offered: without these, Flask redirects the one and answers the other by itself.
    app.url_map.merge_slashes = False
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.before_request(_check_query)
    app.before_request(_check_accept)
