"""Fixed vocabularies, learnt from train rows only: a value becomes a table row, unseen ones row 0.

Row 0 is the default row of every table here. ID dropout trains it for user and item ids; a user
column's default row is trained by its nulls among the train rows, and else keeps its first weights.
Shape letters: N values, V known values.
May import: numpy, pyarrow.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.errors import DataError
from torchrec_models.id_index import IdIndex
from torchrec_models.prefixes import PrefixVocabulary

DEFAULT_ROW = 0

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class IdVocabulary:
    """Sorted int64 ids; the id at position ``i`` has row ``i + 1``."""

    ids_V: npt.NDArray[np.int64]

    @property
    def num_embeddings(self) -> int:
        """Rows of the table, the default row included."""
        return len(self.ids_V) + 1

    def rows(self, ids_N: npt.NDArray[np.int64]) -> Rows:
        """Return the table row of each id, :data:`DEFAULT_ROW` for an id that train never saw."""
        places_N, is_known_N = self._index.find(ids_N)
        return np.where(is_known_N, places_N + 1, DEFAULT_ROW)

    @cached_property
    def _index(self) -> IdIndex:
        return IdIndex(self.ids_V)


@dataclass(frozen=True)
class CategoryVocabulary:
    """Strings or bools; the value at position ``i`` has row ``i + 1``, null and unseen row 0."""

    values: tuple[str, ...]

    @property
    def num_embeddings(self) -> int:
        """Rows of the table, the default row included."""
        return len(self.values) + 1

    def rows(self, column: pa.Array) -> Rows:
        """Return the table row of each value of a string or bool column."""
        found = pc.index_in(pc.cast(column, pa.string()), pa.array(self.values, pa.string()))
        positions_N: Rows = pc.fill_null(found, -1).to_numpy(zero_copy_only=False)
        return positions_N.astype(np.int64) + 1


@dataclass(frozen=True)
class BucketVocabulary:
    """Quantile edges of a numeric column; bucket ``i`` has row ``i + 1``, null and NaN row 0."""

    edges: tuple[float, ...]

    @property
    def num_embeddings(self) -> int:
        """Rows of the table, the default row included."""
        return len(self.edges) + 2

    def rows(self, column: pa.Array) -> Rows:
        """Return the table row of each value: its bucket, edges belonging to the upper one."""
        values_N = _float_values(column)
        rows_N = np.searchsorted(np.asarray(self.edges), values_N, side="right") + 1
        return np.where(np.isnan(values_N), DEFAULT_ROW, rows_N).astype(np.int64)


ColumnVocabulary = CategoryVocabulary | BucketVocabulary


@dataclass(frozen=True)
class Vocabularies:
    """Everything that turns raw values into table rows; stored with rows and checkpoints."""

    user_ids: IdVocabulary
    item_ids: IdVocabulary
    user_columns: Mapping[str, ColumnVocabulary] = field(default_factory=dict)
    item_columns: Mapping[str, ColumnVocabulary] = field(default_factory=dict)
    prefixes: PrefixVocabulary | None = None
    """Of training runs with prefix tokens."""

    def to_json(self) -> str:
        """Return the vocabularies as one JSON text."""
        return json.dumps(
            {
                "user_ids": self.user_ids.ids_V.tolist(),
                "item_ids": self.item_ids.ids_V.tolist(),
                "user_columns": _columns_to_json(self.user_columns),
                "item_columns": _columns_to_json(self.item_columns),
                "prefixes": None if self.prefixes is None else self.prefixes.to_json(),
            }
        )

    @staticmethod
    def from_json(text: str) -> "Vocabularies":
        """Return what :meth:`to_json` wrote."""
        content = json.loads(text)
        prefixes = content.get("prefixes")
        return Vocabularies(
            user_ids=IdVocabulary(np.asarray(content["user_ids"], dtype=np.int64)),
            item_ids=IdVocabulary(np.asarray(content["item_ids"], dtype=np.int64)),
            user_columns=_columns_from_json(content["user_columns"]),
            item_columns=_columns_from_json(content["item_columns"]),
            prefixes=None if prefixes is None else PrefixVocabulary.from_json(prefixes),
        )


def _columns_to_json(columns: Mapping[str, ColumnVocabulary]) -> dict[str, dict[str, Any]]:
    return {
        name: {"values": list(vocabulary.values)}
        if isinstance(vocabulary, CategoryVocabulary)
        else {"edges": list(vocabulary.edges)}
        for name, vocabulary in columns.items()
    }


def _columns_from_json(content: Mapping[str, Mapping[str, Any]]) -> dict[str, ColumnVocabulary]:
    return {
        name: CategoryVocabulary(tuple(column["values"]))
        if "values" in column
        else BucketVocabulary(tuple(column["edges"]))
        for name, column in content.items()
    }


def build_vocabularies(
    train_rows: pa.Table, user_columns: tuple[str, ...], num_numeric_buckets: int
) -> Vocabularies:
    """Return the vocabularies of the given rows, which must be train rows only.

    Args:
        train_rows: Columns ``user_id``, ``item_id`` and the user columns.
        user_columns: Names of the typed user columns.
        num_numeric_buckets: Quantile buckets of a numeric column.

    Returns:
        Vocabularies in which everything else is unseen.

    Raises:
        DataError: If a user column is neither string, bool nor numeric.
    """
    return Vocabularies(
        user_ids=IdVocabulary(np.unique(train_rows["user_id"].to_numpy())),
        item_ids=IdVocabulary(np.unique(train_rows["item_id"].to_numpy())),
        user_columns={
            name: column_vocabulary(name, train_rows[name], num_numeric_buckets, "users.parquet")
            for name in user_columns
        },
    )


def is_column_type(kind: pa.DataType) -> bool:
    """Say whether a column of this type can be a feature: text, bool or number."""
    return _is_category(kind) or bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def column_vocabulary(
    name: str, column: pa.ChunkedArray, num_numeric_buckets: int, file: str
) -> ColumnVocabulary:
    """Return the vocabulary of a typed column's values, which must be those of train only.

    Args:
        name: Column name, for errors.
        column: Values; nulls are left out.
        num_numeric_buckets: Quantile buckets of a numeric column.
        file: Where the column comes from, for errors.

    Returns:
        All values of text and bools, in order; edges between buckets of numbers.

    Raises:
        DataError: If the column is neither text, bool nor number.
    """
    kind = column.type
    if _is_category(kind):
        values = pc.unique(pc.cast(column.drop_null(), pa.string())).to_pylist()
        return CategoryVocabulary(tuple(sorted(values)))
    if not is_column_type(kind):
        raise DataError(
            f"{file}: column {name!r} has type {kind}; a feature column is a string, a bool or a "
            f"number: drop it from {file} or change its type"
        )
    values_N = _float_values(column)
    known_N = values_N[~np.isnan(values_N)]
    if not len(known_N):
        return BucketVocabulary(())
    shares = np.linspace(0, 1, num_numeric_buckets + 1)[1:-1]
    return BucketVocabulary(tuple(np.unique(np.quantile(known_N, shares)).tolist()))


def _is_category(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_boolean(kind))


def _float_values(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.float64]:
    values_N: npt.NDArray[np.float64] = (
        pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
        if isinstance(column, pa.Array)
        else pc.cast(column, pa.float64()).to_numpy()
    )
    return values_N
