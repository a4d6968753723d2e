from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
from stream_fakes import NOW, FakeRecord, SignCodebook, TitleEncoder, png_of, record_of

from qarm_feast.encode import TAKEDOWN_HASH
from qarm_feast.schema import CODE_ROWS, CONTENT_LOG_ROWS, interaction_rows
from streaming.columns import decode_interactions, decode_items
from streaming.messages import InteractionEvent, ItemEvent, encode_interaction_event
from streaming.messages import encode_item_event as encode_event
from streaming.rows import (
    LiveCodebooks,
    content_log_rows,
    encode_rows,
    hash_rows,
    interaction_log_rows,
    quantize_rows,
)

CREATED = datetime(2024, 1, 1, tzinfo=UTC)


def _load_nothing(version: str) -> TitleEncoder:
    raise AssertionError(f"encoder {version} was loaded without need")


def _load_title_encoder(version: str) -> TitleEncoder:
    return TitleEncoder()


def _records(*events: ItemEvent) -> list[FakeRecord]:
    return [record_of(encode_event(event), offset=n) for n, event in enumerate(events)]


def _vector(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_ready_vectors_are_quantized_without_an_encoder() -> None:
    records = _records(
        ItemEvent(1, NOW, {}, _vector(1, -1), "e1"), ItemEvent(2, NOW, {}, _vector(-1, 1), "e1")
    )
    live = LiveCodebooks({"v1": SignCodebook("e1")}, _load_nothing)
    rows = hash_rows(decode_items(records).rows)

    encoded, refused = encode_rows(records, rows, live)
    codes = quantize_rows(rows, encoded, live, CREATED)

    assert refused == []
    assert codes["v1"].schema == CODE_ROWS
    assert codes["v1"]["rq_code"].to_pylist() == [[1, 0], [0, 1]]
    assert codes["v1"]["vq_code"].to_pylist() == [[1, 1, 1], [2, 2, 2]]
    assert codes["v1"]["content_hash"].to_pylist() == rows["content_hash"].to_pylist()
    assert codes["v1"]["created"].to_pylist() == [CREATED, CREATED]


def test_each_encoder_reads_content_where_no_vector_of_its_own_came() -> None:
    both = ItemEvent(1, NOW, {"title": "A"}, _vector(-1, 1), "e1")
    text = ItemEvent(2, NOW, {"title": "B"})
    live = LiveCodebooks({"v1": SignCodebook("e1"), "v2": SignCodebook("e2")}, _load_title_encoder)
    records = _records(both, text)
    rows = hash_rows(decode_items(records).rows)

    encoded, refused = encode_rows(records, rows, live)
    codes = quantize_rows(rows, encoded, live, CREATED)

    by_item = {
        version: dict(zip(t["item_id"].to_pylist(), t["rq_code"].to_pylist(), strict=True))
        for version, t in codes.items()
    }
    assert refused == []
    assert by_item == {"v1": {1: [0, 1], 2: [1, 0]}, "v2": {1: [1, 0], 2: [1, 0]}}
    assert codes["v2"]["encoder_version"].to_pylist() == ["e2", "e2"]


def test_what_no_encoder_can_read_is_refused_for_its_versions_only() -> None:
    ready = ItemEvent(1, NOW, {}, _vector(1, 1), "e1")
    narrow = ItemEvent(2, NOW, {}, _vector(1), "e1")
    foreign = ItemEvent(3, NOW, {}, _vector(1, 1), "e9")
    picture = ItemEvent(4, NOW, {"image": png_of(1, 1)})
    live = LiveCodebooks({"v1": SignCodebook("e1"), "v2": SignCodebook("e1")}, _load_title_encoder)
    records = _records(ready, narrow, foreign, picture)
    rows = hash_rows(decode_items(records).rows)

    encoded, refused = encode_rows(records, rows, live)
    codes = quantize_rows(rows, encoded, live, CREATED)

    assert codes["v1"]["item_id"].to_pylist() == [1]
    assert [(letter.record.offset, letter.reason) for letter in refused] == [
        (1, "embedding_width"),
        (2, "encoder_mismatch"),
        (3, "encoder_mismatch"),
    ]
    assert {letter.codebook_version for letter in refused} == {"v1,v2"}


def test_text_for_an_encoder_that_takes_vectors_only_is_refused_and_the_batch_goes_on() -> None:
    class VectorsOnly:
        content_columns = ("embedding",)

        def encode(self, items: pa.Table) -> np.ndarray:
            raise AssertionError("nothing that it reads has come")

    records = _records(
        ItemEvent(1, NOW, {"title": "A"}), ItemEvent(2, NOW, {}, _vector(1, 1), "e1")
    )
    live = LiveCodebooks({"v1": SignCodebook("e1")}, lambda version: VectorsOnly())
    rows = hash_rows(decode_items(records).rows)

    encoded, refused = encode_rows(records, rows, live)

    assert quantize_rows(rows, encoded, live, CREATED)["v1"]["item_id"].to_pylist() == [2]
    assert [(letter.record.offset, letter.reason) for letter in refused] == [
        (0, "encoder_mismatch")
    ]


def test_takedown_becomes_a_row_of_absent_codes_that_wins_a_tie() -> None:
    records = _records(
        ItemEvent(1, NOW, {}, is_deleted=True), ItemEvent(1, NOW, {}, _vector(1, 1), "e1")
    )
    live = LiveCodebooks({"v1": SignCodebook("e1")}, _load_nothing)
    rows = hash_rows(decode_items(records).rows)

    encoded, _ = encode_rows(records, rows, live)
    codes = quantize_rows(rows, encoded, live, CREATED)["v1"].to_pylist()

    takedown = next(row for row in codes if row["is_deleted"])
    upload = next(row for row in codes if not row["is_deleted"])
    assert takedown["rq_code"] == [-1, -1]
    assert takedown["vq_code"] == [-1, -1, -1]
    assert takedown["content_hash"] == TAKEDOWN_HASH
    assert takedown["content_hash"] > upload["content_hash"]


def test_only_interactions_give_no_code_rows() -> None:
    live = LiveCodebooks({"v1": SignCodebook("e1")}, _load_nothing)
    rows = hash_rows(decode_items([]).rows)

    encoded, refused = encode_rows([], rows, live)

    assert refused == []
    assert quantize_rows(rows, encoded, live, CREATED) == {}
    assert content_log_rows([], rows, encoded, CREATED).num_rows == 0


def test_content_log_keeps_what_a_new_encoder_or_codebook_needs() -> None:
    records = _records(
        ItemEvent(1, NOW, {"title": "Mug", "price": 2}),
        ItemEvent(2, NOW, {}, _vector(3, 4), "e1"),
        ItemEvent(3, NOW, {}, is_deleted=True),
        ItemEvent(4, NOW, {}, _vector(5, 6), "e9"),
    )
    live = LiveCodebooks({"v1": SignCodebook("e1")}, _load_title_encoder)
    rows = hash_rows(decode_items(records).rows)
    encoded, _ = encode_rows(records, rows, live)

    log = content_log_rows(records, rows, encoded, CREATED)

    assert log.schema == CONTENT_LOG_ROWS
    assert log["embedding"].to_pylist() == [[3.0, -1.0], [3.0, 4.0], None, [5.0, 6.0]]
    assert log["encoder_version"].to_pylist() == ["e1", "e1", None, "e9"]
    assert log["content"].to_pylist() == ['{"price":2,"title":"Mug"}', "{}", "{}", "{}"]
    assert log["is_deleted"].to_pylist() == [False, False, True, False]
    assert log["topic"].to_pylist() == ["items"] * 4
    assert log["offset"].to_pylist() == [0, 1, 2, 3]


def test_interaction_log_rows_have_the_logs_schema() -> None:
    event = InteractionEvent(7, 42, NOW, (True,), "")
    record = record_of(encode_interaction_event(event, ("is_like",)))
    rows = decode_interactions([record], ("is_like",)).rows

    log = interaction_log_rows(rows, ("is_like",), CREATED)

    assert log.schema == interaction_rows(("is_like",))
    assert log["event_timestamp"].cast(pa.int64()).to_pylist() == [NOW]
    assert log["split"].to_pylist() == [""]
