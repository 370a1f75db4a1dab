"""Retry-After (RFC 9110, section 10.2.3): how long somebody asks to be left alone."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Retry-After (lower-case header names) in seconds, in both of its forms; None for none or nonsense.

    A date is taken relative to the answer's own Date, if it has one: another machine's clock need not be ours.
    """
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,300}(\.[0-9]{1,9})?", value):
        return float(value)
    until = _date(value)
    if until is None:
        return None
    return max((until - (_date(headers.get("date", "")) or datetime.now(UTC))).total_seconds(), 0.0)


def _date(value: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
