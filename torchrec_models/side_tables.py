"""What a batch needs beside its rows: item columns and what was counted in the train rows.

    <folder>/side_tables.json           names, as JSON
    <folder>/<table>.<array>.npy        arrays that can be mapped

Written with the rows' build; a checkpoint keeps the part that serving reads, so that a score
means the same as in training. May import: numpy, pydantic.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from qarm_feast.errors import ConfigError
from torchrec_models.item_columns import ItemColumns
from torchrec_models.pair_counts import PairCounts
from torchrec_models.popularity import ItemPopularity

Arrays = dict[str, npt.NDArray[Any]]

SIDE_TABLES = "side_tables"
"""Folder of them in a build of rows, a checkpoint and an export."""
_NAMES_FILE = "side_tables.json"


class _Names(BaseModel):
    """What the arrays do not say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    item_columns: tuple[str, ...]
    labels: tuple[str, ...]
    pairs: tuple[str, ...]


@dataclass(frozen=True)
class SideTables:
    """Item columns and counts, as of one build of rows."""

    item_columns: ItemColumns
    popularity: ItemPopularity
    pairs: Mapping[str, PairCounts] = field(default_factory=dict)
    """CF counts by name, of those groups that were switched on when the rows were built."""

    def pair_counts(self, name: str) -> PairCounts:
        """Return the CF counts of one kind of things.

        Args:
            name: ``item``, ``c1`` or ``c1_c2``.

        Returns:
            The counts.

        Raises:
            ConfigError: If the rows were built without them.
        """
        if name not in self.pairs:
            raise ConfigError(
                f"the training rows hold the CF counts {sorted(self.pairs)}, but {name!r} is asked "
                "for; add `item_cf` or `code_cf` to ranker.features and run `qarm-rank rows` again"
            )
        return self.pairs[name]

    def for_serving(self) -> "SideTables":
        """Return the part that other rows than train rows read."""
        pairs = {name: counts.for_serving() for name, counts in self.pairs.items()}
        return SideTables(self.item_columns, self.popularity.totals_only(), pairs)

    def save(self, folder: Path) -> None:
        """Write all tables into a folder, which is made."""
        folder.mkdir(parents=True)
        names = _Names(
            item_columns=self.item_columns.names,
            labels=self.popularity.labels,
            pairs=tuple(self.pairs),
        )
        parts = {
            "item_columns": self.item_columns.arrays(),
            "popularity": self.popularity.arrays(),
        } | {_pairs_part(name): counts.arrays() for name, counts in self.pairs.items()}
        for part, arrays in parts.items():
            for name, array in arrays.items():
                np.save(folder / f"{part}.{name}.npy", array)
        (folder / _NAMES_FILE).write_text(names.model_dump_json(indent=2), encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> "SideTables":
        """Map what :meth:`save` wrote."""
        names = _Names.model_validate_json((folder / _NAMES_FILE).read_text(encoding="utf-8"))
        columns, counts = _mapped(folder, "item_columns"), _mapped(folder, "popularity")
        return SideTables(
            ItemColumns(names.item_columns, columns["item_ids"], columns["rows"]),
            ItemPopularity(
                labels=names.labels,
                item_ids_I=counts["item_ids"],
                totals_IC=counts["totals"],
                base_rates_T=counts["base_rates"],
                times_E=counts["times"],
                sums_EC=counts["sums"],
            ),
            {name: PairCounts(**_mapped(folder, _pairs_part(name))) for name in names.pairs},
        )


def _pairs_part(name: str) -> str:
    return f"pairs_{name}"


def _mapped(folder: Path, part: str) -> Arrays:
    paths = folder.glob(f"{part}.*.npy")
    # Plain arrays over the mapping: the subclass makes every lookup slower.
    return {path.name.split(".")[1]: np.asarray(np.load(path, mmap_mode="r")) for path in paths}
