"""From content and vectors to code rows: the one path that stream, backfill and offline share.

Shape letters in this file: N items, D embedding width, V VQ neighbours, L RQ levels.
May import: numpy, pyarrow.
"""

import hashlib
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.errors import CodebookMismatchError, DataError
from qarm_feast.schema import (
    ABSENT_CODE,
    CODE_ROWS,
    CODES,
    CONTENT_BINARY_COLUMNS,
    CONTENT_TEXT_COLUMNS,
    EVENT_TIMESTAMP,
    ITEM_ID,
    TIMESTAMP,
)

if TYPE_CHECKING:
    from qarm_feast.codebook import Codebook

_EMBEDDING = "embedding"
_ENCODER_VERSION = "encoder_version"
_HASH_BYTES = 16

CONTENT_HASH = "content_hash"
TAKEDOWN_HASH = "takedown"
"""Stands in for a hash and sorts after every hex digest: at equal times the takedown wins."""


def content_hash(
    content: Mapping[str, str | bytes | None],
    embedding: bytes | None = None,
    encoder_version: str | None = None,
) -> str:
    """Return the hash of one item's content: BLAKE2b, 16 bytes, as hex text.

    An absent column, a null and an empty value hash alike, because the encoder reads them
    alike; keys that are no content columns are ignored.

    Args:
        content: Values by column name; text, bytes, or a path as text.
        embedding: Little-endian float32 bytes of a ready vector.
        encoder_version: The encoder that the ready vector comes from.

    Returns:
        32 hex digits.
    """
    return _digest(_content_bytes(content), embedding, encoder_version)


def _content_bytes(content: Mapping[str, str | bytes | None]) -> bytes:
    parts = []
    for name in (*CONTENT_TEXT_COLUMNS, *CONTENT_BINARY_COLUMNS):
        value = content.get(name)
        if value:
            encoded = value.encode() if isinstance(value, str) else value
            parts += [_head(name, len(encoded)), encoded]
    return b"".join(parts)


def _digest(content: bytes, embedding: bytes | None, encoder_version: str | None) -> str:
    if embedding:
        # In one piece: each call of the hash costs as much as a vector does.
        encoder = (encoder_version or "").encode()
        heads = _head(_EMBEDDING, len(embedding)), _head(_ENCODER_VERSION, len(encoder))
        content += heads[0] + embedding + heads[1] + encoder
    return hashlib.blake2b(content, digest_size=_HASH_BYTES).hexdigest()


@lru_cache
def _head(name: str, num_bytes: int) -> bytes:
    # The length goes first, so that no two different contents give the same byte sequence.
    return f"{name}:{num_bytes}:".encode()


def content_hashes(items: pa.Table) -> list[str]:
    """Return :func:`content_hash` of every row.

    Args:
        items: Any of the content columns, ``embedding`` and ``encoder_version``.

    Returns:
        One hash per row, in row order.
    """
    present = set(items.column_names)
    # A column of nulls adds nothing to any hash, only time.
    names = [
        name
        for name in (*CONTENT_TEXT_COLUMNS, *CONTENT_BINARY_COLUMNS)
        if name in present and items[name].null_count < items.num_rows
    ]
    missing = [None] * items.num_rows
    embeddings = _embedding_bytes(items[_EMBEDDING]) if _EMBEDDING in present else missing
    versions = items[_ENCODER_VERSION].to_pylist() if _ENCODER_VERSION in present else missing
    contents = [b""] * items.num_rows
    if names:
        rows = zip(*[items[name].to_pylist() for name in names], strict=True)
        contents = [_content_bytes(dict(zip(names, row, strict=True))) for row in rows]
    return list(map(_digest, contents, embeddings, versions))


def _embedding_bytes(column: pa.ChunkedArray) -> list[bytes | None]:
    # Cut from one block: a list of Python numbers per row would take longer than the hash.
    flat = pc.list_flatten(column).to_numpy().astype("<f4").tobytes()
    lengths = pc.if_else(pc.is_valid(column), pc.list_value_length(column), 0).to_numpy()
    ends = np.cumsum(lengths, dtype=np.int64) * 4
    rows = zip((ends - lengths * 4).tolist(), ends.tolist(), strict=True)
    is_present = column.is_valid().to_pylist()
    return [
        flat[start:end] if present else None
        for (start, end), present in zip(rows, is_present, strict=True)
    ]


def encode_items(
    items: pa.Table,
    vectors_ND: np.ndarray,
    codebooks: Mapping[str, "Codebook"],
    encoder_version: str,
    created: datetime,
) -> dict[str, pa.Table]:
    """Return the code rows of the given items, one table of ``schema.CODE_ROWS`` per version.

    Args:
        items: Columns ``item_id``, ``event_timestamp``, ``content_hash``.
        vectors_ND: Aligned embeddings of the same rows, float32, L2-normalised.
        codebooks: Codebooks by version; all learnt from vectors of ``encoder_version``.
        encoder_version: The encoder that made ``vectors_ND``.
        created: When the rows are written, aware UTC.

    Returns:
        A table by codebook version, rows in the order of ``items``.

    Raises:
        DataError: If rows and vectors differ in number or a vector is not finite.
        CodebookMismatchError: If a codebook belongs to another encoder.
    """
    if len(vectors_ND) != items.num_rows:
        raise DataError(f"{items.num_rows} items came with {len(vectors_ND)} vectors")
    is_finite_N = np.isfinite(vectors_ND).all(axis=1)
    if not is_finite_N.all():
        item_id = items[ITEM_ID][int((~is_finite_N).argmax())]
        count = int((~is_finite_N).sum())
        raise DataError(f"{count} vector(s) hold NaN or infinity, the first is of item {item_id}")
    rows = {}
    for version, codebook in codebooks.items():
        _check_encoder(codebook, version, encoder_version)
        rows[version] = _code_rows(items, vectors_ND, codebook, created)
    return rows


def takedown_rows(takedowns: pa.Table, codebook: "Codebook", created: datetime) -> pa.Table:
    """Return the code rows that mark items as deleted: ``ABSENT_CODE`` in lists of full length.

    Args:
        takedowns: Columns ``item_id``, ``event_timestamp``, ``content_hash``.
        codebook: The version whose rows these are.
        created: When the rows are written, aware UTC.

    Returns:
        Rows of ``schema.CODE_ROWS`` in the order of ``takedowns``.
    """
    num_rows = takedowns.num_rows
    manifest = codebook.manifest
    columns = [
        takedowns[ITEM_ID],
        _absent_codes(num_rows, manifest.num_levels),
        _absent_codes(num_rows, manifest.num_neighbors),
        pa.repeat(pa.scalar(manifest.encoder_version), num_rows),
        takedowns[CONTENT_HASH],
        pa.repeat(pa.scalar(True), num_rows),
        takedowns[EVENT_TIMESTAMP],
        pa.repeat(pa.scalar(created, TIMESTAMP), num_rows),
    ]
    return pa.table(columns, schema=CODE_ROWS)


def newest_per_item(codes: pa.Table) -> pa.Table:
    """Return one row per item: the greatest by (event_timestamp, content_hash)."""
    order = pc.sort_indices(
        codes,
        sort_keys=[
            (ITEM_ID, "ascending"),
            (EVENT_TIMESTAMP, "ascending"),
            ("content_hash", "ascending"),
        ],
    ).to_numpy()
    ids_N = codes[ITEM_ID].to_numpy()[order]
    is_last_N = np.ones(len(ids_N), dtype=bool)
    is_last_N[:-1] = ids_N[1:] != ids_N[:-1]
    return codes.take(pa.array(order[is_last_N]))


def _check_encoder(codebook: "Codebook", version: str, encoder_version: str) -> None:
    wanted = codebook.manifest.encoder_version
    if wanted != encoder_version:
        raise CodebookMismatchError(
            expected=encoder_version,
            found=wanted,
            where=f"codebook {version!r} (encoder)",
            command=f"qarm codebook train --codebook-version {version}",
        )


def _code_rows(
    items: pa.Table, vectors_ND: np.ndarray, codebook: "Codebook", created: datetime
) -> pa.Table:
    item_ids_N = items[ITEM_ID].to_numpy()
    codes = codebook.encode(item_ids_N, items["content_hash"].to_pylist(), vectors_ND)
    num_items = items.num_rows
    columns = [
        items[ITEM_ID],
        _list_array(codes.rq_NL),
        _list_array(codes.vq_NV),
        pa.repeat(pa.scalar(codebook.manifest.encoder_version), num_items),
        items["content_hash"],
        pa.repeat(pa.scalar(False), num_items),
        items[EVENT_TIMESTAMP],
        pa.repeat(pa.scalar(created, TIMESTAMP), num_items),
    ]
    return pa.table(columns, schema=CODE_ROWS)


def _list_array(codes_NK: np.ndarray) -> pa.Array:
    num_rows, width = codes_NK.shape
    offsets = pa.array(np.arange(num_rows + 1, dtype=np.int32) * np.int32(width))
    values = pa.array(np.ascontiguousarray(codes_NK, dtype=np.int64).reshape(-1))
    return pa.ListArray.from_arrays(offsets, values)


def _absent_codes(num_rows: int, width: int) -> pa.Array:
    offsets = np.arange(num_rows + 1, dtype=np.int32) * np.int32(width)
    values = np.full(num_rows * width, ABSENT_CODE, dtype=np.int64)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=CODES)
