"""A wall clock that is wrong, for a whole Python process: Python loads this at its start from a folder on PYTHONPATH.

CLOCK_FAST_SECONDS says by how much (negative: slow). Only the wall clock is wrong, as on a machine without NTP: what
measures how long something takes (time.monotonic) goes on as it was.
"""

import datetime
import os
import time
from datetime import date as real_date
from datetime import datetime as real_datetime
from typing import Any

FAST = float(os.environ["CLOCK_FAST_SECONDS"])

_time, _gmtime, _localtime, _strftime = time.time, time.gmtime, time.localtime, time.strftime


class _LooksReal(type):
    """What C code makes is of the class that was there before."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.__mro__[1])

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.__mro__[1])


class _Date(real_date, metaclass=_LooksReal):
    @classmethod
    def today(cls) -> Any:
        return real_date.fromtimestamp(time.time())  # noqa: DTZ012 - as the original does


class _Datetime(real_datetime, metaclass=_LooksReal):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return real_datetime.fromtimestamp(time.time(), tz)

    @classmethod
    def today(cls) -> Any:
        return real_datetime.fromtimestamp(time.time())  # noqa: DTZ006 - as the original does

    @classmethod
    def utcnow(cls) -> Any:
        return real_datetime.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)


def _wrong() -> None:
    time.time = lambda: _time() + FAST
    time.time_ns = lambda: int((_time() + FAST) * 1e9)
    time.gmtime = lambda seconds=None: _gmtime(time.time() if seconds is None else seconds)
    time.localtime = lambda seconds=None: _localtime(time.time() if seconds is None else seconds)
    time.strftime = lambda form, *moment: _strftime(form, *(moment or [time.localtime()]))
    kinds: dict[str, type] = {"date": _Date, "datetime": _Datetime}
    for name, wrong in kinds.items():
        wrong.__name__ = wrong.__qualname__ = name
        wrong.__module__ = "datetime"
        setattr(datetime, name, wrong)


_wrong()
