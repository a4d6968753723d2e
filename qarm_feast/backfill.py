"""Backfill: the code rows of one codebook version, out of the content log and the catalogue.

1. Every event of ``item_content_log`` below the given offsets becomes a row offline, at its own
   time, so that point-in-time joins find what was there; online the newest row of an item wins by
   the store's guard, whoever writes first. Takedowns become deleted rows.
2. An item of ``items.parquet`` becomes a row at its upload time, unless the version has a row of
   that item and time by then: what came through the stream is nearer to the truth.

A vector of the codebook's encoder is quantized as it is, everything else is encoded from content.
Work is cut into pieces (``backfill_parts``), each is written offline, then online
(``backfill_writer``), then noted (``backfill_progress``); a killed backfill goes on behind the
last noted piece. All rows are idempotent, so that repeating a piece changes nothing. A compaction
may put other parts in the place of those that are noted; a finished backfill is noted by offsets
as well, an unfinished one then repeats them. Of the catalogue ids and times are held in memory.

Shape letters in this file: N items, M rows of a table. May import: feast, ray (by name).
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ConfigDict

from qarm_feast.backfill_parts import (
    MAX_LISTINGS,
    Offsets,
    PartFacts,
    Source,
    Survey,
    cut_catalogue,
    cut_log,
)
from qarm_feast.backfill_progress import BackfillProgress, progress_path
from qarm_feast.backfill_writer import (
    BackfillCounts,
    BackfillJob,
    Piece,
    PieceResult,
    PieceWriter,
)
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import Section, load_section
from qarm_feast.errors import CodebookError, ConfigError, DataError, ServiceUnavailableError
from qarm_feast.feature_views import reads_aligned_vectors
from qarm_feast.input_data import UPLOAD_TIMESTAMP, DataConfig, read_catalogue_times
from qarm_feast.offline_store import open_code_log
from qarm_feast.online_tables import FeastOnlineTables
from qarm_feast.registry import CodebookRegistry, VersionState, read_manifest
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import (
    CODE_ROWS,
    CONTENT_LOG,
    CONTENT_LOG_ROWS,
    EVENT_TIMESTAMP,
    ITEM_ID,
    VECTOR_ROWS,
    code_view_name,
    vector_view_name,
)
from qarm_feast.shared_state import LockTakenError, exclusive

logger = logging.getLogger(__name__)

EngineName = Literal["local", "ray"]

_SECONDS_PER_LINE = 5.0
_WRITABLE = (VersionState.STAGED, VersionState.LIVE, VersionState.DEFAULT)


class Engine(Protocol):
    """Where pieces are written."""

    def run(self, pieces: Sequence[Piece]) -> Iterator[PieceResult]:
        """Write every piece, and yield the results in any order."""
        ...


class LocalEngine:
    """Writes one piece after the other in this process.

    Args:
        job: What to write.
    """

    def __init__(self, job: BackfillJob) -> None:
        self._job = job
        self._writer: PieceWriter | None = None

    def run(self, pieces: Sequence[Piece]) -> Iterator[PieceResult]:
        """Write every piece in order.

        Args:
            pieces: The pieces.

        Yields:
            Each piece's result.
        """
        # Made with the first piece: where nothing is left to do, no codebook is loaded.
        self._writer = self._writer or PieceWriter(self._job)
        for piece in pieces:
            yield self._writer.write(piece)


def backfill_codes(
    config_path: str | Path,
    codebook_version: str,
    *,
    up_to: Mapping[tuple[str, int], int] | None = None,
    engine: EngineName = "local",
) -> BackfillCounts:
    """Write the code rows of every content event and catalogue item, offline, then online.

    Args:
        config_path: Path of ``qarm.yaml``.
        codebook_version: A staged, live or default version whose view is applied.
        up_to: Offset by topic and partition; events from it on are left to whoever writes them.
            Sources that are not named, and None, mean all. Only work is saved by it: rows that
            are written twice are one row.
        engine: ``local`` writes in this process, ``ray`` in many (Ray Data).

    Returns:
        What was done; nothing but zeros if there was nothing left to do.

    Raises:
        CodebookError: If the version is not published, is retired or purged, or damaged.
        ConfigError: If ``feast apply`` has not run, or ``up_to`` names what the log does not know.
        MissingDependencyError: If Ray is asked for and not installed.
        DataError: If there is neither a content log nor a catalogue, an encoder is needed and
            missing, or a vector has no code.
        ServiceUnavailableError: If a store does not answer, or another backfill is at work.
    """
    path = str(Path(config_path).resolve())
    job = BackfillJob(path, codebook_version)
    backfill = _Backfill(job, up_to or {})
    with backfill.lock():
        return backfill.run(_open_engine(engine, job))


def _open_engine(name: EngineName, job: BackfillJob) -> Engine:
    if name == "local":
        return LocalEngine(job)
    from qarm_feast.backfill_ray import RayEngine

    return RayEngine(job)


class _StreamTopic(Section):
    """The one key of section ``stream`` that is needed here; its owner checks the others."""

    model_config = ConfigDict(extra="ignore")

    item_topic: str = "item-events"


class _Backfill:
    """One run: what is checked first, and what is done with the results."""

    def __init__(self, job: BackfillJob, up_to: Mapping[Source, int]) -> None:
        self._job = job
        self._up_to = up_to
        self._view = code_view_name(job.codebook_version)
        self._registry = CodebookRegistry(
            load_section(job.config_path, "codebook", CodebookConfig).uri
        )
        self._check_state()
        feature_store = open_feature_store(Path(job.config_path).parent)
        self._log = open_code_log(feature_store.config)
        self._online = FeastOnlineTables(feature_store)
        self._views = {self._view: CODE_ROWS}
        if reads_aligned_vectors(job.config_path):
            manifest = read_manifest(self._registry.uri, job.codebook_version)
            self._views[vector_view_name(manifest.encoder_version)] = VECTOR_ROWS
        self._online.check_views(self._views)
        self._input = load_section(job.config_path, "data", DataConfig)
        self._catalogue = read_catalogue_times(self._input)
        self._check_sources()
        self._counts = BackfillCounts()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second backfill of this version away.

        Yields:
            Nothing.

        Raises:
            ServiceUnavailableError: If one is at work.
        """
        path = progress_path(self._log.root, self._job.codebook_version).with_suffix(".lock")
        try:
            with exclusive(path, wait_seconds=0):
                yield
        except LockTakenError as error:
            raise ServiceUnavailableError(
                f"another process is filling {self._view} of {self._log.root}; let it finish, or "
                f"{error}"
            ) from error

    def run(self, engine: Engine) -> BackfillCounts:
        """Do what is left to do.

        Args:
            engine: Where pieces are written.

        Returns:
            What was done.
        """
        self._progress = BackfillProgress(self._log.root, self._job.codebook_version)
        if not all(map(self._log.exists, self._views)):
            # Before there is a log again: killed in between, nothing else tells that it was gone.
            self._progress.forget()
        for name, rows in self._views.items():
            self._log.create(name, rows)
        self._fill_from_log(engine)
        self._fill_from_catalogue(engine)
        self._check_state_again()
        logger.info("backfill_done codebook_version=%s %s", *self._words)
        return self._counts

    def _fill_from_log(self, engine: Engine) -> None:
        version = self._job.codebook_version
        encoder_version = read_manifest(self._registry.uri, version).encoder_version
        progress = self._progress
        known = progress.done if progress.is_finished else frozenset()
        survey = Survey(self._log, encoder_version, known)
        wanted = self._wanted(survey.parts())
        for _ in range(MAX_LISTINGS):
            # Listed anew: a scan may miss a part that is written meanwhile, and show the next one,
            # whose offsets are noted as the end. What lies before it is there by now.
            parts = survey.parts()
            # A source that is new since the first look has nothing that is wanted.
            wanted = {s: Offsets(0, 0) for part in parts for s in part.offsets} | wanted
            left_out = self._run(engine, cut_log(parts, wanted, progress.done), "log")
            if left_out is None:
                break
            survey.left_out |= left_out
        else:
            raise DataError(
                f"parts of {self._log.root / CONTENT_LOG} vanished {MAX_LISTINGS} times while they "
                "were read; raise compaction.grace_seconds, then run the backfill again"
            )
        self._counts.num_damaged_parts = len(survey.unread())
        # A damaged part may be mended and come back: its offsets are not done.
        if not self._counts.num_damaged_parts:
            progress.finish(wanted, survey.listed_names())

    def _wanted(self, parts: Sequence[PartFacts]) -> dict[Source, Offsets]:
        """Return the offsets to fill: from where an earlier backfill ended to the given ends."""
        ends: dict[Source, int] = {}
        for part in parts:
            for source, held in part.offsets.items():
                ends[source] = max(ends.get(source, 0), held.end)
        done = self._progress.ends
        self._check_up_to(ends.keys() | done.keys())
        return {
            source: Offsets(done.get(source, -1), min(end, self._up_to.get(source, end)))
            for source, end in ends.items()
        }

    def _fill_from_catalogue(self, engine: Engine) -> None:
        if self._catalogue is None:
            return
        written = self._log.tables(self._view, [ITEM_ID, EVENT_TIMESTAMP])
        is_wanted_N = ~_has_row(self._catalogue, written)
        path = Path(self._input.input_dir) / "items.parquet"
        self._run(engine, list(cut_catalogue(path, is_wanted_N)), "catalogue")

    def _run(self, engine: Engine, pieces: Sequence[Piece], source: str) -> frozenset[str] | None:
        """Write pieces; return None, or if any was cut short the damaged parts among them."""
        if not pieces:
            return None
        meter = _Meter(self._job.codebook_version, source, sum(each.num_rows for each in pieces))
        cut: list[PieceResult] = []
        for result in engine.run(pieces):
            if result.is_cut:
                cut.append(result)
            if result.finished:
                self._progress.add(result.finished)
            self._counts.add(result.counts)
            for each in result.refusals:
                logger.warning(
                    "backfill_refused reason=%s count=%d first_item_id=%d detail=%r",
                    each.reason, each.count, each.first_item_id, each.detail,
                )  # fmt: skip
            meter.add(result.num_rows)
        meter.show()
        return frozenset().union(*(each.left_out for each in cut)) if cut else None

    @property
    def _words(self) -> tuple[str, BackfillCounts]:
        return self._job.codebook_version, self._counts

    def _check_state(self) -> None:
        version = self._job.codebook_version
        self._registry.check_published(version)
        state = self._registry.states()[version]
        if state not in _WRITABLE:
            known = ", ".join(self._registry.versions(*_WRITABLE)) or "none"
            raise CodebookError(
                f"codebook version {version!r} is {state.value} in {self._registry.uri}, only a "
                f"{', '.join(_WRITABLE)} one has a view to be filled (there are: {known}); see "
                "`qarm codebook list`"
            )

    def _check_state_again(self) -> None:
        """Take back what was written online for a view that was dropped meanwhile."""
        try:
            self._check_state()
        except CodebookError:
            if self._online.remove_if_gone(self._view):
                logger.warning("rows_taken_back view=%s because=dropped during a write", self._view)
            raise

    def _check_sources(self) -> None:
        if self._log.exists(CONTENT_LOG):
            # It is there: this checks its columns.
            self._log.create(CONTENT_LOG, CONTENT_LOG_ROWS)
        elif self._catalogue is None:
            raise DataError(
                f"there is nothing to fill {self._view} from: neither {self._log.root}/"
                f"{CONTENT_LOG} nor {self._input.input_dir}/items.parquet is there; run "
                "`qarm-stream run` so that events are logged, or set data.input_dir"
            )

    def _check_up_to(self, sources: Iterable[Source]) -> None:
        known = set(sources)
        own_topic = load_section(self._job.config_path, "stream", _StreamTopic).item_topic
        topics = {topic for topic, _ in known} | {own_topic}
        for (topic, partition), offset in self._up_to.items():
            text = f"{topic}:{partition}:{offset}"
            if offset < 0:
                raise ConfigError(f"--up-to {text}: an offset is 0 or more")
            if topic not in topics:
                raise ConfigError(
                    f"--up-to {text}: no such topic; stream.item_topic is {own_topic!r} and "
                    f"{self._log.root / CONTENT_LOG} holds events of {_listed(known)}"
                )
            if (topic, partition) not in known:
                # No error: all its events may have been refused, or it has had none.
                logger.warning("backfill_bound_unused up_to=%s because=no event is logged", text)


def check_partitions(config_path: str | Path, up_to: Iterable[Source]) -> None:
    """Refuse topics and partitions of which no event is logged, as someone may have mistyped them.

    Args:
        config_path: Path of ``qarm.yaml``.
        up_to: Topics and partitions.

    Raises:
        ConfigError: If one is not known.
    """
    log = open_code_log(open_feature_store(Path(config_path).resolve().parent).config)
    known: set[Source] = set()
    if log.exists(CONTENT_LOG):
        for rows in log.tables(CONTENT_LOG, ["topic", "partition"]):
            pairs = rows.group_by(["topic", "partition"]).aggregate([])
            known |= {(row["topic"], row["partition"]) for row in pairs.to_pylist()}
    for topic, partition in set(up_to) - known:
        raise ConfigError(
            f"--up-to {topic}:{partition}: no event of that topic and partition is logged; "
            f"{log.root / CONTENT_LOG} holds those of {_listed(known)}; name one of these, or "
            "leave it out"
        )


def _listed(sources: Iterable[Source]) -> str:
    return ", ".join(f"{topic}:{partition}" for topic, partition in sorted(sources)) or "nothing"


class _Meter:
    """Logs how fast a run is and how much of it is done.

    Args:
        codebook_version: The version that is filled.
        source: What is read.
        num_rows: Rows of all pieces.
    """

    def __init__(self, codebook_version: str, source: str, num_rows: int) -> None:
        self._labels = (codebook_version, source)
        self._num_rows = num_rows
        self._num_done = 0
        self._started = self._shown = time.monotonic()

    def add(self, num_rows: int) -> None:
        """Note that rows are done; now and then this logs a line.

        Args:
            num_rows: How many.
        """
        self._num_done += num_rows
        if time.monotonic() - self._shown >= _SECONDS_PER_LINE:
            self.show()

    def show(self) -> None:
        """Log a line."""
        self._shown = time.monotonic()
        seconds = max(self._shown - self._started, 1e-9)
        logger.info(
            "backfill_progress codebook_version=%s source=%s share_done=%.3f items=%d "
            "items_per_second=%.0f",
            *self._labels,
            self._num_done / self._num_rows if self._num_rows else 1.0,
            self._num_done,
            self._num_done / seconds,
        )


def _has_row(catalogue: pa.Table, written: Iterator[pa.Table]) -> npt.NDArray[np.bool_]:
    """Tell of each catalogue item whether a row of its id and upload time is written."""
    item_ids_N = catalogue[ITEM_ID].to_numpy()
    times_N = catalogue[UPLOAD_TIMESTAMP].cast(pa.int64()).to_numpy()
    has_row_N = np.zeros(len(item_ids_N), dtype=np.bool_)
    order_N = np.argsort(item_ids_N)
    sorted_ids_N = item_ids_N[order_N]
    for rows in written:
        item_ids_M = rows[ITEM_ID].to_numpy()
        places_M = np.searchsorted(sorted_ids_N, item_ids_M)
        places_M[places_M == len(order_N)] = 0
        items_M = order_N[places_M]
        times_M = rows[EVENT_TIMESTAMP].cast(pa.int64()).to_numpy()
        is_same_M = (item_ids_N[items_M] == item_ids_M) & (times_N[items_M] == times_M)
        has_row_N[items_M[is_same_M]] = True
    return has_row_N
