"""One line an event, in one form for every process: for people (`text`) or for machines (`json`).

A line carries what it is about as fields, and whoever works at a job or a request says so once (`about`, `begin`). What
people wrote, and what is secret, stands in no line: fields are a closed list, an exception is told by its type and
place and not by its words, and what looks like a secret is taken out of all of it.
"""

import json
import logging
import logging.config
import re
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

#: What a line may be about, in the order in which it is shown. Libraries hang other things on their lines, such as the
#: arguments of a task; those are not shown.
FIELDS = (
    *("request_id", "project_id", "job_id", "attempt", "delivery_id", "event_id"),
    *("method", "route", "status", "backend", "from", "to", "why", "outcome", "kind", "billed", "repair"),
    *("count", "seconds"),
)

#: Whose lines below WARNING are shown.
_OURS = ("api", "worker", "shared", "migrations")

_about: ContextVar[Mapping[str, object]] = ContextVar("about", default={})  # noqa: B039  it is replaced, not changed

#: What looks like a secret, whosever it is: keys, webhook secrets, bearer tokens, links' signatures, passwords in URLs.
_SHAPES = (  # each with its mark below
    r"""\bdk_[^\s"'\\&,;]+""",
    r"""\bwhsec_[\w+/=-]+""",
    r"""(?<=bearer )[^\s"'\\]+""",
    r"""(?<=signature=)[^\s"'\\&]+""",
    r"""(?<=://)[^\s"'/@]*:[^\s"'/@]+(?=@)""",
)
#: Without one of these there is nothing to take out: to look for them takes a tenth of the time.
_MARKS = ("dk_", "whsec_", "bearer ", "signature=", "://")
#: A shorter secret is a word such as `sandbox`, and hiding it would only show which word it is.
_SHORTEST_SECRET = 8


class _Hiding:
    """What is taken out of every line of this process."""

    pattern = re.compile("|".join(_SHAPES), re.IGNORECASE)
    marks: tuple[str, ...] = _MARKS

    @classmethod
    def clean(cls, line: str) -> str:
        lowered = line.lower()
        if any(mark in lowered for mark in cls.marks):
            return cls.pattern.sub("[hidden]", line)
        return line


def hide(secrets: Iterable[str]) -> None:
    """Take these out of every line of this process from now on, wherever they come from."""
    known = sorted({secret for secret in secrets if len(secret) >= _SHORTEST_SECRET}, key=len, reverse=True)
    spelt = [spelling for secret in known for spelling in (secret, json.dumps(secret)[1:-1])]
    _Hiding.pattern = re.compile("|".join([*map(re.escape, spelt), *_SHAPES]), re.IGNORECASE)
    _Hiding.marks = (*_MARKS, *(spelling.lower() for spelling in spelt))


@contextmanager
def about(**fields: object) -> Iterator[None]:
    """Every line that this thread writes in the block carries these fields."""
    token = _about.set({**_about.get(), **fields})
    try:
        yield
    finally:
        _about.reset(token)


def begin(**fields: object) -> None:
    """From here on this thread's lines carry these fields, and none of what they carried before."""
    _about.set(fields)


def note(**fields: object) -> None:
    """What became known since `begin`."""
    _about.set({**_about.get(), **fields})


def place_of(error: BaseException) -> str:
    """Where an exception comes from: its stack and type, with its causes. Not its words: they may quote a prompt.

    Those of the operating system quote nobody, and say which file or address it is about.
    """
    parts = []
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        parts.append(place_of(cause))
    parts.extend(line.rstrip("\n") for line in traceback.format_tb(error.__traceback__))
    kind = type(error)
    is_systems = isinstance(error, OSError) and kind.__module__ == "builtins"
    parts.append(
        f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.") + (f": {error}" if is_systems else "")
    )
    return "\n".join(parts)


class _Formatter(logging.Formatter, ABC):
    """A line of one process. `process` names it, as the Procfile does."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        given = {**_about.get(), **record.__dict__}
        fields = {name: given[name] for name in FIELDS if given.get(name) is not None}
        error = record.exc_info[1] if record.exc_info else None
        line = self._line(record, fields, None if error is None else place_of(error))
        return _Hiding.clean(line)

    @abstractmethod
    def _line(self, record: logging.LogRecord, fields: Mapping[str, object], place: str | None) -> str:
        """The line of a record. `place`: where what it tells of was raised."""

    def _time(self, record: logging.LogRecord) -> str:
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(_Formatter):
    def _line(self, record: logging.LogRecord, fields: Mapping[str, object], place: str | None) -> str:
        line: dict[str, object] = {
            "time": self._time(record),
            "level": record.levelname.lower(),
            "process": self.process,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
            **fields,
        }
        if place is not None:
            line["exception"] = place
        return json.dumps(line, default=str)


class TextFormatter(_Formatter):
    def _line(self, record: logging.LogRecord, fields: Mapping[str, object], place: str | None) -> str:
        # Escaped, so that nobody's line break looks like another line of ours.
        message = record.getMessage().replace("\n", "\\n").replace("\r", "\\r")
        named = "".join(f" {name}={value}" for name, value in fields.items())
        line = f"{self._time(record)} {record.levelname:<7} {self.process} {record.name}: {message}{named}"
        return line if place is None else line + "\n" + place


class Unquoted(logging.Filter):
    """Takes out of gunicorn's lines what somebody sent: what it can't read of a request, and the URL with its query."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "gunicorn.error":
            text = str(record.msg)
            if text.startswith("Invalid request from ip="):
                record.msg, record.args = text.partition(": ")[0] + ": it can't be read", ()
            elif text.startswith("Error handling request"):
                record.msg, record.args = "Error handling request", ()
        return True


def handler(log_format: str, process: str) -> logging.Handler:
    """Writes lines to stderr."""
    writes = logging.StreamHandler()
    writes.setFormatter((JsonFormatter if log_format == "json" else TextFormatter)(process))
    writes.addFilter(Unquoted())
    return writes


def configuration(log_format: str, process: str) -> dict[str, Any]:
    """All of it, for `logging.config.dictConfig`."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {},
        "handlers": {"ours": {"()": "shared.logs.handler", "log_format": log_format, "process": process}},
        "root": {"level": "WARNING", "handlers": ["ours"]},
        "loggers": {
            "gunicorn.error": {"handlers": [], "propagate": True},  # its own handler out, so that a line comes once
            **{name: {"level": "INFO"} for name in _OURS},
        },
    }


def configure(log_format: str, process: str) -> None:
    """Log like this from here on, also what nobody caught and what Python warns of."""
    logging.config.dictConfig(configuration(log_format, process))
    logging.captureWarnings(True)
    tell_of_the_uncaught()


def rename(process: str) -> None:
    """This process has another name, now that it is known what it does."""
    for each in logging.getLogger().handlers:
        if isinstance(each.formatter, _Formatter):
            each.formatter.process = process


def tell_of_the_uncaught() -> None:
    """What nobody caught goes the way of every line. Python would show it with its words."""
    log = logging.getLogger(__name__)

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        else:
            log.critical("the process ends: nobody caught this", exc_info=(kind, error, trace))

    def tell_of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            where = "a thread" if args.thread is None else f"thread {args.thread.name}"
            log.critical("%s ends: nobody caught this", where, exc_info=args.exc_value)

    sys.excepthook = tell
    threading.excepthook = tell_of_thread
