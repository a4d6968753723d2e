"""Checks of ``image`` and ``audio`` in an event: where a URI points, what an image's bytes claim.

An image is looked at without making a pixel: its container must be whole, its declared size within
the limit; a PNG's pixels are inflated piece by piece and thrown away. The entropy-coded part of a
JPEG, GIF or WebP is not read: that is the encoder's work, and the one in place reads text only.
May import: the standard library, qarm_feast.errors.
"""

import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

from qarm_feast.errors import EventError
from qarm_feast.schema import CONTENT_BINARY_COLUMNS
from streaming.limits import EventLimits, Reason

IMAGE = "image"

_MAX_URI_CHARACTERS = 2048
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples per pixel by colour type."""
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
_ADAM7_PASSES = (*_ADAM7, (0, 1, 1, 2))
"""First column, first row, column step and row step of each pass of an interlaced PNG."""
_INFLATE_PIECE_BYTES = 65_536
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN = 0xDA
_JPEG_END = b"\xff\xd9"
_FILL_BYTES = re.compile(rb"\xff*")


class _BrokenImageError(Exception):
    """The bytes are no image of a known form, or not a whole one."""


def check_media(content: Mapping[str, object], limits: EventLimits) -> None:
    """Refuse a URI outside of the allowed prefixes, and an image that cannot be decoded.

    Args:
        content: An item's content.
        limits: The allowed prefixes and the largest image.

    Raises:
        EventError: If a value must not be followed or decoded.
    """
    for name in CONTENT_BINARY_COLUMNS:
        value = content.get(name)
        if isinstance(value, str):
            _check_uri(name, value, limits.allowed_uri_prefixes)
        elif isinstance(value, bytes) and name == IMAGE:
            _check_image(value, limits.max_image_pixels)


def _check_uri(name: str, uri: str, prefixes: tuple[str, ...]) -> None:
    # Twice: what is decoded once here may be decoded once more by a server.
    plain = unquote(unquote(uri))
    is_inside = uri.startswith(prefixes) and ".." not in re.split(r"[/\\]", plain)
    if not is_inside or not plain.isprintable() or len(uri) > _MAX_URI_CHARACTERS:
        raise EventError(
            Reason.URI_NOT_ALLOWED,
            f"{name} {uri[:80]!r} is in none of the {len(prefixes)} prefixes of "
            "stream.allowed_uri_prefixes",
        )


def _check_image(image: bytes, max_pixels: int) -> None:
    try:
        width, height = _image_size(image)
        if width * height > max_pixels:
            raise EventError(
                Reason.IMAGE_TOO_LARGE,
                f"image has {width} x {height} pixels, stream.max_image_pixels is {max_pixels}",
            )
        if width * height == 0:
            raise _BrokenImageError("no pixels")
        if image.startswith(_PNG_SIGNATURE):
            _inflate_png(image)
    except (_BrokenImageError, struct.error, zlib.error, IndexError) as error:
        raise EventError(
            Reason.IMAGE_UNDECODABLE, f"image of {len(image)} bytes does not decode: {error}"
        ) from error


def _image_size(image: bytes) -> tuple[int, int]:
    if image.startswith(_PNG_SIGNATURE):
        width, height = struct.unpack_from(">II", image, len(_PNG_SIGNATURE) + 8)
        return width, height
    if image.startswith(b"\xff\xd8\xff"):
        return _jpeg_size(image)
    if image.startswith((b"GIF87a", b"GIF89a")):
        return _gif_size(image)
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return _webp_size(image)
    raise _BrokenImageError("neither PNG, JPEG, GIF nor WebP")


def _png_chunks(image: bytes) -> list[tuple[bytes, bytes]]:
    """Return names and contents of all chunks, IHDR first and IEND last."""
    chunks: list[tuple[bytes, bytes]] = []
    place = len(_PNG_SIGNATURE)
    while not chunks or chunks[-1][0] != b"IEND":
        length, name = struct.unpack_from(">I4s", image, place)
        body = image[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack_from(">I", image, place + 8 + length)
        if zlib.crc32(body, zlib.crc32(name)) != checksum:
            raise _BrokenImageError("a PNG chunk has a wrong checksum")
        chunks.append((name, body))
        place += 12 + length
    if chunks[0][0] != b"IHDR":
        raise _BrokenImageError("a PNG without IHDR")
    return chunks


def _inflate_png(image: bytes) -> None:
    """Unpack the pixels in small pieces; as many bytes must come out as the header says."""
    chunks = _png_chunks(image)
    expected = _png_pixel_bytes(*struct.unpack_from(">IIBBBBB", chunks[0][1]))
    inflater = zlib.decompressobj()
    num_bytes = 0
    for piece in _inflated(inflater, [body for name, body in chunks if name == b"IDAT"]):
        num_bytes += piece
        if num_bytes > expected:
            break
    if num_bytes != expected or not inflater.eof:
        raise _BrokenImageError(f"the PNG's pixels are not the {expected} bytes of its header")


def _inflated(inflater: "zlib._Decompress", bodies: list[bytes]) -> Iterator[int]:
    for body in bodies:
        left = body
        while left and not inflater.eof:
            yield len(inflater.decompress(left, _INFLATE_PIECE_BYTES))
            left = inflater.unconsumed_tail
    while not inflater.eof and (size := len(inflater.decompress(b"", _INFLATE_PIECE_BYTES))):
        yield size


def _png_pixel_bytes(width: int, height: int, depth: int, colour: int, *methods: int) -> int:
    if colour not in _PNG_CHANNELS or depth not in (1, 2, 4, 8, 16) or methods[:2] != (0, 0):
        raise _BrokenImageError("a PNG of an unknown form")
    bits = depth * _PNG_CHANNELS[colour]
    passes = _ADAM7_PASSES if methods[2] else ((0, 0, 1, 1),)
    num_bytes = 0
    for left, top, across, down in passes:
        columns = max(0, -(-(width - left) // across))
        rows = max(0, -(-(height - top) // down))
        # Each row begins with the number of its filter.
        num_bytes += rows * (1 + -(-columns * bits // 8)) if columns else 0
    return num_bytes


def _jpeg_size(image: bytes) -> tuple[int, int]:
    place, size = 2, None
    while True:
        # Any number of fill bytes, like its own first byte, may stand before a marker's code.
        code_at = _FILL_BYTES.match(image, place).end()  # type: ignore[union-attr]  # no bytes match as well
        marker, length = struct.unpack_from(">BH", image, code_at)
        if code_at == place or length < 2:
            raise _BrokenImageError("a JPEG segment does not begin with a marker and its length")
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", image, code_at + 4)
            size = (width, height)
        if marker == _JPEG_SCAN:
            break
        place = code_at + 1 + length
    if size is None or image.find(_JPEG_END, place) < 0:
        raise _BrokenImageError("a JPEG without a frame or without its end")
    return size


def _gif_size(image: bytes) -> tuple[int, int]:
    if not image.rstrip(b"\0").endswith(b";"):
        raise _BrokenImageError("a GIF without its end")
    width, height = struct.unpack_from("<HH", image, 6)
    return width, height


def _webp_size(image: bytes) -> tuple[int, int]:
    length, form = struct.unpack_from("<4xI4x4s", image)
    if length + 8 > len(image):
        raise _BrokenImageError("a WebP without its end")
    if form == b"VP8X":
        width, height = (int.from_bytes(image[at : at + 3], "little") for at in (24, 27))
        return width + 1, height + 1
    if form == b"VP8L" and image[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", image, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if form == b"VP8 " and image[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", image, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise _BrokenImageError("a WebP of an unknown form")
