"""What tells this machine from others. Not its name: the containers of one machine have names of their own."""

import socket
from functools import cache
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@cache
def machine() -> str:
    """The same for all processes under one running kernel, containers included; elsewhere than on Linux its name."""
    try:
        return _BOOT_ID.read_text().strip()[:64]
    except OSError:
        return socket.gethostname()[:64]
