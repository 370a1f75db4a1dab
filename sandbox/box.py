"""The box: a stand-in for a machine with a GPU whose server speaks the Automatic1111 web UI's API.

It draws one picture at a time, in the order of the calls, step by step at a pace; tells how far it is; and what is
interrupted comes back half-drawn with status 200, as from the real one. The painter is the vendor's stand-in's, so the
same call gives the same bytes, and every picture says SANDBOX. The wire format and its sources: `box_wire.py`.
"""

import base64
import io
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any
from urllib.parse import parse_qs

from PIL import Image

from sandbox.answers import PAGE, phrase
from sandbox.books import Books
from sandbox.box_wire import BoxError, Order, checkpoints, error, no_picture_answer, picture_answer, read_order
from sandbox.painter import encode, label, paint
from sandbox.pictures import Pictures
from sandbox.troubles import NONE, BadTrouble, Rules, Troubles, split_prompt
from sandbox.wire import Answer, json_answer

#: Seconds a step, where the sandbox is a process of its own: slow enough to see how far it is.
PACE = 0.05
PREVIEW_SIDE = 96
#: A label needs so much room, in pixels, to say what it says.
LEAST_LABEL = (128, 64)

#: Waits as a trouble says, before anything else.
Wait = Callable[[Troubles], None]


@dataclass(frozen=True)
class Activity:
    """What the box is at, in the server's own names (`modules/shared_state.py`)."""

    job: str = ""
    job_count: int = 0
    job_no: int = 0
    job_timestamp: str = "0"
    sampling_step: int = 0
    sampling_steps: int = 0
    interrupted: bool = False
    skipped: bool = False

    @property
    def progress(self) -> float:
        return self.sampling_step / self.sampling_steps if self.job_count and self.sampling_steps else 0.0


class _Line:
    """One at a time, first come, first served."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        me = object()
        with self._changed:
            self._waiting.append(me)
            self._changed.wait_for(lambda: self._waiting[0] is me)
        try:
            yield
        finally:
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()


class Box:
    """Safe to use from many threads. `auth`: `user:password` that every call must carry, or None.

    `pace`: seconds a step. `without_api`: as if its server had been started without `--api`.
    """

    def __init__(self, pictures: Pictures, rules: Rules) -> None:
        self.pace = 0.0
        self.auth: str | None = None
        self.without_api = False
        self.books = Books()
        self.interrupts = 0
        self._pictures = pictures
        self._rules = rules
        self._line = _Line()
        self._activity = Activity()
        self._changing = threading.Lock()  # of the activity: who draws and who interrupts both change it
        self._stop = threading.Event()  # what is drawn now is not wanted any more
        self._preview: bytes | None = None

    @property
    def activity(self) -> Activity:
        return self._activity

    def answer(self, method: str, target: str, authorization: str, body: bytes, wait: Wait) -> tuple[Answer, Troubles]:
        """What is sent back, and the troubles of sending it."""
        path, _, query = target.partition("?")
        if self.without_api:
            return json_answer(404, {"detail": "Not Found"}), NONE
        if self.auth is not None and authorization != f"Basic {base64.b64encode(self.auth.encode()).decode()}":
            challenge = (("WWW-Authenticate", "Basic"),)
            return error(401, "HTTPException", "Incorrect username or password", headers=challenge), NONE
        match (method, path.removeprefix("/sdapi/v1/")):
            case ("POST", "txt2img" | "img2img" as kind):
                return self._draw(kind, body, wait)
            case ("GET", "progress"):
                return self._tell(parse_qs(query)), NONE
            case ("POST", "interrupt"):
                self.interrupt()
                return json_answer(200, {}), NONE
            case ("GET", "sd-models"):
                return json_answer(200, checkpoints()), NONE
            case _:
                return json_answer(404, {"detail": "Not Found"}), NONE

    def interrupt(self) -> None:
        """As its web page does, whoever's picture is drawn."""
        with self._changing:
            self.interrupts += 1
            self._activity = replace(self._activity, interrupted=True)
            self._stop.set()

    def _draw(self, kind: str, body: bytes, wait: Wait) -> tuple[Answer, Troubles]:
        self.books.came()
        pictures, troubles = 0, NONE
        try:
            order = read_order(body, kind == "img2img")
            self.books.asked(order.wish.prompt)
            drawn, own = split_prompt(order.wish.prompt)
            troubles = self._rules.take(order.wish.prompt, own)
            wait(troubles)
            order = replace(order, wish=replace(order.wish, prompt=drawn))
            with self._line.turn():
                reply = _refusal(troubles) or self._picture(kind, order, troubles)
            pictures = reply.pictures
        except BadTrouble as bad:
            reply = error(422, "BadTrouble", f"Sandbox: {bad}")
        except BoxError as refused:
            reply = refused.answer
        finally:
            self.books.went(pictures)
        # It takes no money for pictures: the vendor's books are not told of them.
        return replace(reply, pictures=0), troubles

    def _picture(self, kind: str, order: Order, troubles: Troubles) -> Answer:
        whole = self._pictures.get(_key(order), partial(_paint, order))
        self._begin(kind, order, whole)
        try:
            done = self._steps(order)
        finally:
            self._change(job="", job_count=0)
            self._preview = None
        if done < order.steps:  # half-drawn: what a few steps make
            picture = _paint(replace(order, wish=replace(order.wish, num_steps=max(1, done // 2))))
            return picture_answer(order, picture)
        seed = order.wish.seed + 1 if troubles.other_seed else None
        answer = picture_answer(
            order, _spoil(order, whole, troubles), seed=seed, data_url=troubles.data_url, broken=troubles.broken_base64
        )
        return replace(answer, pictures=1)

    def _begin(self, kind: str, order: Order, picture: bytes) -> None:
        image = Image.open(io.BytesIO(picture))
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        self._preview = encode(image, "PNG", "")
        with self._changing:
            self._stop.clear()
            self._activity = Activity(
                job=f"scripts_{kind}",
                job_count=1,
                job_timestamp=datetime.now().strftime("%Y%m%d%H%M%S"),  # noqa: DTZ005  the server's own form, no zone
                sampling_steps=order.steps,
            )

    def _change(self, **changes: Any) -> None:
        with self._changing:
            self._activity = replace(self._activity, **changes)

    def _steps(self, order: Order) -> int:
        """How many steps were done."""
        for step in range(order.steps):
            self._change(sampling_step=step)
            if self._stop.wait(self.pace):
                return step
        return order.steps

    def _tell(self, query: dict[str, list[str]]) -> Answer:
        now, preview = self._activity, self._preview
        shown = preview is not None and query.get("skip_current_image") != ["true"]
        state = {name: getattr(now, name) for name in Activity.__dataclass_fields__}
        content: dict[str, Any] = {
            "progress": now.progress,
            "eta_relative": 0.0,
            "state": state | {"stopping_generation": False},
            "current_image": base64.b64encode(preview).decode() if preview is not None and shown else None,
            "textinfo": None,
        }
        return json_answer(200, content)


def _refusal(troubles: Troubles) -> Answer | None:
    """What is sent in place of a picture; None for a picture."""
    again = (("Retry-After", troubles.retry_after),) if troubles.retry_after is not None else ()
    if troubles.redirect is not None:
        return Answer(302, "text/html", b"", (("Location", troubles.redirect), *again))
    if troubles.out_of_memory:
        return error(500, "OutOfMemoryError", words="CUDA out of memory. Tried to allocate 7.54 GiB.")
    if troubles.status is not None:
        return error(troubles.status, phrase(troubles.status), words=troubles.message or "", headers=again)
    if troubles.error_json_200:
        return json_answer(200, {"error": troubles.message or "something is wrong"}, again)
    if troubles.html_200:
        return Answer(200, "text/html; charset=utf-8", PAGE, again)
    if troubles.empty:
        return Answer(200, "application/json", b"", again)
    return no_picture_answer() if troubles.no_images else None


def _key(order: Order) -> tuple[object, ...]:
    pictures = (None if image is None else image.tobytes() for image in (order.image, order.mask))
    return ("box", order.wish, order.strength, *pictures)


def _paint(order: Order) -> bytes:
    """By the painter's rules, mixed with what it starts from; where the mask forbids, a little is changed all the same.

    A real server's picture comes from a decoder that keeps nothing exactly.
    """
    picture = paint(order.wish)
    if order.image is None:
        return picture
    drawn = Image.open(io.BytesIO(picture)).convert("RGB")
    image = Image.blend(order.image, drawn, order.strength)
    words = f"seed {order.wish.seed} · “{order.wish.prompt}” · from a picture, {order.strength:g}"
    if order.mask is None:
        label(image, words)
    else:
        white = order.mask.point(lambda value: 255 if value >= 128 else 0)
        place = white.getbbox()
        if place is not None and place[2] - place[0] >= LEAST_LABEL[0] and place[3] - place[1] >= LEAST_LABEL[1]:
            part = image.crop(place)  # where it stays readable when the rest is put back
            label(part, words)
            image.paste(part, place[:2])
        kept = order.image.point(lambda value: min(value + 3, 255))
        image = Image.composite(image, kept, white)
    return encode(image, "PNG", f"{words} · SANDBOX")


def _spoil(order: Order, picture: bytes, troubles: Troubles) -> bytes:
    if troubles.image is not None:
        return troubles.image
    if troubles.not_image:
        return os.urandom(2048)
    if troubles.wrong_size is not None:
        width, height = troubles.wrong_size
        picture = paint(replace(order.wish, width=width, height=height))
    if troubles.truncate_clean is not None:
        picture = picture[: int(len(picture) * troubles.truncate_clean)]
    return picture
