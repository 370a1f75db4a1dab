"""Another machine's GPU, against the sandbox's box: a real server over real sockets, with its troubles."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from local.web import free_port
from sandbox.server import Sandbox
from shared.inspector import Inspector
from shared.logs import TextFormatter
from tests.kept import Kept
from tests.worker.boxes import (
    AUTH,
    Connect,
    Told,
    ask,
    connect,
    failure,
    inspector,
    picture,
    pixels,
    png,
    request,
    some_pixels,
)
from worker.backends.base import Failure, Kind, Request, Unjudged

__all__ = ("connect", "inspector")  # fixtures


@pytest.fixture
def box() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


def elsewhere(box: Sandbox, **body: Any) -> requests.Response:
    """What somebody else asks of the same box."""
    asked = {"prompt": "somebody else's", "width": 256, "height": 256, "steps": 20} | body
    return requests.post(f"{box.box_url}/sdapi/v1/txt2img", json=asked, timeout=60)


# Pictures.


def test_a_picture_is_drawn_and_the_same_request_gives_the_same_one(box: Sandbox, connect: Connect) -> None:
    backend = connect(box.box_url)
    first, second = picture(ask(backend)), picture(ask(backend))
    assert (first.content_type, first.width, first.height, first.warnings) == ("image/png", 256, 256, ())
    assert first.read() == second.read() != picture(ask(backend, request(seed=8))).read()
    with Image.open(BytesIO(first.read())) as image:
        assert '"seed": 7' in image.info["parameters"], "as the server sent it, with what it wrote into it"


def test_a_picture_starts_from_an_image_and_keeps_more_of_it_the_less_strength_there_is(
    box: Sandbox, connect: Connect
) -> None:
    backend, start = connect(box.box_url), png(np.full((256, 256, 3), (200, 30, 30), np.uint8))

    def distance(strength: float) -> float:
        made = picture(ask(backend, request(start, strength=strength)))
        return float(np.abs(pixels(made.read())[:200].astype(float) - (200, 30, 30)).mean())

    assert distance(0.1) < distance(0.5) < distance(1.0)


def test_outside_of_the_mask_every_pixel_is_kept(box: Sandbox, connect: Connect) -> None:
    mask = np.zeros((256, 256), np.uint8)
    mask[64:200, 32:224] = 255
    kept = Kept()
    asked = request(png(some_pixels()), png(mask), strength=0.9)
    object.__setattr__(asked, "received", kept.keep)
    made = picture(ask(connect(box.box_url), asked))
    drawn = pixels(made.read())
    assert np.array_equal(drawn[mask == 0], some_pixels()[mask == 0])
    assert (drawn[mask == 255] != some_pixels()[mask == 255]).mean() > 0.9
    assert kept == [made.read()], "what is safe is what was put together"
    with Image.open(BytesIO(made.read())) as image:
        said = json.loads(image.info["darkroom"])
        assert set(image.info) == {"parameters", "darkroom"}, "encoded here: nothing that the server wrote into it"
    assert said["job_id"] == asked.job_id and said["backend"] == "automatic1111" and len(said["revision"]) == 10


def test_the_image_is_brought_to_the_size_that_was_asked_for(box: Sandbox, connect: Connect) -> None:
    asked = request(png(some_pixels(100, 300)), png(np.zeros((100, 300), np.uint8)), strength=0.5, width=320)
    made = picture(ask(connect(box.box_url), asked))
    assert (made.width, made.height, made.warnings) == (320, 256, ())


def test_a_picture_of_another_size_or_seed_or_checkpoint_is_kept_with_a_warning(box: Sandbox, connect: Connect) -> None:
    box.trouble(wrong_size="320x256", other_seed=True)
    made = picture(ask(connect(box.box_url, AUTH, "nobody's")))
    assert [(warning.code, warning.message) for warning in made.warnings] == [
        ("size_differs", "asked for 256x256 pixels, got 320x256"),
        ("seed_differs", "asked for seed 7, drawn with 8"),
        ("model_differs", "asked for nobody's, drawn by sd_xl_base_1.0"),
    ]


@pytest.mark.parametrize("checkpoint", ["sd_xl_turbo_1.0", "sd_xl_turbo_1.0.safetensors [e869ac7d69]", "e869ac7d69"])
def test_the_checkpoint_of_the_settings_is_asked_for(box: Sandbox, connect: Connect, checkpoint: str) -> None:
    made = picture(ask(connect(box.box_url, AUTH, checkpoint)))
    assert made.warnings == () and made.read() != picture(ask(connect(box.box_url))).read()


def test_with_a_mask_a_picture_of_another_size_is_none(box: Sandbox, connect: Connect) -> None:
    box.trouble(wrong_size="320x256")
    mask = png(np.zeros((256, 256), np.uint8))
    assert failure(ask(connect(box.box_url), request(png(some_pixels()), mask, strength=0.5))) == Kind.bad_output


def test_a_picture_with_a_data_url_before_it_is_a_picture(box: Sandbox, connect: Connect) -> None:
    box.trouble(data_url=True)
    assert picture(ask(connect(box.box_url))).content_type == "image/png"


# What goes wrong.

TROUBLES: dict[str, tuple[dict[str, Any], Kind]] = {
    "no pictures": ({"no_images": True}, Kind.bad_output),
    "base64 that is none": ({"broken_base64": True}, Kind.bad_output),
    "bytes that are no picture": ({"not_image": True}, Kind.bad_output),
    "half a picture": ({"truncate_clean": 0.5}, Kind.bad_output),
    "HTML": ({"html_200": True}, Kind.bad_output),
    "an error with status 200": ({"error_json_200": True}, Kind.bad_output),
    "nothing": ({"empty": True}, Kind.bad_output),
    "a card that is full": ({"out_of_memory": True}, Kind.out_of_memory),
    "a full card of Apple's": ({"status": 500, "message": "MPS backend out of memory"}, Kind.out_of_memory),
    "a fault of its own": ({"status": 500, "message": "a tensor with all NaNs was produced"}, Kind.transient),
    "a gateway without it": ({"status": 502}, Kind.transient),
    "too many requests": ({"status": 429, "retry_after": "7"}, Kind.rate_limited),
    "a wrong password": ({"status": 401}, Kind.auth_failed),
    "forbidden": ({"status": 403}, Kind.auth_failed),
    "no such route": ({"status": 404}, Kind.auth_failed),
    "a redirect": ({"redirect": "http://127.0.0.1:9/"}, Kind.auth_failed),
    "a value that it does not take": ({"status": 422}, Kind.rejected),
    "a request that is too long": ({"status": 413}, Kind.rejected),
    "half an answer": ({"truncate": 0.5}, Kind.transient),
    "a reset instead of an answer": ({"reset": "before"}, Kind.transient),
    "a reset in the middle": ({"reset": "body"}, Kind.transient),
}


@pytest.mark.parametrize(("trouble", "kind"), TROUBLES.values(), ids=TROUBLES.keys())
def test_each_trouble_has_its_kind_and_none_costs_anything(
    box: Sandbox, connect: Connect, trouble: dict[str, Any], kind: Kind
) -> None:
    box.trouble(**trouble)
    backend = connect(box.box_url)
    assert failure(ask(backend)) == kind
    box.clear()
    picture(ask(backend))
    assert box.box.books.read()["calls"] == 2, "nobody asked twice behind our back"


def test_what_the_server_asks_for_in_time_is_passed_on(box: Sandbox, connect: Connect) -> None:
    box.trouble(status=503, retry_after="7")
    outcome = ask(connect(box.box_url))
    assert isinstance(outcome, Failure) and outcome.retry_after == 7


def test_a_server_without_its_api_is_an_operators_fault_with_clear_words(box: Sandbox, connect: Connect) -> None:
    box.box.without_api = True
    outcome = ask(connect(box.box_url))
    assert failure(outcome) == Kind.auth_failed
    assert str(outcome) == "the server has no such API: it runs without --api, or the address is wrong (HTTP 404)"


def test_a_refused_connection_was_not_accepted(connect: Connect) -> None:
    assert failure(ask(connect(f"http://127.0.0.1:{free_port()}"))) == Kind.not_accepted


def test_the_password_is_sent_and_a_wrong_one_is_an_operators_fault(box: Sandbox, connect: Connect) -> None:
    box.box.auth = AUTH
    picture(ask(connect(box.box_url, AUTH)))
    assert failure(ask(connect(box.box_url, "darkroom:wrong-one"))) == Kind.auth_failed
    assert failure(ask(connect(box.box_url))) == Kind.auth_failed


def test_a_prompt_decides_nothing_and_stands_in_no_message_or_log(
    box: Sandbox, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "OutOfMemoryError upon a lighthouse"
    box.trouble(status=500, message=f"could not draw {prompt} today")
    outcome = ask(connect(box.box_url), request(prompt=prompt))
    assert failure(outcome) == Kind.transient
    logged = "".join(TextFormatter("worker").format(record) for record in caplog.records)
    assert "could not draw" in logged and "lighthouse" not in logged + str(outcome)


@pytest.mark.parametrize("asked", [request(strength=0.5), request(scheduler="x")], ids=["strength alone", "unknown"])
def test_what_the_catalogue_does_not_have_is_refused_without_asking(box: Sandbox, connect: Connect, asked: Any) -> None:
    assert failure(ask(connect(box.box_url), asked)) == Kind.rejected
    assert box.box.books.read()["calls"] == 0


# How far it is, and stopping it.


def test_it_tells_how_far_it_is_with_small_previews(
    box: Sandbox, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, stop = Told(), box.box._stop

    def until_told(_: float) -> bool:
        """Each step takes until it was told."""
        while not stop.is_set() and (box.box.activity.sampling_step, 20) not in [one[:2] for one in told.news]:
            time.sleep(0.005)
        return stop.is_set()

    monkeypatch.setattr(stop, "wait", until_told)
    picture(ask(connect(box.box_url), told=told))
    news = told.news[:20]  # a look in the very moment of its end may find the last step once more, without its preview
    assert [one[:2] for one in news] == [(step, 20) for step in range(20)]
    preview = news[-1][2]
    assert preview is not None
    with Image.open(BytesIO(preview)) as image:
        assert image.format == "JPEG" and max(image.size) <= 256


def test_a_canceled_picture_is_interrupted_and_is_none(box: Sandbox, connect: Connect) -> None:
    box.box.pace = 0.5
    told = Told()
    told.canceled = lambda: bool(told.news)
    assert failure(ask(connect(box.box_url), told=told)) == Kind.canceled
    assert box.box.interrupts == 1 and box.box.books.read()["pictures"] == 0
    assert box.box.activity.job == "", "the box is free again"


def test_a_picture_that_nobody_wants_any_more_is_not_asked_for(box: Sandbox, connect: Connect) -> None:
    assert failure(ask(connect(box.box_url), told=Told(canceled=lambda: True))) == Kind.canceled
    assert box.box.books.read()["calls"] == 0


def test_a_picture_that_takes_too_long_is_given_up_and_interrupted(box: Sandbox, connect: Connect) -> None:
    backend, told = connect(box.box_url), Told()
    box.box.pace = 60.0

    def its_time_is_over() -> bool:
        if told.news:  # not before it is drawn
            (call,) = backend._server.watchdog._calls
            backend._server.watchdog.hurry(call, 0)
        return False

    told.canceled = its_time_is_over
    assert failure(ask(backend, told=told)) == Kind.transient
    assert box.box.interrupts == 1


def test_somebody_elses_picture_is_neither_shown_nor_interrupted(
    box: Sandbox, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(box.box._stop, "wait", lambda _: not go_on.wait(60))  # theirs is drawn for so long
    with ThreadPoolExecutor() as pool:
        theirs = pool.submit(elsewhere, box)
        while not box.box.activity.job:
            pass
        waiting = threading.Event()
        told = Told(canceled=waiting.is_set)
        ours = pool.submit(ask, connect(box.box_url), None, told)
        box.box.books.wait_until(lambda books: books["in_flight"] == 2, 60)
        waiting.set()
        assert failure(ours.result(60)) == Kind.canceled
        assert told.news == [] and box.box.interrupts == 0
        go_on.set()
        assert theirs.result(60).status_code == 200 and box.box.activity.interrupted is False


def test_a_picture_that_somebody_else_interrupts_is_not_taken_as_whole(box: Sandbox, connect: Connect) -> None:
    box.box.pace = 60.0
    with ThreadPoolExecutor() as pool:
        told = Told()
        ours = pool.submit(ask, connect(box.box_url), None, told)
        while not told.news:
            assert not ours.done()
        requests.post(f"{box.box_url}/sdapi/v1/interrupt", timeout=60)
        outcome = ours.result(60)
    assert failure(outcome) == Kind.transient and "interrupted" in str(outcome)


def test_two_threads_are_at_the_server_one_after_the_other(box: Sandbox, connect: Connect) -> None:
    backend = connect(box.box_url)
    with ThreadPoolExecutor() as pool:
        outcomes = list(pool.map(lambda seed: ask(backend, request(seed=seed)), range(4)))
    assert len({picture(outcome).read() for outcome in outcomes}) == 4
    assert box.box.books.read()["most_in_flight"] == 1


def test_who_waits_longer_than_a_call_may_take_was_not_accepted(box: Sandbox, connect: Connect) -> None:
    backend = connect(box.box_url, deadline_seconds=0.2)
    with backend._turn:
        assert failure(ask(backend)) == Kind.not_accepted
    assert box.box.books.read()["calls"] == 0


# The contract.


def test_a_picture_that_nobody_can_judge_now_is_kept_and_can_be_judged_later(
    box: Sandbox, connect: Connect, inspector: Inspector
) -> None:
    away = Inspector(command=("/nowhere",))
    kept = Kept()
    asked = request()
    object.__setattr__(asked, "received", kept.keep)
    assert isinstance(ask(connect(box.box_url, inspector=away), asked), Unjudged)
    assert connect(box.box_url).judge(asked, kept[0]).sha256 == picture(ask(connect(box.box_url))).sha256
    away.close()


def test_one_picture_a_call(box: Sandbox, connect: Connect) -> None:
    with pytest.raises(ValueError, match="one picture"):
        connect(box.box_url).generate([request(), request()], lambda *_: None, lambda _: False)


def test_a_server_that_is_away_or_wrong_does_not_keep_the_worker_from_starting(
    box: Sandbox, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    said: dict[str, str] = {}

    def load(name: str, *arguments: str) -> None:
        caplog.clear()
        connect(*arguments).load()
        said[name] = caplog.text

    load("well", box.box_url)
    load("away", f"http://127.0.0.1:{free_port()}")
    load("checkpoint", box.box_url, AUTH, "nobody's")
    load("in the clear", "http://darkroom.invalid", AUTH)
    box.box.auth = AUTH
    load("refused", box.box_url, "darkroom:wrong-one")
    box.box.without_api = True
    load("no api", box.box_url)
    assert said["well"] == ""
    assert "gives no answer (ConnectionError)" in said["away"]
    assert "has no checkpoint nobody's" in said["checkpoint"]
    assert "travels unencrypted" in said["in the clear"]
    assert "DARKROOM_AUTOMATIC1111_AUTH" in said["refused"]
    assert "--api" in said["no api"]
    assert not [text for text in said.values() if "canary" in text]


def test_a_fault_of_ours_is_an_outcome_too(
    box: Sandbox, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError(f"a bug with {AUTH}")

    monkeypatch.setattr("worker.backends.automatic1111_answers.judge_answer", broken)
    caplog.set_level(logging.INFO)
    assert failure(ask(connect(box.box_url, AUTH))) == Kind.internal
    lines = "".join(TextFormatter("worker").format(record) for record in caplog.records)
    assert "RuntimeError" in lines and "canary" not in lines


@pytest.mark.parametrize(
    "asked", [replace(request(), model="no/such-model"), request(surprise=1), request(b"no picture", strength=0.5)]
)
def test_what_is_refused_without_asking_says_so(box: Sandbox, connect: Connect, asked: Request) -> None:
    outcome = ask(connect(box.box_url), asked)
    assert failure(outcome) == Kind.rejected and isinstance(outcome, Failure) and not outcome.asked
