"""`./dev demo`: a picture from nothing, and nothing left of it but the picture."""

import io
import signal
from pathlib import Path

import pytest
from PIL import Image

from local.demo import save
from local.supervisor import Failure
from tests.local.programs import PATIENCE, eventually, having, lives, living_with, running
from tests.local.test_up import NOTHING_GIVEN

pytestmark = pytest.mark.timeout(180)


@pytest.mark.slow
def test_the_last_line_is_the_path_of_a_whole_picture_in_the_callers_folder(tmp_path: Path) -> None:
    caller, temporary = tmp_path / "caller", tmp_path / "t"
    caller.mkdir()
    temporary.mkdir()
    # Stores of the environment are not a demo's to write to: if it used these, it would fail.
    given = {"DARKROOM_REDIS_URL": "redis://127.0.0.1:1/0", "DARKROOM_DATABASE_URL": "postgresql://127.0.0.1:1/x"}
    with running(
        "local.demo", "--caller", caller, environ=NOTHING_GIVEN | given | {"TMPDIR": str(temporary)}
    ) as program:
        program.until(r"^ +\d+\.\d\d s  POST /v1/jobs -> 202 job_\w+$")
        program.until(r"^ +\d+\.\d\d s  succeeded  512x512 image/png \d+ kB, \$0\.008$")
        assert program.end() == 0
    [picture] = caller.iterdir()
    assert program.seen[-1] == str(picture) and picture.name.startswith("darkroom-")
    with Image.open(picture) as image:
        image.load()
        assert (image.format, image.size) == ("PNG", (512, 512))
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """The house has no API: the demo waits for it when the signal comes."""
    (tmp_path / "Procfile").write_text("api: sleep 1000\n")
    temporary = tmp_path / "t"
    temporary.mkdir()
    arguments = ("demo", tmp_path, "true", PATIENCE, "--caller", tmp_path)
    with running("tests.local.small_house", *arguments, environ=NOTHING_GIVEN | {"TMPDIR": str(temporary)}) as program:
        eventually("its API is started", lambda: bool(having("sleep", program.family())))
        family = program.family()
        program.signal(number)
        assert program.end() == code
        eventually("all its processes are dead", lambda: not any(map(lives, family)))
        eventually("its data folder is gone", lambda: not list(temporary.iterdir()))


@pytest.mark.slow
def test_a_demo_that_fails_shows_what_the_processes_said_and_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "Procfile").write_text("api: sh -c 'echo no such module; exit 1'\n")
    with running(
        "tests.local.small_house", "demo", tmp_path, "true", PATIENCE, "--caller", tmp_path, environ=NOTHING_GIVEN
    ) as program:
        assert program.end() == 1
    assert any(line.endswith("| no such module") for line in program.seen)
    assert program.seen[-1].startswith("darkroom: ")
    assert not living_with(str(tmp_path))


def test_a_picture_is_never_written_over_another(tmp_path: Path) -> None:
    paths = [save(data, "image/png", "job_0123456789abcdef", tmp_path) for data in (b"one", b"two")]
    assert [path.name for path in paths] == ["darkroom-89abcdef.png", "darkroom-89abcdef-2.png"]
    assert [path.read_bytes() for path in paths] == [b"one", b"two"]


def test_a_picture_is_named_by_what_it_is(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "JPEG")
    assert save(data.getvalue(), "image/jpeg; charset=binary", "job_1", tmp_path).suffix == ".jpg"
    assert save(b"?", "application/x-new", "job_1", tmp_path).suffix == ".bin"


def test_a_folder_that_takes_no_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="can't be saved"):
        save(b"", "image/png", "job_1", tmp_path / "missing")
