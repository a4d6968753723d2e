"""The parts of an export: which items each holds, how one is written, what the manifest tells.

    <vectors_uri>/<encoder version>/part-00000-<key>.parquet
    <vectors_uri>/<encoder version>/_manifest.json

The key stands for all that decides the vectors: encoder, catalogue, rows per part. A part of
another encoder or catalogue has another name, so it is never taken for one of this export.

Shape letters in this file: N items, D vector width.
May import: numpy, pyarrow, the encoder.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import load_encoder
from qarm_feast.alignment.export import vector_table
from qarm_feast.alignment.features import FeatureCache, ItemFeatures
from qarm_feast.artifact import file_sha256, replace_file, sha256
from qarm_feast.config import load_section
from qarm_feast.input_data import CONTENT_COLUMNS, UPLOAD_TIMESTAMP, plain_strings
from qarm_feast.schema import ITEM_ID
from qarm_feast.vector_files import EXPORT_MANIFEST
from qarm_feast.vector_source import check_usable

VectorKind = Literal["aligned", "raw"]

_KEY_DIGITS = 8
_ROWS_PER_READ = 1024
_ROWS_AT_ONCE = 16_384
_BYTES_AT_ONCE = 256 << 20
"""Items are encoded when so many, or so many bytes of content, are in memory. Vectors do not
depend on it, files do: each time makes a row group."""
_CACHE_BYTES = 1 << 30
_NO_FAULTS = ("present", "encoded", "repeated")


class PartFacts(BaseModel):
    """What the manifest says of one part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_items: int
    sha256: str
    counts: dict[str, int]


class ExportManifest(BaseModel):
    """What an export is made of, and how far it has come.

    ``encoder_hash`` is that of the encoder's manifest, ``catalogue_hash`` that of
    ``items.parquet``. ``counts`` says how many items were without content; ``ignored_gates``
    which gates an operator overruled.
    """

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    vectors: VectorKind
    encoder_version: str
    encoder_hash: str
    catalogue_hash: str
    rows_per_part: int
    num_items: int
    ignored_gates: tuple[str, ...] = ()
    counts: dict[str, int] = {}
    parts: dict[str, PartFacts] = {}

    @property
    def key(self) -> str:
        """Hash over all that decides the bytes of the parts."""
        fields = self.model_dump(exclude={"parts", "counts", "ignored_gates"})
        return sha256(json.dumps([fields, _ROWS_AT_ONCE, _BYTES_AT_ONCE]).encode())

    def part_names(self) -> list[str]:
        """Return the file names of all parts, in the order of the items."""
        num_parts = -(-self.num_items // self.rows_per_part)
        return [
            f"part-{number:05d}-{self.key[:_KEY_DIGITS]}.parquet" for number in range(num_parts)
        ]

    def add(self, parts: Mapping[str, PartFacts]) -> None:
        """Name further parts; whatever the order in which they come, the manifest is the same."""
        self.parts = dict(sorted({**self.parts, **parts}.items()))
        counts: Counter[str] = Counter()
        for part in self.parts.values():
            counts.update(part.counts)
        self.counts = dict(sorted(counts.items()))

    def write(self, folder: Path) -> None:
        """Put this manifest in place of the one in ``folder``."""
        replace_file(folder / EXPORT_MANIFEST, self.model_dump_json(indent=2).encode() + b"\n")


def read_export_manifest(folder: Path) -> ExportManifest | None:
    """Return the manifest in ``folder``; None if there is none that this version wrote."""
    try:
        return ExportManifest.model_validate_json((folder / EXPORT_MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        # Vectors of a user's own making, or of an earlier version: an export replaces them.
        return None


@dataclass(frozen=True)
class ExportJob:
    """What every part has in common."""

    config_path: str
    encoder_version: str
    items_path: str


@dataclass(frozen=True)
class PartTask:
    """Rows of ``items.parquet`` from ``first`` up to ``end``, and the files to write them to."""

    first: int
    end: int
    paths: Mapping[VectorKind, Path]


PartResult = Mapping[Path, PartFacts]
"""What was written, by file."""


class PartWriter:
    """Encodes items and writes their vectors.

    Args:
        job: What to write.
        on_items: Called with the number of items each time that some are encoded.

    Raises:
        DataError: If the encoder is missing.
        CorruptArtifactError: If a file of it is damaged.
    """

    def __init__(self, job: ExportJob, on_items: Callable[[int], None] = lambda _: None) -> None:
        config = load_section(job.config_path, "alignment", AlignmentConfig)
        self._items_path = Path(job.items_path)
        self._encoder = load_encoder(
            config.encoder_uri, job.encoder_version, self._items_path.parent
        )
        self._cache = KnownFeatures(config.features_uri)
        self._on_items = on_items

    def __call__(self, task: PartTask) -> PartResult:
        """Write the files of one part; killed at any point, each is there or it is not.

        Args:
            task: Which items, and where to.

        Returns:
            Facts by file.

        Raises:
            DataError: If a vector is NaN, infinite or of length zero.
        """
        counts: Counter[str] = Counter()
        with _part_files(task.paths.values()) as files:
            for items in read_items(self._items_path, task.first, task.end):
                features = self._encoder.read_features(items, self._cache)
                aligned_ND = self._encoder.project(features)
                check_usable(items[ITEM_ID].to_numpy(), aligned_ND)
                counts.update(content_counts(features))
                for kind, path in task.paths.items():
                    vectors_ND = aligned_ND if kind == "aligned" else features.raw_vectors()
                    files[path].write(vector_table(items, vectors_ND))
                self._on_items(items.num_rows)
        num_items = task.end - task.first
        return {
            path: PartFacts(num_items=num_items, sha256=file_sha256(path), counts=dict(counts))
            for path in task.paths.values()
        }


class KnownFeatures(FeatureCache):
    """What training and evaluation left in the cache, read once and never added to.

    A catalogue may be larger than memory; what is cached of it is held while it is small.
    """

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._held: dict[tuple[str, str], dict[str, np.ndarray]] = {}

    def read(self, modality: str, backbone_hash: str) -> dict[str, np.ndarray]:
        """Return the cached features by value hash, in a dictionary of the caller's own."""
        key = modality, backbone_hash
        if key not in self._held:
            path = self._path(modality, backbone_hash)
            is_small = path.is_file() and path.stat().st_size <= _CACHE_BYTES
            self._held[key] = super().read(modality, backbone_hash) if is_small else {}
        return dict(self._held[key])

    def write(self, modality: str, backbone_hash: str, known: Mapping[str, np.ndarray]) -> None:
        """Keep nothing: an export reads each value once."""


def content_counts(features: ItemFeatures) -> Counter[str]:
    """Count the items without content, and by modality those that lack it or cannot be read.

    Args:
        features: Features of some items.

    Returns:
        ``without_content``, and ``<modality>_<what is wrong>``. Not how many values were cached
        or repeated: that says nothing about the items.
    """
    faults = {
        f"{modality}_{outcome}": count
        for modality, outcomes in features.counts.items()
        for outcome, count in outcomes.items()
        if modality != "all" and outcome not in _NO_FAULTS
    }
    return Counter({"without_content": features.counts["all"]["without_content"]} | faults)


def read_items(path: Path, first: int, end: int) -> Iterator[pa.Table]:
    """Yield rows of the catalogue with what an encoder may read, as many as memory shall hold.

    Args:
        path: ``items.parquet``.
        first: First row.
        end: The row after the last.

    Yields:
        Ids, upload times and content columns, in file order.
    """
    waiting: list[pa.Table] = []
    for table in _read_rows(path, first, end):
        waiting.append(table)
        num_rows = sum(each.num_rows for each in waiting)
        if num_rows >= _ROWS_AT_ONCE or sum(each.nbytes for each in waiting) >= _BYTES_AT_ONCE:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _read_rows(path: Path, first: int, end: int) -> Iterator[pa.Table]:
    # Not read ahead: a row group may be larger than what a job may hold.
    with pq.ParquetFile(path, pre_buffer=False) as file:
        wanted = (ITEM_ID, UPLOAD_TIMESTAMP, *CONTENT_COLUMNS)
        columns = [name for name in wanted if name in file.schema_arrow.names]
        start = 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            batches = file.iter_batches(
                _ROWS_PER_READ, row_groups=[group], columns=columns, use_threads=False
            )
            while start < min(stop, end) and stop > first:
                batch = next(batches)
                low, high = max(first - start, 0), min(end - start, batch.num_rows)
                if low < high:
                    yield plain_strings(pa.table(batch.slice(low, high - low)))
                start += batch.num_rows
            start = stop


class _PartFile:
    """A parquet file under a temporary name."""

    def __init__(self, path: Path) -> None:
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Append a row group."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._temporary, table.schema)
        self._writer.write_table(table, row_group_size=table.num_rows)

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            self._writer.close()

    def put(self) -> None:
        """Make the file safe, and give it its name."""
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        self._temporary.rename(self._path)

    def discard(self) -> None:
        """Remove what was written under the temporary name, if anything was."""
        self._temporary.unlink(missing_ok=True)


@contextmanager
def _part_files(paths: Iterable[Path]) -> Iterator[dict[Path, _PartFile]]:
    files = {path: _PartFile(path) for path in paths}
    try:
        try:
            yield files
        finally:
            for file in files.values():
                file.close()
        for file in files.values():
            file.put()
    finally:
        for file in files.values():
            file.discard()
