"""The spool on real files: what is safe when, whose it is, and what a full disk does to it. Workers die for real."""

import contextlib
import errno
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from worker.spool import Entry, Spool

ROOT = Path(__file__).parent.parent.parent
DATA = os.urandom(20_000)

#: A worker that keeps two pictures; with the second one something happens to it.
WORKER = """
import os, signal, sys
from pathlib import Path
from worker.spool import Spool

spool, data, step = Spool(Path(sys.argv[1])), sys.stdin.buffer.read(20_000), sys.argv[2]
spool.keep("job_1", 1, data)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(file, rest, write=os.write):
    write(file, rest[:9000])
    die()


if step == "half written":
    os.write = write_half
elif step == "written":
    os.fsync = die
elif step == "synced":
    os.rename = die
elif step == "renamed":
    os.rename = lambda *names, rename=os.rename: (rename(*names), die())
spool.keep("job_2", 3, data)
print("kept", flush=True)
if step == "kept":
    die()
sys.stdin.read()  # it lives until the test is over
"""


@contextlib.contextmanager
def worker(root: Path, step: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has DATA as job_1's picture on its spool, and job_2's as far as the step."""
    command = [sys.executable, "-c", WORKER, str(root), step]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(DATA)
        process.stdin.flush()
        if step in ("lives", "kept"):
            assert process.stdout.readline() == b"kept\n"
        if step != "lives":
            assert process.wait(60) == -signal.SIGKILL
        yield process
        process.kill()


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool")
    yield spool
    spool.close()


def names(entries: Iterator[Entry]) -> list[tuple[str, int]]:
    return [(entry.job_id, entry.attempt) for entry in entries]


def files(root: Path) -> list[str]:
    """Everything below a folder that is not a folder, without the locks."""
    return sorted(path.name for path in root.rglob("*") if not path.is_dir() and path.name != "lock")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def left(root: Path, *job_ids: str) -> Path:
    """The folder of a dead worker with such pictures."""
    dead = Spool(root)
    paths = [dead.keep(job_id, 1, DATA).path for job_id in job_ids]
    dead.close()
    assert paths[0] is not None
    return paths[0].parent


# What a worker's death leaves.


@pytest.mark.parametrize("step", ["written", "synced", "renamed", "kept"])
def test_a_picture_that_is_wholly_written_is_found_however_its_worker_died(tmp_path: Path, step: str) -> None:
    with worker(tmp_path, step):
        spool = Spool(tmp_path)
        found = [(entry.job_id, entry.attempt, entry.read()) for entry in spool.left_behind()]
    assert found == [("job_1", 1, DATA), ("job_2", 3, DATA)]
    spool.close()


def test_a_picture_that_is_half_written_is_told_of_and_never_offered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with worker(tmp_path, "half written"):
        assert "job_2.3" in " ".join(files(tmp_path))
        spool = Spool(tmp_path)
        assert names(spool.left_behind()) == [("job_1", 1)]
    assert len(warnings(caplog)) == 1 and "job_2.3" in caplog.text and "lost" in caplog.text
    assert "job_2.3" not in " ".join(files(tmp_path)), "nothing is to be saved there"
    spool.close()


def test_a_live_workers_folder_is_left_alone_until_it_is_killed(tmp_path: Path) -> None:
    with worker(tmp_path, "lives") as other:
        spool = Spool(tmp_path)
        assert names(spool.left_behind()) == []
        other.kill()
        other.wait()
        assert names(spool.left_behind()) == [("job_1", 1), ("job_2", 3)]
    spool.close()


def test_what_is_in_one_workers_hands_is_no_others(tmp_path: Path) -> None:
    left(tmp_path, "job_1", "job_2")
    one, two = Spool(tmp_path), Spool(tmp_path)
    with contextlib.closing(one.left_behind()) as entries:
        next(entries)
        assert names(two.left_behind()) == []
    assert names(two.left_behind()) == [("job_1", 1), ("job_2", 1)], "the first worker has let go of it"
    one.close()
    two.close()


def test_workers_that_start_together_offer_each_picture_once(tmp_path: Path) -> None:
    for number in range(30):
        left(tmp_path, f"job_{number}")
    offered: list[str] = []
    together = threading.Barrier(4, timeout=60)

    def start() -> None:
        spool = Spool(tmp_path)
        together.wait()
        for entry in spool.left_behind():
            offered.append(entry.job_id)
            entry.remove()
        together.wait()
        spool.close()

    threads = [threading.Thread(target=start, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(offered) == sorted(f"job_{number}" for number in range(30))
    assert list(tmp_path.iterdir()) == [], "emptied folders are removed"


def test_a_folder_that_was_removed_before_we_had_its_lock_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two workers would hold a folder of one name: the one that is gone, and the one that came after it."""
    import fcntl

    folder = left(tmp_path, "job_1")
    spool, flock = Spool(tmp_path), fcntl.flock

    def late(lock: int, how: int) -> None:
        (folder / "lock").rename(tmp_path / "lock of what was")
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert names(spool.left_behind()) == []
    monkeypatch.undo()
    spool.close()


def test_a_new_workers_folder_may_be_removed_under_its_hands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one that came between its making and its locking, and took it for a dead worker's."""
    mkdir = os.mkdir
    stolen: list[Path] = []

    def steal(path: Any, *rest: Any, **named: Any) -> None:
        mkdir(path, *rest, **named)
        if not stolen and Path(path).name.startswith("worker-"):
            stolen.append(Path(path))
            Path(path).rmdir()

    monkeypatch.setattr(os, "mkdir", steal)
    spool = Spool(tmp_path)
    assert stolen
    assert spool.keep("job_1", 1, DATA).path is not None
    other = Spool(tmp_path)
    assert names(other.left_behind()) == [], "it is locked"
    other.close()
    spool.close()


# What a worker does in its life.


def test_what_leaves_the_spool_is_gone_and_an_empty_folder_goes_with_its_worker(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "made" / "with its parents")
    entry = spool.keep("job_1", 1, DATA)
    assert entry.path is not None and entry.path.read_bytes() == DATA
    entry.remove()
    entry.remove()
    spool.close()
    assert list((tmp_path / "made" / "with its parents").iterdir()) == []


def test_a_picture_that_is_on_the_disk_takes_no_memory(spool: Spool) -> None:
    entry = spool.keep("job_1", 1, DATA)
    assert entry.held is None and entry.read() == DATA
    assert entry.path is not None
    entry.path.write_bytes(b"read when it is wanted")
    assert entry.read() == b"read when it is wanted"


def test_pictures_are_for_their_owners_eyes_only(spool: Spool) -> None:
    entry = spool.keep("job_1", 1, DATA)
    assert entry.path is not None
    assert entry.path.stat().st_mode & 0o077 == 0 and entry.path.parent.stat().st_mode & 0o077 == 0


def test_every_step_is_on_the_disk_before_the_next_one(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut takes can't be tried here: the order of the calls is what can be seen."""
    steps: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        real: Callable[..., Any] = getattr(os, name)

        def note(*args: Any) -> Any:
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            steps.append(name + " of the folder" * is_folder)
            return real(*args)

        return note

    with monkeypatch.context() as watched:
        for name in ("write", "fsync", "rename"):
            watched.setattr(os, name, noting(name))
        entry = spool.keep("job_1", 1, DATA)
    assert steps == ["write", "fsync", "rename", "fsync of the folder"]
    entry.remove()


def test_two_hundred_threads_keep_their_pictures_at_once(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are seen waiting for the disk at the same moment: no lock of ours stands between them."""
    together, fsync = threading.Barrier(200, timeout=60), os.fsync

    def fsync_together(file: int) -> None:
        if not stat.S_ISDIR(os.fstat(file).st_mode):
            together.wait()
        fsync(file)

    monkeypatch.setattr(os, "fsync", fsync_together)
    kept: list[Entry] = []

    def keep(number: int) -> None:
        kept.append(spool.keep(f"job_{number}", 1, DATA))

    threads = [threading.Thread(target=keep, args=(number,), daemon=True) for number in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({entry.path for entry in kept}) == 200
    assert all(entry.path is not None and entry.path.read_bytes() == DATA for entry in kept)


# What is not ours, or not whole.


def test_what_is_torn_or_alien_is_told_of_once_and_never_offered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = left(tmp_path, "job_1", "job_2", "job_3")
    [torn], [linked] = folder.glob("job_1.*"), folder.glob("job_2.*")
    torn.write_bytes(DATA[:-1])
    target = linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(target)
    (folder / "job_4.1.00000000.picture").mkdir()
    (folder / "job_5.first.00000000.picture").write_bytes(b"")
    (folder / "notes.txt").write_text("by hand")
    (tmp_path / "worker-of-old").mkdir()
    spool = Spool(tmp_path)
    for _ in range(3):
        assert names(spool.left_behind()) == [("job_3", 1)]
    told = warnings(caplog)
    assert len(told) == len(set(told)) == 7
    for name in ("job_1", "job_2", "job_4", "job_5", "notes.txt", "worker-of-old", "elsewhere"):
        assert sum(name in line.split(" is left")[0] for line in told) == 1, name
    assert torn.exists() and (folder / "notes.txt").exists(), "they are for a person to look at"
    spool.close()


def test_what_is_ignored_is_told_of_once_and_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left(tmp_path, "job_1", "job_2")
    spool = Spool(tmp_path)
    for entry in spool.left_behind():
        if entry.job_id == "job_1":
            assert entry.path is not None
            spool.ignore(entry.path, "this database knows no such job")
    assert names(spool.left_behind()) == [("job_2", 1)]
    assert len(warnings(caplog)) == 1
    spool.close()


def test_a_picture_that_cannot_be_read_is_told_of_once_and_found_when_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    left(tmp_path, "job_1", "job_2")
    spool, read = Spool(tmp_path), Path.read_bytes

    def broken_disk(path: Path) -> bytes:
        if path.name.startswith("job_1"):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", broken_disk)
    for _ in range(3):
        assert names(spool.left_behind()) == [("job_2", 1)]
    assert len(warnings(caplog)) == 1 and "Too many open files" in caplog.text
    monkeypatch.undo()
    assert names(spool.left_behind()) == [("job_1", 1), ("job_2", 1)]
    spool.close()


def test_what_a_live_worker_hands_back_is_offered_until_it_is_removed_and_the_rest_is_not(spool: Spool) -> None:
    first, _second = spool.keep("job_1", 1, DATA), spool.keep("job_2", 1, DATA)
    spool.hand_back(first)
    spool.hand_back(Entry("job_3", 1, DATA))  # in memory alone
    assert names(spool.left_behind()) == names(spool.left_behind()) == [("job_1", 1)]
    first.remove()
    assert names(spool.left_behind()) == []


# A disk that does not take it.


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_picture_that_the_disk_does_not_take_stays_in_memory_and_leaves_nothing_behind(
    spool: Spool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    number: int,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    caplog.set_level(logging.INFO)
    with monkeypatch.context() as broken:
        broken.setattr(os, call, fail)
        for attempt in range(1, 4):
            entry = spool.keep("job_1", attempt, DATA)
            assert (entry.path, entry.read()) == (None, DATA)
            entry.remove()
    assert files(tmp_path) == []
    assert len(warnings(caplog)) == 1 and os.strerror(number) in caplog.text
    entry = spool.keep("job_1", 4, DATA)
    assert entry.path is not None and "again" in caplog.messages[-1]
    entry.remove()


def test_a_stored_picture_that_cannot_be_removed_harms_nobody(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    entry = spool.keep("job_1", 1, DATA)
    with monkeypatch.context() as broken:
        broken.setattr(os, "unlink", read_only)
        entry.remove()
    assert [vars(record)["job_id"] for record in caplog.records] == ["job_1"]
    entry.remove()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with room for 256 kB and 16 files."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=16", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("only root may mount a disk; the same errors are raised by hand above")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_full_takes_no_pictures_until_there_is_room_again(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(small_disk / "spool")
    (small_disk / "of somebody else").write_bytes(bytes(200_000))
    for attempt in range(1, 4):
        assert spool.keep("job_1", attempt, bytes(100_000)).path is None
    assert files(small_disk) == ["of somebody else"] and len(warnings(caplog)) == 1
    (small_disk / "of somebody else").unlink()
    assert spool.keep("job_1", 4, bytes(100_000)).path is not None
    spool.close()


def test_a_worker_that_starts_on_a_full_disk_offers_what_fills_it(small_disk: Path) -> None:
    left(small_disk / "spool", "job_1", "job_2")
    fillers = []
    with contextlib.suppress(OSError):
        for number in range(100):
            fillers.append(small_disk / f"filler {number}")
            fillers[-1].touch()
    spool = Spool(small_disk / "spool")
    assert spool.keep("job_3", 1, DATA).path is None
    for entry in spool.left_behind():
        assert entry.read() == DATA
        entry.remove()
    assert files(small_disk / "spool") == []
    assert spool.keep("job_3", 2, DATA).path is not None, "there is room for a folder of its own now"
    spool.close()


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Spool(tmp_path / "file" / ("" if place == "a file" else "spool"))
