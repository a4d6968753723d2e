"""Training rows from parquet, streamed straight into batches without per-row Python.

Row groups are dealt to the ranks in turn, so that a rank decodes only what it trains on; of the
last groups, which do not go round, rank ``r`` of ``w`` takes the rows whose number is ``r`` modulo
``w``. A rank holds a window of its rows, shuffles inside the window and cuts it into batches, which
worker threads build ahead of training. Memory holds a window and a few batches, however many rows
there are. All ranks make equally many batches of equal sizes, because row-wise sharded tables
exchange whole batches on every step (gloo refuses unequal ones); a rank that is one row short
repeats its last row.
Shape letters: B rows, H history items of all rows, L levels, K neighbours, T tasks.
May import: numpy, pyarrow.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qarm_feast.errors import DataError
from torchrec_models.batch import BatchBuilder, RankingBatch
from torchrec_models.prefetch import prefetched
from torchrec_models.row_columns import Ints, RowColumns
from torchrec_models.sharding import Ranks

_SCAN_ROWS = 16384
_READ_COLUMNS = (
    "user_id",
    "item_id",
    "event_timestamp",
    "split",
    "rq_code",
    "vq_code",
    "history_item_ids",
)


@dataclass(frozen=True)
class _DealtGroups:
    """The first row groups of a file, which are of equal size and go round all ranks."""

    num_groups: int
    rows_per_group: int


@dataclass(frozen=True)
class RowDataset:
    """One split's rows as batches of one rank."""

    path: Path
    label_names: tuple[str, ...]
    user_columns: tuple[str, ...]
    builder: BatchBuilder
    ranks: Ranks
    batch_size: int
    num_workers: int = 0

    def num_rows(self) -> int:
        """Return the number of rows of all ranks together.

        Returns:
            At least one row per rank.

        Raises:
            DataError: If there are fewer rows than ranks.
        """
        num_rows: int = pq.read_metadata(self.path).num_rows
        if num_rows < self.ranks.world_size:
            raise DataError(
                f"{self.path} has {num_rows} rows for {self.ranks.world_size} ranks; "
                "give each rank at least one row"
            )
        return num_rows

    def num_own_rows(self) -> int:
        """Return the number of this rank's rows, the repeated one left out."""
        dealt = self._row_groups_dealt()
        num_rest = self.num_rows() - dealt.num_groups * dealt.rows_per_group
        num_own_groups = dealt.num_groups // self.ranks.world_size
        num_own_rest = -(-(num_rest - self.ranks.rank) // self.ranks.world_size)
        return num_own_groups * dealt.rows_per_group + num_own_rest

    def num_batches(self) -> int:
        """Return the number of batches of every rank in one pass."""
        return len(self._batch_sizes())

    def train_batches(
        self, *, seed: int, epoch: int, window_rows: int, first_batch: int = 0
    ) -> Generator[RankingBatch]:
        """Yield one shuffled pass with ID and code dropout, the same for the same seed and epoch.

        Args:
            seed: Run's seed.
            epoch: Number of this pass.
            window_rows: Rows that are held and shuffled at a time.
            first_batch: Batches at the start that are left out, for a run that goes on.

        Yields:
            Batches of nearly equal size.
        """
        place = [seed, epoch, self.ranks.rank]
        tables = self._tables(
            max(window_rows, self.batch_size), np.random.default_rng([*place, 0, 1])
        )

        def build(number: int, table: pa.Table) -> RankingBatch:
            # A generator per batch: what an arm drops must not change the order in which it sees
            # its rows, and a batch is the same whoever builds it, also in a run that goes on.
            rng = np.random.default_rng([*place, 1, first_batch + number])
            return self.builder.build(self._columns(table), dropout_rng=rng)

        yield from prefetched(islice(tables, first_batch, None), build, self.num_workers)

    def eval_batches(self) -> Iterator[RankingBatch]:
        """Yield one pass in file order, ids as they are.

        Rows beyond :meth:`num_own_rows` are repeated ones, to be left out of metrics.

        Yields:
            Batches of nearly equal size.
        """

        def build(_: int, table: pa.Table) -> RankingBatch:
            return self.builder.build(self._columns(table))

        yield from prefetched(self._tables(_SCAN_ROWS, None), build, self.num_workers)

    def _tables(self, window_rows: int, rng: np.random.Generator | None) -> Iterator[pa.Table]:
        sizes = iter(self._batch_sizes())
        size = next(sizes)
        held: list[pa.RecordBatch] = []
        for part in self._own_rows():
            held.append(part)
            if sum(len(batch) for batch in held) < window_rows:
                continue
            window = _shuffled(held, rng)
            start = 0
            while start + size <= len(window):
                yield window.slice(start, size)
                start += size
                size = next(sizes, len(window) + 1)
            held = window.slice(start).combine_chunks().to_batches()
        if held:
            window = _shuffled(held, rng)
            start = 0
            while start < len(window):
                yield window.slice(start, size)
                start += size
                size = next(sizes, 0)

    def _batch_sizes(self) -> Ints:
        rows_per_rank = -(-self.num_rows() // self.ranks.world_size)
        num_batches = -(-rows_per_rank // self.batch_size)
        bounds = np.linspace(0, rows_per_rank, num_batches + 1).astype(np.int64)
        return bounds[1:] - bounds[:-1]

    def _own_rows(self) -> Iterator[pa.RecordBatch]:
        columns = [*_READ_COLUMNS, *self.label_names, *self.user_columns]
        dealt, world_size = self._row_groups_dealt(), self.ranks.world_size
        with pq.ParquetFile(self.path) as file:
            own = range(self.ranks.rank, dealt.num_groups, world_size)
            rest = range(dealt.num_groups, file.num_row_groups)
            for group in own:
                yield from file.iter_batches(_SCAN_ROWS, row_groups=[group], columns=columns)
            first_row = 0
            for part in file.iter_batches(_SCAN_ROWS, row_groups=list(rest), columns=columns):
                offset = (self.ranks.rank - first_row) % world_size
                places = np.arange(offset, len(part), world_size)
                first_row += len(part)
                if len(places):
                    # Taking all rows of a rank alone would only copy them.
                    last = part if world_size == 1 else part.take(pa.array(places))
                    yield last
        if self.num_own_rows() * world_size < self.num_rows():
            yield last.slice(len(last) - 1)

    def _row_groups_dealt(self) -> "_DealtGroups":
        metadata = pq.read_metadata(self.path)
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        num_equal = len(list(takewhile(lambda size: size == sizes[0], sizes)))
        if not num_equal or sizes[0] < self.ranks.world_size:
            return _DealtGroups(0, 0)
        # One group less than go round: of the rest, every rank must have a row to repeat.
        num_dealt = (num_equal - 1) // self.ranks.world_size * self.ranks.world_size
        return _DealtGroups(num_dealt, sizes[0])

    def _columns(self, table: pa.Table) -> RowColumns:
        return row_columns(table, self.label_names, self.user_columns)


def row_columns(
    table: pa.Table, label_names: Sequence[str], user_columns: Sequence[str]
) -> RowColumns:
    """Return the columns of a table of training rows as the batch builder takes them."""
    num_rows = len(table)
    history = table["history_item_ids"].combine_chunks()
    offsets_B = history.offsets.to_numpy()
    return RowColumns(
        user_ids_B=_ints(table["user_id"]),
        item_ids_B=_ints(table["item_id"]),
        label_times_B=_ints(table["event_timestamp"].cast(pa.int64())),
        rq_BL=_code_matrix(table["rq_code"], num_rows),
        vq_BK=_code_matrix(table["vq_code"], num_rows),
        history_item_ids_H=history.flatten().to_numpy(),
        history_lengths_B=np.diff(offsets_B).astype(np.int64),
        labels_BT=np.stack(
            [table[name].to_numpy().astype(np.float32) for name in label_names], axis=1
        ),
        is_train_B=np.asarray(pc.equal(table["split"], "train")),
        user_columns={name: table[name].combine_chunks() for name in user_columns},
    )


def _shuffled(held: list[pa.RecordBatch], rng: np.random.Generator | None) -> pa.Table:
    window = pa.Table.from_batches(held)
    if rng is None:
        return window
    # Taking from one chunk is faster than from many, by more than joining them costs.
    return window.combine_chunks().take(pa.array(rng.permutation(len(window))))


def _ints(column: pa.ChunkedArray) -> Ints:
    # A copy: Arrow's memory is read-only, and torch wants to own what it wraps.
    return np.array(column.to_numpy(), dtype=np.int64)


def _code_matrix(column: pa.ChunkedArray, num_rows: int) -> Ints:
    flat: Ints = column.combine_chunks().flatten().to_numpy()
    return flat.reshape(num_rows, -1)
