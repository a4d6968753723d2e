"""Label maps: which learned row of an older ranker's tables each row of a new one goes on from.

A codebook's manifest names, per level and code, the parent's code that goes on in it, and the pool
rows that hold another item than the parent's. Over several versions the maps are chained.
Shape letters: R rows of a new table, K codes of a level, P pool rows.
May import: numpy; does no I/O.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qarm_feast.errors import DataError
from qarm_feast.registry import Manifest

Rows = npt.NDArray[np.int64]

NO_ROW = -1
"""In place of an older row: there is none to go on from."""


@dataclass(frozen=True)
class RowMap:
    """Where the rows of a new table come from.

    ``source_R`` is the older table's row whose weights are copied, or :data:`NO_ROW`: the row keeps
    its own start. ``goes_on_R`` says whether it stands for the same thing, so that the optimizer's
    state goes on, too; a new id that starts as the default row does not.
    """

    source_R: Rows
    goes_on_R: npt.NDArray[np.bool_]

    @staticmethod
    def of_sources(source_R: Rows) -> "RowMap":
        """Return a map in which every row that has a source goes on from it."""
        return RowMap(source_R, source_R != NO_ROW)


@dataclass(frozen=True)
class LabelMap:
    """The older code of each code of each level, and the older row of each pool row."""

    levels: tuple[Rows, ...]
    pool_P: Rows

    @staticmethod
    def same_numbers(level_sizes: Sequence[int], pool_size: int) -> "LabelMap":
        """Return the map of a codebook without one: equal numbers are taken for equal things.

        This is what a naive refit does to a ranker; it is here to be compared with.
        """
        levels = tuple(np.arange(size, dtype=np.int64) for size in level_sizes)
        return LabelMap(levels, np.arange(pool_size, dtype=np.int64))

    @property
    def is_identity(self) -> bool:
        """Whether every code goes on from the code of its own number."""
        return all((source_K == np.arange(len(source_K))).all() for source_K in self.levels)

    def after(self, older: "LabelMap") -> "LabelMap":
        """Return the map over two versions: this one's sources looked up in the older map."""
        levels = [
            _chained(source_K, older.levels[number])
            if number < len(older.levels)
            else np.full(len(source_K), NO_ROW, dtype=np.int64)
            for number, source_K in enumerate(self.levels)
        ]
        return LabelMap(tuple(levels), _chained(self.pool_P, older.pool_P))


def label_map(manifests: Mapping[str, Manifest], *, old: str, new: str) -> LabelMap:
    """Return the map from an older codebook version to one that descends from it.

    Args:
        manifests: Manifests by version: the new version, its parent, and so on to the old one.
        old: Version that the older ranker was trained on.
        new: Version of the rows to train on.

    Returns:
        The chained map; for equal versions, every code goes on from itself.

    Raises:
        DataError: If the new version does not descend from the old one.
    """
    manifest = manifests[new]
    if new == old:
        return LabelMap.same_numbers(manifest.level_sizes, manifest.pool_size)
    if manifest.parent is None or manifest.label_map is None:
        raise DataError(
            f"codebook version {new!r} has no parent, so nothing says which of its codes go on "
            f"from {old!r}; refresh with `qarm codebook train --parent {old}`, or train without "
            "--init-from"
        )
    levels = tuple(np.asarray(level, dtype=np.int64) for level in manifest.label_map)
    pool_P = np.arange(manifest.pool_size, dtype=np.int64)
    pool_P[list(manifest.reset_pool_rows)] = NO_ROW
    own = LabelMap(levels, pool_P)
    return own.after(label_map(manifests, old=old, new=manifest.parent))


def _chained(source_R: Rows, older_R: Rows) -> Rows:
    has_source_R = (source_R != NO_ROW) & (source_R < len(older_R))
    chained_R = np.full(len(source_R), NO_ROW, dtype=np.int64)
    chained_R[has_source_R] = older_R[source_R[has_source_R]]
    return chained_R
