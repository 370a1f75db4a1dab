"""Is this one whole picture? And, run as a program, the child process that answers it (see `inspector.py`).

The decoders are C code that reads bytes from strangers. So the bytes are looked at before a decoder sees them, only
one decoder is ever tried, and in the service all of it happens in a child process with little memory.

Accepted: PNG, JPEG and WEBP, whole, of one frame, in any colour mode, at most MOST_PIXELS. Bytes after the end of the
picture are tolerated: every viewer ignores them, and a vendor who appends a newline would otherwise cost every job.
One thing can't be told: a JPEG whose scan stops early and that has its end mark all the same; the decoder paints the
rest grey and keeps it to itself.
"""

import contextlib
import json
import os
import signal
import struct
import sys
import warnings
import zlib
from io import BytesIO
from typing import NamedTuple

# The plugins by name: otherwise Image.open imports every plugin there is as soon as WEBP is asked for.
from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin

MOST_PIXELS = 2048 * 2048 * 4  # four times the largest picture that a model makes
MOST_BYTES = 32 * 1024 * 1024
MOST_PNG_CHUNKS = 100_000

CONTENT_TYPES = {
    PngImagePlugin.PngImageFile.format: "image/png",
    JpegImagePlugin.JpegImageFile.format: "image/jpeg",
    WebPImagePlugin.WebPImageFile.format: "image/webp",
}

#: The orientations of EXIF that exchange width and height.
_QUARTER_TURNS = (5, 6, 7, 8)

CHILD_MEMORY = 512 * 1024 * 1024  # address space, bytes; the largest accepted picture needs about 350 MiB
#: A child whose parent is gone, and cannot end it, ends itself when one picture takes this long. Longer than any
#: parent waits, so that it is never what decides.
CHILD_ALARM_SECONDS = 60


class Unfit(ValueError):
    """These bytes are not one whole picture that we take. The message says why, in one line."""


class Facts(NamedTuple):
    """What the decoder found."""

    content_type: str
    width: int
    height: int
    #: Whether it is to be seen turned by a quarter, as its EXIF data say; None: they can't be read.
    turned: bool | None = False


def image_format(data: bytes) -> str | None:
    """PNG, JPEG or WEBP by the first bytes, else None. Says nothing about the rest."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def inspect(data: bytes) -> Facts:
    """Decode the whole picture and say what it is; raises Unfit.

    Not for several threads at once: it turns warnings into errors, which Python does for the whole process.
    """
    if not data:
        raise Unfit("the picture is empty")
    if len(data) > MOST_BYTES:
        raise Unfit(f"the picture has more than {MOST_BYTES} bytes")
    name = image_format(data)
    if name is None:
        raise Unfit("not a PNG, JPEG or WEBP picture")
    unpacked = name == "PNG" and _check_png(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return _decode(name, data, unpacked)
    except Unfit:
        raise
    except MemoryError:
        raise Unfit("decoding the picture needs too much memory") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # of Pillow's own, larger bound
        raise Unfit(f"the {name} picture has too many pixels, more than {MOST_PIXELS} in all") from None
    except UnidentifiedImageError:  # its words name the address of a buffer of ours
        raise Unfit(f"the {name} picture has no valid header") from None
    except Exception as error:  # noqa: BLE001 - decoders raise nearly everything: OSError, SyntaxError, zlib.error …
        raise Unfit(f"the {name} picture cannot be decoded: {type(error).__name__}: {str(error)[:120]}") from None


def _decode(name: str, data: bytes, unpacked: bool) -> Facts:
    """`unpacked`: what a decoder does with the pixels was done, so that it only has to read what stands before them."""
    with Image.open(BytesIO(data), formats=(name,)) as image:
        width, height = image.size
        _check_size(width, height)
        if getattr(image, "n_frames", 1) != 1:
            raise Unfit("the picture is animated or has several frames")
        if not unpacked:
            image.load()
        return Facts(CONTENT_TYPES[name], width, height, _is_turned(image))


def _is_turned(image: Image.Image) -> bool | None:
    # What is wrong here is no fault of the picture: a vendor's is as good as any other, and what to do about a client's
    # is for others to say.
    try:
        # Not the PNG plugin's own, which decodes the pixels to get at what stands behind them: they are decoded, or
        # nothing stands there.
        exif = Image.Image.getexif(image)
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        if orientation != 1:
            exif.tobytes()  # whoever turns it has to write them anew
    except Exception:  # noqa: BLE001 - as of decoders
        return None
    return orientation in _QUARTER_TURNS


def _check_png(data: bytes) -> bool:
    """Refuse a PNG that is not there to its end. The decoders of the other formats do; this one takes what it gets.

    True if it is as models make them and every pixel of it was unpacked and found well: then a decoder would find
    nothing else, and need as long again. False: let one look at it.
    """
    position, before, plain, pixels = 8, b"", True, None
    for _ in range(MOST_PNG_CHUNKS):
        if position + 12 > len(data):
            raise Unfit("the PNG picture is cut short")
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        if end > len(data):
            raise Unfit("the PNG picture is cut short")
        name = data[position + 4 : position + 8]
        if zlib.crc32(data[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise Unfit("the PNG picture is damaged: a checksum is wrong")
        if name == b"IHDR":
            plain = plain and before == b""
            pixels = _PngPixels(data[position + 8 : end - 4])
        elif name == b"IDAT" and pixels is not None:
            plain = plain and pixels.untouched == (before != b"IDAT")
            pixels.unpack(data[position + 8 : end - 4])
        elif name == b"IEND":
            # The decoder would leave the missing rows black without a word.
            if pixels is not None and pixels.missing:
                raise Unfit("the PNG picture has too few pixels")
            return plain and before == b"IDAT" and pixels is not None and pixels.plain
        position, before = end, name
    raise Unfit("the PNG picture has too many chunks")


class _PngPixels:
    """The pixels of a PNG as they are unpacked. `missing`: how many bytes of them have not come yet."""

    #: What a row may begin with: none, sub, up, average, Paeth.
    LAST_FILTER = 4

    def __init__(self, header: bytes) -> None:
        try:
            width, height, depth, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", header)
            bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        except (struct.error, KeyError):
            raise Unfit("the PNG picture has no valid header") from None
        _check_size(width, height)
        # Adam7: (first column, first row, step between columns, step between rows) of each pass.
        adam7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
        self.missing = 0
        for left, top, across, down in adam7 if interlace else ((0, 0, 1, 1),):
            columns, rows = max(-(-(width - left) // across), 0), max(-(-(height - top) // down), 0)
            if columns:
                self.missing += rows * (1 + (columns * bits + 7) // 8)
        #: Grey, RGB or RGBA of 8 bits, not interlaced: each row is its filter and so many bytes, and any bytes will do.
        self.plain = depth == 8 and colour in (0, 2, 6) and (compression, filtering, interlace) == (0, 0, 0)
        self.untouched = True
        self._row = 1 + width * bits // 8
        self._to_next_row = 0
        self._inflater = zlib.decompressobj()

    def unpack(self, data: bytes) -> None:
        """The next part of the compressed stream. Never unpacks more than is missing."""
        self.untouched = False
        try:
            while data and self.missing:
                part = self._inflater.decompress(data, min(self.missing, 1 << 20))
                if self.plain and max(part[self._to_next_row :: self._row], default=0) > self.LAST_FILTER:
                    raise Unfit("the PNG picture is damaged: there is no such filter")
                self._to_next_row = (self._to_next_row - len(part)) % self._row
                self.missing -= len(part)
                data = self._inflater.unconsumed_tail
        except zlib.error:
            raise Unfit("the PNG picture is damaged: it cannot be decompressed") from None


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise Unfit(f"the picture has {width}x{height} pixels, more than {MOST_PIXELS} in all")


# The child process. It speaks frames (4 bytes length, big endian, then so many bytes) on its standard input, which
# is a socket: pictures come in, JSON goes out. Standard output stays free of it, whatever a library prints.


def read_exactly(descriptor: int, count: int) -> bytes | None:
    """So many bytes; None at the end of the stream."""
    parts = bytearray()
    while len(parts) < count:
        part = os.read(descriptor, min(count - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _write_frame(descriptor: int, payload: bytes) -> None:
    rest = memoryview(len(payload).to_bytes(4, "big") + payload)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _limit_myself() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A stop of the whole process group is not for us: the worker still finishes its pictures. Its end is ours.
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system can
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY, CHILD_MEMORY))


def serve(descriptor: int) -> None:
    """Judge pictures until the other end closes. The first frame, an empty object, says that we are ready."""
    _limit_myself()
    _write_frame(descriptor, b"{}")
    while (header := read_exactly(descriptor, 4)) is not None:
        data = read_exactly(descriptor, int.from_bytes(header, "big"))
        if data is None:
            return
        # Nobody handles SIGALRM, so it ends this process, even in the middle of C code.
        signal.alarm(CHILD_ALARM_SECONDS)
        try:
            answer: dict[str, str | int | None] = dict(inspect(data)._asdict())
        except Unfit as unfit:
            answer = {"unfit": str(unfit)}
        signal.alarm(0)
        _write_frame(descriptor, json.dumps(answer).encode())


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent went away in the middle
        serve(sys.stdin.fileno())
