"""The supervisor with real processes: what it shows, starts again, stops, and leaves behind."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from local.supervisor import _TOLD_TWICE_SECONDS
from tests.local.programs import eventually, having, lives, living_with, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

KEEP = "tests.local.keep"
#: Says `up`, and `bye` when it is asked to end.
POLITE = """sh -c 'trap "echo bye; exit 0" TERM; echo up; while :; do sleep 0.02; done'"""
DEAF = """sh -c 'trap "" TERM; echo up; while :; do sleep 0.02; done'"""
SLOW = """sh -c 'trap "sleep 1; echo is done; exit 0" TERM; echo up; while :; do sleep 0.02; done'"""
#: A process with a child of its own, as gunicorn has.
FAMILY = """sh -c 'sleep 1000 & echo child $!; wait'"""


def write_procfile(folder: Path, **lines: str) -> Path:
    (folder / "Procfile").write_text("".join(f"{name}: {line}\n" for name, line in lines.items()))
    return folder


def test_lines_stand_in_columns_behind_the_name_of_their_process(tmp_path: Path) -> None:
    folder = write_procfile(tmp_path, a="sh -c 'echo one; printf two'", longest_name=POLITE)
    with running(KEEP, folder) as program:
        program.until("longest_name.*up")
        program.until("two")  # a line without an end is shown when its process ends
        program.signal(signal.SIGTERM)
        assert program.end() == 0
    assert "a            | one" in program.seen
    assert "a            | two" in program.seen
    assert "longest_name | up" in program.seen


def test_a_line_of_the_procfile_is_expanded_as_a_shell_would(tmp_path: Path) -> None:
    folder = write_procfile(tmp_path, web="echo port ${PORT:-8000} ${BIND:-127.0.0.1}")
    with running(KEEP, folder, environ={"PORT": "1234"}) as program:
        program.until(r"port 1234 127\.0\.0\.1$")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_in_reverse_order_and_that_is_a_success(tmp_path: Path, number: signal.Signals) -> None:
    folder = write_procfile(tmp_path, first=POLITE, second=POLITE, third=POLITE)
    with running(KEEP, folder) as program:
        for _ in range(3):
            program.until("up$")
        family = program.family()
        os.killpg(program.pid, number)  # as a terminal's Ctrl-C: to the whole foreground group
        assert program.end() == 0
    said = [line.split()[0] for line in program.seen if line.endswith("bye")]
    assert said == ["third", "second", "first"]
    assert len(family) >= 4 and not any(map(lives, family))
    assert not (tmp_path / "throw-away").exists()


def test_what_dies_is_started_again_after_pauses_that_grow_to_a_limit(tmp_path: Path) -> None:
    folder = write_procfile(tmp_path, weak="sh -c 'exit 3'")
    with running(KEEP, folder, "--first-pause", "0.02") as program:
        pauses = [program.until(r"weak ended \(exit code 3\); starting it again in (\S+) s")[1] for _ in range(5)]
    assert pauses == ["0.02", "0.04", "0.08", "0.08", "0.08"]


def test_the_pause_is_short_again_after_a_good_life(tmp_path: Path) -> None:
    folder = write_procfile(tmp_path, weak="sleep 0.05")
    with running(KEEP, folder, "--good-life", "0.01") as program:
        pauses = {program.until(r"starting it again in (\S+) s")[1] for _ in range(3)}
    assert pauses == {"0.02"}


def test_a_process_that_was_killed_is_started_again_and_its_children_do_not_stay(tmp_path: Path) -> None:
    folder = write_procfile(tmp_path, web=FAMILY)
    with running(KEEP, folder) as program:
        child = psutil.Process(int(program.until(r"child (\d+)")[1]))
        os.kill(child.ppid(), signal.SIGKILL)
        program.until(r"web ended \(SIGKILL\)")
        successor = psutil.Process(int(program.until(r"child (\d+)")[1]))
        assert lives(successor)
        eventually("what was killed with its parent is dead", lambda: not lives(child))


def test_what_does_not_end_in_time_is_killed_and_that_is_no_success(tmp_path: Path) -> None:
    folder = write_procfile(tmp_path, deaf=DEAF)
    with running(KEEP, folder, "--grace", "0.1") as program:
        program.until("up$")
        program.signal(signal.SIGTERM)
        program.until("deaf did not end in time: killing it")
        assert program.end() == 1


def test_a_second_signal_does_not_wait_any_longer(tmp_path: Path) -> None:
    folder = write_procfile(tmp_path, deaf=DEAF)
    with running(KEEP, folder, "--grace", "1000") as program:
        program.until("up$")
        program.signal(signal.SIGINT)
        program.until("SIGINT: stopping; waiting for 1000 s at most .*Ctrl-C again ends it at once")
        time.sleep(2 * _TOLD_TWICE_SECONDS)  # a person's second thought
        program.signal(signal.SIGINT)
        assert program.end() == 1


def test_a_signal_that_is_told_twice_is_one(tmp_path: Path) -> None:
    """As GNU's `timeout` tells it, to its child and to the whole group; here the moment in which it does so is long."""
    folder = write_procfile(tmp_path, slow=SLOW)
    with running(KEEP, folder, "--grace", "1000", "--told-twice", "1000") as program:
        program.until("up$")
        program.signal(signal.SIGTERM)
        program.until("SIGTERM: stopping")  # before it was heard, the same signal is one for the system already
        program.signal(signal.SIGTERM)
        program.until("slow.*is done$")
        assert program.end() == 0


def test_kill_9_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = write_procfile(tmp_path, web=FAMILY, deaf=DEAF)
    with running(KEEP, folder) as program:
        for _ in range(2):
            program.until(r"child \d+|deaf.*up$")
        family = program.family()
        program.signal(signal.SIGKILL)
        eventually("all its processes are dead", lambda: not any(map(lives, family)))
        eventually("its throw-away folder is gone", lambda: not (tmp_path / "throw-away").exists())
    assert len(family) >= 4  # web, its sleep, deaf, the guard


@pytest.mark.parametrize("milliseconds", range(0, 60, 6))
def test_kill_9_while_processes_are_being_started_leaves_nothing_behind(tmp_path: Path, milliseconds: int) -> None:
    """From the moment when the guard is there, in steps: some hit a process between its birth and its first word."""
    folder = write_procfile(tmp_path, **{f"p{n}": f"sh -c 'sleep 1000; : {tmp_path}'" for n in range(8)})
    with running(KEEP, folder) as program:
        eventually("the guard is there", lambda: bool(program.family()))
        with pytest.raises(psutil.TimeoutExpired):
            psutil.Process(program.pid).wait(milliseconds / 1000)
        program.signal(signal.SIGKILL)
        try:
            eventually("nothing lives that knows this folder", lambda: not living_with(str(tmp_path)))
        finally:
            for left in living_with(str(tmp_path)):
                os.killpg(left.pid, signal.SIGKILL)


def test_a_guard_that_was_killed_is_replaced_by_one_that_knows_all(tmp_path: Path) -> None:
    folder = write_procfile(tmp_path, web=FAMILY)
    with running(KEEP, folder) as program:
        program.until(r"child (\d+)")
        [guard] = [process for process in program.family() if "guard_process.py" in " ".join(process.cmdline())]
        guard.kill()
        program.until(r"the guard ended \(SIGKILL\); starting it again")
        eventually("a new guard", lambda: any("guard_process" in " ".join(p.cmdline()) for p in program.family()))
        family = program.family()
        program.signal(signal.SIGKILL)
        eventually("all its processes are dead", lambda: not any(map(lives, family)))


def test_when_nobody_reads_any_more_everything_stops(tmp_path: Path) -> None:
    folder = write_procfile(tmp_path, web="sh -c 'while echo x; do sleep 0.01; done'")
    with running(KEEP, folder) as program:
        program.until("x$")
        family = program.family()
        program.stop_reading()
        eventually("all its processes are dead", lambda: not any(map(lives, family)))


def test_what_stands_still_is_killed_and_started_again_when_it_was_said_twice(tmp_path: Path) -> None:
    """The question here is answered by a file that the test writes, and each answer is noted."""
    folder = write_procfile(tmp_path, stopped=POLITE, other=POLITE)
    answer, answered = tmp_path / "answer", tmp_path / "answered"
    answer.touch()
    with running(KEEP, folder, "--question", f"sh -c 'tee -a {answered} <{answer}'") as program:
        program.until("up$")
        program.until("up$")
        stopped = having("echo bye", program.family())[0]
        stopped.suspend()
        answer.write_text(f"{stopped.pid} not seen for 99 s\nnonsense\n")
        program.until(r"(stopped|other) stands still: killing it \(not seen for 99 s\)")
        assert answered.read_text().count("nonsense") >= 2
        program.until(r"(stopped|other) ended \(SIGKILL\)")
        program.until("up$")
        assert not lives(stopped)
        before = answered.read_text().count("nonsense")
        eventually("it was asked again", lambda: answered.read_text().count("nonsense") >= before + 4)
        program.signal(signal.SIGTERM)
        assert program.end() == 0
        assert sum("ended (" in line for line in program.seen) == 1  # its successor has another id


def test_a_question_that_nobody_answers_kills_nobody(tmp_path: Path) -> None:
    folder = write_procfile(tmp_path, one=POLITE)
    asked = tmp_path / "asked"
    with running(KEEP, folder, "--question", f"sh -c 'echo $0 >>{asked}; exit 1'") as program:
        program.until("up$")
        eventually("it was asked three times", lambda: asked.exists() and len(asked.read_text().split()) >= 3)
        program.signal(signal.SIGTERM)
        assert program.end() == 0
        assert not any("stands still" in line for line in program.seen)
