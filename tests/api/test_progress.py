"""How far a running job is, in its answer: a hint beside the contract of sequence and ETag."""

from collections.abc import Iterator

import pytest

from api.services import Services
from shared import jobs as life
from shared.announcements import client
from shared.catalogue import MODELS
from shared.progress import ProgressTeller, Report
from shared.settings import Settings
from tests.api.people import KEY, Caller, Submit, on_sqlite
from tests.api.stores import patient_client, redis_away, stores_are_waited_for  # noqa: F401  a fixture for all
from tests.service import eventually

pytestmark = on_sqlite


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    backends = ("dataoorts", "diffusers")
    return Settings(database_url=database_url, redis_url=redis_url, api_key=KEY, secret_key="s" * 32, backends=backends)


@pytest.fixture
def teller(settings: Settings) -> Iterator[ProgressTeller]:
    teller = ProgressTeller(patient_client(settings))  # it tells only once
    yield teller
    teller.close()


def claim(services: Services, backend: str = "diffusers") -> life.Claim:
    terms = life.Terms("w", 20, 300, dict.fromkeys(MODELS, 0), 3)
    with services.database.write() as tx:
        [claim] = life.claim(tx, backend, terms)
    return claim


def test_a_running_job_says_how_far_it_is_and_its_etag_does_not_change(
    api: Caller, services: Services, submit: Submit, teller: ProgressTeller
) -> None:
    url = submit(backend="diffusers")["urls"]["self"]
    assert api.get(url).json["progress"] is None
    held = claim(services)
    started = api.get(url)
    assert started.json["progress"] is None, "nothing is known yet"
    teller.tell(held.job_id, Report(1, 5, 20, b"jpeg"))
    eventually("its progress is shown", lambda: api.get(url).json["progress"] is not None)
    further = api.get(url)
    assert further.json["progress"] == {"fraction": 0.25, "step": 5, "steps": 20}
    assert further.headers["ETag"] == started.headers["ETag"]
    assert api.get(url, headers={"If-None-Match": started.headers["ETag"]}).status_code == 304
    assert api.get("/v1/jobs").json["data"][0]["progress"] is None, "lists tell nothing"
    assert api.post(f"{url}/cancel").json["progress"] is None and api.get(url).json["progress"] is None


def test_the_progress_of_an_earlier_attempt_is_not_shown(
    api: Caller, services: Services, submit: Submit, teller: ProgressTeller
) -> None:
    url = submit(backend="diffusers")["urls"]["self"]
    first = claim(services)
    teller.tell(first.job_id, Report(1, 19, 20, None))
    eventually("its progress is shown", lambda: api.get(url).json["progress"] is not None)
    with services.database.write() as tx:
        life.requeue(tx, first, reason="transient", after_seconds=0, counts=True)
    assert api.get(url).json["progress"] is None
    claim(services)
    assert api.get(url).json["progress"] is None


def test_a_hosted_job_tells_nothing(
    api: Caller, services: Services, submit: Submit, teller: ProgressTeller, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = submit(backend="dataoorts")["urls"]["self"]
    claim(services, "dataoorts")
    monkeypatch.setattr(services.redis, "hmget", None)  # nobody asks
    assert api.get(url).json["progress"] is None


def test_without_redis_a_running_job_is_answered_without_its_progress(
    services: Services, api: Caller, submit: Submit, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = submit(backend="diffusers")["urls"]["self"]
    claim(services)
    with redis_away() as away:
        monkeypatch.setattr(services.progress, "_redis", client(settings.model_copy(update={"redis_url": away})))
        answer = api.get(url)
    assert answer.status_code == 200 and answer.json["status"] == "running" and answer.json["progress"] is None
