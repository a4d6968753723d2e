"""How often train rows showed an item, and how often each task was true: dense features.

A train row counts what lay strictly before its label, so that neither its own label nor a later
one is in it. (A count that merely leaves the row itself out gives labels away: an item whose only
positive is this row's has none left.) Other rows and requests count all train rows.

An item without counts is an unseen one, and on logs in which an item's first row is more often true
than its others (new items are shown to those who look for them) "unseen" alone would tell labels.
So ID dropout hides the counts with the id: most train rows then have none, and none says nothing.

Features of an item with n rows, of which p_t were true for task t: log(1 + n), then per task
log(1 + p_t) and (p_t + s b_t) / (n + s), with the train rows' base rate b_t and s pseudo-rows.
Shape letters: E train rows, I items with a train row, N looked-up rows, T tasks, C = 1 + T counts.
May import: numpy, pyarrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_models.sorted_ids import Ids, find_ids

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

NUM_PSEUDO_ROWS = 10.0


def popularity_width(num_tasks: int) -> int:
    """Return the number of dense features of one row."""
    return 1 + 2 * num_tasks


@dataclass(frozen=True)
class ItemPopularity:
    """Counts of train rows by item, in total and as of any time.

    Attributes:
        labels: Bool columns that are counted, one per task.
        item_ids_I: Items with a train row, ascending.
        totals_IC: Rows of each item, then true ones per task, int64.
        base_rates_T: Share of true rows per task, float32.
        times_E: Label times of the train rows, by item and then by time; empty where only totals
            are kept, as serving does.
        sums_EC: Counts of the item's rows up to and with this one, int64.
    """

    labels: tuple[str, ...]
    item_ids_I: Ids
    totals_IC: Counts
    base_rates_T: Floats
    times_E: Ids
    sums_EC: Counts

    def totals_only(self) -> "ItemPopularity":
        """Return what serving needs: one row of counts per item."""
        return ItemPopularity(
            self.labels,
            self.item_ids_I,
            self.totals_IC,
            self.base_rates_T,
            np.empty(0, dtype=np.int64),
            np.empty((0, self.totals_IC.shape[1]), dtype=np.int64),
        )

    def counts(
        self, item_ids_N: Ids, label_times_N: Ids, is_train_N: npt.NDArray[np.bool_]
    ) -> Counts:
        """Return rows, and true rows per task, of each row's item.

        Args:
            item_ids_N: Items.
            label_times_N: Label times in microseconds.
            is_train_N: Rows that count only what lay before them; the others count everything.

        Returns:
            Int64 ``[N, 1 + T]``.
        """
        places_N, is_known_N = find_ids(self.item_ids_I, item_ids_N)
        counts_NC = np.zeros((len(item_ids_N), 1 + len(self.labels)), dtype=np.int64)
        is_total_N = is_known_N & ~is_train_N
        counts_NC[is_total_N] = self.totals_IC[places_N[is_total_N]]
        earlier_N = np.flatnonzero(is_known_N & is_train_N)
        counts_NC[earlier_N] = self._before(places_N[earlier_N], label_times_N[earlier_N])
        return counts_NC

    def features(
        self,
        item_ids_N: Ids,
        label_times_N: Ids,
        is_train_N: npt.NDArray[np.bool_],
        labels: Sequence[str],
        is_hidden_N: npt.NDArray[np.bool_],
    ) -> Floats:
        """Return the dense features of some tasks, see the module.

        Args:
            item_ids_N: Items.
            label_times_N: Label times in microseconds.
            is_train_N: Rows that count only what lay before them.
            labels: Labels of the tasks, of those that were counted.
            is_hidden_N: Rows whose item reads as unseen.

        Returns:
            Float32 ``[N, 1 + 2 T]``.
        """
        tasks = [self.labels.index(label) for label in labels]
        counts_NC = self.counts(item_ids_N, label_times_N, is_train_N)
        counts_NC[is_hidden_N] = 0
        shown_N1, true_NT = counts_NC[:, :1], counts_NC[:, 1:][:, tasks]
        rates_NT = true_NT + NUM_PSEUDO_ROWS * self.base_rates_T[tasks]
        rates_NT = rates_NT / (shown_N1 + NUM_PSEUDO_ROWS)
        parts = [np.log1p(shown_N1), np.log1p(true_NT), rates_NT]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _before(self, places_M: Ids, times_M: Ids) -> Counts:
        assert len(self.times_E) or not len(places_M), "totals alone serve no train rows"
        starts_I = np.cumsum(self.totals_IC[:, 0]) - self.totals_IC[:, 0]
        num_before_M = _num_before(self.times_E, starts_I, self.totals_IC[:, 0], places_M, times_M)
        counts_MC = np.zeros((len(places_M), self.totals_IC.shape[1]), dtype=np.int64)
        has_any_M = num_before_M > 0
        last_M = (starts_I[places_M] + num_before_M - 1)[has_any_M]
        counts_MC[has_any_M] = self.sums_EC[last_M]
        return counts_MC

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return what is stored, by name."""
        return {
            "item_ids": self.item_ids_I,
            "totals": self.totals_IC,
            "base_rates": self.base_rates_T,
            "times": self.times_E,
            "sums": self.sums_EC,
        }


def _num_before(
    times_E: Ids, starts_I: Ids, lengths_I: Ids, places_M: Ids, times_M: Ids
) -> npt.NDArray[np.int64]:
    """Return how many of an item's ascending times lie before a time: a bisection of all at once.

    The item's times are ``times_E[starts_I[i] : starts_I[i] + lengths_I[i]]``.
    """
    low_M = starts_I[places_M].copy()
    high_M = low_M + lengths_I[places_M]
    while (is_open_M := low_M < high_M).any():
        middle_M = (low_M + high_M) // 2
        is_before_M = times_E[np.minimum(middle_M, len(times_E) - 1)] < times_M
        low_M = np.where(is_open_M & is_before_M, middle_M + 1, low_M)
        high_M = np.where(is_open_M & ~is_before_M, middle_M, high_M)
    return low_M - starts_I[places_M]


def count_items(train_rows: pa.Table, labels: Sequence[str]) -> ItemPopularity:
    """Count train rows by item.

    Args:
        train_rows: Columns ``item_id``, ``event_timestamp`` and the labels, train rows only.
        labels: Bool columns, one per task.

    Returns:
        Totals, and sums over time.
    """
    item_ids_E = train_rows["item_id"].to_numpy()
    times_E = train_rows["event_timestamp"].cast(pa.int64()).to_numpy()
    order_E = np.lexsort((times_E, item_ids_E))
    item_ids_I, starts_I = np.unique(item_ids_E[order_E], return_index=True)
    columns = [np.ones(len(item_ids_E), dtype=np.int64)]
    columns += [train_rows[label].to_numpy().astype(np.int64) for label in labels]
    counts_EC = np.stack(columns, axis=1)[order_E]
    totals_IC = np.add.reduceat(counts_EC, starts_I, axis=0) if len(starts_I) else counts_EC
    before_IC = np.cumsum(totals_IC, axis=0) - totals_IC
    sums_EC = np.cumsum(counts_EC, axis=0) - np.repeat(before_IC, totals_IC[:, 0], axis=0)
    base_rates_T = totals_IC[:, 1:].sum(axis=0) / max(len(item_ids_E), 1)
    return ItemPopularity(
        labels=tuple(labels),
        item_ids_I=item_ids_I,
        totals_IC=totals_IC,
        base_rates_T=base_rates_T.astype(np.float32),
        times_E=times_E[order_E],
        sums_EC=sums_EC,
    )
