import numpy as np
import pyarrow as pa
from stream_fakes import NOW, record_of

from examples.quickstart.kafka_admin import interaction_messages, item_messages
from qarm_feast.schema import TIMESTAMP
from streaming.messages import (
    InteractionEvent,
    decode_interaction_event,
    decode_item_event,
)


def _times(*offsets: int) -> pa.Array:
    return pa.array([NOW + offset for offset in offsets], pa.int64()).cast(TIMESTAMP)


def test_interactions_written_by_column_are_what_a_worker_reads() -> None:
    interactions = pa.table(
        {
            "user_id": pa.array([7, -8]),
            "item_id": pa.array([42, 43]),
            "event_timestamp": _times(0, 1),
            "is_like": pa.array([True, False]),
            'is 100% "odd"': pa.array([False, True]),
            "split": pa.array(["train", "test"]),
        }
    )

    decoded = [
        decode_interaction_event(record_of(message), ("is_like", 'is 100% "odd"'))
        for message in interaction_messages(interactions)
    ]

    assert decoded == [
        InteractionEvent(7, 42, NOW, (True, False), "train"),
        InteractionEvent(-8, 43, NOW + 1, (False, True), "test"),
    ]


def test_items_keep_their_content_and_ready_vectors() -> None:
    items = pa.table(
        {
            "item_id": pa.array([1, 2]),
            "event_timestamp": _times(0, 1),
            "title": pa.array(["A", None]),
            "price": pa.array([2.5, None]),
            "weight": pa.array([float("nan"), None]),
            "embedding": pa.array([None, [1.0, 2.0]], pa.list_(pa.float32(), 2)),
            "encoder_version": pa.array([None, "e1"]),
        }
    )

    text, vector = [decode_item_event(record_of(message)) for message in item_messages(items)]

    assert text.content == {"title": "A", "price": 2.5}
    assert text.embedding is None
    assert vector.content == {}
    assert vector.encoder_version == "e1"
    np.testing.assert_array_equal(vector.embedding, np.array([1.0, 2.0], dtype=np.float32))
