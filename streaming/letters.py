"""Dead letters on the wire: a refused record, and headers that say why and where it lay.

A letter is the record's key, value and own headers, followed by ours::

    reason  detail  topic  partition  offset  append_timestamp  codebook_version  value_bytes

``value_bytes`` is the length of the refused value, -1 for a null. A letter that the topic cannot
hold keeps our headers only; its value still lies at topic, partition and offset until the topic's
retention ends. A record that was sent again carries the header ``replays``, how often.
May import: the standard library.
"""

from datetime import UTC, datetime
from typing import NamedTuple

from streaming.columns import DeadLetter
from streaming.messages import Message, Record

REPLAYS = "replays"

_HEADERS = (
    *("reason", "detail", "topic", "partition", "offset"),
    *("append_timestamp", "codebook_version", "value_bytes"),
)
_MAX_DETAIL_CHARACTERS = 500
_MAX_STUB_KEY_BYTES = 1024
_MAX_ID_CHARACTERS = 20
_MAX_COUNT_DIGITS = 9
_NULL_BYTES = -1


class StoredLetter(NamedTuple):
    """One record of the dead-letter topic, taken apart.

    Attributes:
        place: Partition and offset in the dead-letter topic.
        timestamp_ms: When it was refused, milliseconds since the epoch.
        reason: Why.
        source: Topic, partition and offset of the refused record.
        codebook_version: Versions that could not take it; empty if none could.
        key: The record's key.
        value: Its value, or of an Arrow record the refused rows.
        headers: Its own headers, without ``replays``.
        value_bytes: Length of the refused value, -1 for a null.
        num_replays: How often it was sent again.
    """

    place: tuple[int, int]
    timestamp_ms: int
    reason: str
    source: tuple[str, int, int]
    codebook_version: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    value_bytes: int
    num_replays: int

    @property
    def is_whole(self) -> bool:
        """Whether the value is here and not left out."""
        found = _NULL_BYTES if self.value is None else len(self.value)
        return found == self.value_bytes

    def row(self) -> dict[str, str | int]:
        """Return what may be shown: no payload, and a key only if it is an id."""
        topic, partition, offset = self.source
        return {
            "time": datetime.fromtimestamp(self.timestamp_ms / 1000, UTC).isoformat(
                timespec="milliseconds"
            ),
            "reason": self.reason,
            "letter": f"{self.place[0]}:{self.place[1]}",
            "topic": topic,
            "partition": partition,
            "offset": offset,
            "codebook_version": self.codebook_version,
            "key": _shown_key(self.key),
            "value_bytes": self.value_bytes,
            "replays": self.num_replays,
        }


def letter_message(letter: DeadLetter) -> Message:
    """Return the whole record with the headers that tell why it was refused."""
    record = letter.record
    # Kafka allows a null value in a header, its client refuses to send one.
    own = [(name, value or b"") for name, value in record.headers]
    # It refuses a message that has neither key nor value as well.
    value = b"" if letter.value is None and record.key is None else letter.value
    return Message(record.key, value, [*own, *_letter_headers(letter)])


def stub_message(letter: DeadLetter) -> Message:
    """Return a message of at most a few kilobytes, which keeps why and where alone."""
    key = letter.record.key
    is_short = key is not None and len(key) <= _MAX_STUB_KEY_BYTES
    return Message(key if is_short else None, b"", _letter_headers(letter))


def parse_letter(record: Record) -> StoredLetter | None:
    """Return what :func:`letter_message` wrote, or None for a record that is no letter.

    Args:
        record: One record of the dead-letter topic.

    Returns:
        The letter's parts.
    """
    # Ours come last: the refused record may have had headers of the same names.
    own, ours = record.headers[: -len(_HEADERS)], record.headers[-len(_HEADERS) :]
    if tuple(name for name, _ in ours) != _HEADERS:
        return None
    try:
        fields = {name: (value or b"").decode() for name, value in ours}
        source = (fields["topic"], int(fields["partition"]), int(fields["offset"]))
        value_bytes = int(fields["value_bytes"])
    except ValueError:
        return None
    return StoredLetter(
        place=(record.partition, record.offset),
        timestamp_ms=record.timestamp,
        reason=fields["reason"],
        source=source,
        codebook_version=fields["codebook_version"],
        key=record.key,
        value=record.value,
        headers=[(name, value or b"") for name, value in own if name != REPLAYS],
        value_bytes=value_bytes,
        num_replays=_count_of(dict(own).get(REPLAYS)),
    )


def replay_message(letter: StoredLetter) -> Message:
    """Return the record as it was, with one more replay counted."""
    count = (REPLAYS, b"%d" % (letter.num_replays + 1))
    return Message(letter.key, letter.value, [*letter.headers, count])


def _letter_headers(letter: DeadLetter) -> list[tuple[str, bytes]]:
    record = letter.record
    values = (
        letter.reason.encode(),
        letter.detail[:_MAX_DETAIL_CHARACTERS].encode(errors="replace"),
        record.topic.encode(),
        b"%d" % record.partition,
        b"%d" % record.offset,
        b"%d" % record.timestamp,
        letter.codebook_version.encode(),
        b"%d" % (_NULL_BYTES if letter.value is None else len(letter.value)),
    )
    return list(zip(_HEADERS, values, strict=True))


def _count_of(text: bytes | None) -> int:
    """Return the number of replays; what a producer wrote there must not hide its letter."""
    is_count = text is not None and text.isdigit() and len(text) <= _MAX_COUNT_DIGITS
    return int(text or b"0") if is_count else 0


def _shown_key(key: bytes | None) -> str:
    if key is None:
        return ""
    is_id = len(key) <= _MAX_ID_CHARACTERS and key.removeprefix(b"-").isdigit()
    return key.decode() if is_id else f"({len(key)} bytes)"
