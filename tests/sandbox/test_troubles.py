"""Each trouble does to the answer what its name says."""

import base64
import io
import socket
import threading
import time
from typing import Any

import pytest
import requests
from PIL import Image, UnidentifiedImageError

from sandbox.server import Sandbox
from sandbox.troubles import BadTrouble
from tests.sandbox.calling import FLUX, KEY, SDXL, SMALL, call


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_status_gives_an_error_in_the_vendors_envelope(sandbox: Sandbox) -> None:
    sandbox.trouble(status=429, retry_after="7")
    answer = call(sandbox)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "7")
    assert answer.json()["errors"] == [
        {"code": 3040, "message": "AiError: Capacity temporarily exceeded, please try again."}
    ]


def test_code_and_message_of_an_error_can_be_chosen(sandbox: Sandbox) -> None:
    sandbox.trouble(status=400, code=3030, message="NSFW")
    assert call(sandbox).json()["errors"] == [{"code": 3030, "message": "NSFW"}]


def test_retry_after_is_sent_as_it_is(sandbox: Sandbox) -> None:
    sandbox.trouble(status=503, retry_after="Wed, 21 Oct 2026 07:28:00 GMT")
    assert call(sandbox).headers["Retry-After"] == "Wed, 21 Oct 2026 07:28:00 GMT"


def test_error_json_can_come_with_status_200(sandbox: Sandbox) -> None:
    sandbox.trouble(error_json_200=True)
    answer = call(sandbox)
    assert (answer.status_code, answer.json()) == (200, {"error": "Invalid API key"})


def test_html_can_come_with_status_200(sandbox: Sandbox) -> None:
    sandbox.trouble(html_200=True)
    answer = call(sandbox)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert answer.text.startswith("<!DOCTYPE html>")


def test_empty_is_a_200_without_a_body(sandbox: Sandbox) -> None:
    sandbox.trouble(empty=True)
    answer = call(sandbox)
    assert (answer.status_code, answer.content) == (200, b"")


def test_truncate_announces_more_than_it_sends(sandbox: Sandbox) -> None:
    sandbox.trouble(truncate=0.5)
    with pytest.raises(requests.exceptions.ChunkedEncodingError, match="IncompleteRead"):
        call(sandbox)


def test_truncate_clean_sends_what_it_announces_and_not_a_whole_picture(sandbox: Sandbox) -> None:
    whole = call(sandbox).content
    sandbox.trouble(truncate_clean=0.5)
    answer = call(sandbox)
    assert answer.content == whole[: len(whole) // 2]
    assert int(answer.headers["Content-Length"]) == len(whole) // 2
    with pytest.raises(OSError, match="truncated"):
        opened(answer.content)


def test_hang_answers_nothing_until_the_client_goes(sandbox: Sandbox) -> None:
    sandbox.trouble(hang=True)
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.post(sandbox.url, json={"model": SDXL, "data": SMALL}, headers=KEY, timeout=0.2)
    # Come and gone: one that came later would be in the books of the next test.
    sandbox.wait_until(lambda calls: (calls["calls"], calls["in_flight"]) == (1, 0), 60)


@pytest.mark.parametrize("seconds", [0.1, 1])
def test_hang_for_a_while_closes_without_an_answer(sandbox: Sandbox, seconds: float) -> None:
    sandbox.trouble(hang=seconds)
    with pytest.raises(requests.exceptions.ConnectionError, match="without response"):
        call(sandbox)


def test_reset_before_the_answer_is_a_tcp_reset(sandbox: Sandbox) -> None:
    sandbox.trouble(reset="before")
    with pytest.raises(requests.exceptions.ConnectionError, match="Connection reset by peer"):
        call(sandbox)


def test_reset_in_the_body_comes_after_the_headers(sandbox: Sandbox) -> None:
    sandbox.trouble(reset="body")
    body = {"model": SDXL, "data": SMALL}
    answer = requests.post(sandbox.url, json=body, headers=KEY, timeout=60, stream=True)
    assert answer.status_code == 200
    with pytest.raises(requests.exceptions.RequestException):
        answer.content  # noqa: B018 - reading it is the test


def test_drip_sends_the_body_slowly(sandbox: Sandbox) -> None:
    sandbox.trouble(error_json_200=True, drip=100)
    start = time.monotonic()
    assert call(sandbox).json() == {"error": "Invalid API key"}  # 28 bytes
    assert time.monotonic() - start > 0.2


def test_drip_headers_sends_one_byte_a_second(sandbox: Sandbox) -> None:
    sandbox.trouble(drip_headers=True)
    host, port = sandbox.url.split("/")[2].split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        body = b'{"model": "%s", "data": {"prompt": "a lake"}}' % SDXL.encode()
        head = b"POST /api/v1 HTTP/1.1\r\nAuthorization: Bearer x\r\nContent-Length: %d\r\n\r\n" % len(body)
        start = time.monotonic()
        connection.sendall(head + body)
        received = connection.recv(1) + connection.recv(1)
        assert received == b"HT"
        assert time.monotonic() - start > 0.9


def test_wrong_size_is_a_whole_picture_of_another_size(sandbox: Sandbox) -> None:
    sandbox.trouble(wrong_size="300x200")
    assert opened(call(sandbox).content).size == (300, 200)


def test_wrong_type_is_a_jpeg_called_png(sandbox: Sandbox) -> None:
    sandbox.trouble(wrong_type=True)
    answer = call(sandbox)
    assert (answer.headers["Content-Type"], opened(answer.content).format) == ("image/png", "JPEG")


def test_not_image_is_no_picture_called_png(sandbox: Sandbox) -> None:
    sandbox.trouble(not_image=True)
    answer = call(sandbox)
    assert answer.headers["Content-Type"] == "image/png"
    with pytest.raises(UnidentifiedImageError):
        opened(answer.content)


def test_redirect_points_where_it_is_told(sandbox: Sandbox) -> None:
    sandbox.trouble(redirect="http://127.0.0.1:9/elsewhere")
    answer = call(sandbox)
    assert (answer.status_code, answer.headers["Location"]) == (302, "http://127.0.0.1:9/elsewhere")


def test_base64_is_the_same_picture_in_json(sandbox: Sandbox) -> None:
    raw = call(sandbox).content
    sandbox.trouble(base64=True)
    assert base64.b64decode(call(sandbox).json()["result"]["image_base64"]) == raw


def test_image_sends_the_given_bytes(sandbox: Sandbox) -> None:
    sandbox.trouble(image=b"\x89PNG hostile")
    answer = call(sandbox)
    assert (answer.headers["Content-Type"], answer.content) == ("image/png", b"\x89PNG hostile")


@pytest.mark.parametrize("size", [20_000, 150_000, 1_000_000])
def test_noise_bytes_is_a_whole_picture_of_about_that_size(sandbox: Sandbox, size: int) -> None:
    sandbox.trouble(noise_bytes=size)
    first, second = call(sandbox, prompt="one"), call(sandbox, prompt="two")
    assert opened(first.content).size == (256, 256)
    assert 0.9 < len(first.content) / size < 1.35
    assert first.content == second.content


def test_a_truncated_picture_of_a_json_model_is_still_whole_json(sandbox: Sandbox) -> None:
    sandbox.trouble(truncate_clean=0.5, noise_bytes=50_000)
    cut = base64.b64decode(call(sandbox, FLUX).json()["result"]["image_base64"])
    with pytest.raises(OSError, match="truncated"):
        opened(cut)


def test_delay_and_a_picture_go_together(sandbox: Sandbox) -> None:
    start = time.monotonic()
    assert opened(call(sandbox, prompt="a lake [sandbox:delay=0.2]").content).size == (256, 256)
    assert time.monotonic() - start > 0.2


def test_a_prompt_can_ask_for_its_own_trouble(sandbox: Sandbox) -> None:
    answer = call(sandbox, prompt="a lake [sandbox:status=503,retry_after=7]")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "7")
    assert call(sandbox, prompt="a lake [sandbox:empty]").content == b""


def test_the_marker_is_not_drawn(sandbox: Sandbox) -> None:
    assert call(sandbox, prompt="a lake [sandbox:delay=0.01]").content == call(sandbox, prompt="a lake").content


def test_a_prompts_own_trouble_wins_over_a_rule(sandbox: Sandbox) -> None:
    sandbox.trouble(status=500)
    assert call(sandbox, prompt="a lake [sandbox:status=503]").status_code == 503


def test_a_rule_holds_for_as_many_calls_as_it_says(sandbox: Sandbox) -> None:
    sandbox.trouble(status=500, calls=2)
    assert [call(sandbox).status_code for _ in range(3)] == [500, 500, 200]


def test_a_rule_holds_only_for_prompts_that_match(sandbox: Sandbox) -> None:
    sandbox.trouble(status=500, match="boat")
    assert [call(sandbox, prompt=prompt).status_code for prompt in ("a boat", "a lake")] == [500, 200]


def test_a_later_rule_wins_and_what_it_does_not_name_stays(sandbox: Sandbox) -> None:
    sandbox.trouble(status=500, retry_after="3")
    sandbox.trouble(status=503, calls=1)
    answers = [call(sandbox) for _ in range(2)]
    assert [(answer.status_code, answer.headers["Retry-After"]) for answer in answers] == [(503, "3"), (500, "3")]


def test_a_refused_call_uses_up_no_rule(sandbox: Sandbox) -> None:
    sandbox.trouble(status=500, calls=1)
    assert call(sandbox, width=1).status_code == 400
    assert call(sandbox).status_code == 500


BAD = [
    ({"explode": True}, "explode"),
    ({"delay": -1}, "delay"),
    ({"delay": "soon"}, "delay"),
    ({"delay": float("nan")}, "delay"),
    ({"status": 99}, "status"),
    ({"status": 500.5}, "status"),
    ({"truncate": 1}, "truncate"),
    ({"reset": "after"}, "reset"),
    ({"wrong_size": "300"}, "wrong_size"),
    ({"image": "%%%"}, "image"),
    ({"empty": "maybe"}, "empty"),
    ({"retry_after": "7\r\nX-Evil: 1"}, "retry_after"),
    ({"drip": 0}, "drip"),
]


@pytest.mark.parametrize(("troubles", "name"), BAD)
def test_a_trouble_that_makes_no_sense_is_named(sandbox: Sandbox, troubles: dict[str, Any], name: str) -> None:
    with pytest.raises(BadTrouble, match=name):
        sandbox.trouble(**troubles)


def test_a_marker_that_makes_no_sense_is_refused_in_the_vendors_envelope(sandbox: Sandbox) -> None:
    answer = call(sandbox, prompt="a lake [sandbox:explode]")
    assert answer.status_code == 400
    assert (answer.json()["errors"][0]["code"], "explode" in answer.text) == (5006, True)


def test_stopping_ends_calls_that_wait() -> None:
    with Sandbox() as sandbox:
        sandbox.trouble(delay=60, match="slow")
        sandbox.trouble(hang=True, match="never")
        ends: list[str] = []

        def wait(prompt: str) -> None:
            try:
                call(sandbox, prompt=prompt)
            except requests.exceptions.ConnectionError:
                ends.append(prompt)

        threads = [threading.Thread(target=wait, args=(prompt,), daemon=True) for prompt in ("slow", "never")]
        for thread in threads:
            thread.start()
        sandbox.wait_until(lambda calls: calls["in_flight"] == 2, 60)
    for thread in threads:
        thread.join(60)
    assert sorted(ends) == ["never", "slow"]
