"""Ids: UUIDv7 with a prefix that says what it names. They sort by the time of their making."""

import re
from typing import Literal

from uuid_utils import uuid7

Prefix = Literal["job", "bat", "end", "dlv", "evt", "prj"]

_SHAPE = re.compile(r"[a-z]{3}_[0-9a-f]{32}")


def new_id(prefix: Prefix) -> str:
    """A new id, such as `job_019337c1e7bf7d2a9d0c8f5b1c2d3e4f` (36 characters)."""
    return f"{prefix}_{uuid7().hex}"


def is_id(prefix: Prefix, text: str) -> bool:
    """Whether the text has the shape of such an id, so that nothing else reaches a query."""
    return text.startswith(prefix) and _SHAPE.fullmatch(text) is not None
