"""The rows of one batch source: as of given times, the latest per key, or all of them.

Two kinds share one interface: ``FeatureRows`` are stored as they are read, ``RecentItemLists``
are computed from raw interactions. Times are int64 microseconds UTC, both bounds of a range are
inclusive, None is no bound. May import: pyarrow, numpy; nothing of Feast.

Shape letters in this file: F stored rows, E positive events, N label rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from qarm_feast import view_tags
from qarm_feast.code_log import CodeLog
from qarm_feast.erasure import outlives_erasure, read_marks
from qarm_feast.errors import DataError
from qarm_feast.object_store import Place, dataset_files
from qarm_feast.point_in_time import TIME, latest_rows, microseconds, rows_as_of
from qarm_feast.recent_items import HistorySlices, PositiveEvents, histories_as_of, newest_first
from qarm_feast.schema import ERASURE_MARK, ITEM_ID, TIMESTAMP, USER_ID

Int64Array = npt.NDArray[np.int64]

_NO_TIME = np.iinfo(np.int64).min


@dataclass(frozen=True)
class TimeRange:
    """Inclusive bounds in microseconds UTC."""

    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class SourceRows(ABC):
    """Rows below ``path``: a log, a parquet file, or a folder of parquet files.

    ``time_column`` is when a row became true, ``created_column`` when it was written, ``tags``
    are those of :mod:`qarm_feast.view_tags`.
    """

    path: Place
    time_column: str
    created_column: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @abstractmethod
    def as_of(
        self, keys: Sequence[str], features: Sequence[str], labels: pa.Table, ttl_us: int
    ) -> pa.Table | None:
        """Return the features that each label row may see.

        Args:
            keys: Key columns, of the same name and type in the source and in ``labels``.
            features: Columns to return.
            labels: Columns ``keys`` and ``time_us``.
            ttl_us: A row older than this at the label's time is not seen; 0: no limit.

        Returns:
            One row per label row, in its order, null where there is none; None if nothing is
            stored, so that the caller must know the types.
        """

    @abstractmethod
    def latest(self, keys: Sequence[str], columns: Sequence[str], times: TimeRange) -> pa.Table:
        """Return ``columns`` and the time columns of each key's newest row in the range."""

    @abstractmethod
    def all(self, columns: Sequence[str], times: TimeRange) -> pa.Table:
        """Return ``columns`` and the time columns of all rows in the range, each event once."""

    def schema(self) -> pa.Schema | None:
        """Return the stored columns, without the day of writing; None if nothing is stored."""
        log = CodeLog(self.path.parent)
        if log.exists(self.path.name):
            return log.schema(self.path.name)
        if not self.path.exists():
            return None
        dataset = parquet_dataset(self.path)
        return dataset.schema if dataset.files else None

    def _read(self, columns: Sequence[str], where: pads.Expression | None) -> pa.Table:
        schema = self.schema()
        missing = [name for name in columns if schema is None or name not in schema.names]
        if schema is None or missing:
            raise DataError(f"the source {self.path} lacks the columns {missing}")
        log = CodeLog(self.path.parent)
        if log.exists(self.path.name):
            return log.read(self.path.name, columns, where)
        return parquet_dataset(self.path).to_table(columns=list(columns), filter=where)

    def _within(self, times: TimeRange) -> pads.Expression | None:
        schema = self.schema()
        assert schema is not None, "callers look for an absent source first"
        column = pads.field(self.time_column)
        bound_type = pa.timestamp("us", tz=schema.field(self.time_column).type.tz)
        bounds = []
        if times.start is not None:
            bounds.append(column >= pa.scalar(times.start, bound_type))
        if times.end is not None:
            bounds.append(column <= pa.scalar(times.end, bound_type))
        return _all_of(bounds)


def parquet_dataset(path: Place) -> pads.Dataset:
    """Return the rows of a parquet file, or of a folder of such files."""
    (found,), file_system = dataset_files([str(path)])
    return pads.dataset(found, format="parquet", filesystem=file_system)


class FeatureRows(SourceRows):
    """Rows stored as they are read; those equal in the source's own key are one row."""

    def as_of(
        self, keys: Sequence[str], features: Sequence[str], labels: pa.Table, ttl_us: int
    ) -> pa.Table | None:
        """See :meth:`SourceRows.as_of`."""
        if self.schema() is None:
            return None
        newest = pc.max(labels[TIME]).as_py()
        table = self._read_rows([*keys, *features], TimeRange(end=newest))
        narrow = self._narrow(table, keys)
        rows_N = rows_as_of(narrow, labels, keys, self._ties(keys))
        if ttl_us:
            rows_N = _drop_expired(rows_N, narrow[TIME], labels[TIME], ttl_us)
        return _take(table.select(list(dict.fromkeys(features))), rows_N)

    def latest(self, keys: Sequence[str], columns: Sequence[str], times: TimeRange) -> pa.Table:
        """See :meth:`SourceRows.latest`."""
        return self._pick(keys, (TIME,), columns, times)

    def all(self, columns: Sequence[str], times: TimeRange) -> pa.Table:
        """See :meth:`SourceRows.all`."""
        if self._dedup_columns:
            return self._pick([*self._dedup_columns, TIME], (), columns, times)
        if self.schema() is None:
            return self._empty(columns)
        return self._read_rows(columns, times).select(self._result_columns(columns))

    @property
    def _dedup_columns(self) -> list[str]:
        names = self.tags.get(view_tags.DEDUP_KEY, "").split(",")
        return [name for name in names if name and name != self.time_column]

    def _ties(self, keys: Sequence[str]) -> list[str]:
        """Name what decides between rows of one key and time: the online store's order first."""
        own = [name for name in self._dedup_columns if name not in keys]
        return [*own, *([self.created_column] if self.created_column else [])]

    def _pick(
        self, keys: Sequence[str], ties: Sequence[str], columns: Sequence[str], times: TimeRange
    ) -> pa.Table:
        if self.schema() is None:
            return self._empty(columns)
        stored_keys = [key for key in keys if key != TIME]
        table = self._read_rows([*stored_keys, *columns], times)
        narrow = self._narrow(table, stored_keys)
        rows = latest_rows(narrow, keys, [*ties, *self._ties(keys)])
        return _take(table.select(self._result_columns(columns)), rows)

    def _read_rows(self, columns: Sequence[str], times: TimeRange) -> pa.Table:
        wanted = [*columns, *self._dedup_columns, *self._time_columns]
        return self._read(list(dict.fromkeys(wanted)), self._within(times))

    def _narrow(self, table: pa.Table, keys: Sequence[str]) -> pa.Table:
        columns = {name: table[name] for name in [*keys, *self._dedup_columns]}
        columns[TIME] = microseconds(table[self.time_column])
        if self.created_column:
            columns[self.created_column] = microseconds(table[self.created_column])
        return pa.table(columns)

    @property
    def _time_columns(self) -> list[str]:
        return [self.time_column, *([self.created_column] if self.created_column else [])]

    def _result_columns(self, columns: Sequence[str]) -> list[str]:
        return list(dict.fromkeys([*columns, *self._time_columns]))

    def _empty(self, columns: Sequence[str]) -> pa.Table:
        types = {name: TIMESTAMP for name in self._time_columns}
        names = self._result_columns(columns)
        return pa.table({name: pa.nulls(0, types.get(name, pa.null())) for name in names})


class RecentItemLists(SourceRows):
    """Lists of a user's latest positives; each event makes a new row of the view.

    What an erasure in the log beside the source covers is in no list. Joins do not show the
    erasure itself; pulls do, as an item ``ERASURE_MARK``, so that it reaches online stores.
    """

    def as_of(
        self, keys: Sequence[str], features: Sequence[str], labels: pa.Table, ttl_us: int
    ) -> pa.Table | None:
        """See :meth:`SourceRows.as_of`; ``keys`` is the user's key."""
        if self.schema() is None:
            return None
        events = self._events(TimeRange(end=pc.max(labels[TIME]).as_py()))
        events = events.take(events.item_ids_E != ERASURE_MARK)
        users, times = labels[keys[0]], labels[TIME]
        times_N = times.fill_null(_NO_TIME).to_numpy()
        user_ids_N = users.fill_null(0).to_numpy()
        slices = histories_as_of(events, user_ids_N, times_N, self._history_length)
        is_seen_N = ~users.is_null().to_numpy() & (slices.lengths() > 0)
        if ttl_us:
            seen = np.flatnonzero(is_seen_N)
            newest = events.times_E[slices.ends_N[seen] - 1]
            is_seen_N[seen] = newest >= times_N[seen] - ttl_us
        shown = replace(slices, starts_N=np.where(is_seen_N, slices.starts_N, slices.ends_N))
        return _lists(events, shown).select(list(features))

    def latest(self, keys: Sequence[str], columns: Sequence[str], times: TimeRange) -> pa.Table:
        """Return the newest list of each user with an event in the range, older events too."""
        events = self._events(times)
        is_last_E = np.append(events.user_ids_E[1:] != events.user_ids_E[:-1], True)
        return self._lists_at(events, is_last_E[: len(events.times_E)], columns, times)

    def all(self, columns: Sequence[str], times: TimeRange) -> pa.Table:
        """See :meth:`SourceRows.all`: a row per user and time of an event."""
        events = self._events(times)
        is_same_user_E = events.user_ids_E[1:] == events.user_ids_E[:-1]
        is_same_E = is_same_user_E & (events.times_E[1:] == events.times_E[:-1])
        is_last_E = np.append(~is_same_E, True)
        return self._lists_at(events, is_last_E[: len(events.times_E)], columns, times)

    @property
    def _history_length(self) -> int:
        return int(self.tags[view_tags.HISTORY_LENGTH])

    def _lists_at(
        self,
        events: PositiveEvents,
        is_asked_E: npt.NDArray[np.bool_],
        columns: Sequence[str],
        times: TimeRange,
    ) -> pa.Table:
        """Return the lists as of the events marked, those before the range left out."""
        if times.start is not None:
            is_asked_E = is_asked_E & (events.times_E >= times.start)
        if times.end is not None:
            # An erasure counts before its time as well, but is told only at its time.
            is_asked_E = is_asked_E & (events.times_E <= times.end)
        user_ids, times_us = events.user_ids_E[is_asked_E], events.times_E[is_asked_E]
        slices = histories_as_of(events, user_ids, times_us, self._history_length)
        table = _lists(events, slices)
        table = table.append_column(USER_ID, pa.array(user_ids))
        table = table.append_column(self.time_column, pa.array(times_us).cast(TIMESTAMP))
        return table.select([*columns, self.time_column])

    def _events(self, times: TimeRange) -> PositiveEvents:
        """Return the positives that outlive the user's erasures, and those as marks."""
        marks = read_marks(CodeLog(self.path.parent))
        pairs = [np.concatenate(both) for both in zip(self._positives(times), marks, strict=True)]
        outlives_E = outlives_erasure(*pairs)
        return PositiveEvents.sort(*(column[outlives_E] for column in pairs))

    def _positives(self, times: TimeRange) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Read the positives up to the end of the range; a list reaches back before its start."""
        schema = self.schema()
        if schema is None:
            return (np.empty(0, np.int64),) * 3
        # A row that names the mark was no erasure: the stream refuses it, other writers may not.
        wanted = [pads.field(self._positive_label(schema)), pads.field(ITEM_ID) != ERASURE_MARK]
        if view_tags.SPLIT in self.tags:
            wanted.append(pads.field("split") == self.tags[view_tags.SPLIT])
        before_end = self._within(TimeRange(end=times.end))
        where = _all_of([*wanted, *([] if before_end is None else [before_end])])
        table = self._read([USER_ID, ITEM_ID, self.time_column], where)
        times_us = microseconds(table[self.time_column])
        return table[USER_ID].to_numpy(), times_us.to_numpy(), table[ITEM_ID].to_numpy()

    def _positive_label(self, schema: pa.Schema) -> str:
        tasks: list[str] = [column.name for column in schema if column.type == pa.bool_()]
        label = self.tags.get(view_tags.POSITIVE_LABEL, "auto")
        if label == "auto" and tasks:
            return tasks[0]
        if label not in tasks:
            raise DataError(f"{self.path} has the tasks {tasks}, but positive_label is {label!r}")
        return label


def _lists(events: PositiveEvents, slices: HistorySlices) -> pa.Table:
    return pa.table(
        {
            "item_ids": newest_first(events.item_ids_E, slices),
            "item_timestamps": newest_first(events.times_E, slices),
        }
    )


def _drop_expired(
    rows_N: Int64Array, times: pa.ChunkedArray, label_times: pa.ChunkedArray, ttl_us: int
) -> Int64Array:
    found = np.flatnonzero(rows_N >= 0)
    ages = label_times.take(pa.array(found)).to_numpy() - times.to_numpy()[rows_N[found]]
    rows_N = rows_N.copy()
    rows_N[found[ages > ttl_us]] = -1
    return rows_N


def _take(table: pa.Table, rows_N: Int64Array) -> pa.Table:
    """Return rows by number, null where it is negative; the whole table is never copied."""
    found_N = rows_N[rows_N >= 0]
    is_ascending = len(found_N) == len(rows_N) and bool(np.all(found_N[1:] > found_N[:-1]))
    wanted = found_N if is_ascending else np.unique(found_N)
    taken = []
    start = 0
    for batch in table.to_batches():
        first, last = np.searchsorted(wanted, [start, start + batch.num_rows])
        taken.append(batch.take(pa.array(wanted[first:last] - start)))
        start += batch.num_rows
    picked = pa.Table.from_batches(taken, table.schema)
    if is_ascending:
        return picked
    places_N = np.searchsorted(wanted, rows_N)
    # Row numbers into many small chunks are slow to resolve, list columns above all.
    return picked.combine_chunks().take(pa.array(places_N, mask=rows_N < 0))


def _all_of(conditions: Sequence[pads.Expression]) -> pads.Expression | None:
    result = None
    for condition in conditions:
        result = condition if result is None else result & condition
    return result
