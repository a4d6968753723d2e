"""The codebook: one immutable, versioned artifact that turns aligned vectors into codes.

Shape letters in this file: N items, D embedding width, L RQ levels, V VQ neighbours.
May import: NumPy, safetensors, the quantizers.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from pydantic import Field, model_validator

from qarm_feast.artifact import read_verified, sha256
from qarm_feast.config import Section
from qarm_feast.errors import CodebookError, DataError
from qarm_feast.object_store import Place, place
from qarm_feast.overrides import NO_ROW, Overrides
from qarm_feast.quantizers.base import Arrays, Codes, Embeddings, check_embeddings
from qarm_feast.quantizers.devices import ON_CPU, Device, Gpu, GpuBackend, Placement
from qarm_feast.quantizers.rq import ResidualQuantizer, RqConfig, level_kinds, level_sizes
from qarm_feast.quantizers.vq import NeighborQuantizer, VqConfig
from qarm_feast.registry import (
    Manifest,
    check_version_name,
    damage_remedy,
    read_manifest,
    write_artifact,
)
from qarm_feast.training_reference import TrainingReference
from qarm_feast.vector_source import (
    VectorsInMemory,
    VectorSource,
    checked_unit_rows,
    take_unit_rows,
)

ItemIds = npt.NDArray[np.int64]
_SUFFIX = ".safetensors"
_INDEX_PART = "vq_index"
_TRAINING_PART = "training"
_OVERRIDES_PART, _OVERRIDDEN_CODES = "overrides", "rq_codes"
_LISTS_PART, _LISTED_ROWS = "list_overrides", "vq_codes"
_INDEX_SUFFIX = ".faiss"


class QuantizerConfig(Section):
    """Section ``quantizer``."""

    rq: RqConfig = Field(default=RqConfig(), description="Residual quantizer.")
    vq: VqConfig = Field(default=VqConfig(), description="Neighbour quantizer.")
    device: Device = Field(
        default="auto",
        description="Where vectors get their codes: cpu, cuda (a GPU), or auto: cuda if "
        "the backend sees a GPU. Training, and the search of an hnsw pool, are on the CPU.",
    )
    gpu_backend: GpuBackend = Field(
        default="faiss",
        description="What drives the GPU: faiss (an ivf_flat pool needs it), or torch.",
    )
    gpu_number: int = Field(default=0, ge=0, description="Which GPU, from 0.")
    gpu_scratch_mib: int | None = Field(
        default=None,
        ge=0,
        description="Memory that faiss sets aside on the GPU for searches, MiB; null leaves it to "
        "faiss (about 1.5 GiB). Processes that share a GPU share its memory.",
    )
    enable_cpu_fallback: bool = Field(
        default=False,
        description="Whether the processor takes over when the GPU fails (same codes, slower); "
        "else the process stops, nothing half-written.",
    )

    @model_validator(mode="after")
    def _sizes_agree(self) -> "QuantizerConfig":
        # So many points that only what the configuration itself contradicts is refused here.
        try:
            level_sizes(self.rq, sys.maxsize)
        except CodebookError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def placement(self) -> Placement:
        """Where a process with this configuration searches."""
        gpu = Gpu(self.gpu_number, self.gpu_scratch_mib)
        return Placement(self.device, self.gpu_backend, gpu, self.enable_cpu_fallback)


@dataclass(frozen=True)
class EncoderFacts:
    """Where training vectors come from.

    ``behaviour_cutoff`` is the newest interaction that the encoder or the choice of items saw
    (None: they saw none).
    """

    version: str
    hash: str
    behaviour_cutoff: datetime | None


@dataclass(frozen=True)
class ItemCodes:
    """Codes of some items, row by row, int64: pool rows ``vq_NV``, nearest first; ``rq_NL``."""

    item_ids_N: ItemIds
    vq_NV: Codes
    rq_NL: Codes


@dataclass(frozen=True)
class ItemVectors:
    """Aligned embeddings of some items and the hash of the content they come from, row by row."""

    item_ids_N: ItemIds
    content_hashes_N: Sequence[str]
    x_ND: Embeddings


class Codebook:
    """Encodes items by its quantizers and its override tables; see :meth:`encode`.

    Immutable, and safe to share between threads. ``overrides`` are stored RQ codes,
    ``list_overrides`` stored VQ lists (None: there are none). ``training`` tells how its training
    set used the codes; None in artifacts that were stored before this was kept.
    """

    def __init__(
        self,
        manifest: Manifest,
        rq: ResidualQuantizer,
        vq: NeighborQuantizer,
        overrides: Overrides,
        training: TrainingReference | None = None,
        list_overrides: Overrides | None = None,
    ) -> None:
        self.manifest = manifest
        self.rq = rq
        self.vq = vq
        self.overrides = overrides
        self.training = training
        self.list_overrides = list_overrides or Overrides.empty(vq.num_neighbors)

    @property
    def version(self) -> str:
        """Version name."""
        return self.manifest.version

    @property
    def embedding_dim(self) -> int:
        """Width of the vectors that this codebook takes."""
        return self.manifest.embedding_dim

    @classmethod
    def train(
        cls,
        version: str,
        item_ids_N: ItemIds,
        x_ND: Embeddings,
        *,
        config: QuantizerConfig,
        encoder: EncoderFacts,
        created: datetime,
    ) -> "Codebook":
        """Train on vectors in memory; see :meth:`train_from`.

        Args:
            version: Name of the new version.
            item_ids_N: Items, each once.
            x_ND: Their aligned embeddings, float32; rows are scaled to length 1.
            config: Sizes and seeds.
            encoder: Where the vectors come from.
            created: Time of training, aware UTC.

        Returns:
            A codebook that is not stored yet.

        Raises:
            DataError: If there are no items, an id comes twice, or a vector is NaN, infinite or
                of length zero.
            CodebookError: If there are too few (distinct) vectors for the sizes asked for.
        """
        source = VectorsInMemory(item_ids_N, x_ND)
        return cls.train_from(version, source, config=config, encoder=encoder, created=created)

    @classmethod
    def train_from(
        cls,
        version: str,
        source: VectorSource,
        *,
        config: QuantizerConfig,
        encoder: EncoderFacts,
        created: datetime,
    ) -> "Codebook":
        """Train RQ and VQ on items that have a train row; in whatever order they come.

        The source is read twice, and held in memory are at a time: its ids, and RQ's sample
        (``rq.train_sample_size`` rows, twice) or VQ's pool (``vq.pool_size`` rows).

        Args:
            version: Name of the new version.
            source: The items and their aligned embeddings; rows are scaled to length 1.
            config: Sizes and seeds.
            encoder: Where the vectors come from.
            created: Time of training, aware UTC.

        Returns:
            A codebook that is not stored yet.

        Raises:
            DataError: If there are no items, an id comes twice, or a vector is NaN, infinite or
                of length zero.
            CodebookError: If there are too few (distinct) vectors for the sizes asked for.
            ConfigError: If the version's name is not legal.
        """
        check_version_name(version)
        given_ids_N = source.item_ids()
        order_N = np.argsort(given_ids_N, kind="stable")
        ids_N = given_ids_N[order_N].astype(np.int64)
        check_distinct(ids_N)
        rq, vq = ResidualQuantizer(config.rq), NeighborQuantizer(config.vq)
        # Before the hours of k-means: what VQ refuses is known from the counts alone.
        pool_P = vq.pool_rows(len(ids_N))
        _check_pool_serves(len(pool_P), len(ids_N), vq.num_neighbors)
        training = _train_levels(rq, source, order_N[rq.training_rows(len(ids_N))])
        vq.set_pool(take_unit_rows(source, order_N[pool_P]), ids_N[pool_P])
        manifest = Manifest(
            version=version,
            encoder_version=encoder.version,
            encoder_hash=encoder.hash,
            behaviour_cutoff=encoder.behaviour_cutoff,
            embedding_dim=source.embedding_dim,
            level_sizes=rq.level_sizes,
            level_kinds=level_kinds(config.rq, rq.level_sizes),
            num_neighbors=vq.num_neighbors,
            pool_size=len(vq.pool_item_ids_P),
            search=vq.search_kind,
            search_settings=vq.search_settings,
            search_recall=vq.search_recall,
            seed=config.rq.seed,
            num_training_items=len(ids_N),
            files={},
            created=created,
        )
        return cls(manifest, rq, vq, Overrides.empty(len(rq.level_sizes)), training).with_hashes()

    @classmethod
    def load(cls, uri: str, version: str, placement: Placement = ON_CPU) -> "Codebook":
        """Return a stored codebook after its files have passed their hashes.

        Args:
            uri: Folder of codebook versions.
            version: Version name.
            placement: Where codes are searched, see ``quantizer.device``; by default on the CPU.

        Returns:
            The codebook.

        Raises:
            CodebookNotFoundError: If no such version is stored.
            CorruptArtifactError: If a file is missing or has another hash than the manifest says.
            ConfigError: If the pool's search needs faiss or a GPU, and there is none.
        """
        manifest = read_manifest(uri, version)
        folder = place(uri) / version
        rq_arrays = _load_arrays(folder, "rq", manifest)
        levels = [rq_arrays[name] for name in sorted(rq_arrays)]
        return cls(
            manifest,
            ResidualQuantizer(codebooks=levels, placement=placement),
            _load_vq(folder, manifest, placement),
            Overrides.from_arrays(
                _load_arrays(folder, _OVERRIDES_PART, manifest), _OVERRIDDEN_CODES
            ),
            _load_training(folder, manifest),
            _load_lists(folder, manifest),
        )

    def save(self, uri: str, *, replace: bool = False) -> None:
        """Store this codebook under ``<uri>/<version>``, arrays before manifest.

        Args:
            uri: Folder of codebook versions.
            replace: Whether a stored version of that name may be replaced (drafts only).

        Raises:
            CodebookError: If the version is stored there with other content.
        """
        write_artifact(uri, self.manifest, self.payloads(), replace=replace)

    def with_overrides(self, overrides: Overrides) -> "Codebook":
        """Return the same codebook with another table of stored RQ codes.

        Args:
            overrides: RQ codes to serve as stored.

        Returns:
            A codebook that is not stored yet.

        Raises:
            CodebookError: If a stored code lies outside its level.
        """
        self.rq.decode(overrides.codes_MC.astype(np.int64, copy=False))
        return Codebook(
            self.manifest, self.rq, self.vq, overrides, self.training, self.list_overrides
        ).with_hashes()

    def with_hashes(self) -> "Codebook":
        """Return the same codebook, its manifest naming its files and counting its overrides."""
        update = {
            "files": {name: sha256(payload) for name, payload in self.payloads().items()},
            "num_overrides": len(self.overrides),
            "num_list_overrides": len(self.list_overrides),
        }
        manifest = self.manifest.model_copy(update=update)
        return Codebook(
            manifest, self.rq, self.vq, self.overrides, self.training, self.list_overrides
        )

    def encode(
        self, item_ids_N: ItemIds, content_hashes_N: Sequence[str], x_ND: Embeddings
    ) -> ItemCodes:
        """Return the codes of items: the one function of stream, backfill and offline jobs.

        RQ: the stored code if the override table has one for this item and content, else the
        nearest centroid level by level. VQ: the stored list if there is one for this item and
        content, else the nearest pool items, the item itself left out. Bit-equal at any batch size,
        thread count and row order. No items give no codes.

        Args:
            item_ids_N: Items; one may come more than once.
            content_hashes_N: Hash of each item's content.
            x_ND: Aligned embeddings, float32; rows are scaled to length 1.

        Returns:
            Codes in the order of the items.

        Raises:
            DataError: If lengths differ, or a vector is NaN, infinite or of length zero.
            CodebookError: If the vectors have another width than the codebook.
        """
        check_embeddings(x_ND[:0], self.embedding_dim)
        if len(content_hashes_N) != len(item_ids_N):
            raise DataError(
                f"{len(item_ids_N)} items came with {len(content_hashes_N)} content hashes"
            )
        unit_ND = checked_unit_rows(item_ids_N, x_ND)
        rq_NL = self.overrides.apply(item_ids_N, content_hashes_N, self.rq.encode(unit_ND))
        return ItemCodes(item_ids_N, self._lists(item_ids_N, content_hashes_N, unit_ND), rq_NL)

    def _lists(
        self, item_ids_N: ItemIds, content_hashes_N: Sequence[str], unit_ND: Embeddings
    ) -> Codes:
        """Return the stored list of each item that has one; the pool is searched for the others."""
        rows_N = self.list_overrides.rows_of(item_ids_N, content_hashes_N)
        is_open_N = rows_N == NO_ROW
        if is_open_N.all():
            return self.vq.encode(unit_ND, item_ids_N)
        vq_NV = np.empty((len(rows_N), self.vq.num_neighbors), dtype=np.int64)
        vq_NV[~is_open_N] = self.list_overrides.codes_MC[rows_N[~is_open_N]]
        vq_NV[is_open_N] = self.vq.encode(unit_ND[is_open_N], item_ids_N[is_open_N])
        return vq_NV

    def decode_rq(self, rq_NL: Codes) -> Embeddings:
        """Return the vector that each row of RQ codes stands for.

        Args:
            rq_NL: Codes of all levels, or of the first few.

        Returns:
            Vectors of shape ``[N, D]``, float32.

        Raises:
            CodebookError: If a code lies outside its level.
        """
        return self.rq.decode(rq_NL)

    def payloads(self) -> dict[str, bytes]:
        """Return the bytes of every file of the artifact but its manifest, by file name."""
        vq_arrays = dict(self.vq.arrays())
        # A file of its own: faiss reads it as it is.
        index = vq_arrays.pop("index", None)
        parts = {
            "rq": self.rq.arrays(),
            "vq": vq_arrays,
            _OVERRIDES_PART: self.overrides.arrays(_OVERRIDDEN_CODES),
        }
        if len(self.list_overrides):
            parts[_LISTS_PART] = self.list_overrides.arrays(_LISTED_ROWS)
        if self.training is not None:
            parts[_TRAINING_PART] = self.training.arrays()
        payloads = {
            _file_name(part, _SUFFIX, payload): payload
            for part, payload in ((part, _dump_arrays(arrays)) for part, arrays in parts.items())
        }
        if index is not None:
            payload = index.tobytes()
            payloads[_file_name(_INDEX_PART, _INDEX_SUFFIX, payload)] = payload
        return payloads


def _file_name(part: str, suffix: str, payload: bytes) -> str:
    return f"{part}-{sha256(payload)[:16]}{suffix}"


def check_distinct(sorted_ids_N: ItemIds) -> None:
    """Refuse item ids, in ascending order, of which one comes more than once (DataError)."""
    is_repeat_N = sorted_ids_N[1:] == sorted_ids_N[:-1]
    if is_repeat_N.any():
        first = int(sorted_ids_N[1:][np.argmax(is_repeat_N)])
        raise DataError(
            f"{int(is_repeat_N.sum())} item ids come more than once; the first is {first}"
        )


def _check_pool_serves(pool_size: int, num_items: int, num_neighbors: int) -> None:
    if pool_size > num_neighbors:
        return
    raise CodebookError(
        f"quantizer.vq.num_neighbors is {num_neighbors}, but the pool has {pool_size} of the "
        f"{num_items} training items, and an item is no neighbour of its own; set it below "
        f"{pool_size} (or a larger quantizer.vq.pool_size) and run `qarm codebook train` again"
    )


def _train_levels(
    rq: ResidualQuantizer, source: VectorSource, rows_M: npt.NDArray[np.int64]
) -> TrainingReference:
    """Train on some rows of the source, which are let go before the pool is read."""
    unit_MD = take_unit_rows(source, rows_M)
    rq.train(unit_MD)
    return TrainingReference.of(rq, unit_MD)


def _dump_arrays(arrays: Arrays) -> bytes:
    return safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in arrays.items()})


def _load_vq(folder: Place, manifest: Manifest, placement: Placement) -> NeighborQuantizer:
    is_exact = manifest.search == "exact"
    return NeighborQuantizer.from_arrays(
        _load_arrays(folder, "vq", manifest),
        manifest.num_neighbors,
        index=None if is_exact else _load_part(folder, _INDEX_PART, manifest),
        placement=placement,
    )


def _load_lists(folder: Place, manifest: Manifest) -> Overrides | None:
    if not _has_part(_LISTS_PART, manifest):
        return None
    return Overrides.from_arrays(_load_arrays(folder, _LISTS_PART, manifest), _LISTED_ROWS)


def _load_training(folder: Place, manifest: Manifest) -> TrainingReference | None:
    if not _has_part(_TRAINING_PART, manifest):
        return None
    return TrainingReference.from_arrays(_load_arrays(folder, _TRAINING_PART, manifest))


def _has_part(part: str, manifest: Manifest) -> bool:
    return any(name.startswith(f"{part}-") for name in manifest.files)


def _load_arrays(folder: Place, part: str, manifest: Manifest) -> dict[str, np.ndarray]:
    return safetensors.numpy.load(_load_part(folder, part, manifest))


def _load_part(folder: Place, part: str, manifest: Manifest) -> bytes:
    name = next((name for name in manifest.files if name.startswith(f"{part}-")), None)
    if name is None:
        raise CodebookError(f"the manifest in {folder} names no file for the part {part!r}")
    return read_verified(folder, name, manifest.files, damage_remedy(folder, manifest))
