"""What the tests of altered pictures send."""

import base64
import struct
import zlib
from typing import Any

from PIL import Image

from tests.shared.pictures import whole

DREAMSHAPER = "lykon/dreamshaper-8-lcm"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def turned(orientation: int, kind: str = "JPEG", width: int = 512, height: int = 256) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return whole(kind, width, height, exif=exif.tobytes())


PNG = whole("PNG", 512, 256)
MASK = whole("PNG", 512, 256, "L")
JPEG = whole("JPEG", 512, 256)


def bomb(side: int) -> bytes:
    """A small PNG that promises so many pixels a side, black: the first million of its rows are there."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1_000_000)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def body(**given: Any) -> dict[str, Any]:
    """The body of a submission with these fields in `input`, of which `model` and the like go where they belong."""
    outside: dict[str, Any] = {name: given.pop(name) for name in ("model", "backend") if name in given}
    return {"input": {"prompt": "a cat", **given}, **outside}
