"""The guards: every line of docs/guards.md is provoked here, and says what stands there."""

import random
import re
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import text, update

from shared import file_systems, guards
from shared.announcements import client
from shared.database import Database, now
from shared.guards import Finding, Level, Place
from shared.settings import Settings
from shared.tables import workers
from tests.servers import RedisServer
from worker import presence

PAGE = (Path(__file__).parent.parent.parent / "docs" / "guards.md").read_text()
MEMORY = Path("/dev/shm")


class Row(NamedTuple):
    """Of the table of docs/guards.md."""

    guard: str
    done: str
    found: str
    says: str
    to_do: str


CELLS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines()]
ROWS = [Row(*cells) for cells in CELLS if len(cells) == 5 and cells[2] in set(Level)]


class Provocation:
    """A place where all is well, and the means to spoil it."""

    def __init__(self, place: Place, folder: Path, monkeypatch: pytest.MonkeyPatch, at_end: ExitStack) -> None:
        self.place = place
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.at_end = at_end

    def with_settings(self, **changes: Any) -> None:
        self.place = replace(self.place, settings=self.place.settings.model_copy(update=changes))

    def with_database(self, url: str) -> None:
        database = Database(url, connections=1, wait_seconds=1)
        self.at_end.callback(database.close)
        self.place = replace(self.place, database=database)

    def database_away(self) -> None:
        """At a port that is kept, so that nobody else gets it, and on which nobody listens."""
        kept = self.at_end.enter_context(socket.socket())
        kept.bind(("127.0.0.1", 0))
        self.with_database(f"postgresql+psycopg://nobody@127.0.0.1:{kept.getsockname()[1]}/none")

    def stands_at(self, revision: str) -> None:
        with self.place.database.write() as tx:
            tx.execute(text("UPDATE alembic_version SET version_num = :it"), {"it": revision})

    def own_redis(self) -> RedisServer:
        server = RedisServer()
        self.at_end.callback(server.close)
        server.start()
        self.place = replace(self.place, redis=server.client())
        return server

    def clock_fast(self, seconds: float) -> None:
        class Fast(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Any:
                return datetime.now(tz) + timedelta(seconds=seconds)

        self.monkeypatch.setattr(guards, "datetime", Fast)

    def on_nfs(self) -> None:
        mounts = self.folder / "mountinfo"
        mounts.write_text(
            "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
            f"90 27 0:50 / {self.folder} rw,relatime shared:1 - nfs4 server:/export rw,vers=4.2\n"
        )
        self.monkeypatch.setattr(file_systems, "_MOUNTS", mounts)

    def file_in_the_way(self) -> None:
        (self.folder / "spool").touch()
        self.with_settings(spool=self.folder / "spool" / "dataoorts")

    def little_room(self) -> None:
        usage = shutil.disk_usage(self.folder)._replace(free=100 * 1024**2)
        self.monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    def few_files(self) -> None:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.at_end.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        self.place = replace(self.place, slots=200)

    def other_machine(self) -> None:
        with self.place.database.write() as tx:
            presence.show(tx, "elsewhere:1", "dataoorts", 200, None)
            tx.execute(update(workers).values(machine="another"))

    def redis_says(self, **info: object) -> None:
        self.monkeypatch.setattr(self.place.redis, "info", lambda: info)


EXAMPLE = "changeme-1234567890-abcdefghijklmnop"

DONE: dict[tuple[str, str], Callable[[Provocation], object]] = {
    ("secret key", "32 times the same character"): lambda it: it.with_settings(secret_key="s" * 32),
    ("secret key", "a guide's example"): lambda it: it.with_settings(secret_key=EXAMPLE),
    ("api key", "not set"): lambda it: it.with_settings(api_key=None),
    ("api key", "a guide's example"): lambda it: it.with_settings(api_key="dk_" + EXAMPLE),
    ("database", "a port on which nobody listens"): Provocation.database_away,
    ("database", "no SQLite file"): lambda it: it.with_database(f"sqlite:///{it.folder}/none.db"),
    ("migrations", "a database of the version before"): lambda it: it.stands_at("0003"),
    ("migrations", "an empty database"): lambda it: it.with_database(f"sqlite:///{it.folder}/none.db"),
    ("migrations", "a database of a later version"): lambda it: it.stands_at("9999"),
    ("clock", "this machine's is ten minutes fast"): lambda it: it.clock_fast(600),
    ("clock", "this machine's is ten minutes slow"): lambda it: it.clock_fast(-600),
    ("sqlite disk", "NFS"): Provocation.on_nfs,
    ("sqlite disk", "tmpfs"): lambda it: it.with_database(f"sqlite:///{MEMORY}/darkroom-none.db"),
    ("sqlite machine", "a worker of another machine was just seen"): Provocation.other_machine,
    ("redis", "a port on which nobody listens"): lambda it: it.own_redis().stop(),
    ("redis version", "5.0.14"): lambda it: it.redis_says(redis_version="5.0.14", aof_enabled=1),
    ("redis eviction", "maxmemory-policy allkeys-lru"): lambda it: (
        it.own_redis().client().config_set("maxmemory-policy", "allkeys-lru")
    ),
    ("redis file", "appendonly no"): lambda it: it.own_redis().client().config_set("appendonly", "no"),
    ("data folder", "mode 0755"): lambda it: it.folder.chmod(0o755),
    ("data disk", "100 MB free"): Provocation.little_room,
    ("spool", "a file in its way"): Provocation.file_in_the_way,
    ("spool", "tmpfs"): lambda it: it.with_settings(spool=MEMORY / "darkroom-none"),
    ("spool", "NFS"): Provocation.on_nfs,
    ("spool disk", "100 MB free"): Provocation.little_room,
    ("open files", "256, for 200 slots"): Provocation.few_files,
}


@pytest.fixture
def provocation(
    sqlite_url: str, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Provocation]:
    tmp_path.chmod(0o700)
    key = "0f4b8a77c1d2e3965aa1b2c3d4e5f607"
    wanted = Settings(
        data_dir=tmp_path, database_url=sqlite_url, redis_url=redis_server.url, secret_key=key, api_key=f"dk_{key}"
    )
    with ExitStack() as at_end:
        database = Database(sqlite_url)
        at_end.callback(database.close)
        yield Provocation(
            Place(wanted, database, client(wanted, timeout_seconds=60), 10), tmp_path, monkeypatch, at_end
        )


def test_where_all_is_well_nothing_is_said(provocation: Provocation) -> None:
    if shutil.disk_usage(provocation.folder).free < guards.LITTLE_BYTES:
        pytest.skip("this machine's own disk is nearly full")
    found = guards.look(provocation.place)
    assert {guard.name: finding for guard, finding in found if finding.level is not Level.ok} == {}
    assert len(found) == len(guards.GUARDS) and all(finding.says for _, finding in found)


@pytest.mark.parametrize(("name", "done"), DONE, ids=str)
def test_what_is_provoked_is_found_and_says_what_the_page_says(provocation: Provocation, name: str, done: str) -> None:
    if "tmpfs" in done and file_systems.kind(MEMORY) != "tmpfs":
        pytest.skip(f"{MEMORY} is no tmpfs here")
    [row] = [row for row in ROWS if (row.guard, row.done) == (name, done)]
    DONE[name, done](provocation)
    [guard] = [guard for guard in guards.GUARDS if guard.name == name]
    [(_, found)] = guards.look(provocation.place, [guard])
    assert found.level == row.found
    for cell, said in ((row.says, found.says), (row.to_do, found.do)):
        assert re.fullmatch(".+".join(map(re.escape, cell.split("…"))), said), said


def test_the_page_has_a_line_for_everything_that_is_provoked_and_for_nothing_else() -> None:
    assert [(row.guard, row.done) for row in ROWS] == list(DONE)
    assert {guard.name for guard in guards.GUARDS} == {row.guard for row in ROWS}


@pytest.mark.parametrize(
    ("revision", "says"), [("0003", "stands at 0003"), ("9999", "does not know"), (None, "run `python -m migrations`")]
)
def test_a_database_at_another_revision_keeps_every_worker_from_starting(
    provocation: Provocation, database_url: str, revision: str | None, says: str
) -> None:
    """On both databases."""
    provocation.with_database(database_url)
    with provocation.place.database.write() as tx:
        tx.execute(text("DELETE FROM alembic_version"))
        if revision is not None:
            tx.execute(text("INSERT INTO alembic_version VALUES (:it)"), {"it": revision})
    for process in (guards.GENERATE, guards.DELIVER, guards.SWEEP):
        [refusal], _ = guards.at_start(provocation.place, process)
        assert refusal.startswith("migrations: ") and says in refusal
    assert guards.at_start(provocation.place, guards.API)[0] == []  # it says so at /readyz


def test_the_clocks_are_compared_on_both_databases(provocation: Provocation, database_url: str) -> None:
    provocation.with_database(database_url)
    [clock] = [guard for guard in guards.GUARDS if guard.name == "clock"]
    assert clock.look(provocation.place).level is Level.ok
    provocation.clock_fast(-600)
    began = time.monotonic()
    found = clock.look(provocation.place)
    took = time.monotonic() - began
    seconds = float(re.findall(r"is (\S+) s behind", found.says)[0])
    assert 599.9 - took <= seconds <= 600.1  # less by what passed between their moment and ours


def test_a_row_of_an_older_version_or_of_long_ago_is_no_other_machine(provocation: Provocation) -> None:
    provocation.other_machine()
    [guard] = [guard for guard in guards.GUARDS if guard.name == "sqlite machine"]
    with provocation.place.database.write() as tx:
        tx.execute(update(workers).values(seen_at=now(-60)))
    assert guard.look(provocation.place).level is Level.ok
    with provocation.place.database.write() as tx:
        tx.execute(update(workers).values(seen_at=now(), machine=None))
    assert guard.look(provocation.place).level is Level.ok


def test_what_asks_a_database_that_is_away_says_so_and_nothing_worse(provocation: Provocation) -> None:
    provocation.database_away()
    found = {guard.name: finding.level for guard, finding in guards.look(provocation.place)}
    assert found["database"] is Level.wrong and found["migrations"] is found["clock"] is Level.warning


def test_a_database_that_is_away_is_waited_for_and_that_is_said_now_and_then(provocation: Provocation) -> None:
    there = provocation.place
    provocation.database_away()
    said: list[str] = []
    pauses = iter(range(5))
    guards.wait_for_database(
        provocation.place, said.append, lambda seconds: next(pauses, None) is None, again_seconds=3
    )
    assert len(said) == 2 and said[0].startswith("waiting for the database: it does not answer (")
    guards.wait_for_database(there, said.append, lambda seconds: pytest.fail("it answers"))


@pytest.mark.parametrize("key", ["a" * 40, "0123456789abcdef" * 2, "MySecretPassword-for-production-1", "abab" * 10])
def test_keys_that_somebody_can_guess_look_weak(key: str) -> None:
    assert guards._looks_weak(key)


def test_keys_as_they_are_made_do_not_look_weak() -> None:
    dice = random.Random(1)  # the same keys each time: of millions one would look weak
    assert not any(guards._looks_weak(dice.randbytes(size).hex()) for size in (16, 24, 32) for _ in range(2000))


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/srv/a b/data", "cifs"), ("/srv", "ext4"), ("/srv/a", "ext4"), ("/mnt/over", "tmpfs"), ("/", "ext4")],
)
def test_a_folder_is_on_the_file_system_that_is_mounted_nearest(
    folder: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_systems, "existing", lambda path: path)
    mounts = (
        "27 1 254:0 / / rw - ext4 /dev/vda rw\n"
        "28 27 0:1 / /srv/a\\040b rw shared:3 master:1 - cifs //server/x rw\n"
        "29 27 0:2 / /mnt/over rw - ext4 /dev/vdb rw\n"
        "30 27 0:3 / /mnt/over rw - tmpfs tmpfs rw\n"
    )
    assert file_systems.kind(Path(folder), mounts) == kind


def test_every_finding_that_is_not_ok_says_what_to_do() -> None:
    assert Finding(Level.ok, "x").do == ""
    assert all(row.to_do for row in ROWS)
