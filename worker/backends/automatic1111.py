"""Another machine's GPU: a server that speaks the Automatic1111 web UI's API (also Forge, reForge, SD.Next).

One POST a picture, drawn there one at a time. Its pictures cost nothing but time. What its answers mean, with the
facts and their sources, stands in `automatic1111_answers.py`; the calls in `automatic1111_server.py`; how far a picture
is, and how it is stopped, in `automatic1111_watch.py`.

A picture's bytes stay as the server sent them, with what it wrote into them; but where there is a mask, what lies
outside of it is put back here exactly, and the picture is encoded here.
"""

import base64
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.catalogue import SIDE
from shared.inspector import Inspector, InspectorAway
from shared.picture import Unfit
from shared.settings import CALL_SECONDS, LOOPBACK_HOSTS, Settings
from worker.backends import automatic1111_answers as answers
from worker.backends import previews, provenance
from worker.backends.automatic1111_server import AnswerTooLong, NoAnswer, Server
from worker.backends.automatic1111_watch import STOPPING_SECONDS, Watch
from worker.backends.base import (
    Billed,
    Canceled,
    Capabilities,
    Failure,
    Kind,
    Picture,
    Progress,
    Request,
    Unjudged,
    one_line,
)
from worker.backends.json_answers import decode_base64
from worker.backends.redaction import Redaction, without_words_of
from worker.backends.source import Source, opaque, source_of
from worker.deadline import Call

log = logging.getLogger(__name__)

SLACK_SECONDS = 10.0  # for everything that is neither waiting for the server nor judging
#: Of what the server shows of an unfinished picture: longer base64 and more pixels than this are not looked at.
LONGEST_PREVIEW = 8 * 1024 * 1024
MOST_PREVIEW_PIXELS = 2048 * 2048
#: Shorter ones are words, and hiding them would show which.
SHORTEST_SECRET = 4


class Automatic1111:
    """The server at `url`. `auth`: `user:password` of its `--api-auth`. `checkpoint`: None for what it has loaded.

    Any number of threads may call; one of them is at the server, the others wait. `deadline_seconds` bounds a call with
    its waiting, up to the last byte of the answer; `connect_seconds` the part before the request is sent.
    """

    #: The longest that one call may take, if nobody says otherwise.
    DEADLINE_SECONDS = CALL_SECONDS["automatic1111"]

    name = "automatic1111"
    capabilities = Capabilities(
        smallest_side=int(SIDE.minimum),
        largest_side=int(SIDE.maximum),
        side_multiple_of=SIDE.multiple_of or 1,
        most_steps=150,  # as its web page has it
        seed=True,
        progress=True,
        cancel=True,
        image_to_image=True,
        most_at_once=1,
        hosted=True,  # a machine that is not this one: that it is switched off costs no job an attempt
    )

    def __init__(
        self,
        url: str,
        auth: str | None = None,
        checkpoint: str | None = None,
        *,
        deadline_seconds: float = DEADLINE_SECONDS,
        connect_seconds: float = 10.0,
        inspector: Inspector | None = None,
    ) -> None:
        self._url = url
        self._auth = auth
        self._checkpoint = checkpoint
        self._deadline_seconds = deadline_seconds
        self._inspector = inspector or Inspector()
        secrets = [auth, auth.partition(":")[2]] if auth else []
        self._redact = Redaction(*(secret for secret in secrets if len(secret) >= SHORTEST_SECRET))
        self._server = Server(url, auth, connect_seconds, self._redact)
        self._turn = threading.Lock()

    @property
    def attempt_seconds(self) -> float:
        return self._deadline_seconds + STOPPING_SECONDS + self._inspector.bound_seconds + SLACK_SECONDS

    def load(self) -> None:
        """Start the processes that judge pictures; raises InspectorAway. Of the server, what is wrong is only said.

        A machine that is switched off for the night must not keep its worker from starting, again and again: jobs wait,
        the breaker asks now and then, and no restart is needed when it is back.
        """
        self._inspector.load()
        for trouble in self.troubles():
            log.warning("%s", trouble)

    def troubles(self) -> list[str]:
        """What is wrong with the server or the way to it, a sentence each. Asks it, for a few seconds at most."""
        parts = urlsplit(self._url)
        where = f"{parts.scheme}://{parts.netloc}{parts.path}"
        found = []
        if self._auth is not None and parts.scheme == "http" and parts.hostname not in LOOPBACK_HOSTS:
            found.append(f"the password for {where} travels unencrypted: whoever is on that network can read it")
        try:
            status, models = self._server.question("GET", "/sdapi/v1/sd-models")
        except (NoAnswer, AnswerTooLong) as error:
            return [*found, f"the server at {where} gives no answer ({one_line(str(error)) or 'it is too long'})"]
        if status in (401, 403):
            found.append(f"the server at {where} refuses our user and password (DARKROOM_AUTOMATIC1111_AUTH)")
        elif status != 200 or not isinstance(models, list):
            found.append(f"the server at {where} does not offer the API (HTTP {status}): it must run with --api")
        elif self._checkpoint is not None and not answers.knows(models, self._checkpoint):
            found.append(
                f"the server at {where} has no checkpoint {self._checkpoint}: it draws with what it has loaded"
            )
        return found

    def health(self) -> str | None:
        return self._inspector.health()

    def compatible(self, in_hand: Sequence[Mapping[str, Any]]) -> None:
        return None

    def generate(self, requests: Sequence[Request], progress: Progress, canceled: Canceled) -> list[Picture | Failure]:
        if len(requests) > self.capabilities.most_at_once:
            raise ValueError("the server draws one picture at a time")
        return [
            self._outcome(request, partial(progress, index), partial(canceled, index))
            for index, request in enumerate(requests)
        ]

    def judge(self, request: Request, data: bytes) -> Picture:
        return self._judge(request, data, {})

    def close(self) -> None:
        self._server.close()
        self._inspector.close()

    def _outcome(self, request: Request, progress: Any, canceled: Any) -> Picture | Failure:
        deadline = time.monotonic() + self._deadline_seconds
        if not self._turn.acquire(timeout=self._deadline_seconds):
            return Failure(Kind.not_accepted, Billed.no, "another picture of ours was drawn there all the time")
        try:
            with self._server.watchdog.call(deadline - time.monotonic()) as call:
                return self._picture(request, call, progress, canceled)
        except Failure as failure:
            # Without its traceback and causes: they hold the answer's bytes, and our password in the request.
            return failure.bare()
        except Exception:  # a fault of ours must not be raised
            log.exception("a fault in the backend")
            return Failure(Kind.internal, Billed.no, "the backend failed; the fault is ours")
        finally:
            self._turn.release()

    def _picture(self, request: Request, call: Call, progress: Any, canceled: Any) -> Picture:
        source = source_of(request)
        if source is None:
            path, body = "/sdapi/v1/txt2img", answers.body_of(request, self._checkpoint, None, None)
        else:
            mask = None if source.mask is None else _base64(np.where(source.mask, np.uint8(255), np.uint8(0)))
            path = "/sdapi/v1/img2img"
            body = answers.body_of(request, self._checkpoint, _base64(source.image), mask)
        if canceled():
            raise _canceled(asked=False)
        watch = Watch(self._server, call, partial(self._tell, progress), canceled)
        try:
            with watch:
                status, headers, content = self._ask(path, body, call)
        except Failure:
            if watch.canceled:
                raise _canceled() from None
            raise
        if watch.canceled:
            raise _canceled()
        drawn = self._read(request, status, headers, content)
        watch.look_back()
        if watch.broken_off:
            raise Failure(Kind.transient, Billed.no, "somebody interrupted the picture at the server")
        return self._finish(request, source, drawn)

    def _ask(self, path: str, body: Mapping[str, Any], call: Call) -> tuple[int, Mapping[str, str], bytes]:
        try:
            return self._server.post(path, body, call)
        except AnswerTooLong:
            raise Failure(Kind.bad_output, Billed.no, "the server's answer is too long") from None
        except NoAnswer as error:
            problem = str(error)
        if not call.sent:
            raise Failure(Kind.not_accepted, Billed.no, f"the server could not be reached ({problem})")
        if call.expired or not call.seconds_left:  # requests may have noticed first
            message = f"the server gave no whole answer in {self._deadline_seconds:g} seconds"
            raise Failure(Kind.transient, Billed.no, message)
        raise Failure(Kind.transient, Billed.no, f"the connection to the server broke ({problem})")

    def _read(self, request: Request, status: int, headers: Mapping[str, str], content: bytes) -> answers.Drawn:
        texts = [str(text) for name in ("prompt", "negative_prompt") if (text := request.input.get(name))]
        said: list[str] = []

        def redact(words: str) -> str:
            said.append(self._redact(words, *texts))
            return said[-1]

        try:
            return answers.judge_answer(status, headers, content, redact)
        except Failure as failure:
            told, words = (without_words_of(texts, one_line(text)) for text in (failure.message, " ".join(said)))
            log.warning("%s. The server said: %s", told, words)
            raise

    def _finish(self, request: Request, source: Source | None, drawn: answers.Drawn) -> Picture:
        if source is None or source.mask is None:
            request.received(drawn.picture)
            return self._judge(request, drawn.picture, drawn.info)
        try:
            made = self._judge(request, drawn.picture, drawn.info)
        except Unjudged as unjudged:  # nobody has it: what is outside of the mask is not put back yet
            raise Failure(unjudged.kind, unjudged.billed, unjudged.message) from None
        if (made.height, made.width) != source.mask.shape:
            what = f"of {made.width}x{made.height} pixels, so that nothing outside of the mask can be kept"
            raise Failure(Kind.bad_output, Billed.no, f"the server sent a picture {what}")
        with Image.open(BytesIO(drawn.picture), formats=("PNG", "JPEG", "WEBP")) as image:
            pixels = source.keep(np.asarray(opaque(image)))
        revision = answers.model_hash(drawn.info)
        data = provenance.png(pixels, request, self.name, revision, sampler=answers.SAMPLER)
        request.received(data)
        return Picture.of(data, "image/png", made.width, made.height, made.warnings)

    def _judge(self, request: Request, data: bytes, info: Mapping[str, Any]) -> Picture:
        try:
            facts = self._inspector.inspect(data)
        except Unfit as unfit:
            log.warning("the server's picture is unfit: %s", one_line(str(unfit)))
            raise Failure(Kind.bad_output, Billed.no, f"the server's picture is unfit: {unfit}") from None
        except InspectorAway as away:
            raise Unjudged(Kind.transient, Billed.no, f"the picture could not be judged: {away}") from None
        warnings = answers.warnings(request, facts.width, facts.height, info, self._checkpoint)
        return Picture.of(data, facts.content_type, facts.width, facts.height, warnings)

    def _tell(self, progress: Any, step: int, steps: int, shown: str | None) -> None:
        try:
            progress(step, steps, None if shown is None else self._preview(shown))
        except Exception:  # news of a picture is not worth the picture
            log.warning("nobody could be told of the progress", exc_info=True)

    def _preview(self, shown: str) -> bytes | None:
        """A small JPEG of what the server shows; None for what can't be shown. Judged like a picture, and first."""
        if len(shown) > LONGEST_PREVIEW:
            return None
        try:
            data = decode_base64(shown)
            facts = self._inspector.inspect(data)
            if facts.width * facts.height > MOST_PREVIEW_PIXELS:
                return None
            with Image.open(BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
                return previews.small(opaque(image))
        except (ValueError, InspectorAway):  # Unfit is a ValueError
            return None


def server_backend(wanted: Settings) -> Automatic1111:
    """The backend that the settings ask for, not loaded."""
    assert wanted.automatic1111_url is not None  # else the settings would have been refused
    return Automatic1111(
        wanted.automatic1111_url,
        wanted.automatic1111_auth,
        wanted.automatic1111_checkpoint,
        deadline_seconds=wanted.call_seconds(Automatic1111.name),
    )


def _canceled(*, asked: bool = True) -> Failure:
    return Failure(Kind.canceled, Billed.no, "nobody wants the picture any more", asked=asked)


def _base64(pixels: NDArray[np.uint8]) -> str:
    """For the way to the server."""
    with BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        return base64.b64encode(file.getvalue()).decode()
