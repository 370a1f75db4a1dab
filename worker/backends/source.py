"""What a picture starts from: an image, and a mask where not all of it may change, as every backend sees them.

The image is turned upright, made opaque on white, and brought to the size that was asked for: scaled until it covers
it, and what is over cut off on both sides alike. A mask, which has the image's size, goes with it. So where nothing
may change, what was sent is what comes back, pixel for pixel, as long as it had the size that was asked for.
"""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from worker.backends.base import Billed, Failure, Kind, Request

#: From this brightness on, of 255, a mask says: this may change.
WHITE = 128


@dataclass(frozen=True)
class Source:
    """`image`: height x width x 3, RGB. `mask`: height x width, True where it may change; None: everywhere."""

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None

    def keep(self, drawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What was drawn (height x width x 3), and outside of the mask the image as it was."""
        return drawn if self.mask is None else np.where(self.mask[:, :, None], drawn, self.image)


def source_of(request: Request) -> Source | None:
    """None for a request that starts from nothing. Raises Failure for what can't be read, though it was judged."""
    if request.image is None:
        return None
    size = int(request.input["width"]), int(request.input["height"])
    try:
        image = np.asarray(ImageOps.fit(opaque(_upright(request.image)), size, Image.Resampling.LANCZOS))
        if request.mask is None:
            return Source(image, None)
        mask = ImageOps.fit(_upright(request.mask).convert("L"), size, Image.Resampling.NEAREST)
    except Exception as error:
        message = f"the image to start from can't be read: {type(error).__name__}"
        raise Failure(Kind.rejected, Billed.no, message, asked=False) from error
    return Source(image, np.asarray(mask) >= WHITE)


def opaque(image: Image.Image) -> Image.Image:
    """In RGB, what shines through on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _upright(data: bytes) -> Image.Image:
    with Image.open(BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        return ImageOps.exif_transpose(image)
