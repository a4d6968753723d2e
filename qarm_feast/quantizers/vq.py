"""Vector quantization by neighbours (VQ): an item's code is its nearest items of a pool.

Shape letters in this file: N items, P pool rows, D embedding width, k neighbours, S sampled rows,
R some rows.
May import: NumPy, torch through ``search``, faiss through ``pool_index``.
"""

import logging
from collections.abc import Mapping
from typing import Annotated, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from qarm_feast.config import Section
from qarm_feast.errors import CodebookError, DataError
from qarm_feast.quantizers.base import Arrays, Codes, Embeddings, check_embeddings
from qarm_feast.quantizers.devices import ON_CPU, Placement
from qarm_feast.quantizers.kmeans import sample_rows
from qarm_feast.quantizers.pool_index import (
    PoolIndex,
    build_graph,
    build_lists,
    canonical_keys,
    rows_of_keys,
)
from qarm_feast.quantizers.search import NearestSearch, squared_distances

logger = logging.getLogger(__name__)

ItemIds = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]

MAX_AUTO_POOL_SIZE = 1_000_000
MAX_EXACT_POOL_SIZE = 131_072
"""Largest pool that ``search: auto`` searches exactly.

benchmarks/quantize.py prints what each search takes, as ``vq_speedup_vs_own_exact``. With the
compiled kernels, on one thread, vectors ``low_rank``, batches of 2048, ivf_flat was 3 times as fast
as the exact search over 100,000 rows and 5 times over 1,000,000: below this size the exact search
takes less than .2 ms per vector, misses nothing and needs no building.
"""
MAX_AUTO_PROBED_SHARE = 1 / 2
"""Share of the lists above which ``search: auto`` goes back to the exact search.

Vectors that need so many are those whose sketch tells little: ``low_rank`` ones (1216 of 4096 lists
of 1,000,000 rows) took .2 of the time of the exact search, ``iid`` ones (3456 lists) 1.6 times as
long (benchmarks/quantize.py). The share does not depend on the machine, though a search without the
kernels takes longer: one configuration builds one kind of search.
"""
MAX_EF_SEARCH = 4096
_NUM_RECALL_QUERIES = 2048
_NUM_BISECTIONS = 5
_ROWS_PER_BLOCK = 1 << 16


class VqConfig(Section):
    """Neighbour quantizer."""

    pool_size: Literal["auto"] | Annotated[int, Field(gt=1)] = Field(
        default="auto",
        description="Pool rows: a number takes a seeded uniform sample of the items with a train "
        "row, auto all of them, or a sample of 1,000,000 if there are more.",
    )
    num_neighbors: int = Field(default=25, gt=0, description="Pool rows in a code.")
    search: Literal["auto", "exact", "ivf_flat", "hnsw"] = Field(
        default="auto",
        description="How the pool is searched. exact: all of it. ivf_flat: the lists nearest to "
        "the vector, on a GPU if there is one. hnsw: a graph, for fleets without GPUs. auto: "
        "exact up to 131,072 rows, above that ivf_flat where half of its lists are enough "
        "for min_recall, else exact.",
    )
    min_recall: float = Field(
        default=0.99,
        gt=0,
        le=1,
        description="Share of the exact neighbours that an approximate search shall find, "
        "measured on pool items at training. Where num_probes or ef_search is auto it is raised "
        "until twice the standard error below the measured share is no less; where it is a "
        "number, training warns.",
    )
    num_lists: Literal["auto"] | Annotated[int, Field(gt=0, le=65_536)] = Field(
        default="auto",
        description="ivf_flat: lists of the pool; auto takes the power of two near four times the "
        "root of its distinct vectors, and at most one list per 39 of them.",
    )
    num_probes: Literal["auto"] | Annotated[int, Field(gt=0, le=65_536)] = Field(
        default="auto", description="ivf_flat: lists searched per vector."
    )
    hnsw_m: int = Field(
        default=32, ge=4, le=128, description="hnsw: links per vector (twice on the lowest layer)."
    )
    ef_construction: int = Field(
        default=80, ge=8, le=4096, description="hnsw: candidates when a vector is linked."
    )
    ef_search: Literal["auto"] | Annotated[int, Field(gt=0, le=MAX_EF_SEARCH)] = Field(
        default="auto",
        description="hnsw: candidates per searched vector, more than num_neighbors.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the samples of pool and queries.")


class PoolSearch(Protocol):
    """Finds the pool rows nearest to a vector."""

    @property
    def kind(self) -> Literal["exact", "ivf_flat", "hnsw"]:
        """Name of the search."""

    @property
    def settings(self) -> Mapping[str, int]:
        """What it was built with and searches with, for the manifest."""

    def search(self, x_ND: Embeddings, k: int) -> Codes:
        """Return k pool rows of each vector, nearest first."""

    def vectors(self, rows_R: Rows) -> Embeddings:
        """Return the vectors of some pool rows."""

    def arrays(self) -> Arrays:
        """Return what an artifact stores of it."""


class ExactPool:
    """Searches every pool row."""

    kind: Literal["exact"] = "exact"
    settings: Mapping[str, int] = {}

    def __init__(self, pool_vectors_PD: Embeddings, placement: Placement = ON_CPU) -> None:
        self._pool_vectors_PD = pool_vectors_PD
        self._search = placement.open(pool_vectors_PD)

    def search(self, x_ND: Embeddings, k: int) -> Codes:
        """Return the k nearest pool rows of each vector, nearest first."""
        return self._search.search(x_ND, k)

    def vectors(self, rows_R: Rows) -> Embeddings:
        """Return the vectors of some pool rows."""
        return self._pool_vectors_PD[rows_R]

    def arrays(self) -> Arrays:
        """Return ``pool_vectors``, row by row."""
        return {"pool_vectors": self._pool_vectors_PD}


class NeighborQuantizer:
    """The code of a vector: the rows of its nearest pool items, nearest first."""

    def __init__(
        self,
        config: VqConfig | None = None,
        pool_vectors_PD: Embeddings | None = None,
        pool_item_ids_P: ItemIds | None = None,
    ) -> None:
        self._config = config or VqConfig()
        self._search: PoolSearch | None = None
        self.search_recall = 1.0
        """Share of the exact neighbours found, as measured at training; 1 for exact search."""
        if pool_vectors_PD is not None:
            self.set_pool(pool_vectors_PD, pool_item_ids_P)

    @classmethod
    def from_arrays(
        cls, arrays: Arrays, num_neighbors: int, *, index: bytes | None, placement: Placement
    ) -> "NeighborQuantizer":
        """Return a stored quantizer.

        Args:
            arrays: What :meth:`arrays` gave, but for ``index``.
            num_neighbors: Pool rows in a code.
            index: The bytes of ``index``; None for an exact search.
            placement: Where the pool is searched; an ``hnsw`` index always is on the CPU.

        Returns:
            The quantizer; ``search_recall`` is not known to it.

        Raises:
            ConfigError: If faiss is missing, or the device is cuda and faiss sees no GPU.
        """
        quantizer = cls(VqConfig(num_neighbors=num_neighbors))
        quantizer.pool_item_ids_P = arrays["pool_item_ids"].astype(np.int64, copy=False)
        if index is None:
            quantizer._search = ExactPool(
                arrays["pool_vectors"].astype(np.float32, copy=False), placement
            )
        else:
            quantizer._search = PoolIndex.from_bytes(index, arrays, placement)
        return quantizer

    @property
    def num_neighbors(self) -> int:
        """Pool rows in a code."""
        return self._config.num_neighbors

    @property
    def search_kind(self) -> Literal["exact", "ivf_flat", "hnsw"]:
        """How the pool is searched."""
        return self._trained().kind

    @property
    def search_settings(self) -> dict[str, int]:
        """What the index was built with and is searched with; empty for exact search."""
        return dict(self._trained().settings)

    @property
    def pool_vectors_PD(self) -> Embeddings:  # noqa: N802 - a shape suffix, as elsewhere
        """Pool vectors, row by row; an approximate search makes this copy for the caller."""
        return self._trained().vectors(np.arange(len(self.pool_item_ids_P)))

    def train(self, x_ND: Embeddings, item_ids_N: ItemIds | None = None) -> None:
        """Make ``x_ND``, or a sample of it, the pool, and build its search.

        Args:
            x_ND: Vectors of the items that may stand in the pool, float32.
            item_ids_N: Their ids, each once; None numbers the rows.

        Raises:
            CodebookError: If there are too few items for the pool, for a code or for the lists.
            DataError: If there are no vectors, a value is NaN or infinite, or an id comes twice.
            MissingDependencyError: If the search is approximate and faiss is not installed.
        """
        check_embeddings(x_ND)
        rows_P = self.pool_rows(len(x_ND))
        ids_N = np.arange(len(x_ND), dtype=np.int64) if item_ids_N is None else item_ids_N
        self.set_pool(x_ND if len(rows_P) == len(x_ND) else x_ND[rows_P], ids_N[rows_P])

    def pool_rows(self, num_items: int) -> Rows:
        """Return which of ``num_items`` items stand in the pool: a seeded sample.

        Args:
            num_items: Items that may stand in it.

        Returns:
            Places of the items, ascending.

        Raises:
            CodebookError: If there are too few items for ``pool_size``.
            DataError: If there are no items.
        """
        if num_items == 0:
            raise DataError("no vectors to make a pool of")
        pool_size = self._config.pool_size
        if pool_size != "auto" and pool_size > num_items:
            raise CodebookError(
                f"quantizer.vq.pool_size is {pool_size}, but only {num_items} items can stand in "
                "the pool; lower it or set it to auto"
            )
        if pool_size == "auto" and num_items > MAX_AUTO_POOL_SIZE:
            logger.info("vq_pool_sampled num_items=%d pool_size=%d", num_items, MAX_AUTO_POOL_SIZE)
        size = MAX_AUTO_POOL_SIZE if pool_size == "auto" else pool_size
        return sample_rows(num_items, size, np.random.default_rng(self._config.seed))

    def set_pool(self, pool_vectors_PD: Embeddings, pool_item_ids_P: ItemIds | None) -> None:
        """Take a pool as it is, and build the search of it.

        Args:
            pool_vectors_PD: Pool vectors, float32, row by row.
            pool_item_ids_P: The item of each row, each once; None numbers the rows.

        Raises:
            CodebookError: If there are too few rows for a code or for the lists.
            DataError: If a value is NaN or infinite, or an id comes twice.
        """
        if pool_item_ids_P is None:
            pool_item_ids_P = np.arange(len(pool_vectors_PD), dtype=np.int64)
        num_ids = len(np.unique(pool_item_ids_P))
        if num_ids != len(pool_vectors_PD):
            raise DataError(
                f"the pool has {len(pool_vectors_PD)} vectors and {num_ids} distinct item ids; "
                "each item may come once"
            )
        if num_ids < self.num_neighbors + 1:
            raise CodebookError(
                f"a pool of {num_ids} items cannot give {self.num_neighbors} "
                f"neighbours besides the item itself; lower quantizer.vq.num_neighbors"
            )
        check_embeddings(pool_vectors_PD)
        self._search, self.search_recall = _built_search(pool_vectors_PD, self._config)
        self.pool_item_ids_P = pool_item_ids_P

    def with_pool(
        self, pool_vectors_PD: Embeddings, pool_item_ids_P: ItemIds
    ) -> "NeighborQuantizer":
        """Return a quantizer of another pool, its search of the same kind and built alike.

        Args:
            pool_vectors_PD: Pool vectors, float32, row by row.
            pool_item_ids_P: The item of each row, each once.

        Returns:
            The trained quantizer.

        Raises:
            CodebookError: If there are too few rows for a code or for the lists.
            DataError: If an id comes twice.
        """
        config = self._config.model_copy(update={"search": self.search_kind})
        return NeighborQuantizer(config, pool_vectors_PD, pool_item_ids_P)

    def encode(self, x_ND: Embeddings, item_ids_N: ItemIds | None = None) -> Codes:
        """Return the nearest pool rows of each vector, nearest first, the item itself left out.

        Args:
            x_ND: Vectors, float32.
            item_ids_N: The items whose vectors these are; an item is never its own neighbour, so
                that new and old items get the same kind of list. None excludes nothing.

        Returns:
            Pool rows of shape ``[N, k]``, int64, each in ``[0, P)``.

        Raises:
            CodebookError: If the quantizer is untrained or the widths differ.
            DataError: If a value is NaN or infinite.
        """
        search = self._trained()
        if item_ids_N is None:
            return search.search(x_ND, self.num_neighbors)
        # One more than wanted: without the item itself the order of the rest does not change.
        rows_Nk = search.search(x_ND, self.num_neighbors + 1)
        return _without(rows_Nk, self.pool_item_ids_P[rows_Nk] == item_ids_N[:, None])

    def decode(self, codes_NC: Codes) -> Embeddings:
        """Return the mean of the pool vectors that each code lists.

        Args:
            codes_NC: Pool rows, int64.

        Returns:
            Vectors of shape ``[N, D]``, float32.

        Raises:
            CodebookError: If the quantizer is untrained or a code is no pool row.
        """
        search, pool_size = self._trained(), len(self.pool_item_ids_P)
        if not ((codes_NC >= 0) & (codes_NC < pool_size)).all():
            raise CodebookError(
                f"vq_code holds {codes_NC.min()} ... {codes_NC.max()}; this pool has rows "
                f"0 ... {pool_size - 1}"
            )
        decoded_ND = search.vectors(codes_NC[:, 0]).astype(np.float64)
        for rows_N in codes_NC.T[1:]:
            decoded_ND += search.vectors(rows_N)
        mean_ND: Embeddings = (decoded_ND / codes_NC.shape[1]).astype(np.float32)
        return mean_ND

    def arrays(self) -> Arrays:
        """Return ``pool_item_ids``, row by row, and what the search stores.

        That is ``pool_vectors``, or ``index`` (bytes), ``pool_vector_numbers`` and the sketch.
        """
        return {**self._trained().arrays(), "pool_item_ids": self.pool_item_ids_P}

    def _trained(self) -> PoolSearch:
        if self._search is None:
            raise CodebookError("this neighbour quantizer has no pool; call train first")
        return self._search


class _RecallSample:
    """Pool items as queries, and their exact neighbours in the pool, themselves left out."""

    def __init__(
        self, x_PD: Embeddings, query_rows_S: Rows, searched_rows_R: Rows, num_neighbors: int
    ) -> None:
        self._query_rows_S = query_rows_S
        self._x_SD = x_PD[query_rows_S]
        self._num_neighbors = num_neighbors
        exact_Sk = _exact_rows(self._x_SD, x_PD, searched_rows_R, num_neighbors + 1)
        self._exact_Sk = self._own_left_out(exact_Sk)

    def fit_margins(self, index: PoolIndex, allowed_miss: float) -> None:
        """Let these neighbours count, but for a part of the share that may be missed."""
        index.fit_margins(self._x_SD, self._exact_Sk, allowed_miss)

    def recall(self, index: PoolIndex, effort: int) -> tuple[float, float]:
        """Return the share of exact neighbours that ``index`` finds, and its standard error."""
        index.effort = effort
        found_Sk = self._own_left_out(index.search(self._x_SD, self._num_neighbors + 1))
        is_found_Skk = found_Sk[:, :, None] == self._exact_Sk[:, None, :]
        shared_S = is_found_Skk.any(axis=2).mean(axis=1)
        return float(shared_S.mean()), float(shared_S.std() / np.sqrt(len(shared_S)))

    def _own_left_out(self, rows_Sk: Codes) -> Codes:
        return _without(rows_Sk, rows_Sk == self._query_rows_S[:, None])


def _built_search(x_PD: Embeddings, config: VqConfig) -> tuple[PoolSearch, float]:
    """Return the search that ``config`` asks for, and its recall."""
    is_small = len(x_PD) <= MAX_EXACT_POOL_SIZE
    if config.search == "exact" or (config.search == "auto" and is_small):
        return ExactPool(x_PD), 1.0
    return _built_graph(x_PD, config) if config.search == "hnsw" else _built_lists(x_PD, config)


def _built_lists(x_PD: Embeddings, config: VqConfig) -> tuple[PoolSearch, float]:
    index = build_lists(x_PD, config.num_lists, config.seed)
    num_lists = most = index.settings["num_lists"]
    _check_effort("num_probes", config.num_probes, 1, num_lists)
    if config.search == "auto" and config.num_probes == "auto":
        most = max(1, int(num_lists * MAX_AUTO_PROBED_SHARE))
    rows_P = np.arange(len(x_PD))
    queries_S = sample_rows(len(x_PD), _NUM_RECALL_QUERIES, np.random.default_rng(config.seed))
    sample = _RecallSample(x_PD, queries_S, rows_P, config.num_neighbors)
    sample.fit_margins(index, 1 - config.min_recall)
    bounds = 1, most
    recall, is_enough = _set_effort(index, sample, config.min_recall, config.num_probes, bounds)
    if config.search == "auto" and not is_enough:
        logger.info(
            "vq_search_exact: %d of %d lists find %.4f of the neighbours, quantizer.vq.min_recall "
            "is %.4f, so auto takes the exact search",
            index.effort, num_lists, recall, config.min_recall,
        )  # fmt: skip
        return ExactPool(x_PD), 1.0
    _log_search(index, recall, is_enough, config.min_recall)
    return index, recall


def _built_graph(x_PD: Embeddings, config: VqConfig) -> tuple[PoolSearch, float]:
    """Return an HNSW search and its recall.

    A vector in the graph finds its neighbours by its own links, a new item has none: so the
    queries are linked only after the recall is measured.
    """
    least = config.num_neighbors + 1
    _check_effort("ef_search", config.ef_search, least, MAX_EF_SEARCH)
    num_late = min(_NUM_RECALL_QUERIES, len(x_PD) - least)
    index, late_S = build_graph(
        x_PD, config.hnsw_m, config.ef_construction, num_late=num_late, seed=config.seed
    )
    # None is left out of a pool of duplicates; its queries then stand in the graph.
    generator = np.random.default_rng(config.seed)
    queries_S = late_S if len(late_S) else sample_rows(len(x_PD), _NUM_RECALL_QUERIES, generator)
    linked_R = np.setdiff1d(np.arange(len(x_PD)), late_S)
    sample = _RecallSample(x_PD, queries_S, linked_R, config.num_neighbors)
    bounds = least, min(MAX_EF_SEARCH, max(least, index.num_distinct))
    recall, is_enough = _set_effort(index, sample, config.min_recall, config.ef_search, bounds)
    index.link(x_PD[late_S])
    _log_search(index, recall, is_enough, config.min_recall)
    return index, recall


def _set_effort(
    index: PoolIndex,
    sample: _RecallSample,
    min_recall: float,
    effort: int | Literal["auto"],
    bounds: tuple[int, int],
) -> tuple[float, bool]:
    """Set the effort and return its recall, and whether that is enough.

    A number is taken as it is. Auto doubles the effort until twice the standard error below its
    recall is no less than ``min_recall``, then halves the last step a few times.
    """
    if effort != "auto":
        recall, _ = sample.recall(index, effort)
        return recall, recall >= min_recall

    def measured(value: int) -> tuple[float, bool]:
        recall, error = sample.recall(index, value)
        return recall, recall - 2 * error >= min_recall

    least, most = bounds
    low, high = least - 1, least
    best = measured(high)
    while not best[1] and high < most:
        low, high = high, min(2 * high, most)
        best = measured(high)
    for _ in range(_NUM_BISECTIONS if best[1] else 0):
        middle = (low + high) // 2
        found = measured(middle) if middle > low else (0.0, False)
        low, high, best = (low, middle, found) if found[1] else (middle, high, best)
    index.effort = high
    return best


def _check_effort(key: str, effort: int | Literal["auto"], least: int, most: int) -> None:
    if effort != "auto" and not least <= effort <= most:
        raise CodebookError(
            f"quantizer.vq.{key} is {effort}, it must lie in {least} ... {most} for this pool; "
            "change it or set it to auto"
        )


def _log_search(index: PoolIndex, recall: float, is_enough: bool, min_recall: float) -> None:
    settings = " ".join(f"{name}={value}" for name, value in index.settings.items())
    logger.info("vq_search kind=%s %s recall=%.4f", index.kind, settings, recall)
    if not is_enough:
        key = "num_probes" if index.kind == "ivf_flat" else "ef_search"
        logger.warning(
            "vq_recall_too_low recall=%.4f is below quantizer.vq.min_recall=%.4f at %s=%d; raise "
            "%s or set it to auto; where auto ends here, use another quantizer.vq.search",
            recall, min_recall, key, index.effort, key,
        )  # fmt: skip


def _exact_rows(x_SD: Embeddings, x_PD: Embeddings, searched_rows_R: Rows, k: int) -> Codes:
    """Return the k nearest of some pool rows by the canonical rule, a block at a time."""
    keys_SC = np.empty((len(x_SD), 0), dtype=np.int64)
    for start in range(0, len(searched_rows_R), _ROWS_PER_BLOCK):
        rows_B = searched_rows_R[start : start + _ROWS_PER_BLOCK]
        block_BD = x_PD[rows_B]
        places_Sk = NearestSearch(block_BD).search(x_SD, min(k, len(block_BD)))
        distances_Sk = np.stack(
            [squared_distances(x_SD, block_BD[places_S]) for places_S in places_Sk.T], axis=1
        )
        keys_SC = np.hstack([keys_SC, canonical_keys(distances_Sk, rows_B[places_Sk])])
        keys_SC = np.sort(keys_SC, axis=1)[:, :k]
    return rows_of_keys(keys_SC, k)


def _without(rows_Nk: Codes, is_left_out_Nk: npt.NDArray[np.bool_]) -> Codes:
    """Return all but one column of each row: the one left out, or else the last."""
    is_left_out_Nk[~is_left_out_Nk.any(axis=1), -1] = True
    kept_Nk: Codes = rows_Nk[~is_left_out_Nk].reshape(len(rows_Nk), rows_Nk.shape[1] - 1)
    return kept_Nk
