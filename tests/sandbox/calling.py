"""One call of the vendor, as the tests make it."""

from typing import Any

import requests

from sandbox.server import Sandbox

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
FLUX = "black-forest-labs/flux-1-schnell"
KEY = {"Authorization": "Bearer any-key"}
SMALL = {"prompt": "a lake", "width": 256, "height": 256, "seed": 1}


def call(sandbox: Sandbox, model: str = SDXL, **data: Any) -> requests.Response:
    """A small picture, unless `data` says otherwise."""
    body = {"model": model, "data": SMALL | data}
    return requests.post(sandbox.url, json=body, headers=KEY, timeout=60, allow_redirects=False)
