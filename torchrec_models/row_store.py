"""Where training rows lie: the folder of one feature service and its manifest.

    <rows_uri>/<service>/manifest.json            what is current, replaced in one step
    <rows_uri>/<service>/<build>/<split>.parquet  rows in time order, never altered
    <rows_uri>/<service>/<build>/vocabularies.json
    <rows_uri>/<service>/<build>/snapshot/*.npy
    <rows_uri>/<service>/<build>/side_tables/*

Shape letters: I items, L levels, D aligned embedding width.
May import: filelock, numpy, pydantic, pyarrow; neither feast nor torch.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qarm_feast.errors import DataError
from qarm_feast.schema import CODES, SPLITS, TIMESTAMP
from torchrec_models.config import CodeSizes, RankerConfig
from torchrec_models.prefixes import build_prefixes
from torchrec_models.side_tables import SIDE_TABLES, SideTables
from torchrec_models.vocabulary import Vocabularies

ManifestT = TypeVar("ManifestT", bound=BaseModel)


class RowsManifest(BaseModel):
    """What a build of training rows holds and what it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    service: str
    codebook_version: str
    encoder_version: str
    build: str
    created: str
    label_names: tuple[str, ...]
    user_columns: tuple[str, ...]
    level_sizes: tuple[int, ...]
    num_neighbors: int
    pool_size: int
    vector_dim: int
    raw_vector_dim: int = Field(description="Width of raw vectors; 0: they were not exported.")
    num_rows: Mapping[str, int] = Field(description="Rows per split.")
    counts: Mapping[str, int] = Field(description="What the builder counted, by name.")


@dataclass(frozen=True)
class SnapshotArrays:
    """Arrays of an item snapshot, one entry per item, in any order.

    ``event_times_I`` is the time of the item's code row in microseconds; ``rq_IL`` holds
    :data:`~qarm_feast.schema.ABSENT_CODE` for a deleted item; ``vectors_ID`` zero rows where
    there is no vector, None when the encoder's vectors were not exported; ``raw_vectors_IE`` the
    same of what the encoder's head reads.
    """

    item_ids_I: npt.NDArray[np.int64]
    event_times_I: npt.NDArray[np.int64]
    rq_IL: npt.NDArray[np.int64]
    vectors_ID: npt.NDArray[np.float32] | None = None
    raw_vectors_IE: npt.NDArray[np.float32] | None = None

    def write(self, folder: Path) -> None:
        """Write the arrays, sorted by item id, as ``.npy`` files that can be mapped."""
        order_I = np.argsort(self.item_ids_I, kind="stable")
        np.save(folder / "item_ids.npy", self.item_ids_I[order_I])
        np.save(folder / "event_times.npy", self.event_times_I[order_I])
        np.save(folder / "rq.npy", self.rq_IL[order_I].astype(np.int32))
        for source, vectors in (("aligned", self.vectors_ID), ("raw", self.raw_vectors_IE)):
            if vectors is not None:
                np.save(folder / vectors_file(source), vectors[order_I].astype(np.float32))


def parse_manifest(kind: type[ManifestT], path: Path, remedy: str) -> ManifestT:
    """Return a manifest that this version or an earlier one wrote.

    Args:
        kind: What it is.
        path: Its file.
        remedy: The next command, for the error.

    Returns:
        The manifest.

    Raises:
        DataError: If it has another form: that of a version in which more, or less, was stored.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(
            f"{path} has another form than this version reads; {remedy}: {error}"
        ) from error


def vectors_file(source: str) -> str:
    """Return the file of the vectors of one ``ranker.vector_source`` in a snapshot."""
    return f"vectors_{source}.npy"


class RowStore:
    """The current build of one service's rows, read only."""

    def __init__(self, rows_uri: str, service: str) -> None:
        self.folder = Path(rows_uri) / service
        manifest_path = self.folder / "manifest.json"
        if not manifest_path.exists():
            raise DataError(f"no training rows at {self.folder}; run `qarm-rank rows` first")
        self.manifest = parse_manifest(RowsManifest, manifest_path, "run `qarm-rank rows` again")
        self.build_folder = self.folder / self.manifest.build

    @property
    def snapshot_folder(self) -> Path:
        """Folder of the item snapshot."""
        return self.build_folder / "snapshot"

    def split_path(self, split: str) -> Path:
        """Return the parquet file of one split."""
        return self.build_folder / f"{split}.parquet"

    def side_tables(self) -> SideTables:
        """Return item columns and counts."""
        return SideTables.load(self.build_folder / SIDE_TABLES)

    def vocabularies(self) -> Vocabularies:
        """Return the vocabularies learnt from the train rows."""
        return Vocabularies.from_json(
            (self.build_folder / "vocabularies.json").read_text(encoding="utf-8")
        )

    def run_vocabularies(self, config: RankerConfig) -> Vocabularies:
        """Return the vocabularies of a training run: with prefixes where they are features.

        Args:
            config: The ranker section; the same rows serve runs with tables of any size.

        Returns:
            What a checkpoint of the run keeps.
        """
        vocabularies = self.vocabularies()
        if not (config.has("prefix") or config.has("history_prefix")):
            return vocabularies
        item_ids_I = np.load(self.snapshot_folder / "item_ids.npy", mmap_mode="r")
        is_train_I = np.isin(item_ids_I, vocabularies.item_ids.ids_V)
        rq_NL = np.load(self.snapshot_folder / "rq.npy", mmap_mode="r")[is_train_I]
        prefixes = build_prefixes(
            rq_NL.astype(np.int64), config.max_prefix_length, config.prefix_table_rows
        )
        return replace(vocabularies, prefixes=prefixes)


def publish_rows(
    rows_uri: str,
    manifest: RowsManifest,
    rows: pa.Table,
    vocabularies: Vocabularies,
    snapshot: SnapshotArrays,
    side_tables: SideTables,
) -> RowStore:
    """Make a build the current one of its service and return it.

    1. Rows, vocabularies, snapshot and side tables are written under a temporary name and flushed.
    2. The folder gets its own name.
    3. ``manifest.json`` is replaced: from here on readers see the new build.
    4. Builds older than the one before are removed; a trainer may still read that one.

    Args:
        rows_uri: ``ranker.rows_uri``.
        manifest: Names the service and the build.
        rows: Rows of all splits, schema :func:`row_schema`.
        vocabularies: Learnt from the train rows.
        snapshot: Codes and vectors of the items.
        side_tables: Item columns, and what was counted in the train rows.

    Returns:
        The store of the new build.
    """
    folder = Path(rows_uri) / manifest.service
    ordered = rows.sort_by([("event_timestamp", "ascending"), ("user_id", "ascending")])
    with publishing(folder) as temporary:
        (temporary / "snapshot").mkdir()
        for split in SPLITS:
            part = ordered.filter(pc.equal(ordered["split"], split))
            pq.write_table(part, temporary / f"{split}.parquet", row_group_size=65536)
        (temporary / "vocabularies.json").write_text(vocabularies.to_json(), encoding="utf-8")
        snapshot.write(temporary / "snapshot")
        side_tables.save(temporary / SIDE_TABLES)
        sync_folder(temporary)
        os.replace(temporary, folder / manifest.build)
        write_atomically(folder / "manifest.json", manifest.model_dump_json(indent=2))
        for old in sorted(folder.glob("build-*"))[:-2]:
            shutil.rmtree(old)
    return RowStore(rows_uri, manifest.service)


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """Let one process at a time put something new into a folder.

    Args:
        folder: Made where it is missing; its ``.lock`` stays.

    Yields:
        An empty folder in it to write into and rename; what a killed process left is gone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for leftover in folder.glob(".*.tmp"):
            # A text file of write_atomically is its writer's, who may not hold this lock.
            if leftover.is_dir():
                shutil.rmtree(leftover)
        temporary = folder / f".{os.getpid()}.tmp"
        temporary.mkdir()
        yield temporary


def row_schema(label_names: tuple[str, ...], user_columns: list[pa.Field]) -> pa.Schema:
    """Return the schema of training rows; lists are never null, codes padded with ABSENT_CODE.

    Args:
        label_names: Bool columns, one per task.
        user_columns: Fields of the user profile.

    Returns:
        The schema, labels before codes, the user columns last.

    Raises:
        DataError: If a user column has the name of a label or of another column of the rows.
    """
    schema = pa.schema(
        [
            pa.field("user_id", pa.int64()),
            pa.field("item_id", pa.int64()),
            pa.field("event_timestamp", TIMESTAMP),
            pa.field("split", pa.string()),
            *[pa.field(name, pa.bool_()) for name in label_names],
            pa.field("rq_code", CODES),
            pa.field("vq_code", CODES),
            pa.field("history_item_ids", CODES),
            pa.field("history_timestamps", CODES),
            *user_columns,
        ]
    )
    if taken := [field.name for field in user_columns if schema.names.count(field.name) > 1]:
        raise DataError(
            f"users.parquet has the columns {taken}, which training rows use for something else "
            "(a task of interactions.parquet, or a column of the joins); rename them"
        )
    return schema


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Flush every file below a folder, and the folders, to the disk."""
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def code_sizes(manifest: RowsManifest) -> CodeSizes:
    """Return the sizes of the codebook that the rows were built with."""
    return CodeSizes(
        level_sizes=manifest.level_sizes,
        pool_size=manifest.pool_size,
        vector_dim=manifest.vector_dim,
        raw_vector_dim=manifest.raw_vector_dim,
    )
