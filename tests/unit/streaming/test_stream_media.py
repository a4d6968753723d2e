import struct
import zlib

import pytest
from stream_fakes import png_of

from qarm_feast.errors import EventError
from streaming.limits import EventLimits
from streaming.media import check_media

LIMITS = EventLimits(
    max_image_pixels=100, allowed_uri_prefixes=("s3://bucket/images/", "/srv/images/")
)


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


def _jpeg(width: int, height: int) -> bytes:
    frame = struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\x00"
    segments = [_segment(0xE0, b"JFIF\0"), _segment(0xC0, frame), _segment(0xDA, b"\x00")]
    return b"\xff\xd8" + b"".join(segments) + b"pixels" + b"\xff\xd9"


def _gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0" + b";"


def _webp(form: bytes, header: bytes) -> bytes:
    body = b"WEBP" + form + struct.pack("<I", len(header)) + header
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _webps(width: int, height: int) -> list[bytes]:
    across, down = (width - 1).to_bytes(3, "little"), (height - 1).to_bytes(3, "little")
    bits = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return [
        _webp(b"VP8X", b"\0" * 4 + across + down),
        _webp(b"VP8L", b"\x2f" + bits),
        _webp(b"VP8 ", b"\0" * 3 + b"\x9d\x01\x2a" + struct.pack("<HH", width, height)),
    ]


def _all_forms(width: int, height: int) -> list[bytes]:
    images = [png_of(width, height), _jpeg(width, height), _gif(width, height)]
    return [*images, *_webps(width, height)]


def _interlaced_png(width: int, height: int, num_bytes: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 1)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(num_bytes))), (b"IEND", b"")]
    framed = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def _reason(**content: str | bytes) -> str:
    with pytest.raises(EventError) as caught:
        check_media(content, LIMITS)
    return caught.value.reason


@pytest.mark.parametrize("form", range(6))
def test_image_of_just_the_allowed_size_passes_and_one_row_more_does_not(form: int) -> None:
    check_media({"image": _all_forms(20, 5)[form]}, LIMITS)

    assert _reason(image=_all_forms(20, 6)[form]) == "image_too_large"


@pytest.mark.parametrize("form", range(6))
def test_image_that_is_cut_off_anywhere_does_not_decode(form: int) -> None:
    image = _all_forms(20, 5)[form]

    reasons = {_reason(image=image[:length]) for length in range(1, len(image))}

    assert reasons == {"image_undecodable"}


def test_bytes_of_no_known_form_are_no_image() -> None:
    assert _reason(image=b"<html>") == "image_undecodable"
    assert _reason(image=b"") == "image_undecodable"


def test_image_without_pixels_is_no_image() -> None:
    assert _reason(image=_jpeg(5, 0)) == "image_undecodable"
    assert _reason(image=_jpeg(0, 5)) == "image_undecodable"


def test_jpeg_may_have_fill_bytes_before_its_markers() -> None:
    markers = (b"\xff\xe0", b"\xff\xc0", b"\xff\xda", b"\xff\xd9")
    image = _jpeg(20, 5)
    for marker in markers:
        filled = image.replace(marker, b"\xff\xff\xff" + marker)
        check_media({"image": filled}, LIMITS)

        assert _reason(image=filled[: filled.index(marker) + 1]) == "image_undecodable"

    for marker in markers[:3]:
        assert _reason(image=image.replace(marker, b"\0" + marker)) == "image_undecodable"
    assert _reason(image=_jpeg(20, 6).replace(markers[1], b"\xff" + markers[1])) == (
        "image_too_large"
    )
    assert _reason(image=image[:2] + b"\xff" * 8_000_000) == "image_undecodable"


def test_png_that_unpacks_to_more_or_less_than_its_header_says_does_not_decode() -> None:
    assert _reason(image=png_of(4, 4, pixels=bytes(21))) == "image_undecodable"
    assert _reason(image=png_of(4, 4, pixels=bytes(19))) == "image_undecodable"
    assert _reason(image=png_of(4, 4, pixels=bytes(10**8))) == "image_undecodable"


def test_interlaced_png_has_the_bytes_of_its_seven_passes() -> None:
    # 5 x 3 at 1 bit. Columns and rows of the passes: 1x1 1x1 none(2x0) 1x1 3x1 2x2 5x1;
    # each row takes 1 byte of pixels and 1 for its filter: 7 rows, 14 bytes.
    check_media({"image": _interlaced_png(5, 3, 14)}, LIMITS)

    assert _reason(image=_interlaced_png(5, 3, 15)) == "image_undecodable"


def test_png_whose_last_checksum_is_wrong_does_not_decode() -> None:
    image = bytearray(png_of(4, 4))
    image[-1] ^= 1

    assert _reason(image=bytes(image)) == "image_undecodable"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/images/1.png",
        "s3://bucket/images/a/b%20c.png",
        "/srv/images/1.png",
        "/srv/images/a..b.png",
    ],
)
def test_uri_under_an_allowed_prefix_passes(uri: str) -> None:
    check_media({"image": uri, "audio": uri}, LIMITS)


@pytest.mark.parametrize(
    "uri",
    [
        "/etc/passwd",
        "s3://bucket/imagesevil/1.png",
        "S3://bucket/images/1.png",
        "http://169.254.169.254/latest/",
        "/srv/images/../../etc/passwd",
        "/srv/images/..",
        "/srv/images/%2e%2e/secret",
        "/srv/images/%252e%252e/secret",
        "/srv/images/a\\..\\..\\secret",
        "/srv/images/1.png\n/etc/passwd",
        "/srv/images/1.png%00.txt",
        "/srv/images/" + "a" * 3000,
    ],
)
def test_uri_outside_of_the_allowed_prefixes_is_refused(uri: str) -> None:
    assert _reason(image=uri) == "uri_not_allowed"
    assert _reason(audio=uri) == "uri_not_allowed"


def test_no_uri_is_allowed_unless_a_prefix_is_set() -> None:
    with pytest.raises(EventError, match="uri_not_allowed"):
        check_media({"image": "/srv/images/1.png"}, EventLimits())
