"""From a call to its answer: the picture or the error, and what the troubles make of it. No sockets here."""

import os
from dataclasses import replace
from functools import partial
from http import HTTPStatus

import numpy as np
from PIL import Image

from sandbox.painter import Wish, encode, label, paint
from sandbox.pictures import Pictures
from sandbox.troubles import Troubles
from sandbox.wire import MODELS, Answer, error_answer, json_answer, picture_answer

PAGE = b"<!DOCTYPE html><html><head><title>Just a moment...</title></head><body>Checking your browser</body></html>"

#: What Cloudflare says with these; 429 is 3040 (busy), 3021 (rate limit) or 3036 (daily quota) there.
USUAL_ERRORS = {
    401: (10000, "Authentication error"),
    403: (5018, "AiError: This account is not allowed to access this model"),
    408: (3007, "AiError: Request timeout"),
    413: (3006, "AiError: Request is too large"),
    429: (3040, "AiError: Capacity temporarily exceeded, please try again."),
}


def answer(wish: Wish, troubles: Troubles, pictures: Pictures) -> Answer:
    """What is sent back. The first trouble that replaces the answer counts; those about the picture add up."""
    again = (("Retry-After", troubles.retry_after),) if troubles.retry_after is not None else ()
    if troubles.redirect is not None:
        return Answer(302, "text/html", b"", (("Location", troubles.redirect), *again))
    if troubles.status is not None:
        code, message = USUAL_ERRORS.get(troubles.status, (troubles.status, phrase(troubles.status)))
        code = code if troubles.code is None else troubles.code
        error = error_answer(troubles.status, code, troubles.message or message, again)
        return replace(error, body=b"") if troubles.status in (204, 304) else error  # these have no body
    if troubles.error_json_200:
        return json_answer(200, {"error": troubles.message or "Invalid API key"}, again)
    if troubles.html_200:
        return Answer(200, "text/html; charset=utf-8", PAGE, again)
    if troubles.empty:
        return Answer(200, f"image/{wish.kind.lower()}", b"", again)
    return replace(_picture(wish, troubles, pictures), headers=again)


def _picture(wish: Wish, troubles: Troubles, pictures: Pictures) -> Answer:
    as_json = MODELS[wish.model].json or troubles.base64
    whole = troubles.truncate is None and troubles.truncate_clean is None and troubles.reset is None
    if troubles.image is not None:
        return picture_answer(troubles.image, wish.kind, as_json, whole=False)
    if troubles.not_image:
        return picture_answer(os.urandom(2048), wish.kind, as_json, whole=False)
    width, height = troubles.wrong_size or (wish.width, wish.height)
    if troubles.noise_bytes is not None:
        picture = pictures.get(
            (width, height, troubles.noise_bytes), partial(noise, width, height, troubles.noise_bytes)
        )
        label_says = "PNG"
    else:
        other = "JPEG" if wish.kind == "PNG" else "PNG"
        made = replace(wish, width=width, height=height, kind=other if troubles.wrong_type else wish.kind)
        picture = pictures.get(made, partial(paint, made))
        label_says = wish.kind
    if troubles.truncate_clean is not None:
        picture = picture[: int(len(picture) * troubles.truncate_clean)]
    return picture_answer(picture, label_says, as_json, whole)


def noise(width: int, height: int, size: int) -> bytes:
    """A labelled PNG of about `size` bytes (its label alone takes a few kB): rows of noise, and padding beyond them."""
    chance = np.random.default_rng(size)
    rows = min(height, size // (3 * width))
    image = Image.new("RGB", (width, height))
    if rows:
        image.paste(Image.frombytes("RGB", (width, rows), chance.bytes(3 * width * rows)), (0, 0))
    label(image, f"{size} bytes of noise")
    missing = size - len(encode(image, "PNG", ""))
    return encode(image, "PNG", chance.bytes(max(0, missing) // 2).hex())


def phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown error"
