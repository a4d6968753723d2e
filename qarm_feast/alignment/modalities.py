"""Which kinds of content items have, and their values as a backbone reads them.

May import: pyarrow, numpy.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from qarm_feast.errors import DataError
from qarm_feast.input_data import EMBEDDING, embedding_matrix
from qarm_feast.media_values import is_reference, is_remote
from qarm_feast.schema import CONTENT_BINARY_COLUMNS, CONTENT_TEXT_COLUMNS

Modality = Literal["text", "image", "audio", "embedding"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
"""In the order in which a fusion concatenates them."""

NOT_FOLLOWED = "not_followed"
"""Why a picture or sound is absent: it is named by a URI, or by an event; neither is opened."""
NOT_FOUND = "not_found"
"""Why a picture or sound is absent: its file cannot be read."""
TOO_LARGE = "too_large"
"""Why a picture or sound is absent: it has more bytes, pixels or channels than are read."""
UNDECODABLE = "undecodable"
"""Why a picture or sound is absent: its bytes are none that the decoder knows."""
EMPTY = "empty"
"""Why a sound or a ready vector is absent: it holds no sample, or silence or zeros alone."""

FAULTS = (NOT_FOLLOWED, NOT_FOUND, TOO_LARGE, UNDECODABLE, EMPTY)

MAX_MEDIA_BYTES = 64 * 1024 * 1024
"""Largest file of a picture or sound that is read."""


class ContentValues(NamedTuple):
    """Values of one modality, one per item, and why some are None although the item has one.

    A value is text (empty: none), bytes or None, or a float32 row (NaN: none).
    """

    values: Sequence[Any]
    faults: Counter[str]


def columns_of(modality: str) -> tuple[str, ...]:
    """Return the content columns that hold a modality."""
    return CONTENT_TEXT_COLUMNS if modality == "text" else (modality,)


def modalities_of(items: pa.Table) -> tuple[Modality, ...]:
    """Return the modalities of which some item has a value.

    A column of pictures or sounds that holds URIs alone does not count: none is ever fetched.

    Args:
        items: Input items.

    Returns:
        Some of ``MODALITIES``, in their order; maybe none.
    """
    present: dict[Modality, bool] = {
        "text": any(_has_value(items, name) for name in CONTENT_TEXT_COLUMNS),
        "image": _has_media(items, "image"),
        "audio": _has_media(items, "audio"),
        "embedding": _has_value(items, EMBEDDING),
    }
    return tuple(modality for modality in MODALITIES if present[modality])


def choose_modalities(
    items: pa.Table, wanted: Literal["auto"] | Sequence[Modality]
) -> tuple[Modality, ...]:
    """Return what an encoder of these items reads.

    Args:
        items: Input items.
        wanted: ``alignment.modalities``; ``auto`` is what the items have, ready vectors only where
            they have nothing else.

    Returns:
        Modalities in the order of ``MODALITIES``, at least one.

    Raises:
        DataError: If the items have none of them.
    """
    found = modalities_of(items)
    if wanted == "auto":
        chosen = tuple(name for name in found if name != "embedding") or found
    else:
        chosen = tuple(name for name in MODALITIES if name in wanted)
    missing = [name for name in chosen if name not in found]
    if missing or not chosen:
        raise DataError(
            f"no item has a value for {' or '.join(missing) or 'any modality'}: the items have "
            f"{', '.join(found) or 'no content'}, alignment.modalities is {wanted!r}; text stands "
            f"in {', '.join(CONTENT_TEXT_COLUMNS)}, pictures and sounds as bytes or local paths in "
            f"{', '.join(CONTENT_BINARY_COLUMNS)}, vectors of a model of yours in {EMBEDDING}"
        )
    return chosen


def content_values(items: pa.Table, modality: str, media_dir: Path | None = None) -> ContentValues:
    """Return the values of one modality.

    Args:
        items: Any content columns; an absent one holds nothing.
        modality: What is wanted.
        media_dir: Folder at which relative paths of pictures and sounds start; None: what is given
            as text is never opened, as in a worker, which must not follow what an event names.

    Returns:
        One value per item, and counts of what could not be read.

    Raises:
        DataError: If ``embedding`` is no fixed-size list.
    """
    if modality == "text":
        return ContentValues(item_texts(items), Counter())
    if modality == "embedding":
        return ContentValues(list(_ready_vectors(items)), Counter())
    if modality not in items.column_names:
        return ContentValues([None] * items.num_rows, Counter())
    faults: Counter[str] = Counter()
    values = [_read_media(value, media_dir, faults) for value in items[modality].to_pylist()]
    return ContentValues(values, faults)


def item_texts(items: pa.Table) -> list[str]:
    """Return one text per item: its text columns in a fixed order, empty where all are null."""
    names = [name for name in CONTENT_TEXT_COLUMNS if name in items.column_names]
    if not names:
        return [""] * items.num_rows
    columns = [items[name].to_pylist() for name in names]
    return [". ".join(part for part in parts if part) for parts in zip(*columns, strict=True)]


def _has_value(items: pa.Table, name: str) -> bool:
    return name in items.column_names and items[name].null_count < items.num_rows


def _has_media(items: pa.Table, name: str) -> bool:
    if not _has_value(items, name):
        return False
    if not pa.types.is_string(items.schema.field(name).type):
        return True
    return any(value and not is_remote(value) for value in items[name].to_pylist())


def _ready_vectors(items: pa.Table) -> np.ndarray:
    if EMBEDDING not in items.column_names:
        return np.full((items.num_rows, 1), np.nan, dtype=np.float32)
    column = items[EMBEDDING]
    if not pa.types.is_fixed_size_list(column.type):
        raise DataError(
            f"ready vectors have the type {column.type}, a fixed-size list of float32 is needed"
        )
    return embedding_matrix(column)


def _read_media(
    value: bytes | str | None, media_dir: Path | None, faults: Counter[str]
) -> bytes | None:
    """Return a picture's or sound's bytes; None and a count of why not, if it has any."""
    if not value:
        return None
    if isinstance(value, str):
        if media_dir is not None and not is_remote(value):
            return _read_file(media_dir / value, faults)
        faults[NOT_FOLLOWED] += 1
        return None
    # A name that came as bytes came with an event, and what that names is never opened.
    if is_reference(value):
        faults[NOT_FOLLOWED] += 1
        return None
    if len(value) > MAX_MEDIA_BYTES:
        faults[TOO_LARGE] += 1
        return None
    return value


def _read_file(path: Path, faults: Counter[str]) -> bytes | None:
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            # A pipe or a device may have no end.
            faults[NOT_FOUND] += 1
            return None
        if status.st_size > MAX_MEDIA_BYTES:
            faults[TOO_LARGE] += 1
            return None
        return path.read_bytes() or None
    except (OSError, ValueError):
        # Also a path that holds a NUL. The item has other content, or gets the vector of none.
        faults[NOT_FOUND] += 1
        return None
