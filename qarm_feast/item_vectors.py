"""Aligned vectors of item rows: ready ones as they came, the others from content.

Stream and backfill read items by this one function, so that neither sees another vector than the
other; both write what a ranker of vectors reads online by :func:`vector_rows`.
Shape letters in this file: N rows, D embedding width.
May import: numpy, pyarrow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.errors import DataError
from qarm_feast.media_values import is_reference, is_remote
from qarm_feast.quantizers.base import unit_rows
from qarm_feast.schema import (
    CONTENT_BINARY_COLUMNS,
    CONTENT_TEXT_COLUMNS,
    CREATED,
    EVENT_TIMESTAMP,
    ITEM_ID,
    TIMESTAMP,
    VECTOR_ROWS,
)

EMBEDDING_WIDTH = "embedding_width"
"""Why a row is refused: its ready vector is of the right encoder, but of another width."""
ENCODER_MISMATCH = "encoder_mismatch"
"""Why a row is refused: neither a vector of the right encoder, nor content that it reads."""

EMBEDDING = "embedding"
_ENCODER_VERSION = "encoder_version"
_IS_DELETED = "is_deleted"
_STORED = np.dtype("<f2")
_READABLE = (*CONTENT_TEXT_COLUMNS, *CONTENT_BINARY_COLUMNS)
_VECTOR_COLUMNS = (ITEM_ID, "content_hash", _IS_DELETED, EVENT_TIMESTAMP)


class Encoder(Protocol):
    """Content to aligned embeddings; ``qarm_feast.alignment.encoder.ItemEncoder`` is one."""

    @property
    def content_columns(self) -> tuple[str, ...]:
        """The content columns that it reads."""
        ...

    def encode(self, items: pa.Table) -> np.ndarray:
        """Return the items' aligned embeddings.

        Args:
            items: Columns of ``content_columns``, or some of them.

        Returns:
            Float32 ``[N, D]``, L2-normalised.
        """
        ...


@dataclass(frozen=True)
class EncodedItems:
    """Vectors of one encoder for some of the given item rows, ``positions_N``."""

    encoder_version: str
    positions_N: np.ndarray
    vectors_ND: np.ndarray


class RefusedItems(NamedTuple):
    """Positions of rows that an encoder cannot read, and why."""

    positions_N: np.ndarray
    reason: str
    detail: str


def vectors_of(
    rows: pa.Table, encoder_version: str, width: int, load_encoder: Callable[[str], Encoder]
) -> tuple[EncodedItems, list[RefusedItems]]:
    """Return one encoder's vectors of item rows; takedowns are passed over.

    Args:
        rows: Columns ``is_deleted``, ``encoder_version``, ``embedding`` (list of float32) and any
            content columns. A picture or sound that is only named is none.
        encoder_version: The encoder that vectors must come from.
        width: Numbers in each of them.
        load_encoder: Gives the encoder; called only when content must be encoded.

    Returns:
        The vectors, and the rows that have none, by reason; some entries may be empty.
    """
    parts = _split_by_readiness(rows, encoder_version, width)
    made_ND, readable_N = np.empty((0, width), dtype=np.float32), parts.others[:0]
    # Not for content of items that bring a vector: the encoder may be on another machine.
    if len(_with_content(rows, parts.others, _READABLE)):
        encoder = load_encoder(encoder_version)
        columns = [name for name in _READABLE if name in encoder.content_columns]
        readable_N = _with_content(rows, parts.others, columns)
        if len(readable_N):
            present = [name for name in columns if name in rows.column_names]
            made_ND = encoder.encode(rows.select(present).take(readable_N))
    ready_ND = embedding_matrix(rows[EMBEDDING].take(parts.ready), width)
    positions_N = np.concatenate([parts.ready, readable_N])
    encoded = EncodedItems(encoder_version, positions_N, np.concatenate([ready_ND, made_ND]))
    return encoded, parts.refused(encoder_version, width, readable_N)


def vector_rows(rows: pa.Table, encoded: EncodedItems, created: datetime) -> pa.Table:
    """Return the rows of ``item_vectors_<encoder_version>`` for item rows, takedowns included.

    Args:
        rows: Columns ``item_id``, ``content_hash``, ``is_deleted``, ``event_timestamp``.
        encoded: Vectors of some of them.
        created: When the rows are written, aware UTC.

    Returns:
        Rows of ``schema.VECTOR_ROWS``: uploads with their vector scaled to length 1, then
        takedowns with none.
    """
    uploads = rows.take(pa.array(encoded.positions_N))
    takedowns = rows.filter(rows[_IS_DELETED])
    kept = pa.concat_tables([table.select(_VECTOR_COLUMNS) for table in (uploads, takedowns)])
    vectors = encode_vectors(unit_rows(encoded.vectors_ND)) + [b""] * takedowns.num_rows
    columns = {
        **{name: kept[name] for name in _VECTOR_COLUMNS},
        EMBEDDING: pa.array(vectors, pa.binary()),
        CREATED: pa.repeat(pa.scalar(created, TIMESTAMP), kept.num_rows),
    }
    return pa.table([columns[name] for name in VECTOR_ROWS.names], schema=VECTOR_ROWS)


def encode_vectors(x_ND: np.ndarray) -> list[bytes]:
    """Return each row as little-endian float16; numbers of a vector of length 1 fit."""
    stored_ND = x_ND.astype(_STORED)
    return [row.tobytes() for row in stored_ND]


def decode_vectors(stored_N: Sequence[bytes], width: int, place: str) -> np.ndarray:
    """Return what :func:`encode_vectors` made.

    Args:
        stored_N: One value per vector.
        width: Numbers in each.
        place: Where they were read, for the error.

    Returns:
        Float32 ``[N, width]``.

    Raises:
        DataError: If a value has another size.
    """
    num_bytes = width * _STORED.itemsize
    joined = b"".join(stored_N)
    if len(joined) != num_bytes * len(stored_N) or any(len(one) != num_bytes for one in stored_N):
        wrong = next(len(one) for one in stored_N if len(one) != num_bytes)
        raise DataError(
            f"{place} holds a vector of {wrong} bytes, {width} numbers take {num_bytes}: another "
            "encoder's rows were written into it; write the encoder's vectors again"
        )
    return np.frombuffer(joined, dtype=_STORED).reshape(-1, width).astype(np.float32)


def embedding_matrix(embeddings: pa.ChunkedArray, width: int) -> np.ndarray:
    """Return ready embeddings as float32 of shape ``[N, width]``; every row has that width."""
    flat: np.ndarray = pc.list_flatten(embeddings).to_numpy()
    return flat.reshape(-1, width)


class _Parts(NamedTuple):
    """Positions of uploads, as one encoder sees them."""

    ready: np.ndarray
    wrong_width: np.ndarray
    others: np.ndarray

    def refused(
        self, encoder_version: str, width: int, readable_N: np.ndarray
    ) -> list[RefusedItems]:
        """Return the rows that cannot be encoded, by kind."""
        return [
            RefusedItems(
                self.wrong_width,
                EMBEDDING_WIDTH,
                f"encoder {encoder_version!r} makes vectors of {width} numbers",
            ),
            RefusedItems(
                np.setdiff1d(self.others, readable_N),
                ENCODER_MISMATCH,
                f"no content that encoder {encoder_version!r} reads, and no embedding of it",
            ),
        ]


def _split_by_readiness(rows: pa.Table, encoder_version: str, width: int) -> _Parts:
    is_upload_N = ~_mask(rows[_IS_DELETED])
    is_own_N = _mask(pc.equal(rows[_ENCODER_VERSION], encoder_version))
    is_wide_N = _mask(pc.equal(pc.list_value_length(rows[EMBEDDING]), width))
    return _Parts(
        ready=np.flatnonzero(is_upload_N & is_own_N & is_wide_N),
        wrong_width=np.flatnonzero(is_upload_N & is_own_N & ~is_wide_N),
        others=np.flatnonzero(is_upload_N & ~is_own_N),
    )


def _with_content(rows: pa.Table, positions_N: np.ndarray, columns: Sequence[str]) -> np.ndarray:
    """Return those of the positions at which one of the columns has something to read."""
    has_content_N = np.zeros(rows.num_rows, dtype=bool)
    for name in columns:
        has_content_N |= _has_content(rows, name)
    readable_N: np.ndarray = positions_N[has_content_N[positions_N]]
    return readable_N


def _has_content(rows: pa.Table, name: str) -> np.ndarray:
    if name not in rows.column_names:
        return np.zeros(rows.num_rows, dtype=bool)
    has_value_N: np.ndarray = _mask(pc.is_valid(rows[name]))
    if name in CONTENT_BINARY_COLUMNS and has_value_N.any():
        for position in np.flatnonzero(has_value_N):
            has_value_N[position] = _can_be_opened(rows[name][int(position)].as_py())
    return has_value_N


def _can_be_opened(value: str | bytes) -> bool:
    """Tell bytes of a file and paths of a catalogue from URIs and from what events name."""
    return bool(value) and (
        not is_remote(value) if isinstance(value, str) else not is_reference(value)
    )


def _mask(condition: pa.ChunkedArray) -> np.ndarray:
    mask_N: np.ndarray = pc.fill_null(condition, False).to_numpy().astype(bool)
    return mask_N
