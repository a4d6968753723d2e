"""Decoded columns of a batch to the rows of every store: encode, quantize, lay out.

Shape letters in this file: N rows, D embedding width.
May import: numpy, pyarrow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.encode import (
    CONTENT_HASH,
    TAKEDOWN_HASH,
    content_hashes,
    encode_items,
    takedown_rows,
)
from qarm_feast.item_vectors import EncodedItems, Encoder, vectors_of
from qarm_feast.schema import (
    CONTENT_LOG_ROWS,
    CREATED,
    EVENT_TIMESTAMP,
    ITEM_ID,
    TIMESTAMP,
    USER_ERASURE_ROWS,
    interaction_rows,
)
from streaming.columns import DeadLetter, letters_of_rows
from streaming.event_columns import CONTENT, IS_DELETED, RECORD_INDEX
from streaming.limits import Reason
from streaming.messages import EMBEDDING, ENCODER_VERSION, Record, UserErasure

if TYPE_CHECKING:
    from qarm_feast.codebook import Codebook


@dataclass(frozen=True)
class LiveCodebooks:
    """The codebooks that this worker writes.

    Attributes:
        codebooks: By version; the default version first.
        load_encoder: Gives the encoder of a version; called only when content must be encoded.
    """

    codebooks: Mapping[str, "Codebook"]
    load_encoder: Callable[[str], Encoder]

    def by_encoder(self) -> dict[str, dict[str, "Codebook"]]:
        """Return the codebooks grouped by encoder version, in the same order."""
        groups: dict[str, dict[str, Codebook]] = {}
        for version, codebook in self.codebooks.items():
            groups.setdefault(codebook.manifest.encoder_version, {})[version] = codebook
        return groups


def hash_rows(rows: pa.Table) -> pa.Table:
    """Return decoded item rows with ``content_hash`` added."""
    hashes = pa.array(content_hashes(rows), pa.string())
    return rows.append_column(CONTENT_HASH, pc.if_else(rows[IS_DELETED], TAKEDOWN_HASH, hashes))


def encode_rows(
    records: Sequence[Record], rows: pa.Table, live: LiveCodebooks
) -> tuple[list[EncodedItems], list[DeadLetter]]:
    """Return vectors per encoder: ready ones as they came, the others from content.

    Args:
        records: The records that the rows came from.
        rows: Hashed item rows; takedowns are passed over.
        live: The codebooks to write.

    Returns:
        One entry per encoder version, and the dead letters of rows that it cannot read.
    """
    encoded: list[EncodedItems] = []
    dead_letters: list[DeadLetter] = []
    for encoder_version, codebooks in live.by_encoder().items():
        width = next(iter(codebooks.values())).embedding_dim
        group, refusals = vectors_of(rows, encoder_version, width, live.load_encoder)
        encoded.append(group)
        for refused in refusals:
            letter = (Reason(refused.reason), refused.detail, ",".join(codebooks))
            dead_letters += letters_of_rows(records, rows.take(refused.positions_N), letter)
    return encoded, dead_letters


def quantize_rows(
    rows: pa.Table, encoded: Sequence[EncodedItems], live: LiveCodebooks, created: datetime
) -> dict[str, pa.Table]:
    """Return the code rows of a batch by codebook version, takedowns included.

    Args:
        rows: Hashed item rows.
        encoded: What :func:`encode_rows` returned for them.
        live: The codebooks to write.
        created: When the rows are written, aware UTC.

    Returns:
        Tables of ``schema.CODE_ROWS`` by codebook version; none for a batch without items.
    """
    if not rows.num_rows:
        return {}
    takedowns = rows.filter(rows[IS_DELETED])
    groups = live.by_encoder()
    codes: dict[str, pa.Table] = {}
    for group in encoded:
        version = group.encoder_version
        group_rows = rows.take(group.positions_N)
        codes |= encode_items(group_rows, group.vectors_ND, groups[version], version, created)
    return {
        version: pa.concat_tables(
            [codes[version], takedown_rows(takedowns, live.codebooks[version], created)]
        )
        for version in live.codebooks
    }


def content_log_rows(
    records: Sequence[Record],
    rows: pa.Table,
    encoded: Sequence[EncodedItems],
    created: datetime,
) -> pa.Table:
    """Return the content log's rows: all that a backfill or a new encoder needs.

    ``embedding`` is the vector that came ready, else the one that the default version's encoder
    made; null for takedowns and refused rows.
    """
    rows = _with_vectors(rows, encoded[0])
    indexes = rows[RECORD_INDEX].to_pylist()
    num_rows = rows.num_rows
    values = {
        ITEM_ID: rows[ITEM_ID],
        CONTENT: rows[CONTENT],
        CONTENT_HASH: rows[CONTENT_HASH],
        EMBEDDING: rows[EMBEDDING],
        ENCODER_VERSION: rows[ENCODER_VERSION],
        IS_DELETED: rows[IS_DELETED],
        "topic": pa.array([records[i].topic for i in indexes], pa.string()),
        "partition": pa.array([records[i].partition for i in indexes], pa.int32()),
        "offset": pa.array([records[i].offset for i in indexes], pa.int64()),
        EVENT_TIMESTAMP: rows[EVENT_TIMESTAMP],
        CREATED: pa.repeat(pa.scalar(created, TIMESTAMP), num_rows),
    }
    return pa.table(values, schema=CONTENT_LOG_ROWS)


def interaction_log_rows(
    rows: pa.Table, task_names: tuple[str, ...], created: datetime
) -> pa.Table:
    """Return the raw interaction log's rows."""
    column = pa.repeat(pa.scalar(created, TIMESTAMP), rows.num_rows)
    schema = interaction_rows(task_names)
    return rows.append_column(CREATED, column).select(schema.names).cast(schema)


def erasure_log_rows(erasures: Sequence[UserErasure], created: datetime) -> pa.Table:
    """Return the rows of ``user_erasure_log``."""
    columns = [
        pa.array([erasure.user_id for erasure in erasures], pa.int64()),
        pa.array([erasure.event_timestamp for erasure in erasures], pa.int64()).cast(TIMESTAMP),
        pa.repeat(pa.scalar(created, TIMESTAMP), len(erasures)),
    ]
    return pa.table(columns, schema=USER_ERASURE_ROWS)


def _mask(condition: pa.ChunkedArray) -> np.ndarray:
    mask_N: np.ndarray = pc.fill_null(condition, False).to_numpy().astype(bool)
    return mask_N


def _with_vectors(rows: pa.Table, first: EncodedItems) -> pa.Table:
    """Fill in the vectors of one encoder where none came ready."""
    places_N = np.full(rows.num_rows, -1, dtype=np.int64)
    places_N[first.positions_N] = np.arange(len(first.positions_N))
    is_made_N = (places_N >= 0) & ~_mask(pc.is_valid(rows[EMBEDDING]))
    taken = pa.array(places_N, mask=~is_made_N)
    is_made = pa.array(is_made_N)
    made = _vector_array(first.vectors_ND).take(taken)
    columns = {
        EMBEDDING: pc.if_else(is_made, made, rows[EMBEDDING]),
        ENCODER_VERSION: pc.if_else(is_made, first.encoder_version, rows[ENCODER_VERSION]),
    }
    for name, column in columns.items():
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return rows


def _vector_array(x_ND: np.ndarray) -> pa.ListArray:
    offsets = np.arange(len(x_ND) + 1, dtype=np.int32) * np.int32(x_ND.shape[1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(x_ND.reshape(-1)))
