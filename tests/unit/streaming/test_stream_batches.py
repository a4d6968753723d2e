"""Records are checked many at once; here each one alone says what must come out."""

import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from stream_fakes import NOW, NOW_MS, FakeRecord, record_of

from qarm_feast.errors import EventError
from qarm_feast.schema import TIMESTAMP
from streaming import columns
from streaming.arrow_rows import check_item_rows
from streaming.columns import DeadLetter, DecodedItems, decode_interactions, decode_items
from streaming.event_columns import item_table
from streaming.limits import EventLimits
from streaming.messages import (
    ItemEvent,
    content_type,
    decode_arrow,
    decode_item_event,
    encode_arrow,
    encode_item_event,
)
from tests.fault.mutations import make_mutants
from tests.fault.traffic import TASK_NAMES

LIMITS = EventLimits()


def _mutants(seed: int, count: int) -> list[FakeRecord]:
    mutants = make_mutants(np.random.default_rng(seed), count)
    return [record_of(each.parcel.message, offset=n) for n, each in enumerate(mutants)]


def _said(letters: Sequence[DeadLetter]) -> list[tuple[int, str, str, bytes | None]]:
    """Return the letters in an order of their own."""
    said = [(each.record.offset, each.reason, each.detail, each.value) for each in letters]
    return sorted(said, key=repr)


def _alone(record: FakeRecord) -> DecodedItems:
    """Read a JSON record by the function that a producer has."""
    try:
        content_type(record)
        return DecodedItems(item_table({0: decode_item_event(record, LIMITS)}), [])
    except EventError as error:
        letter = DeadLetter(record, error.reason, str(error), record.value)
        return DecodedItems(item_table({}), [letter])


def _one_by_one(records: Sequence[FakeRecord]) -> DecodedItems:
    tables, letters = [], []
    for index, record in enumerate(records):
        is_arrow = ("content-type", b"application/vnd.apache.arrow.stream") in record.headers
        is_whole = is_arrow and record.value is not None
        rows, refused = decode_items([record], LIMITS) if is_whole else _alone(record)
        place = rows.schema.get_field_index("record_index")
        indexes = pa.repeat(pa.scalar(index, pa.int32()), rows.num_rows)
        tables.append(rows.set_column(place, "record_index", indexes))
        letters += refused
    return DecodedItems(pa.concat_tables(tables), letters)


@pytest.mark.parametrize("seed", range(3))
def test_item_records_of_a_batch_come_out_as_each_one_alone(seed: int) -> None:
    records = _mutants(seed, 1_000)

    together = decode_items(records, LIMITS)

    alone = _one_by_one(records)
    assert together.rows.equals(alone.rows)
    assert _said(together.dead_letters) == _said(alone.dead_letters)
    assert together.rows.num_rows > 300
    assert len({letter.reason for letter in together.dead_letters}) >= 9


def test_interaction_records_of_a_batch_come_out_as_each_one_alone() -> None:
    records = _mutants(4, 2_000)

    rows, letters, erasures = decode_interactions(records, TASK_NAMES, LIMITS)

    alone = [decode_interactions([record], TASK_NAMES, LIMITS) for record in records]
    keys = [(name, "ascending") for name in rows.column_names]
    expected = pa.concat_tables([each.rows for each in alone])
    assert rows.sort_by(keys).equals(expected.sort_by(keys))
    assert _said(letters) == _said(list(itertools.chain(*(each.dead_letters for each in alone))))
    assert erasures == list(itertools.chain(*(each.erasures for each in alone)))
    assert rows.num_rows > 200


# Values that a field of an upload may take; each upload below takes three at random.
FIELDS: dict[str, Sequence[Any]] = {
    "item_id": (42, 42.0, True, "42", None, -1, -(2**63), 2**63, 2**63 - 1, 10**30),
    "event_timestamp": (NOW, float(NOW), True, "2023-11-14T22:13:20Z", None, -1, 2**62, 10**400),
    "embedding": (
        *([1.0, 2], [], [0.0], [0, 1], [True], [float("nan")], [1e38], [1e15], [9.9e14], [1e-46]),
        *([10**400], ["1"], [None], [[1.0]], "1", {}, None, 1.0),
    ),
    "encoder_version": ("e1", "", "é", "\ud800", None, 1, ["e1"]),
    "title": ("Mug", "", None, 5),
    "price": (9.5, 10**400, None, [1]),
}
KEYS = (
    *(b"42", b"42", b"42", b"-1", b"042", b"True", None),
    *(b"9223372036854775807", b"-9223372036854775808", b"9223372036854775808"),
)


def test_uploads_of_every_kind_are_read_or_refused_as_by_the_event_decoder() -> None:
    rng = random.Random(0)
    good = {"item_id": 42, "event_timestamp": NOW, "embedding": [1.0], "encoder_version": "e1"}
    records = []
    for offset in range(6_000):
        fields: dict[str, Any] = dict(good)
        for name in rng.sample(sorted(FIELDS), rng.randrange(4)):
            fields[name] = rng.choice(FIELDS[name])
        value = json.dumps(fields).encode()
        records.append(FakeRecord(rng.choice(KEYS), value, offset=offset))

    together = decode_items(records, LIMITS)

    alone = _one_by_one(records)
    assert together.rows.equals(alone.rows)
    assert _said(together.dead_letters) == _said(alone.dead_letters)
    reasons = {letter.reason for letter in together.dead_letters}
    assert {
        "embedding_zero",
        "embedding_not_finite",
        "key_mismatch",
        "wrong_type",
        "reserved_id",
    } <= reasons
    assert 500 < together.rows.num_rows < 5_500


def _arrow(ids: list[int | None], time: int = NOW, append_ms: int = NOW_MS, **more: Any) -> Any:
    table = pa.table(
        {
            "item_id": pa.array(ids, pa.int64()),
            "event_timestamp": pa.array([time] * len(ids)).cast(TIMESTAMP),
            "embedding": pa.array(
                [[float(n + 1)] for n in range(len(ids))], pa.list_(pa.float32())
            ),
            "encoder_version": pa.array(["e1"] * len(ids), pa.string()),
        }
        | more
    )
    message = encode_arrow(table)
    return FakeRecord(None, message.value, message.headers, timestamp=append_ms)


def test_each_arrow_record_is_held_against_its_own_append_time() -> None:
    late = _arrow([1, 2], time=NOW + 400_000_000)
    later = _arrow([3], time=NOW + 400_000_000, append_ms=NOW_MS + 200_000)

    rows, letters = decode_items([late, later])

    assert rows["item_id"].to_pylist() == [3]
    assert [(each.record, each.reason) for each in letters] == [(late, "future_timestamp")]


def test_rows_of_arrow_records_know_their_record_and_their_place_in_it() -> None:
    as_json = record_of(encode_item_event(ItemEvent(7, NOW, {}, np.float32([1]), "e1")))
    records = [
        _arrow([1, None, 3]),
        _arrow([]),
        as_json,
        _arrow([4], title=["Mug"]),
        _arrow([5, 6]),
    ]

    rows, letters = decode_items(records)

    assert rows["item_id"].to_pylist() == [1, 3, 7, 4, 5, 6]
    assert rows["record_index"].to_pylist() == [0, 0, 2, 3, 4, 4]
    assert rows["row_index"].to_pylist() == [0, 2, 0, 0, 0, 1]
    assert rows["embedding"].to_pylist() == [[1.0], [3.0], [1.0], [1.0], [1.0], [2.0]]
    (letter,) = letters
    assert letter.detail == "missing_field: 1 of the record's 3 rows"
    assert decode_arrow(FakeRecord(None, letter.value))["embedding"].to_pylist() == [[2.0]]


def test_a_bug_over_one_arrow_record_does_not_sink_those_of_its_schema(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def check_with_a_bug(limits: EventLimits) -> Any:
        real = check_item_rows(limits)

        def check(table: pa.Table, append_ms_N: np.ndarray) -> Any:
            if 2 in table["item_id"].to_pylist():
                raise KeyError("2")
            return real(table, append_ms_N)

        return check

    monkeypatch.setattr(columns, "check_item_rows", check_with_a_bug)
    records = [_arrow([1]), _arrow([2]), _arrow([3, 4])]

    rows, letters = decode_items(records)

    assert rows["item_id"].to_pylist() == [1, 3, 4]
    assert [(each.record, each.reason) for each in letters] == [(records[1], "decoder_fault")]
