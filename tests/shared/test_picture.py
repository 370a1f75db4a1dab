"""Which bytes are one whole picture."""

import io
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared import picture
from shared.picture import Unfit, inspect
from tests.shared.pictures import animated, chunk, jpeg_of_size, png, webp_of_size, whole


@pytest.mark.parametrize(
    ("kind", "content_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")]
)
def test_a_whole_picture_is_told_with_its_true_type_and_size(kind: str, content_type: str) -> None:
    assert inspect(whole(kind, 320, 200)) == (content_type, 320, 200, False)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "1", {}),
        ("PNG", "L", {}),
        ("PNG", "LA", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "I;16", {}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("WEBP", "RGBA", {"lossless": True}),
    ],
)
def test_every_colour_mode_of_a_whole_picture_is_taken(kind: str, mode: str, options: dict[str, object]) -> None:
    assert inspect(whole(kind, 64, 48, mode, **options))[1:3] == (64, 48)


def test_the_smallest_and_the_largest_picture_are_taken() -> None:
    assert inspect(whole("PNG", 1, 1))[1:3] == (1, 1)
    assert inspect(whole("PNG", 4096, 4096, "L"))[1:3] == (4096, 4096)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_bytes_after_the_end_of_the_picture_are_tolerated(kind: str) -> None:
    assert inspect(whole(kind, 64, 64) + b"\n<!-- trailing -->\r\n")[1:3] == (64, 64)


def gif() -> bytes:
    return whole("GIF", 16, 16)


def eps() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :]


def spoiled(data: bytes) -> bytes:
    return data[:40] + b"\xff" * 40 + data[80:]


def two_pictures_in_one_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (64, 64), "red")])
    return buffer.getvalue()


BOMB = zlib.compress(b"\0" * 80_000_000, 9)

HOSTILE = {
    "nothing": b"",
    "one byte": b"\x89",
    "only the magic of PNG": b"\x89PNG\r\n\x1a\n",
    "only the magic of JPEG": b"\xff\xd8\xff\xe0",
    "only the magic of WEBP": b"RIFF\x00\x00\x00\x00WEBP",
    "HTML": b"<!doctype html><html><body>502 Bad Gateway</body></html>",
    "JSON": b'{"success": false, "errors": []}',
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "EPS": eps(),
    "GIF": gif(),
    "animated GIF": animated("GIF"),
    "BMP": whole("BMP", 16, 16),
    "TIFF": whole("TIFF", 16, 16),
    "AVIF": whole("AVIF", 16, 16),
    "PDF": b"%PDF-1.7\n1 0 obj\n",
    "wrong magic before a picture": b"\0" + whole("PNG", 16, 16),
    "EPS behind the magic of PNG": b"\x89PNG\r\n\x1a\n" + eps(),
    "GIF behind the magic of JPEG": b"\xff\xd8\xff" + gif(),
    "AVI, which is RIFF too": b"RIFF\x24\x00\x00\x00AVI LIST" + b"\0" * 40,
    "animated PNG": animated("PNG"),
    "animated WEBP": animated("WEBP"),
    "two pictures in one JPEG": two_pictures_in_one_jpeg(),
    "truncated PNG": whole("PNG", 256, 256)[:-1000],
    "PNG without its end mark": whole("PNG", 64, 64)[:-12],
    "truncated JPEG": whole("JPEG", 256, 256)[:-500],
    "JPEG without its end mark": whole("JPEG", 64, 64)[:-2],
    "progressive JPEG without its last scan": whole("JPEG", 256, 256, progressive=True)[:-300],
    "truncated WEBP": whole("WEBP", 256, 256)[:-100],
    "PNG with one wrong byte": damaged(whole("PNG", 256, 256)),
    "PNG with too few pixels": png(pixels=zlib.compress(b"\0" * 9)),
    "PNG with a filter that does not exist": png(pixels=zlib.compress(b"\x09" * 72)),
    "WEBP with damaged pixels": spoiled(whole("WEBP", 64, 64, lossless=True)),
    "PNG without pixels": png(pixels=b""),
    "PNG of no width": png(width=0),
    "PNG that promises 2^31 by 2^31 pixels": png(width=2**31 - 1, height=2**31 - 1, pixels=b"\0"),
    "PNG that promises 100,000 by 100,000 pixels": png(width=100_000, height=100_000, pixels=b"\0"),
    "PNG just above the ceiling": whole("PNG", 4096, 4097, "1"),
    "JPEG just above the ceiling": jpeg_of_size(4096, 4097),
    "JPEG that promises 65,000 by 65,000 pixels": jpeg_of_size(65_000, 65_000),
    "WEBP that promises 16,384 by 16,384 pixels": webp_of_size(16384, 16384),
    "WEBP without a picture": webp_of_size(64, 64),
    "bomb in a compressed text (zTXt)": png(chunk(b"zTXt", b"Comment\0\0" + BOMB)),
    "bomb in an international text (iTXt)": png(chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB)),
    "bomb in the colour profile (iCCP)": png(chunk(b"iCCP", b"profile\0\0" + BOMB)),
    "bomb in the pixels, a row short": png(width=4096, height=4096, pixels=zlib.compress(b"\0" * 4097 * 4095)),
    "interlaced PNG with too few pixels": png(interlace=1, pixels=zlib.compress(b"\0" * 78)),
    "PNG of too many chunks": png(chunk(b"tEXt", b"a\0b") * 100_001),
    "PNG with a chunk longer than itself": b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIHDR",
    "far too many bytes": whole("PNG", 16, 16) + b"\0" * picture.MOST_BYTES,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_whatever_is_not_one_whole_picture_is_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(Unfit) as refusal:
        inspect(data)
    assert 10 < len(str(refusal.value)) < 250 and "\n" not in str(refusal.value)


def test_an_interlaced_png_is_whole_with_the_rows_of_its_seven_passes() -> None:
    assert inspect(png(interlace=1, pixels=zlib.compress(b"\0" * 79)))[1:3] == (8, 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_no_beginning_of_a_picture_passes_for_the_whole(kind: str) -> None:
    data = whole(kind, 40, 40)
    for length in range(len(data)):
        with pytest.raises(Unfit):
            inspect(data[:length])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_mutated_picture_is_judged_and_never_raises_anything_else(kind: str, data: st.DataObject) -> None:
    content = bytearray(whole(kind, 32, 32))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        facts = inspect(bytes(content))
    except Unfit:
        return
    assert facts.width * facts.height <= picture.MOST_PIXELS


def with_right_checksums(data: bytes) -> bytes:
    position, parts = 8, [data[:8]]
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        body = data[position : end - 4]
        parts.append(body + zlib.crc32(body[4:]).to_bytes(4, "big"))
        position = end
    return b"".join(parts)


@settings(max_examples=500)
@given(
    mode=st.sampled_from(["L", "RGB", "RGBA"]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    level=st.sampled_from([0, 9]),
    changes=st.lists(st.tuples(st.integers(8, 10_000), st.integers(0, 255)), max_size=3),
)
def test_a_png_whose_pixels_are_not_decoded_again_is_one_that_the_decoder_takes(
    mode: str, size: tuple[int, int], level: int, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(whole("PNG", *size, mode, compress_level=level))
    for place, value in changes:
        content[place % len(content)] = value
    data = with_right_checksums(bytes(content))
    try:
        facts = inspect(data)
    except Unfit:
        return
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.load()
        assert (facts.width, facts.height) == image.size


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_what_a_model_makes_is_unpacked_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: Image.Image) -> None:
        raise AssertionError("unpacked again")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert inspect(whole("PNG", 64, 48, mode))[1:3] == (64, 48)
    with pytest.raises(Unfit, match="no such filter"):
        inspect(png(pixels=zlib.compress(b"\x05" * 72)))
    text_behind = whole("PNG", 64, 48, mode)[:-12] + chunk(b"tEXt", b"a\0b") + chunk(b"IEND", b"")
    with pytest.raises(Unfit, match="unpacked again"):
        inspect(text_behind)  # what stands behind the pixels is for the decoder to judge


def test_the_size_is_refused_before_a_single_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(Unfit, match="pixels"):
        inspect(whole("PNG", 4096, 4097, "1"))


def with_exif(kind: str, orientation: int | None, junk: bytes | None = None) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    return whole(kind, 40, 20, exif=exif.tobytes() if junk is None else junk)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_whether_a_picture_is_to_be_turned_by_a_quarter_is_told(kind: str) -> None:
    assert inspect(whole(kind, 40, 20)).turned is False
    turned = {orientation for orientation in range(10) if inspect(with_exif(kind, orientation)).turned}
    assert turned == {5, 6, 7, 8}
    assert inspect(with_exif(kind, 6))[1:3] == (40, 20)


def test_exif_that_cannot_be_read_is_no_fault_of_the_picture() -> None:
    for kind, content_type in (("PNG", "image/png"), ("WEBP", "image/webp")):
        for junk in (b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12", b"Exif\0\0nonsense"):
            assert inspect(with_exif(kind, None, junk)) == (content_type, 40, 20, None)


def test_no_address_of_ours_stands_in_a_reason() -> None:
    with pytest.raises(Unfit, match=r"^the WEBP picture has no valid header$"):
        inspect(b"RIFF\0\0\0\0WEBPxxxx")
