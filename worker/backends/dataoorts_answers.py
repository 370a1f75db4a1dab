"""What the vendor's answer means: one table, and the reading that leads to it. Pure: no network, no clock but one.

The vendor documents no errors. Its models, parameters and envelope are Cloudflare Workers AI's, so that one's codes
are expected; whatever else comes is judged by the words of the error, then by the HTTP status.

Success is told by the content alone: the labels of this vendor's kind are known to be wrong.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.picture import image_format
from worker.backends.base import Billed, Failure, Kind
from worker.backends.json_answers import decode_base64, read_json
from worker.backends.redaction import without_words_of
from worker.retry_after import retry_after_seconds


@dataclass(frozen=True)
class Rule:
    """One line of the table. It fits if everything that it names does: a code, a status, words."""

    kind: Kind
    billed: Billed
    codes: frozenset[int] = frozenset()
    statuses: frozenset[int] = frozenset()
    words: str = ""  # a pattern

    def fits(self, status: int, codes: set[int], words: str) -> bool:
        return (
            (not self.codes or not self.codes.isdisjoint(codes))
            and (not self.statuses or status in self.statuses)
            and (not self.words or re.search(self.words, words, re.IGNORECASE) is not None)
        )


def _numbers(*statuses: int | range) -> frozenset[int]:
    return frozenset(number for entry in statuses for number in (entry if isinstance(entry, range) else (entry,)))


_OK = range(200, 300)
_ANY_4XX = range(400, 500)
_ANY_5XX = range(500, 600)

_MISSED = r"(invalid|wrong|missing|expired|revoked|incorrect)"

#: The table: the first line that fits holds. Codes stand before words, words before bare statuses. Words are believed
#: only beside a status that goes with them: an error text may quote the prompt, and a prompt may say anything.
RULES: tuple[Rule, ...] = (
    # Codes of Cloudflare Workers AI, in any status. One status, 429, is three things: the codes tell them apart.
    Rule(Kind.quota_exhausted, Billed.no, codes=_numbers(3036, 4006)),
    Rule(Kind.unsafe, Billed.no, codes=_numbers(3030, 8007)),
    Rule(Kind.rate_limited, Billed.no, codes=_numbers(3021)),
    Rule(Kind.rate_limited, Billed.no, codes=_numbers(3040), statuses=_numbers(429)),  # no capacity: it was not taken
    Rule(Kind.transient, Billed.no, codes=_numbers(3040)),
    Rule(Kind.transient, Billed.unknown, codes=_numbers(3007, 3008)),  # it timed out in there, perhaps while drawing
    Rule(Kind.auth_failed, Billed.no, codes=_numbers(10000)),
    # The account is blocked, or may not have this model, or has not agreed to its terms, or its plan lacks it.
    Rule(Kind.auth_failed, Billed.no, codes=_numbers(3023, 3041, 5016, 5018, 5035)),
    Rule(Kind.rejected, Billed.no, codes=_numbers(5004, 5006, 5007, 3006)),
    # Words, for errors without a known code.
    Rule(
        Kind.unsafe,
        Billed.no,
        statuses=_numbers(_OK, 400, 403, 422, 451),
        words=r"nsfw|content[ _-]?(moderation|policy|filter)|safety (system|filter|checker)|flagged",
    ),
    Rule(
        Kind.quota_exhausted,
        Billed.no,
        statuses=_numbers(_OK, 400, 402, 403, 429),
        words=r"daily free allocation|insufficient (credit|balance|fund)|out of credits|quota|payment required",
    ),
    Rule(Kind.rate_limited, Billed.no, statuses=_numbers(_OK, 403, 503), words=r"rate.?limit|too many requests"),
    # A bare `forbidden` or `token` may be the prompt's: "forbidden words", "too many tokens".
    Rule(
        Kind.auth_failed,
        Billed.no,
        statuses=_numbers(_OK, 400),
        words=_MISSED + r".{0,20}(api.?key|(api|access|auth|bearer).?token|credential)|unauthori[sz]ed|authenticat",
    ),
    # With 200 no status speaks for it: there, a whole sentence that says no more is believed.
    Rule(
        Kind.auth_failed,
        Billed.no,
        statuses=_numbers(_OK),
        words=rf"(^|[:;] )(forbidden|{_MISSED} token)\W*($|;)",
    ),
    Rule(
        Kind.rejected, Billed.no, statuses=_numbers(_OK), words=r"bad input|invalid (input|request|param)|must be [<>]"
    ),
    Rule(
        Kind.transient,
        Billed.no,
        statuses=_numbers(_OK),
        words=r"capacity|overloaded|unavailable|internal (server )?err",
    ),
    # Statuses.
    Rule(Kind.bad_output, Billed.no, statuses=_numbers(_OK)),  # an error of a sort that nobody knows, with status 200
    # A redirect is never followed. The address in the settings is wrong or has moved: the operator must mend it.
    Rule(Kind.auth_failed, Billed.no, statuses=_numbers(range(300, 400))),
    Rule(Kind.auth_failed, Billed.no, statuses=_numbers(401, 403, 407)),
    Rule(Kind.quota_exhausted, Billed.no, statuses=_numbers(402)),
    Rule(Kind.rate_limited, Billed.no, statuses=_numbers(429)),
    Rule(Kind.transient, Billed.no, statuses=_numbers(408, 409, 421, 423, 425)),
    Rule(Kind.rejected, Billed.no, statuses=_numbers(_ANY_4XX)),
    # A gateway gave up waiting: the picture may have been made behind it.
    Rule(Kind.transient, Billed.unknown, statuses=_numbers(502, 504, 520, 522, 524)),
    Rule(Kind.transient, Billed.no, statuses=_numbers(_ANY_5XX)),
    Rule(Kind.transient, Billed.unknown),  # no status that HTTP knows
)

_SENTENCES = {
    Kind.transient: "the vendor could not make the picture now",
    Kind.rate_limited: "the vendor takes no more requests now",
    Kind.bad_output: "the vendor answered with something that is not a picture",
    Kind.rejected: "the vendor refused the request",
    Kind.unsafe: "the vendor's content rules forbid this picture",
    Kind.quota_exhausted: "the vendor account's quota is used up",
    Kind.auth_failed: "the vendor refused our credentials or is not at this address",
}
#: Of the other kinds the vendor's words may tell about the operator's account: they go to the log alone. They are about
#: everybody's jobs, so no word that stands in the prompt may lead to one of them.
_ABOUT_THE_JOB = frozenset({Kind.rejected, Kind.unsafe})


def judge_answer(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    redact: Callable[[str], str] = lambda text: text,
    texts: Iterable[str] = (),
) -> bytes:
    """The picture's bytes, not looked at any closer; or Failure.

    `redact` takes out of the vendor's words what must not be repeated, before they are used or cut to length. `texts`
    are the client's own: an answer may quote a part of them.
    """
    lowered = {name.lower(): value for name, value in headers.items()}
    if status in _OK and image_format(body):
        return body
    content = read_json(body)
    if status in _OK and isinstance(content, dict) and content.get("success") is not False:
        picture = _find_picture(content)
        if picture is not None:
            return _decode(picture)
    codes, words = _read_errors(content, body)
    words = redact(words)
    if status in _OK and not codes and not words:
        raise _no_picture(status, lowered, body, content)
    counted = _status_that_counts(status, codes, content)
    not_quoted = without_words_of(texts, words)
    rule = next(
        rule for rule in RULES if rule.fits(counted, codes, words if rule.kind in _ABOUT_THE_JOB else not_quoted)
    )
    message = f"{_SENTENCES[rule.kind]} (HTTP {status}{''.join(f', code {code}' for code in sorted(codes))})"
    if rule.kind in _ABOUT_THE_JOB and words:
        message += f": {words}"
    raise Failure(rule.kind, rule.billed, message, retry_after_seconds(lowered))


def _status_that_counts(status: int, codes: set[int], content: object) -> int:
    if status in _OK:
        # `{"code": 429, …}` with status 200: what it says is worth more than what it is sent with.
        return next((code for code in sorted(codes) if 400 <= code < 600), status)
    if status in (404, 405, 410) and content is None:
        # Nobody there speaks the vendor's language, so this is not about the job but about the address: as a redirect.
        return 301
    return status


def vendor_words(body: bytes) -> str:
    """What an answer without a picture says, for a log; not redacted, at most a few thousand characters."""
    return _read_errors(read_json(body), body)[1] or _text(body)


def _no_picture(status: int, headers: Mapping[str, str], body: bytes, content: object) -> Failure:
    """A 2xx that names no error and has no picture that we know."""
    if not body[:1000].strip():
        return Failure(Kind.bad_output, Billed.unknown, f"the vendor sent an empty answer (HTTP {status})")
    if content is not None:
        return Failure(Kind.bad_output, Billed.unknown, f"the vendor sent JSON without a picture (HTTP {status})")
    if headers.get("content-type", "").lower().startswith("image/"):
        what = "the vendor sent something as a picture that is no PNG, JPEG or WEBP"
        return Failure(Kind.bad_output, Billed.yes, f"{what} (HTTP {status})")
    return Failure(Kind.bad_output, Billed.unknown, f"{_SENTENCES[Kind.bad_output]} (HTTP {status})")


def _find_picture(content: dict[str, Any]) -> str | None:
    result = content.get("result")
    if isinstance(result, dict):
        for name in ("image_base64", "image"):
            if isinstance(result.get(name), str) and result[name]:
                return str(result[name])
    return None


def _decode(text: str) -> bytes:
    try:
        return decode_base64(text)
    except ValueError:
        message = "the vendor sent JSON with a picture that is not base64"
        raise Failure(Kind.bad_output, Billed.yes, message) from None


def _read_errors(content: object, body: bytes) -> tuple[set[int], str]:
    """Codes and words of an error answer: JSON in the usual shapes, or plain text; of HTML nothing is believed."""
    if isinstance(content, dict):
        codes: set[int] = set()
        words: list[str] = []
        for name in ("errors", "error", "detail"):
            _collect(content.get(name), codes, words)
        if content.get("success") is not True:
            _collect(content.get("message"), codes, words)
        if content.get("success") is False or words:
            _collect({"code": content.get("code")}, codes, words)
        if content.get("success") is False and not words:
            words.append("no reason given")
        return codes, "; ".join(dict.fromkeys(words))
    text = _text(body)
    readable = text and text[0] not in '<{["' and text.isprintable() and "\ufffd" not in text
    return set(), text if readable else ""


def _collect(error: object, codes: set[int], words: list[str]) -> None:
    if isinstance(error, str) and error.strip():
        words.append(error.strip()[:2000])
        # Cloudflare repeats its code in the text: "4006: you have used up …", "AiError: 3030: …".
        if match := re.match(r"(?:AiError: )?(\d{4,5}): ", error.strip()):
            codes.add(int(match[1]))
    elif isinstance(error, list):
        for entry in error[:20]:
            _collect(entry, codes, words)
    elif isinstance(error, dict):
        for name in ("code", "internal_code", "internalCode", "status"):
            if re.fullmatch(r"\d{3,5}", str(error.get(name))):
                codes.add(int(str(error[name])))
        for name in ("message", "msg", "detail", "type"):
            _collect(error.get(name), codes, words)


def _text(body: bytes) -> str:
    return " ".join(body[:4000].decode("utf-8", "replace").split())
