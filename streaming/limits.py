"""What one record may be, and the names of what it must not be.

May import: the standard library only; a producer reads this as well.
"""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a record became a dead letter; the value of its header ``reason``."""

    UNDECODABLE = "undecodable"
    UNKNOWN_SCHEMA_VERSION = "unknown_schema_version"
    WRONG_TYPE = "wrong_type"
    MISSING_FIELD = "missing_field"
    KEY_MISMATCH = "key_mismatch"
    OVERSIZED = "oversized"
    DECOMPRESSION_BOMB = "decompression_bomb"
    FUTURE_TIMESTAMP = "future_timestamp"
    ABSURD_TIMESTAMP = "absurd_timestamp"
    EMBEDDING_NOT_FINITE = "embedding_not_finite"
    EMBEDDING_ZERO = "embedding_zero"
    EMBEDDING_WIDTH = "embedding_width"
    ENCODER_MISMATCH = "encoder_mismatch"
    IMAGE_UNDECODABLE = "image_undecodable"
    IMAGE_TOO_LARGE = "image_too_large"
    URI_NOT_ALLOWED = "uri_not_allowed"
    RESERVED_ID = "reserved_id"
    DECODER_FAULT = "decoder_fault"
    """A bug of ours: the decoder raised something else; the log holds the place."""


@dataclass(frozen=True)
class EventLimits:
    """Bounds that a record must keep; section ``stream`` sets each.

    Attributes:
        max_future_seconds: An event may lie this much later than its append time.
        max_record_bytes: Key, value and headers of one record.
        max_decoded_bytes: An Arrow record unpacked, a cell counting as 16 bytes at least; and what
            is unpacked at once of a batch.
        max_image_pixels: Width times height of one image.
        allowed_uri_prefixes: An ``image`` or ``audio`` given as text starts with one of them.
    """

    max_future_seconds: float = 300.0
    max_record_bytes: int = 8_388_608
    max_decoded_bytes: int = 67_108_864
    max_image_pixels: int = 50_000_000
    allowed_uri_prefixes: tuple[str, ...] = ()


DEFAULT_LIMITS = EventLimits()
