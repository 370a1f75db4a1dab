"""Troubles on demand: what a vendor's answer can be like on a bad day, asked for by prompt or by a rule.

In a prompt: `[sandbox:delay=2]`, `[sandbox:status=503,retry_after=7]`, `[sandbox:empty]`. By the control route: rules
with the same names and values. Where a rule and a prompt name the same trouble, the prompt's counts.
"""

import base64
import binascii
import math
import re
import threading
from dataclasses import dataclass, field, fields, replace
from typing import Any

MARKER = re.compile(r"\s*\[sandbox:([^\]]*)\]")
LONGEST = 24 * 3600
#: More would not fit into any test's memory.
MOST_NOISE_BYTES = 64 * 1024 * 1024


class BadTrouble(ValueError):
    """A trouble that is not known or whose value is of no use; the message says which."""


@dataclass(frozen=True)
class Troubles:
    """What is to go wrong with one call. Times in seconds, drip in bytes a second, shares from 0 to below 1."""

    delay: float = 0.0  # before anything else
    hang: float | None = None  # no answer, until the client goes or this long; then the connection is closed
    reset: str | None = None  # TCP RST, `before` the answer or in the middle of the `body`
    redirect: str | None = None  # 302 to this URL
    status: int | None = None  # an error with this status
    code: int | None = None  # the vendor's code in that error
    message: str | None = None  # and its words
    retry_after: str | None = None  # the header, as given
    error_json_200: bool = False  # 200, {"error": "Invalid API key"}
    html_200: bool = False  # 200, a web page
    empty: bool = False  # 200, no body
    image: bytes | None = None  # these bytes, labelled image/png
    not_image: bool = False  # random bytes, labelled image/png
    noise_bytes: int | None = None  # a PNG of about this many bytes, always the same: costs no painting
    wrong_size: tuple[int, int] | None = None  # another size than asked
    wrong_type: bool = False  # a JPEG labelled image/png (or the other way round)
    base64: bool = False  # JSON instead of raw bytes
    truncate_clean: float | None = None  # this share of the picture, Content-Length to match
    truncate: float | None = None  # this share of the body, Content-Length of the whole, then close
    drip: float | None = None  # the body at this many bytes a second
    drip_headers: bool = False  # the head at one byte a second
    # Of the box alone:
    out_of_memory: bool = False  # 500, as from a card that is too small
    no_images: bool = False  # 200, an empty list of pictures
    broken_base64: bool = False  # a picture with a character that base64 does not have
    data_url: bool = False  # a picture with `data:image/png;base64,` before it
    other_seed: bool = False  # another seed was used than asked


NAMES = [trouble.name for trouble in fields(Troubles)]
NONE = Troubles()
#: The troubles that are numbers, and their limits.
NUMBERS: dict[str, tuple[type[int] | type[float], float, float]] = {
    "delay": (float, 0, LONGEST),
    "hang": (float, 0, LONGEST),
    "drip": (float, 0.1, 1e9),
    "truncate": (float, 0, 0.9999),
    "truncate_clean": (float, 0, 0.9999),
    "status": (int, 200, 599),
    "code": (int, 0, 10**9),
    "noise_bytes": (int, 1, MOST_NOISE_BYTES),
}


def read_troubles(wanted: dict[str, Any]) -> dict[str, Any]:
    """Checked values by name, ready for Troubles. Values may be text, as in a prompt. Raises BadTrouble."""
    for name in wanted:
        if name not in NAMES:
            raise BadTrouble(f"unknown trouble {name!r}; known: {', '.join(NAMES)}")
    return {name: _read(name, value) for name, value in wanted.items()}


def split_prompt(prompt: str) -> tuple[str, dict[str, Any]]:
    """The prompt without its markers, and the troubles they ask for. Raises BadTrouble."""
    wanted: dict[str, Any] = {}
    for marker in MARKER.findall(prompt):
        for part in marker.split(","):
            name, equals, value = part.strip().partition("=")
            wanted[name] = value if equals else True
    return (MARKER.sub("", prompt).strip(), read_troubles(wanted)) if wanted else (prompt, {})


def _read(name: str, value: Any) -> Any:
    if name == "hang" and (value is True or value == "true"):
        return math.inf
    if name in NUMBERS:
        return _number(name, value)
    match name:
        case "message":
            return _text(name, value)
        case "retry_after" | "redirect":
            return _header(name, value)
        case "reset":
            if value not in ("before", "body"):
                raise BadTrouble("reset must be before or body")
            return value
        case "wrong_size":
            return _size(value)
        case "image":
            return _bytes(value)
        case _:
            return _flag(name, value)


def _number(name: str, value: Any) -> int | float:
    kind, lowest, highest = NUMBERS[name]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not lowest <= number <= highest or kind(number) != number:
        called = "a whole number" if kind is int else "a number"
        raise BadTrouble(f"{name} must be {called} from {lowest} to {highest}")
    return kind(number)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise BadTrouble(f"{name} must be text")
    return value


def _header(name: str, value: Any) -> str:
    text = _text(name, str(value) if type(value) is int else value)
    if not text.isascii() or not text.isprintable():
        raise BadTrouble(f"{name} must be printable ASCII: it becomes a header")
    return text


def _size(value: Any) -> tuple[int, int]:
    sides = re.fullmatch(r"(\d{1,4})x(\d{1,4})", value) if isinstance(value, str) else None
    if not sides or not all(16 <= int(side) <= 4096 for side in sides.groups()):
        raise BadTrouble("wrong_size must be WIDTHxHEIGHT, each from 16 to 4096")
    return int(sides[1]), int(sides[2])


def _bytes(value: Any) -> bytes:
    try:
        return base64.b64decode(_text("image", value), validate=True)
    except (binascii.Error, ValueError):
        raise BadTrouble("image must be bytes in base64") from None


def _flag(name: str, value: Any) -> bool:
    if value not in (True, False, "true", "false"):
        raise BadTrouble(f"{name} must be true or false")
    return value in (True, "true")


@dataclass
class Rule:
    """Troubles for the calls whose prompt contains `match` (None: all), `calls` more times (None: until cleared)."""

    troubles: dict[str, Any]
    calls: int | None = None
    match: str | None = None
    values: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.values = read_troubles(self.troubles)
        if self.calls is not None and (type(self.calls) is not int or self.calls < 1):
            raise BadTrouble("calls must be a whole number from 1, or null")
        if self.match is not None and not isinstance(self.match, str):
            raise BadTrouble("match must be text, or null")


class Rules:
    """The rules in force, in the order they came; where two name the same trouble, the later one's counts."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._lock = threading.Lock()

    def add(self, rule: Rule) -> None:
        with self._lock:
            self._rules.append(rule)

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()

    def listed(self) -> list[dict[str, Any]]:
        with self._lock:
            return [{"troubles": rule.troubles, "calls": rule.calls, "match": rule.match} for rule in self._rules]

    def take(self, prompt: str, own: dict[str, Any]) -> Troubles:
        """The troubles of a call with this prompt and its own markers; counts as one of each matching rule's calls."""
        if not self._rules and not own:  # the common case, without the lock
            return NONE
        values: dict[str, Any] = {}
        with self._lock:
            for rule in self._rules:
                if rule.match is None or rule.match in prompt:
                    values |= rule.values
                    rule.calls = None if rule.calls is None else rule.calls - 1
            self._rules = [rule for rule in self._rules if rule.calls != 0]
        return replace(NONE, **(values | own))
