"""How a backfill cuts its work: pieces of the content log, then pieces of the catalogue.

A piece is some small parts of the log together, one row group of a large part, or a stretch of
``items.parquet``. The same files give the same pieces, each is read by itself, and none is larger
than memory allows. Names of log pieces are those of parts below the log, ``#`` and the row group
behind a large one; a part never changes, so that a name stands for its rows for good.

Shape letters in this file: N rows. May import: pyarrow, the log.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qarm_feast.code_log import CodeLog, left_out_after
from qarm_feast.errors import DataError
from qarm_feast.log_parts import (
    QUARANTINE_PREFIX,
    DamagedPartError,
    is_stream,
    list_quarantined,
    read_parts,
    read_row_group,
    unpacked_bytes,
)
from qarm_feast.object_store import open_input, place
from qarm_feast.point_in_time import latest_rows, microseconds
from qarm_feast.schema import (
    CONTENT_LOG,
    CONTENT_LOG_ROWS,
    CREATED,
    EVENT_TIMESTAMP,
    ITEM_ID,
)

Source = tuple[str, int]
"""Topic and partition that a row of the content log came from."""

SMALL_PARTS_BYTES = 33_554_432
"""Small parts are read together up to so many bytes."""
CATALOGUE_ROWS = 65_536
"""Rows of a piece of the catalogue."""
MAX_LISTINGS = 20
"""A compaction may take parts away meanwhile; grace periods let that happen once or twice."""
_SOURCE_COLUMNS = ("topic", "partition", "offset")
_SURVEY_COLUMNS = [*_SOURCE_COLUMNS, "encoder_version", "is_deleted"]
_EVENT_KEY = (ITEM_ID, EVENT_TIMESTAMP, "content_hash")


@dataclass(frozen=True)
class Offsets:
    """Half-open range of offsets of one source: ``first`` is in it, ``end`` is not."""

    first: int
    end: int


@dataclass(frozen=True)
class PartFacts:
    """What a survey found in one part of the content log.

    ``groups`` are the row counts of a parquet part's row groups, empty for a stream.
    ``needs_content`` tells whether some row has no vector of the codebook's encoder.
    """

    path: str
    name: str
    num_rows: int
    num_bytes: int
    groups: tuple[int, ...]
    offsets: Mapping[Source, Offsets]
    needs_content: bool


@dataclass(frozen=True)
class LogPiece:
    """Parts of the content log, or one row group of one, to be encoded together.

    ``wanted`` bounds the offsets of the sources that it names; other rows are all wanted.
    ``finished`` are the names that are done for good with this piece: those of which nothing is
    left for a later backfill.
    """

    paths: tuple[str, ...]
    row_group: int | None
    num_rows: int
    needs_content: bool
    wanted: Mapping[Source, Offsets]
    finished: tuple[str, ...]


@dataclass(frozen=True)
class CataloguePiece:
    """Rows of ``items.parquet``: batch ``number`` of one row group, where ``is_wanted_N``."""

    path: str
    row_group: int
    number: int
    is_wanted_N: npt.NDArray[np.bool_] = field(repr=False)

    @property
    def num_rows(self) -> int:
        """Rows that are wanted."""
        return int(self.is_wanted_N.sum())


class Survey:
    """What the parts of the content log hold, as far as a backfill has to know.

    Args:
        log: The logs.
        encoder_version: The encoder of the codebook.
        done: Names of pieces whose parts need no look; see the module's docstring.
    """

    def __init__(self, log: CodeLog, encoder_version: str, done: frozenset[str]) -> None:
        self.left_out: set[str] = set()
        """Damaged parts, and some that are gone."""
        self._log = log
        self._encoder_version = encoder_version
        self._done = {name.partition("#")[0] for name in done}
        self._found: dict[str, PartFacts] = {}

    def parts(self) -> list[PartFacts]:
        """Look at every part that is listed and neither done nor known yet.

        Returns:
            The parts in the order of the listing.

        Raises:
            DataError: If parts vanish faster than they can be looked at.
            OSError: If the system cannot read a part.
        """
        for _ in range(MAX_LISTINGS):
            listed = [path for path in self._log.row_parts(CONTENT_LOG) if self._is_open(path)]
            if all([self._look_at(path) for path in listed]):
                return [self._found[path] for path in listed]
        raise DataError(
            f"parts of {self._log.root / CONTENT_LOG} vanished {MAX_LISTINGS} times while they "
            "were looked at; see that compaction.grace_seconds is longer than a read takes, then "
            "run the backfill again"
        )

    def listed_names(self) -> frozenset[str]:
        """Return the names of all parts that are there."""
        return frozenset(map(self._name, self._log.row_parts(CONTENT_LOG)))

    def unread(self) -> set[str]:
        """Return the damaged parts: those left out, and those that somebody put into quarantine.

        Returns:
            Paths under which they may come back mended; one that has done so is none of them.
        """
        listed = set(self._log.row_parts(CONTENT_LOG))
        aside = list_quarantined(self._log.root / CONTENT_LOG)
        places = {
            str(path.with_name(path.name.removeprefix(QUARANTINE_PREFIX)))
            for path in map(place, aside)
        }
        return (self.left_out & listed) | (places - listed)

    def _is_open(self, path: str) -> bool:
        return path not in self.left_out and self._name(path) not in self._done

    def _name(self, path: str) -> str:
        return path.removeprefix(f"{self._log.root / CONTENT_LOG}/")

    def _look_at(self, path: str) -> bool:
        """Return whether the part is known; False if it is gone or damaged: list again."""
        if path in self._found:
            return True
        try:
            self._found[path] = self._facts_of(path)
        except (DamagedPartError, pa.ArrowInvalid, OSError) as error:
            self.left_out |= left_out_after(error, [path])
            return False
        return True

    def _facts_of(self, path: str) -> PartFacts:
        rows = read_parts([path], CONTENT_LOG_ROWS, _SURVEY_COLUMNS)
        groups: tuple[int, ...] = ()
        if not is_stream(path):
            footer = pq.read_metadata(open_input(path))
            groups = tuple(footer.row_group(n).num_rows for n in range(footer.num_row_groups))
        is_own = pc.fill_null(pc.equal(rows["encoder_version"], self._encoder_version), False)
        is_served = pc.or_(is_own, rows["is_deleted"])
        return PartFacts(
            path=path,
            name=self._name(path),
            num_rows=rows.num_rows,
            num_bytes=unpacked_bytes(path),
            groups=groups,
            offsets=_offset_ranges(rows),
            needs_content=not pc.all(is_served, min_count=0).as_py(),
        )


def _offset_ranges(rows: pa.Table) -> dict[Source, Offsets]:
    known = _known_sources(rows)
    found = known.group_by(["topic", "partition"]).aggregate([("offset", "min"), ("offset", "max")])
    return {
        (row["topic"], row["partition"]): Offsets(row["offset_min"], row["offset_max"] + 1)
        for row in found.to_pylist()
    }


def _known_sources(rows: pa.Table) -> pa.Table:
    """Return topic, partition and offset, those of rows without them as "", -1 and -1."""
    missing = {"topic": "", "partition": -1, "offset": -1}
    return pa.table({name: pc.fill_null(rows[name], missing[name]) for name in _SOURCE_COLUMNS})


def cut_log(
    parts: Sequence[PartFacts], wanted: Mapping[Source, Offsets], done: frozenset[str]
) -> list[LogPiece]:
    """Return the pieces of the parts that hold a wanted row.

    Args:
        parts: What a survey found.
        wanted: Bounds of every source of theirs.
        done: Names of pieces that are in both stores already.

    Returns:
        Pieces in the order of the parts: small ones together, large ones by row group.
    """
    pieces: list[LogPiece] = []
    small: list[PartFacts] = []
    for part in parts:
        if part.name in done or not _holds_wanted(part, wanted):
            continue
        if part.groups:
            pieces += _cut_large(part, wanted, done)
            continue
        if small and sum(each.num_bytes for each in [*small, part]) > SMALL_PARTS_BYTES:
            pieces.append(_together(small, wanted))
            small = []
        small.append(part)
    return [*pieces, _together(small, wanted)] if small else pieces


def _holds_wanted(part: PartFacts, wanted: Mapping[Source, Offsets]) -> bool:
    return any(
        held.first < wanted[source].end and held.end > wanted[source].first
        for source, held in part.offsets.items()
    )


def _cut_large(
    part: PartFacts, wanted: Mapping[Source, Offsets], done: frozenset[str]
) -> list[LogPiece]:
    bounds = _cutting_bounds([part], wanted)
    return [
        LogPiece(
            paths=(part.path,),
            row_group=group,
            num_rows=num_rows,
            needs_content=part.needs_content,
            wanted=bounds,
            finished=(name,) if _is_used_up(part, wanted) else (),
        )
        for group, num_rows in enumerate(part.groups)
        if (name := f"{part.name}#{group}") not in done
    ]


def _together(parts: Sequence[PartFacts], wanted: Mapping[Source, Offsets]) -> LogPiece:
    return LogPiece(
        paths=tuple(part.path for part in parts),
        row_group=None,
        num_rows=sum(part.num_rows for part in parts),
        needs_content=any(part.needs_content for part in parts),
        wanted=_cutting_bounds(parts, wanted),
        finished=tuple(part.name for part in parts if _is_used_up(part, wanted)),
    )


def _is_used_up(part: PartFacts, wanted: Mapping[Source, Offsets]) -> bool:
    """Tell whether no row of a part lies beyond the bounds, where a later backfill may go."""
    return all(held.end <= wanted[source].end for source, held in part.offsets.items())


def _cutting_bounds(
    parts: Sequence[PartFacts], wanted: Mapping[Source, Offsets]
) -> dict[Source, Offsets]:
    """Return the bounds that leave rows of these parts out."""
    return {
        source: wanted[source]
        for part in parts
        for source, held in part.offsets.items()
        if held.first < wanted[source].first or held.end > wanted[source].end
    }


def read_log_piece(piece: LogPiece) -> pa.Table:
    """Return the wanted rows of a piece, each event once.

    Args:
        piece: The piece.

    Returns:
        Columns of ``schema.CONTENT_LOG_ROWS``, in one chunk; without ``content`` where every
        row has a vector of the codebook's encoder.

    Raises:
        DamagedPartError: If a checksum does not hold.
        OSError: If a part is gone, cannot be read, or makes no sense.
        pa.ArrowInvalid: If its content makes no sense.
    """
    columns = [name for name in CONTENT_LOG_ROWS.names if piece.needs_content or name != "content"]
    if piece.row_group is None:
        rows = read_parts(piece.paths, CONTENT_LOG_ROWS, columns)
    else:
        rows = read_row_group(piece.paths[0], piece.row_group, columns)
    return _each_event_once(_within(rows, piece.wanted))


def _within(rows: pa.Table, wanted: Mapping[Source, Offsets]) -> pa.Table:
    if not wanted:
        return rows
    known = _known_sources(rows)
    is_wanted = pa.repeat(True, rows.num_rows)
    for (topic, partition), bounds in wanted.items():
        is_source = pc.and_(
            pc.equal(known["topic"], topic), pc.equal(known["partition"], partition)
        )
        is_inside = pc.and_(
            pc.greater_equal(known["offset"], bounds.first), pc.less(known["offset"], bounds.end)
        )
        is_wanted = pc.and_(is_wanted, pc.or_(pc.invert(is_source), is_inside))
    return rows.filter(is_wanted)


def _each_event_once(rows: pa.Table) -> pa.Table:
    """Drop replays as readers do: of equal (item, time, content hash) the last written stays."""
    narrow = {name: rows[name] for name in _EVENT_KEY}
    narrow |= {name: microseconds(rows[name]) for name in (EVENT_TIMESTAMP, CREATED)}
    places = latest_rows(pa.table(narrow), _EVENT_KEY, [CREATED])
    rows = rows.combine_chunks()
    return rows if len(places) == rows.num_rows else rows.take(pa.array(places))


def cut_catalogue(path: Path, is_wanted_N: npt.NDArray[np.bool_]) -> Iterator[CataloguePiece]:
    """Yield the pieces of ``items.parquet`` that hold a wanted row.

    Args:
        path: The file.
        is_wanted_N: Tells of every row of it whether it is wanted.

    Yields:
        Pieces in file order.
    """
    footer = pq.read_metadata(path)
    start = 0
    for group in range(footer.num_row_groups):
        end = start + footer.row_group(group).num_rows
        for number, first in enumerate(range(start, end, CATALOGUE_ROWS)):
            piece_N = is_wanted_N[first : min(first + CATALOGUE_ROWS, end)]
            if piece_N.any():
                yield CataloguePiece(str(path), group, number, piece_N)
        start = end


def read_catalogue_piece(piece: CataloguePiece, columns: Sequence[str]) -> pa.Table:
    """Return the wanted rows of a piece of the catalogue.

    Args:
        piece: The piece.
        columns: Columns to read.

    Returns:
        The rows in file order.
    """
    # Not read ahead: a row group may be larger than what a job may hold.
    with pq.ParquetFile(piece.path, pre_buffer=False) as file:
        batches = file.iter_batches(
            CATALOGUE_ROWS, row_groups=[piece.row_group], columns=list(columns), use_threads=False
        )
        batch = next(batch for number, batch in enumerate(batches) if number == piece.number)
    return pa.Table.from_batches([batch]).filter(pa.array(piece.is_wanted_N))
