import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from stream_fakes import VERSIONED, FakeRecord, record_of

from streaming.limits import EventLimits
from streaming.messages import ARROW_TYPE, UnreadableRecord, encode_arrow
from streaming.pieces import JSON_GROWTH, pieces


def _arrow(num_rows: int) -> FakeRecord:
    """Ids alone: 8 bytes each, counted as the cell's 16, and as much for the row."""
    return record_of(encode_arrow(pa.table({"item_id": np.zeros(num_rows, dtype=np.int64)})))


def _lengths(*records: FakeRecord | UnreadableRecord, limit: int) -> list[int]:
    found = list(pieces(records, EventLimits(max_decoded_bytes=limit, max_record_bytes=10_000)))
    assert [record for piece in found for record in piece] == list(records)
    return [len(piece) for piece in found]


def test_a_piece_ends_before_the_record_that_would_be_too_much() -> None:
    records = [_arrow(10), _arrow(20), _arrow(5), _arrow(1)]

    assert _lengths(*records, limit=32 * 36) == [4]
    assert _lengths(*records, limit=32 * 36 - 1) == [3, 1]
    assert _lengths(*records, limit=32 * 25) == [1, 2, 1]
    # What one record claims beyond the limit is refused, not unpacked.
    assert _lengths(*records, limit=32 * 10) == [2, 2]


def test_json_counts_by_its_length() -> None:
    records = [FakeRecord(b"1", b" " * 100)] * 5

    assert _lengths(*records, limit=2 * 100 * JSON_GROWTH) == [2, 2, 1]


def test_records_that_are_refused_unread_take_no_room() -> None:
    refused = [
        FakeRecord(b"1", None),
        FakeRecord(b"1", b" " * 10_001),
        FakeRecord(b"1", b" " * 100, headers=[]),
        FakeRecord(None, b"no stream", [*VERSIONED, ("content-type", ARROW_TYPE)]),
        UnreadableRecord("items", 0, 5, 0, "CorruptRecordError"),
    ]

    assert _lengths(*refused, FakeRecord(b"1", b"{}"), limit=2 * JSON_GROWTH) == [6]


def test_no_records_are_no_piece() -> None:
    assert _lengths(limit=1) == []


def test_memory_stays_flat_over_a_batch_of_records_that_unpack_to_much(tmp_path: Path) -> None:
    """A fresh process decodes 16 records that unpack to 8 MB each; two of them make a piece."""
    text = "a" * 8_000_000
    table = pa.table(
        {
            "item_id": [1],
            "event_timestamp": pa.array([1_700_000_000_000_000]).cast(pa.timestamp("us", "UTC")),
            "description": [text],
        }
    )
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    path = tmp_path / "large.arrow"
    path.write_bytes(sink.getvalue().to_pybytes())

    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    ).stdout
    num_rows, first_bytes, all_bytes = json.loads(output)

    assert num_rows == 16
    assert path.stat().st_size < 100_000
    assert first_bytes > 16_000_000
    # Without pieces it would be some eight times as much.
    assert all_bytes < 1.5 * first_bytes


_MEASURE = """
import json, sys
from streaming.columns import decode_items
from streaming.limits import EventLimits
from streaming.pieces import pieces
from stream_fakes import FakeRecord, VERSIONED, peak_bytes

headers = [*VERSIONED, ("content-type", b"application/vnd.apache.arrow.stream")]
record = FakeRecord(None, open(sys.argv[1], "rb").read(), headers)
limits = EventLimits(max_decoded_bytes=20_000_000)
decode_items([FakeRecord(b"1", b"{")])

start, grown, num_rows = peak_bytes(), [], 0
for piece in pieces([record] * 16, limits):
    assert len(piece) == 2
    num_rows += decode_items(piece, limits).rows.num_rows
    grown.append(peak_bytes() - start)
print(json.dumps([num_rows, grown[0], grown[-1]]))
"""
