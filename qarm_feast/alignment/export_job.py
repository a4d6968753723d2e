"""The job behind `qarm align export`: vectors of the whole catalogue as parquet parts.

1. The parts that are not there yet are written into ``<vectors_uri>/.<version>.partial``, one
   machine or many; after each of them the manifest there names it.
2. When all are there, that folder gets its final name by a rename. An export of another catalogue
   that has the name steps aside first: between the two renames there is none, never a mixture.

A killed export goes on with the missing parts, and ends with the same bytes; what another encoder,
catalogue or part size left behind is removed. May import: the encoder, ray (by name).
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import read_encoder_manifest
from qarm_feast.alignment.evaluation_job import check_accepted
from qarm_feast.alignment.export import raw_vectors_folder
from qarm_feast.alignment.export_folder import ExportFolder
from qarm_feast.alignment.export_parts import (
    ExportJob,
    ExportManifest,
    PartResult,
    PartTask,
    PartWriter,
    VectorKind,
)
from qarm_feast.artifact import MANIFEST_NAME, file_sha256, file_stamp
from qarm_feast.config import load_section
from qarm_feast.errors import AlreadyRunningError, DataError, GateRefusedError
from qarm_feast.input_data import ITEMS_FILE, DataConfig, read_catalogue_times
from qarm_feast.shared_state import LockTakenError, exclusive

logger = logging.getLogger(__name__)

EngineName = Literal["local", "ray"]
OnItems = Callable[[int], None]

_SECONDS_PER_LINE = 5.0


@dataclass(frozen=True)
class ExportSummary:
    """What an export did; ``num_written`` of ``num_parts`` files are new, the others stood there.

    ``counts`` says how many items were without content, ``ignored_gates`` what was overruled when
    the export was made.
    """

    folder: Path
    num_items: int
    num_parts: int
    num_written: int
    counts: dict[str, int]
    ignored_gates: tuple[str, ...]


class Engine(Protocol):
    """Where parts are written."""

    def run(self, tasks: Sequence[PartTask], on_items: OnItems) -> Iterator[PartResult]:
        """Write every part, report items as they are done, and yield the results in any order."""
        ...


class LocalEngine:
    """Writes one part after the other in this process.

    Args:
        job: What to write.
    """

    def __init__(self, job: ExportJob) -> None:
        self._job = job

    def run(self, tasks: Sequence[PartTask], on_items: OnItems) -> Iterator[PartResult]:
        """Write every part in order.

        Args:
            tasks: The parts.
            on_items: Called with a number of items when they are encoded.

        Yields:
            Facts of each part's files.
        """
        write = PartWriter(self._job, on_items)
        for task in tasks:
            yield write(task)


class RayEngine:
    """Writes parts by a pool of Ray actors, each with its own encoder; see ``ray_tasks``.

    Args:
        job: What to write.

    Raises:
        MissingDependencyError: If Ray Data is not installed.
    """

    def __init__(self, job: ExportJob) -> None:
        from qarm_feast.ray_tasks import RayTasks

        self._tasks = RayTasks[PartTask, PartResult](
            partial(PartWriter, job), "an export with --engine ray"
        )

    def run(self, tasks: Sequence[PartTask], on_items: OnItems) -> Iterator[PartResult]:
        """Write every part.

        Args:
            tasks: The parts.
            on_items: Called with a number of items when they are encoded.

        Yields:
            Facts of each part's files, as they come.
        """
        for result in self._tasks.run(tasks):
            on_items(next(iter(result.values())).num_items)
            yield result


def export_accepted(
    config_path: str,
    encoder_version: str | None = None,
    *,
    include_raw: bool = False,
    engine: EngineName = "local",
    ignore_gates: bool = False,
) -> ExportSummary:
    """Do :func:`export_catalogue` for an encoder that its last evaluation lets pass.

    Args:
        config_path: Path of ``qarm.yaml``.
        encoder_version: The encoder; None: ``alignment.encoder_version``.
        include_raw: See there.
        engine: See there.
        ignore_gates: Export whatever the gates say. A warning tells which, and the manifest of
            the export keeps it.

    Returns:
        What was done.

    Raises:
        DataError: See there.
        GateRefusedError: If the encoder was not evaluated as it is on this data, or a gate is
            missed.
        AlreadyRunningError: See there.
    """
    config = load_section(config_path, "alignment", AlignmentConfig)
    version = encoder_version or config.encoder_version
    ignored: tuple[str, ...] = ()
    try:
        check_accepted(
            config.model_copy(update={"encoder_version": version}),
            load_section(config_path, "data", DataConfig),
        )
    except GateRefusedError as error:
        if not ignore_gates:
            raise
        logger.warning("export_gates_ignored encoder_version=%s refusal=%r", version, str(error))
        ignored = (str(error),)
    return export_catalogue(
        config_path, version, include_raw=include_raw, engine=engine, ignored_gates=ignored
    )


def export_catalogue(
    config_path: str,
    encoder_version: str,
    *,
    include_raw: bool = False,
    engine: EngineName = "local",
    ignored_gates: tuple[str, ...] = (),
) -> ExportSummary:
    """Encode every item of the catalogue, and put the vectors in place of an earlier export.

    Gates are not asked: an encoder that serves already needs vectors of new items, too.

    Args:
        config_path: Path of ``qarm.yaml``.
        encoder_version: The encoder.
        include_raw: Also write what the encoder's head reads, L2-normalised, into
            ``<vectors_uri>/<encoder version>.raw``. Raw vectors that stand there are always
            replaced with the aligned ones, so that both are of one catalogue.
        engine: ``local`` writes in this process, ``ray`` in many (Ray Data).
        ignored_gates: What an operator overruled, for the manifest.

    Returns:
        What was done; nothing is written if the export is there.

    Raises:
        DataError: If the encoder or the catalogue is missing, the catalogue changes meanwhile, or
            an item has no usable vector.
        ContractError: If the catalogue breaks the input contract.
        MissingDependencyError: If Ray is asked for and not installed.
        AlreadyRunningError: If another process exports this encoder's vectors.
    """
    path = str(Path(config_path).resolve())
    config = load_section(path, "alignment", AlignmentConfig)
    items_path = Path(load_section(path, "data", DataConfig).input_dir) / ITEMS_FILE
    job = ExportJob(path, encoder_version, str(items_path))
    with _lock(config, encoder_version):
        export = _Export(job, config, ignored_gates, include_raw=include_raw)
        return export.run(RayEngine(job) if engine == "ray" else LocalEngine(job))


@contextmanager
def _lock(config: AlignmentConfig, version: str) -> Iterator[None]:
    path = Path(config.vectors_uri) / f".{version}.lock"
    try:
        with exclusive(path, wait_seconds=0):
            yield
    except LockTakenError as error:
        raise AlreadyRunningError(
            f"another process exports the vectors of encoder {version!r} into "
            f"{config.vectors_uri}; let it finish, or {error}"
        ) from error


class _Export:
    """One run: what stands, what is missing, and how it gets its name."""

    def __init__(
        self,
        job: ExportJob,
        config: AlignmentConfig,
        ignored_gates: tuple[str, ...],
        *,
        include_raw: bool,
    ) -> None:
        self._job = job
        # Before the hash: what changes while it is made is seen as well.
        self._stamp = file_stamp(Path(job.items_path))
        manifest = read_encoder_manifest(config.encoder_uri, job.encoder_version)
        encoder_hash = file_sha256(Path(config.encoder_uri) / manifest.version / MANIFEST_NAME)
        catalogue = read_catalogue_times(load_section(job.config_path, "data", DataConfig))
        if catalogue is None:
            raise DataError(f"there is no catalogue at {job.items_path}; set data.input_dir")
        catalogue_hash = file_sha256(Path(job.items_path))
        folder = Path(config.vectors_uri) / job.encoder_version
        folders: dict[VectorKind, Path] = {"aligned": folder}
        raw_folder = raw_vectors_folder(config.vectors_uri, job.encoder_version)
        if include_raw or raw_folder.exists():
            # First: the aligned vectors are what others wait for.
            folders = {"raw": raw_folder, "aligned": folder}
        self._targets = [
            ExportFolder(
                folder,
                ExportManifest(
                    vectors=kind,
                    encoder_version=manifest.version,
                    encoder_hash=encoder_hash,
                    catalogue_hash=catalogue_hash,
                    rows_per_part=config.export_rows_per_part,
                    num_items=catalogue.num_rows,
                    ignored_gates=ignored_gates,
                ),
            )
            for kind, folder in folders.items()
        ]

    def run(self, engine: Engine) -> ExportSummary:
        """Write what is missing and give it its name.

        Args:
            engine: Where parts are written.

        Returns:
            What was done.
        """
        tasks = self._tasks()
        if tasks:
            meter = _Meter(self._job.encoder_version, sum(task.end - task.first for task in tasks))
            for result in engine.run(tasks, meter.add):
                self._check_catalogue()
                for target in self._targets:
                    target.note(result)
            meter.show()
        for target in self._targets:
            target.publish()
        aligned = self._targets[-1]
        logger.info(
            "vectors_exported items=%d parts=%d parts_written=%d path=%s",
            aligned.manifest.num_items, len(aligned.manifest.parts), len(tasks), aligned.folder,
        )  # fmt: skip
        return ExportSummary(
            folder=aligned.folder,
            num_items=aligned.manifest.num_items,
            num_parts=len(aligned.manifest.parts),
            num_written=len(tasks),
            counts=aligned.manifest.counts,
            ignored_gates=aligned.manifest.ignored_gates,
        )

    def _check_catalogue(self) -> None:
        """Refuse to name a part that may be of another catalogue than the manifest says."""
        if file_stamp(Path(self._job.items_path)) != self._stamp:
            raise DataError(
                f"{self._job.items_path} changed while its vectors were exported: its parts would "
                "be of unequal catalogues; run `qarm align export` again"
            )

    def _tasks(self) -> list[PartTask]:
        """Return the parts of which a file is missing."""
        wanted = self._targets[-1].manifest
        size, num_items = wanted.rows_per_part, wanted.num_items
        tasks = []
        for number in range(len(wanted.part_names())):
            missing = {
                target.manifest.vectors: path
                for target in self._targets
                if (path := target.missing(number)) is not None
            }
            if missing:
                end = min((number + 1) * size, num_items)
                tasks.append(PartTask(number * size, end, missing))
        return tasks


class _Meter:
    """Logs how fast an export is and how much of it is done."""

    def __init__(self, encoder_version: str, num_items: int) -> None:
        self._encoder_version = encoder_version
        self._num_items = num_items
        self._num_done = 0
        self._started = self._shown = time.monotonic()

    def add(self, num_items: int) -> None:
        """Note that items are encoded; now and then this logs a line."""
        self._num_done += num_items
        if time.monotonic() - self._shown >= _SECONDS_PER_LINE:
            self.show()

    def show(self) -> None:
        """Log a line."""
        self._shown = time.monotonic()
        seconds = max(self._shown - self._started, 1e-9)
        logger.info(
            "export_progress encoder_version=%s items=%d of=%d items_per_second=%.0f",
            self._encoder_version, self._num_done, self._num_items, self._num_done / seconds,
        )  # fmt: skip
