"""The guards: what is looked at before anything starts, each with what it says and what is to be done.

One list, for every process at its start and for `./dev doctor`. `wrong` refuses to start, `warning` is only said. What
is not a fact but a guess (a key that looks weak), and what costs time and no job (all of Redis), never refuses.
docs/guards.md has a line for each, and a test for each line.
"""

import resource
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import redis
from sqlalchemy import select

import migrations
from shared import file_systems
from shared.database import AWAY, Database, now
from shared.machine import machine
from shared.present import GONE_SECONDS
from shared.settings import Settings
from shared.tables import workers

#: Redis has what kombu asks of it from this version on, and Darkroom is tested with it.
OLDEST_REDIS = (6, 2)
#: Times in the database are its own; logs and signatures of webhooks have this machine's (receivers take 5 minutes).
SKEW_SECONDS = 2.0
#: A few hundred pictures, and PostgreSQL's or SQLite's log.
LITTLE_BYTES = 1024**3
#: A slot holds a socket and its duplicate (worker/deadline.py) and a file on the spool; the rest is everybody's.
FILES_PER_SLOT, FILES_BESIDES = 3, 100
#: Different characters that a random key of 32 has, but for one in a billion; hexadecimal ones have ten and more.
FEW_CHARACTERS = 8
EXAMPLES = ("changeme", "change-me", "change_me", "example", "secret", "password", "darkroom", "0123456789")


class Level(StrEnum):
    """What becomes of a process that finds it at its start: nothing, a line in its log, no start."""

    ok = "ok"
    warning = "warning"
    wrong = "wrong"


@dataclass(frozen=True)
class Finding:
    """What a guard saw. `do`: what mends it."""

    level: Level
    says: str
    do: str = ""


@dataclass(frozen=True)
class Place:
    """What the guards look at. `slots`: of this process, if it has any."""

    settings: Settings
    database: Database
    redis: redis.Redis
    slots: int = 0


@dataclass(frozen=True)
class Guard:
    """One question. `said_by`: the processes that ask it at their start; the others leave it to them."""

    name: str
    look: Callable[[Place], Finding]
    said_by: frozenset[str]


GENERATE, DELIVER, SWEEP, API = "generate", "deliver", "sweep", "api"


def ok(says: str) -> Finding:
    return Finding(Level.ok, says)


def warning(says: str, do: str) -> Finding:
    return Finding(Level.warning, says, do)


def wrong(says: str, do: str) -> Finding:
    return Finding(Level.wrong, says, do)


# -- settings ---------------------------------------------------------------------------------------------------------


def _secret_key(place: Place) -> Finding:
    if _looks_weak(place.settings.secret_key):
        return warning(
            "DARKROOM_SECRET_KEY looks like one that somebody can guess: it signs links and seals secrets",
            "make one with `openssl rand -hex 32`; API keys and webhook secrets made under the old one end with it",
        )
    return ok("it looks random")


def _api_key(place: Place) -> Finding:
    key = place.settings.api_key
    if key is None:
        return warning("DARKROOM_API_KEY is not set: nobody has a key", "make one: echo dk_$(openssl rand -hex 24)")
    if _looks_weak(key.removeprefix("dk_")):
        return warning(
            "DARKROOM_API_KEY looks like one that somebody can guess", "make one: echo dk_$(openssl rand -hex 24)"
        )
    return ok("it looks random")


def _looks_weak(key: str) -> bool:
    plain = key.lower()
    return len(set(plain)) < FEW_CHARACTERS or any(example in plain for example in EXAMPLES)


# -- the database -----------------------------------------------------------------------------------------------------


def _database(place: Place) -> Finding:
    if _no_file(place):
        return wrong(f"there is no {_sqlite_path(place.database)} yet", "run `python -m migrations`")
    try:
        with place.database.read() as connection:
            connection.execute(select(now()))
    except AWAY as error:
        return wrong(
            f"it does not answer ({first_line(error)})",
            "start it, or mend DARKROOM_DATABASE_URL; processes wait for it",
        )
    return ok("SQLite answers" if place.database.is_sqlite else "PostgreSQL answers")


def _migrations(place: Place) -> Finding:
    newest = migrations.newest()
    if _no_file(place):
        return wrong("the database has no tables yet", "run `python -m migrations`")
    with place.database.read() as connection:
        current = migrations.current(connection)
    if current == newest:
        return ok(f"it stands at {newest}, as this code does")
    if current is None:
        return wrong("the database has no tables yet", "run `python -m migrations`")
    if migrations.knows(current):
        return wrong(f"the database stands at {current}, this code at {newest}", "run `python -m migrations`")
    return wrong(
        f"the database stands at {current}, which this code does not know: newer code has migrated it",
        "run that code, or take the database back by its backup",
    )


def _clock(place: Place) -> Finding:
    if _no_file(place):
        return ok("there is no database to compare it with")
    with place.database.read() as connection:
        before = datetime.now(UTC)
        theirs = connection.scalar(select(now()))
        after = datetime.now(UTC)
    assert theirs is not None
    # However long the question took: their moment lies between ours, if the clocks agree.
    off = max((before - theirs).total_seconds(), 0.0) + min((after - theirs).total_seconds(), 0.0)
    if abs(off) <= SKEW_SECONDS:
        return ok(f"within {SKEW_SECONDS:g} s of the database's")
    which = "ahead of" if off > 0 else "behind"
    return warning(
        f"this machine's clock is {abs(off):.1f} s {which} the database's",
        "let both follow NTP; leases are safe (they are the database's), webhook signatures and logs are not",
    )


def _sqlite_disk(place: Place) -> Finding:
    path = _sqlite_path(place.database)
    if path is None:
        return ok("not SQLite")
    kind = file_systems.kind(path.parent)
    if kind in file_systems.NETWORK:
        return wrong(
            f"SQLite is on {kind} ({path.parent}): its log needs memory and locks that only one machine's disk has",
            "move DARKROOM_DATA_DIR to a disk of this machine, or use PostgreSQL",
        )
    if kind in file_systems.MEMORY:
        return warning(f"SQLite is in memory ({path.parent}): it is gone after a restart", "move it to a disk")
    return ok(f"SQLite is on {kind or 'a disk, as far as can be told'}")


def _one_machine(place: Place) -> Finding:
    if not place.database.is_sqlite:
        return ok("not SQLite")
    if _no_file(place):
        return ok("nobody writes to it")
    other = select(workers.c.name, workers.c.machine).where(
        workers.c.seen_at > now(-GONE_SECONDS), workers.c.machine != machine()
    )
    with place.database.read() as connection:
        row = connection.execute(other.limit(1)).one_or_none()
    if row is not None:
        return wrong(
            f"another machine writes to this SQLite: its worker {row.name} was seen in the last {GONE_SECONDS:.0f} s",
            "stop one of them, or use PostgreSQL: SQLite is for one machine",
        )
    return ok("no other machine writes to it")


def _sqlite_path(database: Database) -> Path | None:
    name = database.engine.url.database if database.is_sqlite else None
    return Path(name).absolute() if name and name != ":memory:" else None


def _no_file(place: Place) -> bool:
    """To ask would make an empty one."""
    path = _sqlite_path(place.database)
    return path is not None and not path.exists()


# -- Redis: no job depends on it, so nothing here refuses --------------------------------------------------------------


def _redis(place: Place) -> Finding:
    try:
        place.redis.ping()
    except (redis.RedisError, OSError) as error:
        return warning(
            f"it does not answer ({first_line(error)}): jobs are taken all the same, and wait",
            "start it, or mend DARKROOM_REDIS_URL",
        )
    return ok("it answers")


def _redis_version(place: Place) -> Finding:
    if not (info := _info(place)):
        return ok("it does not answer")
    version = str(info.get("redis_version", "unknown"))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST_REDIS:
        return warning(f"it is version {version}; Darkroom is tested with 6.2 and newer", "use Redis 6.2 or newer")
    return ok(f"it is version {version}")


def _redis_eviction(place: Place) -> Finding:
    info = _info(place)
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        return warning(f"its maxmemory-policy is {policy}: it may drop tickets, and jobs start late", "set noeviction")
    return ok("it evicts nothing" if info else "it does not answer")


def _redis_file(place: Place) -> Finding:
    if (info := _info(place)) and not info.get("aof_enabled", 0):
        return warning("its append-only file is off: after a restart jobs wait for the sweep", "set appendonly yes")
    return ok("its append-only file is on" if info else "it does not answer")


def _info(place: Place) -> dict[str, Any]:
    """INFO is allowed where CONFIG is not. What a Redis that is away says is said once, by the guard before."""
    try:
        return dict(place.redis.info())
    except (redis.RedisError, OSError):
        return {}


# -- this machine -----------------------------------------------------------------------------------------------------


def _data_folder(place: Place) -> Finding:
    folder = place.settings.data_dir
    try:
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError:
        return ok(f"{folder} is not there, and nothing is kept in it")
    if mode & 0o077:
        return warning(
            f"others may look into {folder} (mode {mode:04o}): prompts, pictures and keys live there",
            f"chmod 700 {folder}",
        )
    return ok("its owner's alone")


def _spool(place: Place) -> Finding:
    folder = place.settings.spool
    try:
        with tempfile.TemporaryFile(dir=file_systems.existing(folder)) as probe:
            probe.write(b"x")
    except OSError as error:
        return wrong(f"received pictures can't be written to {folder} ({error.strerror})", "mend DARKROOM_SPOOL")
    kind = file_systems.kind(folder)
    if kind in file_systems.MEMORY:
        return warning(
            f"{folder} is memory ({kind}): pictures that are paid for and not stored yet are gone after a restart",
            "set DARKROOM_SPOOL to a folder on a disk of this machine",
        )
    if kind in file_systems.NETWORK:
        return warning(
            f"{folder} is on {kind}: where its locks don't reach the server, live workers look dead to each other",
            "set DARKROOM_SPOOL to a folder on a disk of this machine",
        )
    return ok(f"on {kind or 'a disk, as far as can be told'}")


def _data_disk(place: Place) -> Finding:
    return _room(place.settings.data_dir)


def _spool_disk(place: Place) -> Finding:
    return _room(place.settings.spool)


def _room(folder: Path) -> Finding:
    free = shutil.disk_usage(file_systems.existing(folder)).free
    if free < LITTLE_BYTES:
        return warning(
            f"{free / 1024**2:.0f} MB are free for {folder}: when it is full, submissions get 503 and pictures wait",
            "free some space, or give it another disk",
        )
    return ok(f"{free / 1024**3:.0f} GB are free")


def _open_files(place: Place) -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_PER_SLOT * place.slots + FILES_BESIDES
    if limit != resource.RLIM_INFINITY and limit < needed:
        return warning(
            f"{limit} files may be open at once, and {place.slots} slots may need {needed}",
            f"ulimit -n {needed} before it starts (LimitNOFILE= of systemd, ulimits: of compose), or fewer slots",
        )
    return ok(f"{limit} may be open" if limit != resource.RLIM_INFINITY else "as many as it likes")


def first_line(error: BaseException) -> str:
    """What the database itself said."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_WORKERS = frozenset({GENERATE, DELIVER, SWEEP})
_ALL = _WORKERS | {API}

GUARDS = (
    Guard("secret key", _secret_key, frozenset({API})),
    Guard("api key", _api_key, frozenset({API})),
    Guard("database", _database, frozenset()),  # processes wait for it: see wait_for_database
    Guard("migrations", _migrations, _WORKERS),  # the API says so at /readyz, and waits
    Guard("clock", _clock, _ALL),
    Guard("sqlite disk", _sqlite_disk, _ALL),
    Guard("sqlite machine", _one_machine, _ALL),
    Guard("redis", _redis, frozenset({SWEEP})),
    Guard("redis version", _redis_version, frozenset({SWEEP})),
    Guard("redis eviction", _redis_eviction, frozenset({SWEEP})),
    Guard("redis file", _redis_file, frozenset({SWEEP})),
    Guard("data folder", _data_folder, frozenset({SWEEP})),
    Guard("data disk", _data_disk, frozenset({SWEEP})),
    Guard("spool", _spool, frozenset({GENERATE})),
    Guard("spool disk", _spool_disk, frozenset({GENERATE})),
    Guard("open files", _open_files, frozenset({GENERATE, DELIVER})),
)


def look(place: Place, guards: Iterable[Guard] = GUARDS) -> list[tuple[Guard, Finding]]:
    """What each of them sees, in their order. What asks a database that is away has seen nothing."""
    found = []
    for guard in guards:
        try:
            finding = guard.look(place)
        except AWAY as error:
            finding = warning(f"it could not be asked ({first_line(error)})", "see the database's own line")
        found.append((guard, finding))
    return found


def at_start(place: Place, *processes: str) -> tuple[list[str], list[str]]:
    """For a process that is these: the lines for which it must not start, and those that it should say."""
    mine = [guard for guard in GUARDS if guard.said_by & set(processes)]
    lines: dict[Level, list[str]] = {level: [] for level in Level}
    for guard, finding in look(place, mine):
        lines[finding.level].append(f"{guard.name}: {finding.says}; {finding.do}")
    return lines[Level.wrong], lines[Level.warning]


def wait_for_database(
    place: Place, say: Callable[[str], object], wait: Callable[[float], object], *, again_seconds: float = 30.0
) -> None:
    """Return once it answers. `wait` pauses, and ends the waiting by returning something true."""
    waited = 0.0
    while not _no_file(place) and (finding := _database(place)).level is not Level.ok:
        if waited % again_seconds == 0:
            say(f"waiting for the database: {finding.says}")
        waited += 1.0
        if wait(1.0):
            return
