"""Typed columns of ``items.parquet`` as table rows: brand, category, price and the like.

Columns are constant over an item's life here, so that they are looked up by item id as of the
rows' build, in training and in serving alike; an item that came later has the default row of
every column. Times are no columns: an item's age would tell what only the log's end knows.
Shape letters: I items, N looked-up items, C columns.
May import: numpy, pyarrow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.errors import ConfigError
from qarm_feast.input_data import CONTENT_COLUMNS, UPLOAD_TIMESTAMP
from qarm_feast.schema import ITEM_ID
from torchrec_models.sorted_ids import Ids, find_ids
from torchrec_models.vocabulary import (
    DEFAULT_ROW,
    ColumnVocabulary,
    column_vocabulary,
    is_column_type,
)

Rows = npt.NDArray[np.int32]

BRAND = "brand"
MIN_ITEMS_OF_A_VALUE = 2
"""A value that one item alone has says no more than its id, and would pass by ID dropout."""


@dataclass(frozen=True)
class ItemColumns:
    """Table rows of every item's columns, items ascending.

    ``rows_IC`` is int32; :data:`~torchrec_models.vocabulary.DEFAULT_ROW` stands for a null, for a
    value that train never saw, and for an item that is not listed.
    """

    names: tuple[str, ...]
    item_ids_I: Ids
    rows_IC: Rows

    def rows(self, name: str, item_ids_N: Ids) -> npt.NDArray[np.int64]:
        """Return the table row of each item in one column, int64 ``[N]``."""
        places_N, is_known_N = find_ids(self.item_ids_I, item_ids_N)
        if not len(self.item_ids_I):
            return np.full(len(item_ids_N), DEFAULT_ROW, dtype=np.int64)
        rows_N = self.rows_IC[places_N, self.names.index(name)].astype(np.int64)
        return np.where(is_known_N, rows_N, DEFAULT_ROW)

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return what is stored, by name."""
        return {"item_ids": self.item_ids_I, "rows": self.rows_IC}


def select_item_columns(schema: pa.Schema, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Return the columns of ``items.parquet`` that become features.

    Args:
        schema: Schema of the file.
        wanted: Names from ``ranker.item_columns``; None: ``brand`` and every other column of
            text, numbers or bools that is not content that the encoder reads.

    Returns:
        Names in file order, or in the order wanted.

    Raises:
        ConfigError: If a wanted column is missing or is neither text, number nor bool.
    """
    excluded = {ITEM_ID, UPLOAD_TIMESTAMP, *CONTENT_COLUMNS} - {BRAND}
    if wanted is None:
        return tuple(
            field.name
            for field in schema
            if field.name not in excluded and is_column_type(field.type)
        )
    known = {field.name: field.type for field in schema if is_column_type(field.type)}
    if wrong := [name for name in wanted if name in (ITEM_ID, UPLOAD_TIMESTAMP)]:
        raise ConfigError(f"ranker.item_columns names {wrong}, which are never features")
    if missing := [name for name in wanted if name not in known]:
        raise ConfigError(
            f"ranker.item_columns names {missing}, but items.parquet has the text, number and bool "
            f"columns {list(known)}; mend the names or set it to auto"
        )
    return tuple(wanted)


def build_item_columns(
    items: pa.Table, names: Sequence[str], train_item_ids: Ids, num_numeric_buckets: int
) -> tuple[ItemColumns, Mapping[str, ColumnVocabulary]]:
    """Return the items' table rows and the vocabularies, learnt from items with a train row.

    Args:
        items: ``items.parquet``.
        names: Columns, from :func:`select_item_columns`.
        train_item_ids: Items with a train row.
        num_numeric_buckets: Quantile buckets of a numeric column.

    Returns:
        Rows of all items, and the vocabulary of each column.
    """
    order_I = np.argsort(items[ITEM_ID].to_numpy(), kind="stable")
    items = items.take(pa.array(order_I))
    item_ids_I = items[ITEM_ID].to_numpy().copy()
    train = items.filter(pa.array(np.isin(item_ids_I, train_item_ids)))
    rows_IC = np.full((len(items), len(names)), DEFAULT_ROW, dtype=np.int32)
    vocabularies: dict[str, ColumnVocabulary] = {}
    for place, name in enumerate(names):
        known = _without_rare(train[name])
        vocabularies[name] = column_vocabulary(name, known, num_numeric_buckets, "items.parquet")
        rows_IC[:, place] = vocabularies[name].rows(items[name].combine_chunks())
    return ItemColumns(tuple(names), item_ids_I, rows_IC), vocabularies


def _without_rare(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not (pa.types.is_string(column.type) or pa.types.is_boolean(column.type)):
        return column
    counts = pc.value_counts(column.drop_null().combine_chunks())
    is_common = pc.greater_equal(counts.field("counts"), MIN_ITEMS_OF_A_VALUE)
    return column.filter(pc.is_in(column, counts.field("values").filter(is_common)))
