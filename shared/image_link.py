"""Signed links to a picture: whoever has one may read that picture, without a key, until it expires.

They die with the data, since what was removed is not there to be read.
"""

import hashlib
import hmac
import time
from urllib.parse import urlencode

#: The lifetime of the links in webhooks.
WEBHOOK_SECONDS = 7 * 86400
LONGEST_SECONDS = 30 * 86400


def _signature(secret_key: str, job_id: str, expires: int) -> str:
    text = f"darkroom image link {job_id} {expires}"
    return hmac.new(secret_key.encode(), text.encode(), hashlib.sha256).hexdigest()


def image_link(base_url: str, secret_key: str, job_id: str, seconds: int) -> tuple[str, int]:
    """A link that is good for so many seconds from now, by this machine's clock; and when it expires (Unix time)."""
    expires = int(time.time()) + seconds
    query = urlencode({"expires": expires, "signature": _signature(secret_key, job_id, expires)})
    return f"{base_url.rstrip('/')}/v1/jobs/{job_id}/image?{query}", expires


def is_ours(secret_key: str, job_id: str, expires: int, signature: str) -> bool:
    """Whether this link was made here, for this job and this end. It may have expired since."""
    ours = _signature(secret_key, job_id, expires)
    return hmac.compare_digest(ours.encode(), signature.encode("utf-8", "replace"))


def seconds_left(expires: int) -> int:
    """For how long a link is still good, by this machine's clock. Zero or less: it has expired."""
    return expires - int(time.time())
