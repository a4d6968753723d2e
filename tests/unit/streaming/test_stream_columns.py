import json

import numpy as np
import pyarrow as pa
from stream_fakes import NOW, FakeRecord, png_of, record_of

from qarm_feast.schema import TIMESTAMP
from streaming.columns import (
    decode_interactions,
    decode_items,
    letters_of_rows,
)
from streaming.event_columns import ITEM_EVENT_ROWS
from streaming.messages import (
    InteractionEvent,
    ItemEvent,
    UserErasure,
    decode_arrow,
    encode_arrow,
    encode_interaction_event,
    encode_item_event,
    encode_user_erasure,
)


def _arrow_record(**columns: pa.Array) -> FakeRecord:
    return record_of(encode_arrow(pa.table(columns)))


def _times(*offsets: int | None) -> pa.Array:
    values = [None if offset is None else NOW + offset for offset in offsets]
    return pa.array(values, pa.int64()).cast(TIMESTAMP)


def test_good_records_become_columns_and_a_bad_one_a_dead_letter() -> None:
    records = [
        record_of(encode_item_event(ItemEvent(1, NOW, {"title": "A", "price": 2}))),
        FakeRecord(b"2", b"{"),
        record_of(encode_item_event(ItemEvent(3, NOW + 5, {}, np.float32([1, 2]), "e1")), offset=9),
        record_of(encode_item_event(ItemEvent(4, NOW, {}, is_deleted=True))),
    ]

    decoded = decode_items(records)

    assert decoded.rows.schema == ITEM_EVENT_ROWS
    assert decoded.rows["item_id"].to_pylist() == [1, 3, 4]
    assert decoded.rows["event_timestamp"].cast(pa.int64()).to_pylist() == [NOW, NOW + 5, NOW]
    assert decoded.rows["title"].to_pylist() == ["A", None, None]
    assert decoded.rows["content"].to_pylist() == ['{"price":2,"title":"A"}', "{}", "{}"]
    assert decoded.rows["embedding"].to_pylist() == [None, [1.0, 2.0], None]
    assert decoded.rows["encoder_version"].to_pylist() == [None, "e1", None]
    assert decoded.rows["is_deleted"].to_pylist() == [False, False, True]
    assert decoded.rows["record_index"].to_pylist() == [0, 2, 3]
    (letter,) = decoded.dead_letters
    assert (letter.reason, letter.record, letter.value) == ("undecodable", records[1], b"{")


def test_no_records_give_empty_columns() -> None:
    assert decode_items([]).rows.schema == ITEM_EVENT_ROWS
    assert decode_interactions([], ("is_like",)).rows.num_rows == 0


def test_json_and_arrow_events_give_the_same_columns() -> None:
    events = [
        ItemEvent(1, NOW, {"title": "A", "price": 2.5}, np.float32([1, 2]), "e1"),
        ItemEvent(2, NOW + 1, {"title": "B", "image": png_of(1, 1)}),
    ]
    as_json = [record_of(encode_item_event(event)) for event in events]
    as_arrow = _arrow_record(
        item_id=pa.array([1, 2]),
        event_timestamp=_times(0, 1),
        title=pa.array(["A", "B"]),
        price=pa.array([2.5, None]),
        image=pa.array([None, png_of(1, 1)], pa.binary()),
        embedding=pa.array([[1.0, 2.0], None], pa.list_(pa.float32())),
        encoder_version=pa.array(["e1", None]),
    )
    places = ["record_index", "row_index"]

    from_json = decode_items(as_json).rows.drop_columns(places)
    from_arrow = decode_items([as_arrow])

    assert from_arrow.dead_letters == []
    assert from_arrow.rows.drop_columns(places).equals(from_json)
    assert from_arrow.rows["row_index"].to_pylist() == [0, 1]


def test_bad_rows_of_an_arrow_record_do_not_sink_the_others() -> None:
    vector = [1.0, 2.0]
    record = _arrow_record(
        item_id=pa.array([1, None, 3, 4, 5, 6, 7, 8]),
        event_timestamp=_times(0, 0, 10**9, None, 0, 0, 0, 0),
        embedding=pa.array(
            [vector, vector, vector, vector, [1.0, np.inf], [0.0, 0.0], None, vector],
            pa.list_(pa.float32(), 2),
        ),
        encoder_version=pa.array(["e1"] * 7 + [None]),
    )

    decoded = decode_items([record])

    assert decoded.rows["item_id"].to_pylist() == [1]
    refused = {
        letter.reason: decode_arrow(FakeRecord(None, letter.value))["item_id"].to_pylist()
        for letter in decoded.dead_letters
    }
    assert refused == {
        "missing_field": [None, 4, 7, 8],
        "future_timestamp": [3],
        "embedding_not_finite": [5],
        "embedding_zero": [6],
    }


def test_vectors_of_an_arrow_record_keep_their_own_lengths_and_faults() -> None:
    vectors = [[1.0, 2.0], [], None, [3.0, None], [0.0], [-4.0]]
    record = _arrow_record(
        item_id=pa.array([1, 2, 3, 4, 5, 6]),
        event_timestamp=_times(0, 0, 0, 0, 0, 0),
        title=pa.array(["t"] * 6),
        embedding=pa.array(vectors, pa.list_(pa.float32())),
        encoder_version=pa.array(["e1"] * 6),
    )

    decoded = decode_items([record])

    assert decoded.rows["item_id"].to_pylist() == [1, 3, 6]
    assert decoded.rows["embedding"].to_pylist() == [[1.0, 2.0], None, [-4.0]]
    refused = {
        letter.reason: decode_arrow(FakeRecord(None, letter.value))["item_id"].to_pylist()
        for letter in decoded.dead_letters
    }
    assert refused == {"embedding_zero": [2, 5], "embedding_not_finite": [4]}


def test_an_arrow_record_without_rows_gives_none() -> None:
    record = _arrow_record(
        item_id=pa.array([], pa.int64()),
        event_timestamp=_times(),
        embedding=pa.array([], pa.list_(pa.float32())),
        encoder_version=pa.array([], pa.string()),
    )

    decoded = decode_items([record])

    assert (decoded.rows.num_rows, decoded.dead_letters) == (0, [])


def test_arrow_record_with_a_wrong_column_is_one_dead_letter() -> None:
    text_ids = _arrow_record(item_id=pa.array(["1"]), event_timestamp=_times(0))
    naive = _arrow_record(
        item_id=pa.array([1]), event_timestamp=pa.array([NOW]).cast(pa.timestamp("us"))
    )
    lists = _arrow_record(item_id=pa.array([1]), event_timestamp=_times(0), title=pa.array([["a"]]))
    doubles = _arrow_record(
        item_id=pa.array([1]),
        event_timestamp=_times(0),
        embedding=pa.array([[1.0]], pa.list_(pa.float64())),
    )

    title, columns = pa.array(["A"]), ["item_id", "event_timestamp", "title", "title"]
    twice = pa.Table.from_arrays([pa.array([1]), _times(0), title, title], names=columns)

    decoded = decode_items([text_ids, naive, lists, doubles, record_of(encode_arrow(twice))])

    assert [letter.reason for letter in decoded.dead_letters] == ["wrong_type"] * 5
    assert decoded.rows.num_rows == 0


def test_interactions_of_both_forms_become_columns() -> None:
    tasks = ("is_like", "is_love")
    event = InteractionEvent(7, 42, NOW, (True, False), "train")
    as_json = record_of(encode_interaction_event(event, tasks))
    as_arrow = _arrow_record(
        user_id=pa.array([8, 9, 10, 11]),
        item_id=pa.array([1, 2, 3, -1]),
        event_timestamp=_times(1, 2, 3, 4),
        is_like=pa.array([False, None, True, True]),
        is_love=pa.array([True, True, True, True]),
        split=pa.array(["test", "test", "dev", "test"]),
    )
    erasure = UserErasure(12, NOW)

    decoded = decode_interactions(
        [as_json, record_of(encode_user_erasure(erasure)), as_arrow], tasks
    )

    rows = decoded.rows.sort_by("user_id").to_pydict()
    assert rows["user_id"] == [7, 8]
    assert rows["is_like"] == [True, False]
    assert rows["is_love"] == [False, True]
    assert rows["split"] == ["train", "test"]
    assert sorted(letter.reason for letter in decoded.dead_letters) == [
        "missing_field",
        "reserved_id",
        "wrong_type",
    ]
    assert decoded.erasures == [erasure]


def test_rows_refused_later_go_back_to_the_form_of_their_record() -> None:
    as_json = record_of(encode_item_event(ItemEvent(1, NOW, {"title": "A"})))
    as_arrow = _arrow_record(
        item_id=pa.array([2, 3]), event_timestamp=_times(0, 0), title=pa.array(["B", "C"])
    )
    records = [as_json, as_arrow]
    rows = decode_items(records).rows
    refused = rows.take([0, 2])

    letters = letters_of_rows(records, refused, ("why", "detail", "v1"))

    assert [letter.record for letter in letters] == records
    assert json.loads(letters[0].value or b"")["item_id"] == 1
    assert decode_arrow(FakeRecord(None, letters[1].value))["title"].to_pylist() == ["C"]
    assert {letter.codebook_version for letter in letters} == {"v1"}
