"""Arrow schemas and reserved values that every part of the system shares.

May import: pyarrow only.
"""

import pyarrow as pa

TIMESTAMP = pa.timestamp("us", tz="UTC")
CODES = pa.list_(pa.int64())

ITEM_ID = "item_id"
USER_ID = "user_id"
EVENT_TIMESTAMP = "event_timestamp"
CREATED = "created"

CONTENT_TEXT_COLUMNS = ("title", "description", "brand")
"""Text columns of ``items`` in the order in which the encoder reads them."""
CONTENT_BINARY_COLUMNS = ("image", "audio")
SPLITS = ("train", "valid", "test")

ABSENT_CODE = -1
"""Fills the code lists of a deleted item: Feast has no empty list, and no code is negative."""
ERASURE_MARK = -1
"""Stands for an item where a user's history was erased, and where a short list of items is filled
up: no item has this id. Every other int64 is one; users may have any."""

CODE_ROWS = pa.schema(
    [
        (ITEM_ID, pa.int64()),
        ("rq_code", CODES),
        ("vq_code", CODES),
        ("encoder_version", pa.string()),
        ("content_hash", pa.string()),
        ("is_deleted", pa.bool_()),
        (EVENT_TIMESTAMP, TIMESTAMP),
        (CREATED, TIMESTAMP),
    ]
)
"""Rows of ``item_codes_<version>``; ``event_timestamp`` is the content event's time."""

VECTOR_ROWS = pa.schema(
    [
        (ITEM_ID, pa.int64()),
        ("embedding", pa.binary()),
        ("content_hash", pa.string()),
        ("is_deleted", pa.bool_()),
        (EVENT_TIMESTAMP, TIMESTAMP),
        (CREATED, TIMESTAMP),
    ]
)
"""Rows of ``item_vectors_<encoder_version>``: the aligned vector of length 1 as little-endian
float16, empty for a deleted item; times and hash are those of the item's code rows."""

RECENT_ITEM_ROWS = pa.schema(
    [
        (USER_ID, pa.int64()),
        ("item_ids", CODES),
        ("item_timestamps", CODES),
        (EVENT_TIMESTAMP, TIMESTAMP),
        (CREATED, TIMESTAMP),
    ]
)
"""Rows of ``user_recent_items``: latest positives, newest first; ``item_timestamps`` are
microseconds since the epoch, UTC; ``event_timestamp`` is the newest of them. After an erasure
the list ends in ``ERASURE_MARK`` with the erasure's time; see :mod:`qarm_feast.erasure`."""

USER_ERASURE_ROWS = pa.schema(
    [(USER_ID, pa.int64()), (EVENT_TIMESTAMP, TIMESTAMP), (CREATED, TIMESTAMP)]
)
"""Rows of ``user_erasure_log``: what the user did up to ``event_timestamp`` counts no more; a
compaction removes the raw rows of it from the interaction log, see :mod:`qarm_feast.erasure`."""

CONTENT_LOG_ROWS = pa.schema(
    [
        (ITEM_ID, pa.int64()),
        ("content", pa.string()),
        ("content_hash", pa.string()),
        ("embedding", pa.list_(pa.float32())),
        ("encoder_version", pa.string()),
        ("is_deleted", pa.bool_()),
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        (EVENT_TIMESTAMP, TIMESTAMP),
        (CREATED, TIMESTAMP),
    ]
)
"""Rows of ``item_content_log``: what a backfill or a new encoder re-reads; ``content`` is the
JSON text of the event's content columns."""

SERVED_CODE_ROWS = pa.schema(
    [
        (ITEM_ID, pa.int64()),
        ("codebook_version", pa.string()),
        ("codes_hash", pa.string()),
        (EVENT_TIMESTAMP, TIMESTAMP),
        (CREATED, TIMESTAMP),
    ]
)
"""Rows of ``served_code_log``: what a reader answered at ``event_timestamp``, by sampling; the hash
is empty where the item had no codes, see :mod:`qarm_feast.serving_log`."""


def interaction_rows(task_names: tuple[str, ...]) -> pa.Schema:
    """Return the schema of the raw interaction log: one bool column per task.

    ``split`` is an empty string where the data has none.
    """
    return pa.schema(
        [
            (USER_ID, pa.int64()),
            (ITEM_ID, pa.int64()),
            *[(name, pa.bool_()) for name in task_names],
            ("split", pa.string()),
            (EVENT_TIMESTAMP, TIMESTAMP),
            (CREATED, TIMESTAMP),
        ]
    )


def code_view_name(codebook_version: str) -> str:
    """Return the Feast view that holds the codes of one codebook version."""
    return f"item_codes_{codebook_version}"


def vector_view_name(encoder_version: str) -> str:
    """Return the Feast view that holds the aligned vectors of one encoder version."""
    return f"item_vectors_{encoder_version}"


def cross_view_name(codebook_version: str) -> str:
    """Return the on-demand view of the cross features of one codebook version."""
    return f"cross_features_{codebook_version}"


RECENT_ITEMS_VIEW = "user_recent_items"
TRAIN_ITEMS_VIEW = "user_train_items"
USER_PROFILE_VIEW = "user_profile"
CONTENT_LOG = "item_content_log"
INTERACTION_LOG = "interaction_log"
USER_ERASURE_LOG = "user_erasure_log"
SERVED_CODE_LOG = "served_code_log"
