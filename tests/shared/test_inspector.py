"""The child processes that judge pictures, and what becomes of the pictures that harm them."""

import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from shared.inspector import COMMAND, ROOT, Inspector, InspectorAway
from shared.picture import Facts, Unfit
from tests.shared.pictures import whole

PNG = whole("PNG", 64, 48)
FACTS = Facts("image/png", 64, 48)


def fragile(behaviour: str) -> Sequence[str]:
    """The real program, with a decoder that a picture holding certain words makes do something."""
    program = f"""
        import os, sys, time
        from shared import picture
        healthy = picture._decode
        def decode(name, data, unpacked):
            if b"trigger" in data:
                {behaviour}
            return healthy(name, data, unpacked)
        picture._decode = decode
        picture.serve(0)
    """
    return [sys.executable, "-c", textwrap.dedent(program)]


BAD = PNG + b"trigger"
SEGFAULT = "import ctypes; ctypes.string_at(0)"
HANG = "time.sleep(600)"


def slow(until: Path) -> str:
    """What takes until this file is made, and goes well then."""
    return f"while not os.path.exists({str(until)!r}): time.sleep(0.01)"


@pytest.fixture
def inspector_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Inspector]]:
    # A child that stands still while it starts is no fault of anything here.
    monkeypatch.setattr("shared.inspector.LOAD_SECONDS", 60)
    monkeypatch.setattr(Inspector._ready, "__defaults__", (60.0,))
    made: list[Inspector] = []

    def make(command: Sequence[str] = COMMAND, children: int = 1, seconds: float = 60, wait: float = 60) -> Inspector:
        made.append(Inspector(children, seconds, wait, command))
        return made[-1]

    yield make
    for inspector in made:
        inspector.close()


def children_of(inspector: Inspector) -> list[psutil.Process]:
    """Its own alone: the process that runs the tests has other children, such as PostgreSQL, in any order of ids."""
    children = [psutil.Process(child.process.pid) for child in inspector._running]
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]


def test_a_picture_is_judged_in_another_process(inspector_with: Callable[..., Inspector]) -> None:
    inspector = inspector_with()
    assert inspector.inspect(PNG) == FACTS
    (child,) = children_of(inspector)
    assert child.ppid() == os.getpid()


def test_the_reason_of_a_refusal_comes_back(inspector_with: Callable[..., Inspector]) -> None:
    inspector = inspector_with()
    with pytest.raises(Unfit, match="not a PNG"):
        inspector.inspect(b"<html>")
    with pytest.raises(Unfit, match="empty"):
        inspector.inspect(b"")
    assert inspector.inspect(PNG) == FACTS


def test_the_largest_pictures_fit_into_the_childs_memory(inspector_with: Callable[..., Inspector]) -> None:
    inspector = inspector_with()
    assert inspector.inspect(whole("PNG", 4096, 4096, "RGBA", compress_level=1))[1:3] == (4096, 4096)
    assert inspector.inspect(whole("WEBP", 2048, 2048, "RGBA", lossless=True, quality=0, method=0))[1:3] == (2048, 2048)


@pytest.mark.parametrize("crash", [SEGFAULT, "os._exit(0)", "os.kill(os.getpid(), 9)", "os.write(0, b'\\0\\0\\0\\1?')"])
def test_a_picture_that_crashes_its_decoder_harms_itself_alone(
    crash: str, inspector_with: Callable[..., Inspector]
) -> None:
    inspector = inspector_with(fragile(crash))
    with pytest.raises(Unfit):
        inspector.inspect(BAD)
    assert inspector.inspect(PNG) == FACTS


def test_a_picture_that_hangs_its_decoder_is_given_up_and_its_process_ended(
    inspector_with: Callable[..., Inspector],
) -> None:
    inspector = inspector_with(fragile(HANG), seconds=0.3)
    inspector.load()
    (child,) = children_of(inspector)
    with pytest.raises(Unfit, match=r"0\.3 seconds"):
        inspector.inspect(BAD)
    assert not psutil.pid_exists(child.pid)
    inspector._seconds = 60  # for one that is well
    assert inspector.inspect(PNG) == FACTS


def test_a_stopped_process_that_does_not_even_read_is_given_up(inspector_with: Callable[..., Inspector]) -> None:
    inspector = inspector_with(seconds=0.3)
    inspector.load()
    (child,) = children_of(inspector)
    child.send_signal(signal.SIGSTOP)
    with pytest.raises(Unfit, match=r"0\.3 seconds"):
        inspector.inspect(PNG + b"\0" * 4_000_000)


def test_a_decoder_that_runs_out_of_memory_lives_on(inspector_with: Callable[..., Inspector]) -> None:
    inspector = inspector_with(fragile("bytearray(1 << 30)"))
    inspector.load()
    (child,) = children_of(inspector)
    with pytest.raises(Unfit, match="too much memory"):
        inspector.inspect(BAD)
    assert inspector.inspect(PNG) == FACTS
    assert child.is_running()


def test_a_process_that_died_while_idle_costs_no_picture(inspector_with: Callable[..., Inspector]) -> None:
    inspector = inspector_with()
    assert inspector.inspect(PNG) == FACTS
    (child,) = children_of(inspector)
    child.kill()
    child.wait(60)
    assert inspector.inspect(PNG) == FACTS


def test_a_process_that_takes_no_picture_costs_none(inspector_with: Callable[..., Inspector], tmp_path: Path) -> None:
    program = f"""
        import os, pathlib, time
        first = pathlib.Path({str(tmp_path / "first")!r})
        if not first.exists():
            first.touch()
            os.write(0, bytes([0, 0, 0, 2]) + b"{{}}")
            os.close(0)
            time.sleep(600)
        from shared import picture
        picture.serve(0)
    """
    inspector = inspector_with([sys.executable, "-c", textwrap.dedent(program)])
    inspector.load()
    while select.select([next(iter(inspector._running)).socket], [], [], 0)[0] == []:
        threading.Event().wait(0.005)
    assert inspector.inspect(PNG) == FACTS


def test_many_threads_share_few_processes_and_each_gets_its_own_answer(
    inspector_with: Callable[..., Inspector],
) -> None:
    inspector = inspector_with(fragile(SEGFAULT), children=2)
    pictures = [whole("PNG", 16 + index, 8) for index in range(60)]
    pictures[7] += b"trigger"
    pictures[31] += b"trigger"

    def judge(data: bytes) -> Facts | str:
        try:
            return inspector.inspect(data)
        except Unfit as unfit:
            return str(unfit)

    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(judge, pictures))
    expected: list[Facts | str] = [Facts("image/png", 16 + index, 8) for index in range(60)]
    expected[7] = expected[31] = "the picture crashed its decoder"
    assert answers == expected
    assert len(children_of(inspector)) <= 2


def test_a_thread_that_gets_no_process_in_time_says_so_without_blaming_the_picture(
    inspector_with: Callable[..., Inspector], tmp_path: Path
) -> None:
    done = tmp_path / "done"
    inspector = inspector_with(fragile(slow(done)), wait=0.1)
    inspector.load()
    with ThreadPoolExecutor(1) as pool:
        judging = pool.submit(inspector.inspect, BAD)
        while not inspector._idle.empty():
            threading.Event().wait(0.005)
        with pytest.raises(InspectorAway, match="free"):
            inspector.inspect(PNG)
        done.touch()
        assert judging.result(60) == FACTS


@pytest.mark.parametrize(
    "command", [["/nonexistent"], [sys.executable, "-c", "raise SystemExit(3)"]], ids=["missing", "ends at once"]
)
def test_a_program_that_cannot_start_is_no_fault_of_the_picture(
    command: Sequence[str], inspector_with: Callable[..., Inspector]
) -> None:
    inspector = inspector_with(command)
    for attempt in (inspector.load, lambda: inspector.inspect(PNG)):
        with pytest.raises(InspectorAway):
            attempt()
    assert inspector._idle.qsize() == 1  # the place of the child is not lost


def test_closing_ends_the_processes_and_wakes_those_who_wait(inspector_with: Callable[..., Inspector]) -> None:
    inspector = inspector_with(fragile(HANG))
    inspector.load()
    (child,) = children_of(inspector)
    with ThreadPoolExecutor(2) as pool:
        hanging = pool.submit(inspector.inspect, BAD)
        while not inspector._idle.empty():
            threading.Event().wait(0.005)
        waiting = pool.submit(inspector.inspect, PNG)
        inspector.close()
        assert isinstance(hanging.exception(60), InspectorAway)
        assert isinstance(waiting.exception(60), InspectorAway)
    assert not psutil.pid_exists(child.pid)
    assert inspector.health()
    with pytest.raises(InspectorAway):
        inspector.inspect(PNG)


PARENT = """
import sys, time
from shared.inspector import Inspector
inspector = Inspector(2)
inspector.load()
print(*(child.process.pid for child in inspector._running), flush=True)
time.sleep(600)
"""


def test_the_processes_end_with_a_parent_that_was_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(children) == 2
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_a_stop_of_the_whole_process_group_leaves_the_judging_to_its_parent(
    inspector_with: Callable[..., Inspector],
) -> None:
    inspector = inspector_with()
    inspector.load()
    (child,) = children_of(inspector)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        child.send_signal(number)
    assert inspector.inspect(PNG) == FACTS
    assert child.is_running()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_in_the_middle_of_a_judging_judges_with_children_of_its_own(
    inspector_with: Callable[..., Inspector], tmp_path: Path
) -> None:
    done = tmp_path / "done"
    inspector = inspector_with(fragile(slow(done)))
    inspector.load()
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as pool, ours, theirs:
        judging = pool.submit(inspector.inspect, BAD)
        while not inspector._idle.empty():
            threading.Event().wait(0.005)
        pid = os.fork()
        if pid == 0:
            try:
                well = inspector.inspect(PNG) == FACTS and len(psutil.Process().children()) == 1
                theirs.sendall(b"well" if well else b"wrong")
                inspector.close()
            finally:
                os._exit(0)
        ours.settimeout(60)
        assert ours.recv(16) == b"well"
        done.touch()
        assert judging.result(60) == FACTS
    os.waitpid(pid, 0)
    assert inspector.inspect(PNG) == FACTS


def test_a_hanging_process_whose_parent_cannot_end_it_ends_itself() -> None:
    command = fragile(HANG)
    command = [*command[:2], command[2].replace("picture.serve", "picture.CHILD_ALARM_SECONDS = 1; picture.serve")]
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen(command, stdin=theirs.fileno(), cwd=ROOT) as child:
        try:
            ours.sendall(len(BAD).to_bytes(4, "big") + BAD)
            assert child.wait(60) == -signal.SIGALRM
        finally:
            child.kill()


def test_the_program_imports_nothing_that_makes_its_start_slow() -> None:
    script = "import shared.picture, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"requests", "sqlalchemy", "urllib3", "celery", "numpy", "pydantic"} & set(loaded)


def test_without_a_descriptor_for_a_process_the_picture_is_not_judged_and_nobody_is_to_blame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_more(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("shared.inspector.socket.socketpair", no_more)
    with pytest.raises(InspectorAway, match="Too many open files"):
        Inspector(1).inspect(PNG)
