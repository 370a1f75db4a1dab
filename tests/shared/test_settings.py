"""Settings: what is refused, and that the refusal names the setting."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from local import procfile
from shared import settings
from shared.catalogue import DEFAULT_MODEL, MODELS
from tests.servers import RedisServer
from tests.service import ROOT

GOOD = {"DARKROOM_SECRET_KEY": "s" * 32}


def refusal(**environ: str) -> str:
    with pytest.raises(settings.SettingsError) as caught:
        settings.load({**GOOD, **environ})
    return str(caught.value)


def test_a_service_without_a_secret_key_refuses_to_start() -> None:
    with pytest.raises(settings.SettingsError, match=r"^DARKROOM_SECRET_KEY: must be set"):
        settings.load({})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DARKROOM_SECRET_KEY", "short", "32 characters"),
        ("DARKROOM_API_KEY", "dk_short", "32 characters"),
        ("DARKROOM_API_KEY", "dk_" + "x" * 30 + " y", "blanks"),
        ("DARKROOM_API_KEY", "sk_" + "x" * 40, "dk_"),
        ("DARKROOM_LEASE_SECONDS", "soon", "number"),
        ("DARKROOM_LEASE_SECONDS", "2", "greater than or equal to 10"),
        ("DARKROOM_MAX_ATTEMPTS", "0", "greater than or equal to 1"),
        ("DARKROOM_MAX_WAIT_SECONDS", "-1", "greater than or equal to 1"),
        ("DARKROOM_BACKENDS", "midjourney", "midjourney"),
        ("DARKROOM_BACKENDS", ",", "nothing"),
        ("DARKROOM_BACKENDS", "dataoorts, dataoorts", "twice"),
        ("DARKROOM_AUTOMATIC1111_URL", "gpu-box:7860", "http or https"),
        ("DARKROOM_AUTOMATIC1111_URL", "http://gpu-box:7860/?a=b", "what follows a ?"),
        ("DARKROOM_AUTOMATIC1111_URL", "http://me:canary@gpu-box:7860", "DARKROOM_AUTOMATIC1111_AUTH"),
        ("DARKROOM_AUTOMATIC1111_AUTH", "canary", "user:password"),
        ("DARKROOM_AUTOMATIC1111_AUTH", "me:", "user:password"),
        ("DARKROOM_AUTOMATIC1111_AUTH", "me:pass\nword", "printable"),
        ("DARKROOM_PRICES", "{", "not JSON"),
        ("DARKROOM_PRICES", f'{{"{DEFAULT_MODEL}": -1}}', "between 0 and 1000"),
        ("DARKROOM_PRICES", f'{{"{DEFAULT_MODEL}": "0.0000001"}}', "millionth"),
        ("DARKROOM_PRICES", f'{{"{DEFAULT_MODEL}": "NaN"}}', "finite"),
        ("DARKROOM_PRICES", f'{{"{DEFAULT_MODEL[:-2]}": 1}}', f"did you mean {DEFAULT_MODEL}?"),
        ("DARKROOM_PRICES", '{"x": 1}', f"there is no model x; did you mean {' or '.join(MODELS)}?"),
        ("DARKROOM_IMAGE_STORE", "s3://bucket", "database"),
        ("DARKROOM_DATABASE_URL", "mysql://x/y", "postgresql://"),
        ("DARKROOM_REDIS_URL", "127.0.0.1:6379", "redis://"),
        ("DARKROOM_PUBLIC_URL", "darkroom.example", "http"),
        ("DARKROOM_SANDBOX", "perhaps", "boolean"),
        ("DARKROOM_SPOOL", "  ", "path of a folder"),
        ("DARKROOM_SPOOL", "/var/spool\n", "path of a folder"),
        ("DATAOORTS_URL", "ftp://example.org", "http"),
        ("DATAOORTS_URL", "http://example.org/api/v1", "plain http"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_setting(name: str, value: str, says: str) -> None:
    said = refusal(**{name: value})
    assert said.startswith(f"{name}: ")
    assert says in said


def test_every_bad_setting_is_named_at_once() -> None:
    said = refusal(DARKROOM_MAX_ATTEMPTS="0", DARKROOM_MAX_CRASHES="x")
    assert len(said.splitlines()) == 2


def test_a_misspelt_setting_is_refused_with_a_guess() -> None:
    assert "did you mean DARKROOM_LEASE_SECONDS?" in refusal(DARKROOM_LEASE_SECOND="20")


def test_no_refusal_shows_a_secret() -> None:
    said = refusal(DARKROOM_API_KEY="dk_canary", DARKROOM_SECRET_KEY="canary")
    assert "canary" not in said
    shown = repr(settings.load({**GOOD, "DATAOORTS_API_KEY": "canary", "DARKROOM_API_KEY": "dk_" + "canary" * 6}))
    assert "canary" not in shown and GOOD["DARKROOM_SECRET_KEY"] not in shown


def test_an_empty_variable_counts_as_not_set() -> None:
    assert settings.load({**GOOD, "DATAOORTS_API_KEY": "", "DARKROOM_BACKENDS": ""}).dataoorts_api_key is None


def test_without_a_database_url_it_is_sqlite_in_the_data_folder() -> None:
    wanted = settings.load({**GOOD, "DARKROOM_DATA_DIR": "/srv/darkroom"})
    assert wanted.database_url == "sqlite:////srv/darkroom/darkroom.db"


def test_the_spool_is_in_the_data_folder_unless_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings.load({**GOOD, "DARKROOM_DATA_DIR": "/srv/darkroom"}).spool == Path("/srv/darkroom/spool")
    assert settings.load(GOOD).spool == tmp_path / "data" / "spool"
    assert settings.load({**GOOD, "DARKROOM_SPOOL": "here"}).spool == tmp_path / "here"


def test_a_redis_socket_is_spelt_as_celery_spells_it() -> None:
    wanted = settings.load({**GOOD, "DARKROOM_REDIS_URL": "unix:///run/r.sock?db=2"})
    assert wanted.broker_url == "redis+socket:///run/r.sock?virtual_host=2"


def test_plain_http_to_the_vendor_is_for_loopback_and_the_sandbox_only() -> None:
    assert settings.load({**GOOD, "DATAOORTS_URL": "http://127.0.0.1:9/api/v1"}).dataoorts_url
    assert settings.load({**GOOD, "DATAOORTS_URL": "http://sandbox:9000/api/v1", "DARKROOM_SANDBOX": "1"}).sandbox


def test_networks_for_webhooks_are_read_as_networks() -> None:
    allowed = settings.load(
        {"DARKROOM_SECRET_KEY": "s" * 32, "DARKROOM_WEBHOOK_ALLOW": "10.20.0.0/16, fd12::/32,127.0.0.1"}
    )
    assert list(map(str, allowed.webhook_allow)) == ["10.20.0.0/16", "fd12::/32", "127.0.0.1/32"]
    assert settings.load({"DARKROOM_SECRET_KEY": "s" * 32}).webhook_allow == ()


@pytest.mark.parametrize("value", ["10.20.0.1/16", "example.com", "10.0.0.0/33", "1.2.3.4-1.2.3.9"])
def test_what_is_no_network_refuses_to_start(value: str) -> None:
    with pytest.raises(settings.SettingsError, match=r"^DARKROOM_WEBHOOK_ALLOW: must name networks"):
        settings.load({"DARKROOM_SECRET_KEY": "s" * 32, "DARKROOM_WEBHOOK_ALLOW": value})


def test_the_password_of_another_machine_is_a_secret_with_its_user_and_without() -> None:
    loaded = settings.load({**GOOD, "DARKROOM_AUTOMATIC1111_AUTH": "me:a:canary"})
    assert {"me:a:canary", "a:canary"} <= set(loaded.secrets)
    assert "canary" not in repr(loaded)


def test_the_sandbox_stands_in_for_each_backend_by_itself() -> None:
    vendor = settings.load({**GOOD, "DARKROOM_SANDBOX": "1"})
    server = settings.load({**GOOD, "DARKROOM_AUTOMATIC1111_SANDBOX": "1"})
    stood_in = {
        backend: (vendor.is_sandbox(backend), server.is_sandbox(backend)) for backend in settings.KNOWN_BACKENDS
    }
    assert stood_in == {"dataoorts": (True, False), "automatic1111": (False, True), "diffusers": (False, False)}


def test_who_draws_on_another_machine_must_say_where_it_is() -> None:
    assert refusal(DARKROOM_BACKENDS="dataoorts,automatic1111").startswith("DARKROOM_AUTOMATIC1111_URL: must be set")
    settings.load({**GOOD, "DARKROOM_BACKENDS": "automatic1111", "DARKROOM_AUTOMATIC1111_URL": "http://gpu-box:7860"})


#: What docs/guards.md says of settings: (setting, what was done) -> (who refuses, what it says).
CELLS = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "guards.md").read_text().splitlines()]
ROWS = [cells for cells in CELLS if len(cells) == 4 and cells[0].startswith("`D")]
SAID = {(name.strip("`"), done): (who, says) for name, done, who, says in ROWS}

#: The same, as it is provoked.
DONE: dict[tuple[str, str], dict[str, str]] = {
    ("DARKROOM_SECRET_KEY", "not set"): {"DARKROOM_SECRET_KEY": ""},
    ("DARKROOM_SECRET_KEY", "31 characters"): {"DARKROOM_SECRET_KEY": "s" * 31},
    ("DARKROOM_API_KEY", "dk_short"): {"DARKROOM_API_KEY": "dk_short"},
    ("DARKROOM_LEASE_SECOND", "set: the name is misspelt"): {"DARKROOM_LEASE_SECOND": "20"},
    ("DARKROOM_BACKENDS", "midjourney"): {"DARKROOM_BACKENDS": "midjourney"},
    ("DARKROOM_AUTOMATIC1111_URL", "not set, with that backend"): {"DARKROOM_BACKENDS": "automatic1111"},
    ("DARKROOM_DATABASE_URL", "mysql://x/y"): {"DARKROOM_DATABASE_URL": "mysql://x/y"},
    ("DATAOORTS_URL", "plain http, to another machine"): {"DATAOORTS_URL": "http://example.org/api/v1"},
    ("DATAOORTS_API_KEY", "not set, without the sandbox"): {},
    ("DARKROOM_PUBLIC_URL", "not set"): {},
}


def test_the_page_has_a_line_for_every_setting_that_is_provoked_and_for_nothing_else() -> None:
    assert [*SAID] == [*DONE]


@pytest.mark.parametrize(("name", "done"), [key for key in DONE if DONE[key]])
def test_every_process_refuses_what_the_page_says_in_its_words(name: str, done: str) -> None:
    assert SAID[name, done] == ("every process", refusal(**DONE[name, done]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "done"), [key for key in DONE if not DONE[key]])
def test_who_needs_a_setting_that_others_do_not_refuses_without_it(
    name: str, done: str, sqlite_url: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """As the Procfile starts it."""
    process, says = SAID[name, done]
    [line] = [command.line for command in procfile.read(ROOT / "Procfile", ["dataoorts"]) if command.name == process]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("DARKROOM_", "DATAOORTS_"))}
    environ |= GOOD | {
        "DARKROOM_DATA_DIR": str(tmp_path),
        "DARKROOM_DATABASE_URL": sqlite_url,
        "DARKROOM_REDIS_URL": redis_server.url,
    }
    command = [sys.executable, "-m", *shlex.split(line)]
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0 and says in ended.stderr and "Traceback" not in ended.stderr
