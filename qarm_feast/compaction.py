"""Compaction of the offline logs: many small parts of a day become few large, sorted ones.

Ideas of log-structured stores and table formats, on plain folders: parts of like size are merged,
and what a merge replaces stays readable for a while. One compactor works at a time (a lock file
below the root); readers and writers take no part in it. In each day folder of each log it

1. sweeps: what killed processes left, and replaced parts whose grace period is over;
2. merges: the smallest parts, as many as together are ``min_growth`` times the largest of them
   (or fill a part). So each rewrite of a row leaves it in a part ``min_growth`` times as large,
   and it is rewritten log(target / append) / log(min_growth) + 1 times at most, however many
   parts there are. Rows equal in the log's key become one, the one that readers take; rows of
   the interaction log that an erasure covers are left out;
3. erases (at intervals): rewrites the other parts of the interaction log that hold such rows;
4. sweeps again.

A kill anywhere leaves the old parts or the new one, and files that the next sweep removes: see
``log_parts.write_merged``. A replaced part is deleted only after its successor was read through
once more. May import: pyarrow, the log.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from qarm_feast.artifact import replace_file, sync_folder
from qarm_feast.code_log import SEED_PART, CodeLog
from qarm_feast.config import Section
from qarm_feast.erasure import Marks, read_marks, without_marked
from qarm_feast.errors import DataError, ServiceUnavailableError
from qarm_feast.log_parts import (
    MERGED_PREFIX,
    DamagedPartError,
    find_damage,
    is_damage,
    is_gone,
    is_merged_leftover,
    is_part,
    is_part_leftover,
    is_stream,
    list_day,
    list_days,
    list_quarantined,
    list_sizes,
    merged_part_of,
    quarantine,
    read_parts,
    read_replaced,
    replaces_path,
    scan_days,
    set_aside_damaged,
    size_in,
    unpacked_bytes,
    write_merged,
)
from qarm_feast.object_store import Entry, Place, StorePath, place, remove_many, scan
from qarm_feast.point_in_time import latest_rows, microseconds
from qarm_feast.schema import (
    CONTENT_LOG,
    CREATED,
    EVENT_TIMESTAMP,
    INTERACTION_LOG,
    ITEM_ID,
    USER_ERASURE_LOG,
    USER_ID,
    USER_PROFILE_VIEW,
    code_view_name,
)
from qarm_feast.shared_state import CheckHeld, LockTakenError, exclusive

logger = logging.getLogger(__name__)

LOCK_NAME = ".compaction.lock"
_SEARCHED_NAME = ".erased_rows_searched"
"""Holds when the last whole search for rows of erased users began, in seconds since the epoch."""
_STALE_WRITE_SECONDS = 3600.0
"""No append takes as long; its temporary file is then of a process that was killed."""
_FAULTS_OF_ONE_LOG = (
    *(DataError, DamagedPartError, ServiceUnavailableError),
    *(pa.ArrowException, OSError),
)
_ROW = "row_number"
_SHRINKAGE = 4
"""Bytes of code rows in memory, or in an Arrow stream, over those in compressed parquet."""
_KEY_OF_LOG = {
    CONTENT_LOG: (ITEM_ID, EVENT_TIMESTAMP, "content_hash", "topic", "partition", "offset"),
    USER_ERASURE_LOG: (USER_ID, EVENT_TIMESTAMP),
    USER_PROFILE_VIEW: (USER_ID, EVENT_TIMESTAMP),
}
_CODE_KEY = (ITEM_ID, EVENT_TIMESTAMP, "content_hash")


class CompactionConfig(Section):
    """Section ``compaction``: how the parts of the offline logs are kept few."""

    enable_compaction: bool = Field(
        default=True, description="Whether workers compact in the background, one at a time."
    )
    interval_seconds: float = Field(
        default=60.0, gt=0, description="Time between two compactions by a worker."
    )
    erasure_interval_seconds: float = Field(
        default=86_400.0,
        gt=0,
        description="Time between two searches of a worker for raw rows of erased users in parts "
        "that need no merge; `qarm offline compact` always searches.",
    )
    grace_seconds: float = Field(
        default=600.0,
        ge=10,
        description="A replaced part is kept so long for readers that have listed it.",
    )
    target_part_bytes: int = Field(
        default=67_108_864,
        gt=0,
        description="Most bytes that one merge writes, and a quarter of the most that it unpacks; "
        "its memory is some fifteen times as much.",
    )
    min_growth: float = Field(
        default=4.0, ge=1, description="A merge makes a part so many times as large as its largest."
    )

    @property
    def rules(self) -> "CompactionRules":
        """What a compactor goes by."""
        return CompactionRules(self.target_part_bytes, self.min_growth, self.grace_seconds)


@dataclass(frozen=True)
class CompactionRules:
    """What a compactor goes by; see :class:`CompactionConfig`."""

    target_part_bytes: int = 67_108_864
    min_growth: float = 4.0
    grace_seconds: float = 600.0


@dataclass
class CompactionCounts:
    """What one compaction did; bytes are those of files."""

    num_merged_parts: int = 0
    num_new_parts: int = 0
    num_written_bytes: int = 0
    num_written_rows: int = 0
    num_dropped_duplicates: int = 0
    num_erased_rows: int = 0
    num_deleted_parts: int = 0

    def __str__(self) -> str:
        """Return ``name=value`` pairs, as log lines have them."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


class CompactorAtWorkError(ServiceUnavailableError):
    """Another process compacts the same logs."""


@dataclass(frozen=True)
class LogState:
    """The files of one log: what counts, what waits to be deleted, what is damaged."""

    name: str
    num_parts: int
    num_bytes: int
    num_replaced_parts: int
    num_replaced_bytes: int
    quarantined: Mapping[str, str] = field(default_factory=dict)
    """Reason by path."""


class Compactor:
    """Compacts all logs of one root.

    Args:
        log: The logs.
        rules: Sizes and the grace period.
        should_stop: Asked between two merges; True ends the compaction early.
        clock: Seconds since the epoch, as file times are.
    """

    def __init__(
        self,
        log: CodeLog,
        rules: CompactionRules | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._log = log
        self._rules = rules or CompactionRules()
        self._should_stop = should_stop
        self._clock = clock

    def compact(
        self, *, is_full: bool, erasure_interval_seconds: float = 0.0, wait_seconds: float = 0.0
    ) -> CompactionCounts:
        """Compact every log, if no other process is at it.

        Args:
            is_full: Merge all parts of a day that are not large yet, however few they are; each
                call then rewrites the day's last rows again.
            erasure_interval_seconds: Look through all parts of the interaction log for erased
                users if no process has done so for so long.
            wait_seconds: How long to wait for another compactor.

        Returns:
            What was done.

        Raises:
            CompactorAtWorkError: If another process is compacting all that time.
            ServiceUnavailableError: If the object store does not answer or keeps what was deleted.
            DataError: If a part that was just written reads back wrong.
            OSError: If the system cannot read or write a file. The other logs are compacted.
        """
        counts = CompactionCounts()
        with self._lock(wait_seconds) as check_held:
            started = self._clock()
            # Distances, here and below: a clock that was ahead for a while holds up nothing.
            is_erasing = abs(started - self._last_search()) >= erasure_interval_seconds
            failed = self._compact_each(is_full, is_erasing, counts, check_held)
            if is_erasing and INTERACTION_LOG not in failed and not self._should_stop():
                replace_file(self._log.root / _SEARCHED_NAME, str(started).encode())
        for error in failed.values():
            raise error
        return counts

    def _compact_each(
        self, is_full: bool, is_erasing: bool, counts: CompactionCounts, check_held: CheckHeld
    ) -> dict[str, Exception]:
        """Compact each log by itself; return errors by log, so that one does not hold up all."""
        failed: dict[str, Exception] = {}
        for name in self._log.names():
            try:
                job = _LogCompaction(
                    *(self._log, name, self._rules, self._should_stop, self._clock),
                    *(counts, check_held),
                )
                job.run(is_full, is_erasing)
            except _FAULTS_OF_ONE_LOG as error:
                logger.error("offline_log_not_compacted log=%s error=%r", name, str(error))
                failed[name] = error
        return failed

    def _last_search(self) -> float:
        try:
            # Empty where an older release wrote it: then there is another search.
            return float((self._log.root / _SEARCHED_NAME).read_bytes() or b"0")
        except FileNotFoundError:
            return 0.0

    @contextmanager
    def _lock(self, wait_seconds: float) -> Iterator[CheckHeld]:
        try:
            with exclusive(self._log.root / LOCK_NAME, wait_seconds) as check_held:
                yield check_held
        except LockTakenError as error:
            raise CompactorAtWorkError(
                f"another process has been compacting {self._log.root} for {wait_seconds:.0f} s; "
                f"let it finish, or {error}"
            ) from error


@dataclass
class _LogCompaction:
    """One compaction of one log, under the lock."""

    log: CodeLog
    name: str
    rules: CompactionRules
    should_stop: Callable[[], bool]
    clock: Callable[[], float]
    counts: CompactionCounts
    check_held: CheckHeld

    def __post_init__(self) -> None:
        self._folder = self.log.root / self.name
        self._schema = self.log.schema(self.name)
        self._marks = read_marks(self.log) if self.name == INTERACTION_LOG else None
        # Damaged parts in a folder where this process may not write.
        self._left_out: set[str] = set()

    def run(self, is_full: bool, is_erasing: bool) -> None:
        for day in self._days(is_erasing):
            if self.should_stop():
                return
            self._sweep(day)
            while not self.should_stop() and self._merge_some(day, is_full):
                pass
            if is_erasing and self._marks is not None:
                self._erase(day, self._marks)
            self._sweep(day)

    def _days(self, is_erasing: bool) -> list[Place]:
        days: list[Place]
        if isinstance(self._folder, StorePath):
            # Each look into a prefix is a request, and most days of a long log are done with.
            scanned = scan_days(self._folder)
            is_whole = is_erasing and self._marks is not None
            days = [day for day, found in scanned.items() if is_whole or not self._is_done(found)]
        else:
            days = [place(path) for path in list_days(self._folder)]
        return [day for day in days if day != self._folder / SEED_PART.parent]

    def _is_done(self, entries: Sequence[Entry]) -> bool:
        """Return whether a day holds merged parts alone, and not two that might be merged."""
        half = self.rules.target_part_bytes / 2
        num_small = sum(entry.stat().st_size < half for entry in entries)
        return num_small < 2 and all(
            is_part(entry.name) and entry.name.startswith(MERGED_PREFIX) for entry in entries
        )

    def _sweep(self, day: Place) -> None:
        visible_since: dict[str, float] = {}
        for entry in scan(day):
            part = merged_part_of(entry.name)
            since = _visible_since(day / part) if part is not None else None
            if part is not None and since is not None:
                visible_since[part] = since
            elif part is not None or self._is_leftover(entry):
                # A list without its part: the merge was cut short, or the part is in quarantine.
                self.check_held()
                _unlink_if_there(place(entry.path))
        replaced = {name for part in visible_since for name in read_replaced(day / part)}
        # Oldest first: a part that was replaced in turn goes after those that it replaced.
        for part in sorted(visible_since, key=lambda name: visible_since[name]):
            if abs(self.clock() - visible_since[part]) >= self.rules.grace_seconds:
                self._delete_replaced(day / part, is_replaced=part in replaced)

    def _is_leftover(self, entry: Entry) -> bool:
        return is_merged_leftover(entry.name) or self._is_stale_write(entry)

    def _is_stale_write(self, entry: Entry) -> bool:
        if not is_part_leftover(entry.name):
            return False
        try:
            age_seconds = self.clock() - entry.stat().st_mtime
        except FileNotFoundError:
            # A part that is being written got its name just now.
            return False
        return age_seconds > _STALE_WRITE_SECONDS

    def _delete_replaced(self, part: Place, is_replaced: bool) -> None:
        try:
            reason = find_damage(part)
        except OSError as error:
            if not is_gone(error):
                raise
            # Deleted above together with others, or put into quarantine by a reader.
            return
        self.check_held()
        if reason is None:
            self._delete_below(part)
        elif not is_replaced:
            # Without it, what it stands for counts again.
            quarantine(str(part), reason)
        # Otherwise its rows stand in its successor, which takes it and what is below it away.

    def _delete_below(self, part: Place) -> None:
        """Delete what a merged part stands for, and last the list that hides it."""
        names = sorted(read_replaced(part))
        for name in names:
            if name.startswith(MERGED_PREFIX):
                self._delete_below(part.with_name(name))
        self.counts.num_deleted_parts += _unlink_all(part.parent, names)
        sync_folder(part.parent)
        _unlink_if_there(replaces_path(part))

    def _merge_some(self, day: Place, is_full: bool) -> bool:
        """Merge once; return whether there was something to merge or to set aside."""
        listed = {p: size for p, size in list_sizes(day).items() if p not in self._left_out}
        if isinstance(day, StorePath):
            # A look at a footer is three requests, and most parts of most days are large.
            half = self.rules.target_part_bytes / 2
            listed = {path: size for path, size in listed.items() if size < half}
        merged = {path: merged_size(path, num_bytes) for path, num_bytes in listed.items()}
        sizes = {path: size for path, size in merged.items() if size is not None}
        growth = 1.0 if is_full else self.rules.min_growth
        paths = choose_parts(sizes, self.rules.target_part_bytes, growth)
        if paths:
            self._replace(day, paths)
            # A worker needs none of what a merge held, nor does the next merge build upon it.
            pa.default_memory_pool().release_unused()
        return bool(paths)

    def _replace(self, day: Place, paths: Sequence[str]) -> None:
        table = self._read(paths)
        if table is None:
            return
        places = self._distinct_rows(table)
        num_distinct = places.num_rows
        if self._marks is not None:
            places = without_marked(places, self._marks)
        sort_columns = [*self._sort_columns, _ROW]
        order = pc.sort_indices(places, [(name, "ascending") for name in sort_columns])
        rows = places[_ROW].take(order)
        num_rows = table.num_rows
        # In one chunk, of which rows are taken once: a merge holds its rows twice, not more.
        table = table.combine_chunks()
        kept = table.take(rows)
        del table
        self.check_held()
        part = write_merged(day, kept, [os.path.basename(path) for path in paths])
        counts = self.counts
        counts.num_merged_parts += len(paths)
        counts.num_new_parts += 1
        counts.num_written_bytes += part.stat().st_size
        counts.num_written_rows += kept.num_rows
        counts.num_dropped_duplicates += num_rows - num_distinct
        counts.num_erased_rows += num_distinct - kept.num_rows

    def _read(self, paths: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table | None:
        """Return the rows; None if parts are damaged or were taken away, so that others must do."""
        try:
            return read_parts(paths, self._schema, columns)
        except (DamagedPartError, pa.ArrowInvalid, OSError) as error:
            if is_gone(error):
                return None
            damaged = set_aside_damaged(paths) if is_damage(error) else set()
            if not damaged:
                raise
            self._left_out |= damaged
            return None

    @property
    def _sort_columns(self) -> list[str]:
        wanted = (USER_ID if USER_ID in self._schema.names else ITEM_ID, EVENT_TIMESTAMP)
        return [name for name in wanted if name in self._schema.names]

    def _distinct_rows(self, table: pa.Table) -> pa.Table:
        """Return numbers and sort columns of the rows that stay of those with an equal key."""
        key = row_key(self.name, self._schema)
        places = pa.table(
            {name: table[name] for name in self._sort_columns} | {_ROW: np.arange(table.num_rows)}
        )
        if not key:
            return places
        narrow = {name: table[name] for name in key}
        ties = [CREATED] if CREATED in self._schema.names else []
        narrow |= {name: microseconds(table[name]) for name in ties}
        return places.take(pa.array(latest_rows(pa.table(narrow), key, ties)))

    def _erase(self, day: Place, marks: Marks) -> None:
        for path in list_day(day):
            if self.should_stop():
                return
            rows = self._read([path], [USER_ID, EVENT_TIMESTAMP])
            if rows is not None and without_marked(rows, marks).num_rows < rows.num_rows:
                self._replace(day, [path])


def choose_parts(sizes: Mapping[str, int], target_part_bytes: int, min_growth: float) -> list[str]:
    """Return which parts of a day to merge next, smallest first; none if it does not pay.

    Args:
        sizes: Bytes by part.
        target_part_bytes: Most bytes of them together; a part of half as many stays as it is.
        min_growth: All together are so many times the largest, unless they fill a part.

    Returns:
        Two parts or more, or none.
    """
    small = sorted((size, part) for part, size in sizes.items() if 2 * size < target_part_bytes)
    num_chosen, total = 0, 0
    for count, (size, _) in enumerate(small, start=1):
        total += size
        if total > target_part_bytes:
            break
        if count > 1 and (total >= min_growth * size or 2 * total >= target_part_bytes):
            num_chosen = count
    return [part for _, part in small[:num_chosen]]


def row_key(log_name: str, schema: pa.Schema) -> tuple[str, ...]:
    """Return the columns whose equality makes two rows of a log one row; empty: none do.

    Codes, profiles and erasures: as the readers of their views have it. An interaction must be
    equal in its flags as well, since a list takes a pair that any row calls positive. An event
    of the content log must be the same record of the same partition: a backfill goes by offsets.

    Args:
        log_name: Folder name of the log.
        schema: Its columns.

    Returns:
        Column names. Of equal rows the one with the greatest ``created`` stays.
    """
    if log_name == INTERACTION_LOG:
        return tuple(name for name in schema.names if name != CREATED)
    is_code_log = log_name.startswith(code_view_name(""))
    key = _CODE_KEY if is_code_log else _KEY_OF_LOG.get(log_name, ())
    # Someone else's log of such a name may lack one of them.
    return key if set(key) <= set(schema.names) else ()


def log_states(log: CodeLog) -> list[LogState]:
    """Return the state of every log by name; damaged parts are read again for the reason.

    Args:
        log: The logs.

    Returns:
        One state per log.
    """
    return [_log_state(log, name) for name in log.names()]


def _log_state(log: CodeLog, name: str) -> LogState:
    folder = log.root / name
    present = {
        entry.path: size_in(entry) or 0
        for day in list_days(folder)
        for entry in scan(place(day))
        if is_part(entry.name)
    }
    counting = {path: present.get(path, 0) for path in log.row_parts(name)}
    waiting = present.keys() - counting.keys() - {str(folder / SEED_PART)}
    return LogState(
        name=name,
        num_parts=len(counting),
        num_bytes=sum(counting.values()),
        num_replaced_parts=len(waiting),
        num_replaced_bytes=sum(present[path] for path in waiting),
        quarantined={path: find_damage(path) or "sound" for path in list_quarantined(folder)},
    )


def _visible_since(part: Place) -> float | None:
    """Return when a merged part got its name, its file's last change; None if it is not there."""
    try:
        return part.stat().st_ctime
    except FileNotFoundError:
        return None


def merged_size(path: str, num_bytes: int) -> int | None:
    """Return about how many bytes the rows of a part take in a merged one.

    Rows that shrink more than codes do count for more, so that what a merge holds is bounded.

    Args:
        path: A part.
        num_bytes: Its size, as listed.

    Returns:
        Bytes; None if it is gone.
    """
    if is_stream(path):
        return num_bytes // _SHRINKAGE
    try:
        return max(num_bytes, unpacked_bytes(path) // _SHRINKAGE)
    except (pa.ArrowInvalid, OSError) as error:
        if is_gone(error):
            return None
        if not is_damage(error):
            raise
        # The merge that takes it puts it into quarantine.
        return 0


def _unlink_all(folder: Place, names: Sequence[str]) -> int:
    """Delete files of a folder; return how many there were, of objects how many were named."""
    if isinstance(folder, StorePath):
        remove_many([folder / name for name in names])
        return len(names)
    return sum(_unlink_if_there(folder / name) for name in names)


def _unlink_if_there(path: Place) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
