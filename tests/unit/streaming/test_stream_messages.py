import base64
import json

import numpy as np
import pyarrow as pa
import pytest
from stream_fakes import NOW, VERSIONED, FakeRecord, png_of, record_of

from qarm_feast.errors import EventError
from qarm_feast.quantizers.base import MAX_ABSOLUTE_VALUE
from streaming.limits import EventLimits
from streaming.messages import (
    MAX_EMBEDDING_VALUE,
    InteractionEvent,
    ItemEvent,
    UserErasure,
    content_type,
    decode_arrow,
    decode_interaction_event,
    decode_item_event,
    encode_arrow,
    encode_interaction_event,
    encode_item_event,
    encode_user_erasure,
)

ITEM = {"item_id": 42, "event_timestamp": NOW, "title": "Mug"}
INTERACTION = {"user_id": 7, "item_id": 42, "event_timestamp": NOW, "is_like": True}


def _item(key: bytes = b"42", **changes: object) -> FakeRecord:
    fields = {name: value for name, value in (ITEM | changes).items() if value is not ...}
    return FakeRecord(key, json.dumps(fields).encode())


def _interaction(key: bytes = b"7", **changes: object) -> FakeRecord:
    fields = {name: value for name, value in (INTERACTION | changes).items() if value is not ...}
    return FakeRecord(key, json.dumps(fields).encode())


def _reason(record: FakeRecord) -> str:
    with pytest.raises(EventError) as caught:
        _decode(record)
    return caught.value.reason


def _decode(record: FakeRecord) -> None:
    content_type(record)
    decode_item_event(record)


def test_item_event_survives_the_wire() -> None:
    content = {"title": "Größe 🙂", "price": 9.5, "in_stock": True, "audio": b"\x00\xff"}
    vector_D = np.array([0.25, -1.0], dtype=np.float32)
    event = ItemEvent(42, NOW, content, vector_D, "e1")

    decoded = decode_item_event(record_of(encode_item_event(event)))

    assert decoded._replace(embedding=None) == event._replace(embedding=None)
    assert decoded.embedding is not None
    assert decoded.embedding.dtype == np.float32
    assert decoded.embedding.tolist() == [0.25, -1.0]


def test_takedown_survives_the_wire() -> None:
    event = ItemEvent(42, NOW, {}, is_deleted=True)

    message = encode_item_event(event)

    assert message.value is None
    assert decode_item_event(record_of(message)) == event


def test_interaction_event_survives_the_wire() -> None:
    event = InteractionEvent(7, 42, NOW, (True, False), "valid")

    decoded = decode_interaction_event(
        record_of(encode_interaction_event(event, ("is_like", "is_love"))), ("is_like", "is_love")
    )

    assert decoded == event


def test_erasure_of_a_user_survives_the_wire() -> None:
    erasure = UserErasure(7, NOW)

    message = encode_user_erasure(erasure)

    assert message.value is None
    assert decode_interaction_event(record_of(message), ("is_like",)) == erasure


def test_event_time_may_be_iso_8601_with_an_offset() -> None:
    record = _item(event_timestamp="2023-11-14T23:13:20.000001+01:00")

    assert decode_item_event(record).event_timestamp == NOW + 1


def test_empty_and_null_content_is_no_content() -> None:
    decoded = decode_item_event(_item(description="", brand=None))

    assert decoded.content == {"title": "Mug"}


def test_image_is_a_uri_or_base64() -> None:
    picture = base64.b64encode(png_of(2, 3)).decode()
    limits = EventLimits(allowed_uri_prefixes=("s3://bucket/",))

    by_uri = decode_item_event(_item(image="s3://bucket/1.png"), limits)
    by_value = decode_item_event(_item(image={"base64": picture}))

    assert by_uri.content["image"] == "s3://bucket/1.png"
    assert by_value.content["image"] == png_of(2, 3)


def test_event_time_may_lie_300_seconds_after_the_append_time_and_no_longer() -> None:
    in_time = _item(event_timestamp=NOW + 300_000_000)
    late = _item(event_timestamp=NOW + 300_000_001)

    assert decode_item_event(in_time).event_timestamp == NOW + 300_000_000
    assert _reason(late) == "future_timestamp"


def test_largest_embedding_value_is_that_of_the_quantizers() -> None:
    assert MAX_EMBEDDING_VALUE == MAX_ABSOLUTE_VALUE


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (FakeRecord(b"42", b"{"), "undecodable"),
        (FakeRecord(b"42", b"\xff\xfe"), "undecodable"),
        (FakeRecord(b"42", b"[" * 100_000), "undecodable"),
        (FakeRecord(b"42", b'{"item_id":' + b"9" * 5000 + b"}"), "undecodable"),
        (FakeRecord(b"42", b"[]"), "wrong_type"),
        (FakeRecord(b"42", b"{}", headers=[]), "unknown_schema_version"),
        (FakeRecord(b"42", b"{}", headers=[("schema_version", b"2")]), "unknown_schema_version"),
        (FakeRecord(b"42", b"{}", [*VERSIONED, ("content-type", b"text/csv")]), "undecodable"),
        (FakeRecord(b"42", b"{}", [*VERSIONED, ("content-type", None)]), "undecodable"),
        (_item(item_id=...), "missing_field"),
        (_item(item_id="42"), "wrong_type"),
        (_item(item_id=True), "wrong_type"),
        (_item(item_id=42.0), "wrong_type"),
        (_item(item_id=2**63), "wrong_type"),
        (_item(key=b"43"), "key_mismatch"),
        (_item(key=b"042"), "key_mismatch"),
        (_item(event_timestamp=...), "missing_field"),
        (_item(event_timestamp=1.5), "wrong_type"),
        (_item(event_timestamp="yesterday"), "wrong_type"),
        (_item(event_timestamp="2023-11-14T23:13:20"), "wrong_type"),
        (_item(event_timestamp=NOW // 1000), "absurd_timestamp"),
        (_item(event_timestamp=-1), "absurd_timestamp"),
        (_item(title=...), "missing_field"),
        (_item(title=""), "missing_field"),
        (_item(title=7), "wrong_type"),
        (_item(title="\ud800"), "undecodable"),
        (_item(price=[1]), "wrong_type"),
        (_item(price=float("nan")), "wrong_type"),
        (_item(image={"base64": "%"}), "undecodable"),
        (_item(image={"url": "x"}), "undecodable"),
        (_item(embedding=[1.0]), "missing_field"),
        (_item(embedding=[1.0], encoder_version="\ud800"), "undecodable"),
        (_item(embedding="text", encoder_version="e1"), "wrong_type"),
        (_item(embedding=["1.0"], encoder_version="e1"), "wrong_type"),
        (_item(embedding=[None], encoder_version="e1"), "wrong_type"),
        (_item(embedding=[10**400], encoder_version="e1"), "wrong_type"),
        (_item(embedding=[float("nan")], encoder_version="e1"), "embedding_not_finite"),
        (_item(embedding=[1e300], encoder_version="e1"), "embedding_not_finite"),
        (_item(embedding=[1e16], encoder_version="e1"), "embedding_not_finite"),
        (_item(embedding=[0.0, 0.0], encoder_version="e1"), "embedding_zero"),
        (_item(embedding=[], encoder_version="e1"), "embedding_zero"),
        (FakeRecord(b"42", None), "missing_field"),
        (FakeRecord(b"x", None), "key_mismatch"),
        (FakeRecord(None, None), "key_mismatch"),
        (FakeRecord(b"9" * 5000, None), "wrong_type"),
        (FakeRecord(b"42", None, [*VERSIONED, ("event_timestamp", b"9" * 5000)]), "wrong_type"),
    ],
)
def test_broken_item_record_names_its_reason(record: FakeRecord, reason: str) -> None:
    assert _reason(record) == reason


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (_interaction(user_id=...), "missing_field"),
        (_interaction(key=b"42"), "key_mismatch"),
        (_interaction(item_id=None), "missing_field"),
        (_interaction(is_like=...), "missing_field"),
        (_interaction(is_like=1), "wrong_type"),
        (_interaction(split="dev"), "wrong_type"),
        (_interaction(split=[]), "wrong_type"),
        (_interaction(item_id=-1), "reserved_id"),
        (FakeRecord(b"7", None), "missing_field"),
        (FakeRecord(b"x", None), "key_mismatch"),
        (
            FakeRecord(b"7", None, [*VERSIONED, ("event_timestamp", b"%d" % (NOW + 400_000_000))]),
            "future_timestamp",
        ),
    ],
)
def test_broken_interaction_record_names_its_reason(record: FakeRecord, reason: str) -> None:
    with pytest.raises(EventError) as caught:
        decode_interaction_event(record, ("is_like",))

    assert caught.value.reason == reason


def test_arrow_record_must_have_no_key() -> None:
    message = encode_arrow(pa.table({"item_id": [1]}))

    with pytest.raises(EventError, match="key_mismatch"):
        decode_arrow(record_of(message._replace(key=b"1")))


def test_an_arrow_column_name_that_is_no_text_is_refused() -> None:
    message = encode_arrow(pa.table({"title": ["a"]}))
    damaged = (message.value or b"").replace(b"title", b"tit\xf5e")

    with pytest.raises(EventError, match="not an Arrow IPC stream") as refused:
        decode_arrow(record_of(message._replace(value=damaged)))

    assert refused.value.reason == "undecodable"


def test_damaged_arrow_stream_is_refused_wherever_it_is_cut() -> None:
    message = encode_arrow(pa.table({"title": ["a", "bb"], "embedding": [[1.0], [2.0, 3.0]]}))
    assert message.value is not None

    refused = 0
    for length in range(0, len(message.value) - 8, 7):
        cut = FakeRecord(None, message.value[:length])
        try:
            # Cut behind the schema: a stream without batches is a legal, empty one.
            assert decode_arrow(cut).num_rows == 0
        except EventError:
            refused += 1

    assert refused > 10
