"""`./dev doctor`: on a newcomer's machine, and on a data folder of `./dev up`."""

import signal
from pathlib import Path

import pytest

from local import web
from tests.local.programs import ROOT, eventually, running
from tests.local.test_up import NOTHING_GIVEN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def doctor(folder: Path, **environ: str) -> tuple[int, str]:
    with running("local.doctor", "--data", folder, environ=NOTHING_GIVEN | environ) as program:
        code = program.end()
        return code, "\n".join(program.seen)


def test_on_a_newcomer_s_machine_it_says_what_up_would_make_and_makes_nothing(tmp_path: Path) -> None:
    code, said = doctor(tmp_path / "data")
    assert code == 0, said
    assert f"What `./dev up` would run with on {tmp_path / 'data'}:" in said
    for name in ("secret key", "api key", "database", "migrations"):
        assert f"ok       {name}" in said
    assert said.count("`./dev up` makes it") == 4 and "`./dev up` starts its own (valkey" in said
    assert "starts a sandbox that stands in" in said and "`./dev up` starts everything" in said
    assert list(tmp_path.iterdir()) == []


def test_a_server_on_another_machine_is_asked_for_where_it_is_and_else_a_sandbox_is_promised(tmp_path: Path) -> None:
    environ = {"DARKROOM_BACKENDS": "automatic1111"}
    code, said = doctor(tmp_path / "data", **environ)
    assert code == 0 and "ok       automatic1111 " in said and "`./dev up` starts a sandbox that stands in" in said
    away = f"http://127.0.0.1:{web.free_port()}"
    code, said = doctor(tmp_path / "data", **environ, DARKROOM_AUTOMATIC1111_URL=away)
    assert code == 0 and "warning  automatic1111 " in said and f"the server at {away} gives no answer" in said


def test_what_is_given_is_looked_at(tmp_path: Path) -> None:
    redis = f"redis://127.0.0.1:{web.free_port()}/0"
    code, said = doctor(tmp_path / "data", DARKROOM_REDIS_URL=redis, DARKROOM_SECRET_KEY="s" * 32)
    assert code == 0 and "warning  redis   " in said and "warning  secret key" in said
    code, said = doctor(tmp_path / "data", DARKROOM_LEASE_SECONDS="1")
    assert code == 1 and "wrong    settings  DARKROOM_LEASE_SECONDS: " in said


def test_beside_a_service_that_runs_it_looks_at_that_one(tmp_path: Path) -> None:
    port = web.free_port()
    with running("local.up", "--data", tmp_path / "data", "--port", port, environ=NOTHING_GIVEN) as program:
        program.until("^Ready on")

        def redis_answers() -> bool:
            """A Redis that stands still for a second does not answer, and so it is said; then it is asked again."""
            code, said = doctor(tmp_path / "data")
            assert code == 0, said
            assert "SQLite answers" in said and "wrong" not in said.replace("0 wrong", "")
            found = "1 for dataoorts, 1 for deliver, 1 for sweep", "ok       redis           it answers"
            return all(words in said for words in found)

        eventually("it finds all that runs", redis_answers)
        program.signal(signal.SIGTERM)
        assert program.end() == 0
    _, said = doctor(tmp_path / "data")
    assert "`./dev up` starts its own" in said and "SQLite answers" in said


def test_the_one_door_leads_to_it() -> None:
    text = (ROOT / "dev").read_text()
    assert "./dev doctor [--data DIR]" in text and "up | demo | doctor)" in text
