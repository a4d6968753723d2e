"""Rows as columns, before any vocabulary is applied: what training and serving both fill.

Shape letters: B rows, H history items of all rows together, L levels, K neighbours, T tasks.
May import: numpy, pyarrow; does no I/O.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qarm_feast.schema import ABSENT_CODE

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RowColumns:
    """B rows as columns, before any vocabulary is applied.

    History items stand newest first, row after row, ``history_lengths_B`` of them per row.
    A missing code is :data:`~qarm_feast.schema.ABSENT_CODE`; times are microseconds, UTC.
    ``is_train_B`` tells the rows that what is counted in train rows must not see themselves.
    ``has_one_history``: all rows have the same history, as candidates of one request have, so that
    what follows from it alone is found once.
    """

    user_ids_B: Ints
    item_ids_B: Ints
    label_times_B: Ints
    rq_BL: Ints
    vq_BK: Ints
    history_item_ids_H: Ints
    history_lengths_B: Ints
    labels_BT: Floats
    is_train_B: npt.NDArray[np.bool_]
    user_columns: Mapping[str, pa.Array] = field(default_factory=dict)
    has_one_history: bool = False

    def one_history(self) -> tuple[Ints, Ints, int]:
        """Return the items and label times of the first history, and how many rows repeat it.

        Where histories differ, all of them are one, which nothing repeats.
        """
        label_times_H = np.repeat(self.label_times_B, self.history_lengths_B)
        if not self.has_one_history:
            return self.history_item_ids_H, label_times_H, 1
        length = int(self.history_lengths_B[0])
        return self.history_item_ids_H[:length], label_times_H[:length], len(self.item_ids_B)

    def with_latest_history(self, num_items: int) -> "RowColumns":
        """Return the rows with at most so many latest history items each."""
        lengths_B = self.history_lengths_B
        if not len(lengths_B) or lengths_B.max() <= num_items:
            return self
        starts_B = np.cumsum(lengths_B) - lengths_B
        places_H = np.arange(len(self.history_item_ids_H)) - np.repeat(starts_B, lengths_B)
        return replace(
            self,
            history_item_ids_H=self.history_item_ids_H[places_H < num_items],
            history_lengths_B=np.minimum(lengths_B, num_items),
        )

    def without_some_codes(self, share: float, rng: np.random.Generator) -> "RowColumns":
        """Return the rows, the candidates of a random share of which have lost their codes."""
        is_hidden_B1 = rng.random((len(self.item_ids_B), 1)) < share
        return replace(
            self,
            rq_BL=np.where(is_hidden_B1, ABSENT_CODE, self.rq_BL),
            vq_BK=np.where(is_hidden_B1, ABSENT_CODE, self.vq_BK),
        )
