"""Each kind of poison, as JSON and as a row of an Arrow record, beside a good event."""

import base64
import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from stream_fakes import (
    NOW,
    VERSIONED,
    FakeRecord,
    FixedCodebooks,
    SignCodebook,
    TitleEncoder,
    png_of,
    record_of,
)

from qarm_feast.observability import STREAM_DEAD_LETTERS
from qarm_feast.schema import TIMESTAMP
from streaming import columns
from streaming.columns import DeadLetter, decode_interactions, decode_items
from streaming.health import WorkerHealth
from streaming.limits import EventLimits
from streaming.messages import (
    ARROW_TYPE,
    InteractionEvent,
    ItemEvent,
    UnreadableRecord,
    check_unpacked_size,
    decode_arrow,
    encode_arrow,
    encode_interaction_event,
    encode_item_event,
)
from streaming.rows import LiveCodebooks, encode_rows, hash_rows
from streaming.source import Batch
from streaming.worker import Drain, Pipeline, StreamWorker, WorkerSettings

LIMITS = EventLimits(
    max_record_bytes=20_000, max_decoded_bytes=100_000, allowed_uri_prefixes=("s3://bucket/",)
)
GOOD = record_of(encode_item_event(ItemEvent(1, NOW, {"title": "Mug"})))
LIVE = LiveCodebooks({"v1": SignCodebook("e1")}, lambda version: TitleEncoder())


def _json(**changes: object) -> FakeRecord:
    fields = {"item_id": 2, "event_timestamp": NOW, "title": "Cup"} | changes
    kept = {name: value for name, value in fields.items() if value is not ...}
    return FakeRecord(b"2", json.dumps(kept).encode())


def _ready(vector: list[float], version: str = "e1", **changes: object) -> FakeRecord:
    return _json(embedding=vector, encoder_version=version, title=..., **changes)


def _arrow(**changes: pa.Array | None) -> FakeRecord:
    """Two rows: item 1 is good, item 2 is what ``changes`` make of it."""
    arrays: dict[str, pa.Array | None] = {
        "item_id": pa.array([1, 2]),
        "event_timestamp": pa.array([NOW, NOW]).cast(TIMESTAMP),
        "title": pa.array(["Mug", "Cup"]),
    } | changes
    kept = {name: array for name, array in arrays.items() if array is not None}
    return record_of(encode_arrow(pa.table(kept)))


def _vectors(second: list[float], version: str = "e1") -> FakeRecord:
    return _arrow(
        title=pa.array(["Mug", None]),
        embedding=pa.array([[1.0, 1.0], second], pa.list_(pa.float32())),
        encoder_version=pa.array(["e1", version]),
    )


def _raw(value: bytes, *headers: tuple[str, bytes]) -> FakeRecord:
    return FakeRecord(None, value, [*VERSIONED, ("content-type", ARROW_TYPE), *headers])


def _compressed(codec: str, num_zeros: int) -> FakeRecord:
    table = pa.table({"item_id": pa.array(np.zeros(num_zeros, dtype=np.int64))})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return _raw(sink.getvalue().to_pybytes())


def _bomb_behind_a_negative_length() -> FakeRecord:
    """Two buffers that declare 8,000,000 bytes; the second one is made to declare minus that."""
    zeros = pa.array(np.zeros(1_000_000, dtype=np.int64))
    sink = pa.BufferOutputStream()
    table = pa.table({"item_id": zeros, "price": zeros})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    value = sink.getvalue().to_pybytes()
    at = value.rindex(struct.pack("<q", 8_000_000))
    return _raw(value[:at] + struct.pack("<q", -8_000_000) + value[at + 8 :])


def _dictionary_bomb() -> FakeRecord:
    values = pa.array(["a" * 200_000])
    table = pa.table({"title": pa.DictionaryArray.from_arrays(pa.array([0]), values)})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return _raw(sink.getvalue().to_pybytes())


def _rows_without_buffers() -> FakeRecord:
    value = encode_arrow(pa.table({"item_id": pa.nulls(123_457)})).value or b""
    return _raw(value.replace(struct.pack("<q", 123_457), struct.pack("<q", 2**40)))


def _many_flags() -> FakeRecord:
    """One bit per cell on the wire, a Python object per cell in memory."""
    flags = pa.array(np.zeros(1000, dtype=bool))
    return record_of(encode_arrow(pa.table({f"flag{n}": flags for n in range(10)})))


def _large_image() -> bytes:
    return png_of(1, 1)[:16] + b"\0\1\0\0" * 2 + png_of(1, 1)[24:]


def _picture(image: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(image).decode()}


def _images(second: bytes | str) -> FakeRecord:
    kind = pa.string() if isinstance(second, str) else pa.binary()
    return _arrow(image=pa.array([None, second], kind))


def _refuse(*records: FakeRecord) -> tuple[set[int], list[DeadLetter]]:
    """Return the items that got codes and the letters of the others."""
    decoded = decode_items(records, LIMITS)
    rows = hash_rows(decoded.rows)
    encoded, refused = encode_rows(records, rows, LIVE)
    ids_N = rows["item_id"].to_numpy()[encoded[0].positions_N]
    return set(ids_N.tolist()), [*decoded.dead_letters, *refused]


INFINITE = float("inf")
IN_TEN_MINUTES = NOW + 600_000_000
DEEP = b'{"item_id":' + b"[" * 9_000 + b"]" * 9_000 + b"}"


@pytest.mark.parametrize(
    ("reason", "poison"),
    [
        ("undecodable", FakeRecord(b"2", b"\x00\x01")),
        ("undecodable", FakeRecord(b"2", DEEP)),
        ("undecodable", _raw(b"\xff\xff\xff\xff\x10")),
        ("undecodable", _raw(b"")),
        ("undecodable", UnreadableRecord("items", 0, 5, NOW // 1000, "CorruptRecordError")),
        ("unknown_schema_version", FakeRecord(b"2", b"{}", [("schema_version", b"0")])),
        ("wrong_type", _json(title=5)),
        ("wrong_type", _json(price=float("nan"))),
        ("wrong_type", _json(price=INFINITE)),
        ("missing_field", _json(title=...)),
        ("key_mismatch", _json(item_id=3)),
        ("reserved_id", FakeRecord(b"-1", b'{"item_id":-1,"title":"Mug"}')),
        ("reserved_id", FakeRecord(b"-1", None, [*VERSIONED, ("event_timestamp", b"%d" % NOW)])),
        ("oversized", _json(title="a" * 20_000)),
        ("oversized", FakeRecord(b"2" * 20_001, None)),
        ("oversized", FakeRecord(b"2", b"{}", [*VERSIONED, ("trace", b"a" * 20_000)])),
        ("decompression_bomb", _compressed("zstd", 10_000_000)),
        ("decompression_bomb", _compressed("lz4", 500_000)),
        ("undecodable", _bomb_behind_a_negative_length()),
        ("decompression_bomb", _dictionary_bomb()),
        ("decompression_bomb", _rows_without_buffers()),
        ("decompression_bomb", _many_flags()),
        ("future_timestamp", _json(event_timestamp=IN_TEN_MINUTES)),
        ("future_timestamp", _json(event_timestamp=2**62)),
        ("absurd_timestamp", _json(event_timestamp=NOW // 1_000_000)),
        ("absurd_timestamp", _json(event_timestamp="0001-01-01T00:00:00+14:00")),
        ("wrong_type", _json(event_timestamp="2023-11-14T23:13:20")),
        ("embedding_not_finite", _ready([float("nan"), 1.0])),
        ("embedding_not_finite", _ready([1.0, -INFINITE])),
        ("embedding_zero", _ready([0.0, 0.0])),
        ("embedding_width", _ready([1.0, 1.0, 1.0])),
        ("encoder_mismatch", _ready([1.0, 1.0], "e9")),
        ("image_undecodable", _json(image=_picture(b"\x89PNG\r\n\x1a\n"))),
        ("image_too_large", _json(image=_picture(_large_image()))),
        ("uri_not_allowed", _json(image="/etc/passwd")),
        ("uri_not_allowed", _json(audio="s3://bucket/../secret")),
    ],
)
def test_poison_record_is_one_letter_and_its_neighbours_are_stored(
    reason: str, poison: FakeRecord
) -> None:
    stored, letters = _refuse(GOOD, poison)

    assert stored == {1}
    assert [(letter.reason, letter.record) for letter in letters] == [(reason, poison)]
    assert letters[0].value == poison.value


@pytest.mark.parametrize(
    ("reason", "poison"),
    [
        ("missing_field", _arrow(item_id=pa.array([1, None]))),
        ("reserved_id", _arrow(item_id=pa.array([1, -1]))),
        ("missing_field", _arrow(title=pa.array(["Mug", None]))),
        ("wrong_type", _arrow(price=pa.array([1.0, INFINITE]))),
        (
            "future_timestamp",
            _arrow(event_timestamp=pa.array([NOW, IN_TEN_MINUTES]).cast(TIMESTAMP)),
        ),
        ("absurd_timestamp", _arrow(event_timestamp=pa.array([NOW, -(2**63)]).cast(TIMESTAMP))),
        ("embedding_not_finite", _vectors([float("nan"), 1.0])),
        ("embedding_not_finite", _vectors([1.0, INFINITE])),
        ("embedding_zero", _vectors([0.0, 0.0])),
        ("embedding_width", _vectors([1.0])),
        ("encoder_mismatch", _vectors([1.0, 1.0], "e9")),
        ("image_undecodable", _images(b"\xff\xd8\xff")),
        ("image_too_large", _images(_large_image())),
        ("uri_not_allowed", _images("s3://other/1.png")),
    ],
)
def test_poison_row_of_an_arrow_record_is_one_letter_and_the_other_row_is_stored(
    reason: str, poison: FakeRecord
) -> None:
    stored, letters = _refuse(poison)

    assert stored == {1}
    assert [letter.reason for letter in letters] == [reason]
    refused = decode_arrow(FakeRecord(None, letters[0].value))
    assert refused["item_id"].to_pylist() in ([2], [None], [-1])


def test_letters_are_counted_by_reason() -> None:
    class Parts:
        """Source, sink and dead letters that take everything."""

        def acknowledged(self) -> frozenset[str]:
            return frozenset()

        def keep_alive(self, *arguments: object) -> None:
            pass

        announce = commit = write_offline = write_online = send = keep_alive

    settings = WorkerSettings("items", ("is_like",), "is_like", limits=LIMITS)
    parts = Pipeline(Parts(), Parts(), Parts(), FixedCodebooks(LIVE))
    worker = StreamWorker(parts, settings, WorkerHealth(), Drain(0.0))
    poison = [_json(image="/etc/passwd"), _json(title="a" * 20_000), _vectors([0.0, 0.0])]
    reasons = ("uri_not_allowed", "oversized", "embedding_zero")
    before = [STREAM_DEAD_LETTERS.labels(reason)._value.get() for reason in reasons]

    worker.handle(Batch([GOOD, *poison, poison[0]], {}, assignment_number=1))

    after = [STREAM_DEAD_LETTERS.labels(reason)._value.get() for reason in reasons]
    assert np.subtract(after, before).tolist() == [2, 1, 1]


def test_each_bound_is_met_exactly() -> None:
    record = _arrow()
    size = len(record.value or b"") + sum(len(n) + len(v or b"") for n, v in record.headers)
    # Two rows of an id, a time and a title: 6 cells and 2 rows of 16 bytes at least.
    kept = EventLimits(max_record_bytes=size, max_decoded_bytes=16 * 8)
    small = EventLimits(max_record_bytes=size - 1)
    unpacked = EventLimits(max_decoded_bytes=16 * 8 - 1)

    assert decode_items([record], kept).rows.num_rows == 2
    assert decode_items([record], small).dead_letters[0].reason == "oversized"
    assert decode_items([record], unpacked).dead_letters[0].reason == "decompression_bomb"


def test_a_compressed_arrow_record_within_the_bounds_is_read() -> None:
    check_unpacked_size(_compressed("zstd", 1000), 16 * 2000)
    check_unpacked_size(_compressed("lz4", 1000), 16 * 2000)

    assert decode_arrow(_compressed("lz4", 1000)).num_rows == 1000


def test_columns_that_nobody_asks_for_do_not_sink_an_arrow_record_of_interactions() -> None:
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([3], pa.int32()), pa.array([b"x"]))
    views = pa.array(["a", "b", "c"], pa.string_view())
    unions = pa.UnionArray.from_sparse(pa.array([0, 0, 0], pa.int8()), [views])
    record = record_of(
        encode_arrow(
            pa.table(
                {
                    "user_id": pa.array([7, 8, 9]),
                    "item_id": pa.array([1, None, 3]),
                    "event_timestamp": pa.array([NOW] * 3).cast(TIMESTAMP),
                    "is_like": pa.array([True] * 3),
                    "runs": runs,
                    "views": views,
                    "unions": unions,
                }
            )
        )
    )

    decoded = decode_interactions([record], ("is_like",))

    assert decoded.rows["user_id"].to_pylist() == [7, 9]
    assert [letter.reason for letter in decoded.dead_letters] == ["missing_field"]


def test_poison_interactions_are_refused_by_the_same_bounds() -> None:
    large = FakeRecord(b"7", b'{"user_id": 7, "pad": "' + b"a" * 20_000 + b'"}')

    decoded = decode_interactions([large, _compressed("zstd", 10_000_000)], ("is_like",), LIMITS)

    assert [letter.reason for letter in decoded.dead_letters] == [
        "oversized",
        "decompression_bomb",
    ]


def test_a_bug_of_the_decoder_costs_one_record_and_says_where_without_the_payload(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = columns.item_upload

    def decode(record: FakeRecord, fields: dict[str, Any], limits: EventLimits) -> ItemEvent:
        if record.key == b"2":
            raise KeyError("the payload's secret")
        return real(record, fields, limits)

    monkeypatch.setattr(columns, "item_upload", decode)

    decoded = decode_items([_json(), GOOD], LIMITS)

    assert decoded.rows["item_id"].to_pylist() == [1]
    assert [letter.reason for letter in decoded.dead_letters] == ["decoder_fault"]
    assert "error=KeyError file=" in caplog.text
    assert "secret" not in caplog.text + decoded.dead_letters[0].detail


def test_memory_stays_flat_under_bombs(tmp_path: Path) -> None:
    """A fresh process measures its peak over bombs that would take 400 MB each, or 8 TB."""
    bombs = [
        _compressed("zstd", 50_000_000),
        _rows_without_buffers(),
        _images(png_of(100, 100, pixels=bytes(400_000_000))),
    ]
    paths = [tmp_path / f"{number}.arrow" for number in range(len(bombs))]
    for path, bomb in zip(paths, bombs, strict=True):
        path.write_bytes(bomb.value or b"")

    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    ).stdout
    reasons, grown_bytes = json.loads(output)

    assert reasons == ["decompression_bomb", "decompression_bomb", "image_undecodable"]
    assert grown_bytes < 32 * 1024**2


_MEASURE = """
import json, sys
from streaming.columns import decode_items
from stream_fakes import FakeRecord, VERSIONED, peak_bytes

headers = [*VERSIONED, ("content-type", b"application/vnd.apache.arrow.stream")]
records = [FakeRecord(None, open(path, "rb").read(), headers) for path in sys.argv[1:]]
decode_items([FakeRecord(b"1", b"{")])
before = peak_bytes()
reasons = [letter.reason for letter in decode_items(records).dead_letters]
after = peak_bytes()
print(json.dumps([reasons, after - before]))
"""


def test_5000_mutated_records_are_stored_or_refused_with_a_reason() -> None:
    rng = random.Random(0)
    seeds = [GOOD, _ready([1.0, 2.0]), _json(image=_picture(png_of(2, 2))), _json(image="s3://b")]
    seeds += [_arrow(), _vectors([1.0, 2.0]), _images(png_of(2, 2)), _compressed("zstd", 50)]
    like = InteractionEvent(7, 42, NOW, (True,), "train")
    likes_seeds = [record_of(encode_interaction_event(like, ("is_like",))), _arrow_like()]
    reasons: set[str] = set()

    for _ in range(500):
        records = [_mutated(seed, rng) for seed in seeds]
        decoded = decode_items(records, LIMITS)
        encoded, refused = encode_rows(records, hash_rows(decoded.rows), LIVE)
        reasons |= {letter.reason for letter in [*decoded.dead_letters, *refused]}
        assert np.isfinite(encoded[0].vectors_ND).all()

        likes = decode_interactions([_mutated(seed, rng) for seed in likes_seeds], ("is_like",))
        reasons |= {letter.reason for letter in likes.dead_letters}

    assert "decoder_fault" not in reasons
    assert {"undecodable", "wrong_type", "missing_field"} <= reasons


def _arrow_like() -> FakeRecord:
    columns = {
        "user_id": pa.array([7]),
        "item_id": pa.array([42]),
        "event_timestamp": pa.array([NOW]).cast(TIMESTAMP),
        "is_like": pa.array([True]),
        "split": pa.array(["train"]),
    }
    return record_of(encode_arrow(pa.table(columns)))


def _mutated(record: FakeRecord, rng: random.Random) -> FakeRecord:
    value = bytearray(record.value or b"")
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(value))
        how = rng.randrange(4)
        if how == 0:
            value[place] = rng.randrange(256)
        elif how == 1:
            value[place] ^= 1 << rng.randrange(8)
        elif how == 2:
            del value[place : place + rng.randint(1, 8)]
        else:
            value[place:place] = value[: rng.randint(1, 16)]
    return FakeRecord(record.key, bytes(value), record.headers)
