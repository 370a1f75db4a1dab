"""What the vendor's answers mean: kind of failure and bill, for every answer that is known or to be expected."""

import base64
import json
import tracemalloc
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from email.utils import format_datetime
from typing import Self

import pytest

from tests.shared.pictures import whole
from worker import retry_after
from worker.backends.base import Billed, Failure, Kind
from worker.backends.dataoorts_answers import judge_answer
from worker.retry import decide

PNG = whole("PNG", 16, 16)
B64 = base64.b64encode(PNG).decode()


def as_json(content: object) -> bytes:
    return json.dumps(content).encode()


def cloudflare(code: int, message: str) -> bytes:
    return as_json({"success": False, "errors": [{"code": code, "message": message}], "result": {}, "messages": []})


def failure_of(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> Failure:
    with pytest.raises(Failure) as caught:
        judge_answer(status, headers or {}, body)
    assert len(caught.value.message) <= 300 and caught.value.message.isprintable()
    return caught.value


WITH_A_PICTURE = {
    "raw PNG": (PNG, {"Content-Type": "image/png"}),
    "raw bytes called JSON": (PNG, {"Content-Type": "application/json"}),
    "raw bytes called HTML": (PNG, {"Content-Type": "text/html"}),
    "raw bytes without a name": (PNG, {}),
    "result.image_base64": (as_json({"result": {"image_base64": B64}}), {}),
    "result.image": (as_json({"result": {"image": B64}, "success": True, "errors": [], "messages": []}), {}),
    "JSON called a picture": (as_json({"result": {"image": B64}}), {"Content-Type": "image/png"}),
    "a data: URL": (as_json({"result": {"image": "data:image/png;base64," + B64}}), {}),
    "line breaks": (as_json({"result": {"image": base64.encodebytes(PNG).decode()}}), {}),
    "the URL alphabet": (as_json({"result": {"image": base64.urlsafe_b64encode(PNG).decode()}}), {}),
    "no padding": (as_json({"result": {"image": B64.rstrip("=")}}), {}),
    "blanks before the JSON": (b" \r\n" + as_json({"result": {"image": B64}}), {}),
    "a warning beside the picture": (as_json({"errors": [{"message": "slow"}], "result": {"image": B64}}), {}),
}


@pytest.mark.parametrize(("body", "headers"), WITH_A_PICTURE.values(), ids=WITH_A_PICTURE.keys())
def test_a_picture_is_found_by_its_content_whatever_the_label_says(body: bytes, headers: dict[str, str]) -> None:
    assert judge_answer(200, headers, body) == PNG
    assert judge_answer(201, headers, body) == PNG


HTML = b"<!doctype html><html><title>Just a moment</title>quota nsfw unauthorized</html>"
NO, YES, UNKNOWN = Billed.no, Billed.yes, Billed.unknown

FAILURES = {
    # Codes, whatever the status.
    "bad input": (400, cloudflare(5006, "AiError: Bad input: '/num_steps' must be <= 20"), Kind.rejected, NO),
    "unknown model": (400, cloudflare(5007, "AiError: No such model"), Kind.rejected, NO),
    "code 5004": (400, cloudflare(5004, "Invalid data"), Kind.rejected, NO),
    "too large": (413, cloudflare(3006, "Request is too large"), Kind.rejected, NO),
    "daily quota, 3036": (
        429,
        cloudflare(3036, "You have used up your daily free allocation"),
        Kind.quota_exhausted,
        NO,
    ),
    "daily quota, 4006": (429, cloudflare(4006, "4006: used up"), Kind.quota_exhausted, NO),
    "no capacity": (429, cloudflare(3040, "Capacity temporarily exceeded"), Kind.rate_limited, NO),
    "no capacity, 500": (500, cloudflare(3040, "Capacity temporarily exceeded"), Kind.transient, NO),
    "rate limit": (429, cloudflare(3021, "slow down"), Kind.rate_limited, NO),
    "unsafe prompt": (400, cloudflare(3030, "AiError: 3030: Input prompt contains NSFW content"), Kind.unsafe, NO),
    "unsafe picture": (400, cloudflare(8007, "flagged"), Kind.unsafe, NO),
    "wrong key": (401, cloudflare(10000, "Authentication error"), Kind.auth_failed, NO),
    "account blocked": (403, cloudflare(3023, "Service unavailable for account"), Kind.auth_failed, NO),
    "200, account blocked": (200, cloudflare(3023, "Service unavailable for account"), Kind.auth_failed, NO),
    "no such model for us, 5018": (403, cloudflare(5018, "The account is not allowed"), Kind.auth_failed, NO),
    "200, no such model for us": (200, cloudflare(5018, "The account is not allowed"), Kind.auth_failed, NO),
    "no such model for us, 3041": (400, cloudflare(3041, "The account is not allowed"), Kind.auth_failed, NO),
    "terms not agreed to": (400, cloudflare(5016, "User has not agreed to terms"), Kind.auth_failed, NO),
    "not in our plan": (400, as_json({"errors": ["5035: not in this plan"]}), Kind.auth_failed, NO),
    "timeout inside": (408, cloudflare(3007, "Timeout"), Kind.transient, UNKNOWN),
    "aborted inside": (408, cloudflare(3008, "Aborted"), Kind.transient, UNKNOWN),
    "code as a string": (400, as_json({"errors": [{"code": "3030", "message": "no"}]}), Kind.unsafe, NO),
    "code in the text only": (400, as_json({"errors": ["AiError: 4006: used up"]}), Kind.quota_exhausted, NO),
    # Error JSON with status 200: what it says counts.
    "200, bad input": (200, cloudflare(5006, "AiError: Bad input"), Kind.rejected, NO),
    "200, quota": (200, cloudflare(4006, "used up"), Kind.quota_exhausted, NO),
    "200, key": (200, as_json({"error": "Invalid API key"}), Kind.auth_failed, NO),
    "200, unsafe": (200, as_json({"error": {"message": "NSFW content detected"}}), Kind.unsafe, NO),
    "200, credits": (200, as_json({"detail": "Insufficient credits"}), Kind.quota_exhausted, NO),
    "200, rate": (200, as_json({"error": "Rate limit exceeded"}), Kind.rate_limited, NO),
    "200 that says 429": (200, as_json({"error": {"code": 429, "message": "slow"}}), Kind.rate_limited, NO),
    "200 that says 503": (200, as_json({"success": False, "code": 503, "message": "?"}), Kind.transient, NO),
    "200, overloaded": (200, as_json({"error": "The model is overloaded"}), Kind.transient, NO),
    "200, some error": (200, as_json({"error": "E_BANANA"}), Kind.bad_output, NO),
    "200, success false": (200, as_json({"success": False, "errors": [], "result": None}), Kind.bad_output, NO),
    "200, success false with a picture": (
        200,
        as_json({"success": False, "errors": [{"message": "E"}], "result": {"image": B64}}),
        Kind.bad_output,
        NO,
    ),
    "200, token": (200, as_json({"error": "Invalid token."}), Kind.auth_failed, NO),
    "200, forbidden": (200, as_json({"error": {"message": "403: Forbidden", "type": "E"}}), Kind.auth_failed, NO),
    # What is said of a prompt is not said of a key.
    "400, key": (400, as_json({"error": "Invalid API key"}), Kind.auth_failed, NO),
    "400, access token": (
        400,
        as_json({"error": "The access token is missing: invalid access token"}),
        Kind.auth_failed,
        NO,
    ),
    "400, forbidden words": (400, as_json({"error": "Prompt contains forbidden words"}), Kind.rejected, NO),
    "400, forbidden": (400, as_json({"error": "Forbidden"}), Kind.rejected, NO),
    "400, tokens": (400, as_json({"error": "Prompt holds invalid tokens"}), Kind.rejected, NO),
    "200, forbidden words": (200, as_json({"error": "Prompt contains forbidden words"}), Kind.bad_output, NO),
    "200, tokens": (200, as_json({"error": "Prompt holds invalid tokens"}), Kind.bad_output, NO),
    # 2xx without an error and without a picture: nobody says that it was free.
    "empty": (200, b"", Kind.bad_output, UNKNOWN),
    "blanks": (200, b" \n", Kind.bad_output, UNKNOWN),
    "204": (204, b"", Kind.bad_output, UNKNOWN),
    "HTML": (200, HTML, Kind.bad_output, UNKNOWN),
    "JSON without a result": (200, b"{}", Kind.bad_output, UNKNOWN),
    "JSON with an empty result": (
        200,
        as_json({"success": True, "errors": [], "result": {}}),
        Kind.bad_output,
        UNKNOWN,
    ),
    "JSON with an empty picture": (200, as_json({"result": {"image": ""}}), Kind.bad_output, UNKNOWN),
    "a JSON list": (200, b"[1, 2]", Kind.bad_output, UNKNOWN),
    "a JSON string": (200, json.dumps(B64).encode(), Kind.bad_output, UNKNOWN),
    "broken JSON": (200, b'{"result": {"image": "', Kind.bad_output, UNKNOWN),
    "deep JSON": (200, b"[" * 5000, Kind.bad_output, UNKNOWN),
    "JSON of a million values": (200, b'{"result": [' + b"[]," * 1_000_000 + b"0]}", Kind.bad_output, UNKNOWN),
    "a number of a million digits": (200, b'{"a": ' + b"1" * 1_000_000 + b"}", Kind.bad_output, UNKNOWN),
    "bytes of no kind": (200, b"\x00\x01\x02\xff" * 50, Kind.bad_output, UNKNOWN),
    # A picture was delivered, and it is none.
    "broken base64": (200, as_json({"result": {"image": "%%%"}}), Kind.bad_output, YES),
    "a link": (200, as_json({"result": {"image": "https://cdn.example/1.png"}}), Kind.bad_output, YES),
    # Statuses alone.
    "301": (301, b"", Kind.auth_failed, NO),
    "302 with a picture": (302, PNG, Kind.auth_failed, NO),
    "304": (304, b"", Kind.auth_failed, NO),
    "400": (400, b"", Kind.rejected, NO),
    "400 with a picture": (400, PNG, Kind.rejected, NO),
    "401": (401, b"", Kind.auth_failed, NO),
    "402": (402, b"{}", Kind.quota_exhausted, NO),
    "403": (403, HTML, Kind.auth_failed, NO),
    "403, moderation": (403, as_json({"errors": ["content_moderation"]}), Kind.unsafe, NO),
    "404 of a stranger": (404, HTML, Kind.auth_failed, NO),
    "404 of the vendor": (404, as_json({"error": "model not found"}), Kind.rejected, NO),
    "405": (405, b"", Kind.auth_failed, NO),
    "408": (408, b"", Kind.transient, NO),
    "413": (413, b"", Kind.rejected, NO),
    "422": (422, as_json({"detail": [{"msg": "width: too small"}]}), Kind.rejected, NO),
    "429": (429, b"slow down", Kind.rate_limited, NO),
    "429, HTML": (429, HTML, Kind.rate_limited, NO),
    "429, plain quota": (429, b"monthly quota exceeded", Kind.quota_exhausted, NO),
    "500": (500, b"", Kind.transient, NO),
    "500, HTML": (500, HTML, Kind.transient, NO),
    "500 with strange words": (500, as_json({"error": "nsfw quota invalid api key"}), Kind.transient, NO),
    "502": (502, HTML, Kind.transient, UNKNOWN),
    "503": (503, as_json({"error": "Model is loading", "estimated_time": 20}), Kind.transient, NO),
    "504": (504, b"", Kind.transient, UNKNOWN),
    "520": (520, HTML, Kind.transient, UNKNOWN),
    "521": (521, HTML, Kind.transient, NO),
    "524": (524, HTML, Kind.transient, UNKNOWN),
    "101": (101, b"", Kind.transient, UNKNOWN),
    "999": (999, b"", Kind.transient, UNKNOWN),
}


@pytest.mark.parametrize(("status", "body", "kind", "billed"), FAILURES.values(), ids=FAILURES.keys())
def test_every_other_answer_is_a_failure_with_its_kind_and_bill(
    status: int, body: bytes, kind: Kind, billed: Billed
) -> None:
    failure = failure_of(status, body)
    assert (failure.kind, failure.billed) == (kind, billed)


PROMPT = "an invalid api key on a billboard, unauthorized, out of credits, the daily quota, too many requests"

QUOTING = {
    "a part": (400, "Unsupported prompt: 'an invalid api key on a bl...'", Kind.rejected),
    "a part that ends within a word": (400, "Unsupported prompt: '... unauthorized, out of cred'", Kind.rejected),
    "in other letters": (400, "Bad prompt: AN INVALID API KEY", Kind.rejected),
    "a quota": (400, "Unsupported prompt: 'daily quota, too ma'", Kind.rejected),
    "a rate limit, 200": (200, "Bad input: '... too many requests'", Kind.rejected),
    "a key, 200": (200, "Bad input: 'an invalid api key'", Kind.rejected),
    # Whom its own words accuse all the same.
    "401": (401, "invalid api key", Kind.auth_failed),
    "429": (429, "too many requests", Kind.rate_limited),
    "other words": (400, "Incorrect credentials", Kind.auth_failed),
    "content": (400, "'unauthorized' was flagged", Kind.unsafe),
}


@pytest.mark.parametrize(("status", "said", "kind"), QUOTING.values(), ids=QUOTING.keys())
def test_no_word_of_a_prompt_makes_an_error_everybodys(status: int, said: str, kind: Kind) -> None:
    with pytest.raises(Failure) as caught:
        judge_answer(status, {}, as_json({"error": said}), texts=[PROMPT])
    assert caught.value.kind == kind


def test_what_says_of_a_job_that_it_is_unsafe_may_say_so_in_the_prompts_words() -> None:
    with pytest.raises(Failure) as caught:
        judge_answer(400, {}, as_json({"error": "NSFW content detected"}), texts=["nsfw content"])
    assert caught.value.kind == Kind.unsafe


def test_json_of_millions_of_values_is_not_unpacked() -> None:
    body = b'{"result": [' + b"[]," * 1_000_000 + b"0]}"
    tracemalloc.start()
    failure_of(200, body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_something_that_is_called_a_picture_and_is_none_was_delivered() -> None:
    assert failure_of(200, b"GIF89a" + b"\xff" * 30, {"Content-Type": "image/gif"}).billed == Billed.yes


def test_the_client_learns_the_vendors_words_about_the_clients_own_request() -> None:
    assert "'/num_steps' must be <= 20" in failure_of(400, cloudflare(5006, "'/num_steps' must be <= 20")).message


@pytest.mark.parametrize("status", [401, 402, 429, 500, 200])
def test_the_client_does_not_learn_what_the_vendor_says_about_the_operators_account(status: int) -> None:
    assert "4711" not in failure_of(status, as_json({"error": "account 4711 is broken"})).message


def test_a_message_is_one_line_of_at_most_300_characters() -> None:
    message = failure_of(400, cloudflare(5006, "line\r\nbreak\x1b[31m\u202e " + "x" * 5000)).message
    assert len(message) == 300 and message.isprintable()


def test_secrets_are_taken_out_before_the_message_is_cut_to_length() -> None:
    body = cloudflare(5006, "x" * 200 + " dk_secret_secret_secret")
    with pytest.raises(Failure) as caught:
        judge_answer(400, {}, body, lambda words: words.replace("dk_secret_secret_secret", "[key]"))
    assert "dk_" not in caught.value.message


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        (" 7 ", 7.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("1000000000", 1e9),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
        ("-5", None),
        ("soon", None),
        ("", None),
        ("nan", None),
        ("1e9", None),
        ("٣", None),
        ("9" * 5000, None),
        ("Fri, 99 Foo 2026 99:99:99 GMT", None),
        ("Fri, 31 Dec 999999 23:59:59 GMT", None),
    ],
)
def test_retry_after_is_read_in_seconds_and_nonsense_is_none(value: str, seconds: float | None) -> None:
    assert failure_of(429, b"", {"retry-after": value}).retry_after == seconds
    assert failure_of(503, b"", {"Retry-After": value}).retry_after == seconds


class Standing(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls(2026, 1, 1, tzinfo=tz)


def test_retry_after_as_a_date_is_taken_from_the_vendors_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_after, "datetime", Standing)
    wrong = datetime(2031, 1, 1, tzinfo=UTC)
    headers = {"Retry-After": format_datetime(wrong + timedelta(seconds=90), usegmt=True)}
    assert failure_of(429, b"", headers | {"Date": format_datetime(wrong, usegmt=True)}).retry_after == 90
    later = {"Retry-After": format_datetime(Standing.now(UTC) + timedelta(seconds=60), usegmt=True)}
    assert failure_of(429, b"", later).retry_after == 60


def test_whatever_retry_after_says_the_pause_stays_within_bounds() -> None:
    for value in ("0", "7", "999999999999", "9" * 299, "Fri, 31 Dec 9999 23:59:59 GMT", "-1", "x"):
        failure = failure_of(429, b"", {"Retry-After": value})
        decision = decide(failure.kind, 0, 3, 1, failure.retry_after, 0.5)
        assert 1 <= decision.after_seconds <= 990  # type: ignore[union-attr]
