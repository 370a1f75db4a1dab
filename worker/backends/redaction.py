"""Taking out of somebody else's words what must not be repeated."""

import base64
import html
import json
import logging
import re
from collections.abc import Iterable
from urllib.parse import quote


class Redaction:
    """Knows secrets, in the ways in which an error page may repeat them. Its repr does not tell them."""

    def __init__(self, *secrets: str) -> None:
        spellings = {spelling for secret in secrets for spelling in _spellings(secret)}
        longest_first = sorted(map(re.escape, spellings), key=len, reverse=True)
        # What follows `Bearer` is a secret, whosever it is.
        self._secret = re.compile("|".join([*longest_first, r"(?<=bearer )\S+"]), re.IGNORECASE)

    def __call__(self, words: str, *quoted: str) -> str:
        """The words without the secrets, and without what they quote of the client's own texts.

        The client's texts: in logs and messages they would outlive the removal of the job; and an error is told by
        its words, so that a prompt must not supply them. Texts of up to three characters stay: they hide nothing.
        """
        texts = [re.escape(text) for text in quoted if len(text) > 3]
        if texts:
            words = re.sub(rf"(?<!\w)({'|'.join(texts)})(?!\w)", "[prompt]", words, flags=re.IGNORECASE)
        return self._secret.sub("[key]", words)


def _spellings(secret: str) -> set[str]:
    encoded = base64.b64encode(secret.encode()).decode().rstrip("=")
    as_json = json.dumps(secret)[1:-1]
    return {secret, quote(secret, safe=""), html.escape(secret), as_json, as_json.replace("/", r"\/"), encoded}


def without_words_of(texts: Iterable[str], said: str) -> str:
    """What was said, without any word of these texts: whoever repeats a prompt may repeat a part of it.

    A word that one of theirs begins with goes too: the part may end within a word. Words of up to three letters stay.
    """
    words = {word.lower() for text in texts for word in re.findall(r"\w{4,}", text)}
    begun = {word[:length] for word in words for length in range(4, len(word) + 1)}
    return re.sub(r"\w{4,}", lambda word: "[prompt]" if word[0].lower() in begun else word[0], said)


class RedactingFilter(logging.Filter):
    """For loggers of libraries that may repeat what a server said: a malformed header, for one."""

    def __init__(self, redact: Redaction) -> None:
        super().__init__()
        self._redact = redact

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._redact(record.getMessage()), ()
        record.exc_info = record.exc_text = None  # a traceback repeats it once more
        return True
