"""Approximate search of a VQ pool: faiss's IVF-Flat and HNSW-Flat under the canonical rule.

faiss proposes candidates, the canonical distance of ``search`` orders them (of equal distances the
lower pool row first), so faiss's own rounding never shows in a code. Where the machine can have the
compiled kernels of ``native`` they scan the lists instead of faiss, and give the same codes. What
is guaranteed:

- A vector's code depends on nothing but the vector and the index: not on the batch, its order, or
  the number of threads.
- ``ivf_flat``: the code is the canonical answer over those items of the probed lists that count by
  the integer ``sketch``; where fewer count than a code holds, over all items of these lists, and of
  more lists where these are too short. The lists are chosen by the canonical rule too, since
  faiss's own choice takes another formula from 20 queries on. faiss's float32 distances are off by
  a known share; a candidate list whose end lies within it of the last neighbour wanted is asked
  for again, twice as long.
- ``hnsw``: the code is the canonical answer over the ``ef_search`` items that the walk through the
  graph ends with; a walk that ends with too few is replaced by a scan of all vectors.
- Equal vectors stand in the index once and are spread over their rows afterwards. So duplicates
  neither crowd others out of a candidate list nor tear the graph apart, and their lowest rows
  stand in a code.
- The same pool, settings and seed build the same bytes. faiss links a graph in whatever order its
  threads come, so ``hnsw`` is built by one thread.

The vectors are held once, in the index; their digits (a byte each) beside it, by the kernels or by
those who search without them.

Shape letters in this file: N items, B items of a block, O open items of a block, S sampled items,
P pool rows, U distinct vectors, D embedding width, I lists, M nearest lists of an item,
C candidates per item, T (item, candidate) pairs, R some rows, k neighbours.
May import: NumPy, faiss through ``devices``, torch through ``search``.
"""

from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from qarm_feast.errors import CodebookError
from qarm_feast.quantizers.base import Arrays, Codes, Embeddings, check_embeddings, fold_sum
from qarm_feast.quantizers.devices import ON_CPU, Placement, load_faiss
from qarm_feast.quantizers.ivf_lists import NUM_SPARE, IvfLists, auto_num_lists, build_ivf
from qarm_feast.quantizers.kmeans import sample_rows
from qarm_feast.quantizers.search import squared_distances
from qarm_feast.quantizers.sketch import Sketch

Rows = npt.NDArray[np.int64]

_PAIRS_PER_BLOCK = 1 << 16
_ROWS_PER_BLOCK = 1 << 16
_NO_KEY = np.iinfo(np.int64).max


class _Index(Protocol):
    """Proposes candidates among the distinct vectors, by their number."""

    def candidates(self, x_BD: Embeddings, k: int) -> tuple[Codes, Embeddings | None]:
        """Return at least k candidates per row where there are so many; -1 fills up.

        Canonical distances come with them where they are known.
        """

    def vectors(self, numbers_R: Rows) -> Embeddings:
        """Return the vectors of some numbers."""


class PoolIndex:
    """Searches pool rows like ``NearestSearch``, but not all of them; see the module.

    Safe to share between threads.

    Args:
        faiss_index: Holds the distinct vectors.
        number_of_row_P: For each pool row the number of its vector in there.
        sketch: Of an ``ivf_flat`` index; None for ``hnsw``.
        placement: Where an ``ivf_flat`` index is searched.
    """

    def __init__(
        self,
        faiss_index: Any,
        number_of_row_P: Rows,
        sketch: Sketch | None = None,
        placement: Placement = ON_CPU,
    ) -> None:
        self._faiss_index = faiss_index
        self._number_of_row_P = number_of_row_P
        self.kind: Literal["ivf_flat", "hnsw"] = "hnsw" if sketch is None else "ivf_flat"
        self._ivf = None if sketch is None else IvfLists(faiss_index, sketch, placement)
        self._index: _Index = self._ivf or _Graph(faiss_index)
        self._rows_P = np.argsort(number_of_row_P, kind="stable")
        self._counts_U = np.bincount(number_of_row_P)
        self._starts_U = np.cumsum(self._counts_U) - self._counts_U
        # Where each row is its own vector's number, candidates that are in order are the code.
        self._is_one_each = np.array_equal(number_of_row_P, np.arange(len(number_of_row_P)))

    @classmethod
    def from_bytes(cls, payload: bytes, arrays: Arrays, placement: Placement) -> "PoolIndex":
        """Return a stored index.

        Args:
            payload: Bytes of the array ``index``, see :meth:`arrays`; their hash has been checked.
            arrays: The other arrays.
            placement: Where an ``ivf_flat`` index is searched; ``hnsw`` always is on the CPU.

        Returns:
            The index.

        Raises:
            CodebookError: If the sketch is missing.
            ConfigError: If the device is cuda and faiss sees no GPU.
            MissingDependencyError: If faiss is not installed.
        """
        faiss = load_faiss()
        index = faiss.deserialize_index(np.frombuffer(payload, np.uint8))
        is_graph = isinstance(index, faiss.IndexHNSW)
        if not is_graph and "sketch_axes" not in arrays:
            raise CodebookError(
                "this codebook's ivf_flat index has no sketch: it is of an earlier version of "
                "qarm-feast; train it again with `qarm codebook train`"
            )
        numbers_P = arrays["pool_vector_numbers"].astype(np.int64, copy=False)
        return cls(index, numbers_P, None if is_graph else Sketch.from_arrays(arrays), placement)

    @property
    def num_distinct(self) -> int:
        """Different vectors in the pool."""
        return len(self._counts_U)

    @property
    def effort(self) -> int:
        """Lists to probe (``ivf_flat``) or candidates of a walk (``hnsw``)."""
        index = self._faiss_index
        return int(index.hnsw.efSearch if self.kind == "hnsw" else index.nprobe)

    @effort.setter
    def effort(self, value: int) -> None:
        if self.kind == "hnsw":
            self._faiss_index.hnsw.efSearch = value
        else:
            self._faiss_index.nprobe = value

    @property
    def settings(self) -> dict[str, int]:
        """What the index was built with and is searched with, for the manifest."""
        index = self._faiss_index
        if self._ivf is not None:
            return {
                "num_lists": int(index.nlist),
                "num_probes": self.effort,
                **{f"{name}_margin": value for name, value in self._ivf.sketch.margins.named()},
            }
        return {
            "hnsw_m": int(index.hnsw.nb_neighbors(1)),
            "ef_construction": int(index.hnsw.efConstruction),
            "ef_search": self.effort,
        }

    def link(self, x_RD: Embeddings) -> None:
        """Append the vectors that come next by number to the graph of an ``hnsw`` index."""
        faiss = load_faiss()
        num_threads = faiss.omp_get_max_threads()
        # More than one would link in the order in which they happen to come.
        faiss.omp_set_num_threads(1)
        try:
            self._faiss_index.add(x_RD)
        finally:
            faiss.omp_set_num_threads(num_threads)

    def arrays(self) -> Arrays:
        """Return faiss's own bytes as ``index``, ``pool_vector_numbers``, and the sketch."""
        return {
            "pool_vector_numbers": self._number_of_row_P,
            "index": load_faiss().serialize_index(self._faiss_index),
            **(self._ivf.sketch.arrays() if self._ivf is not None else {}),
        }

    def fit_margins(self, x_SD: Embeddings, rows_Sk: Codes, allowed_miss: float) -> None:
        """Set what counts in an ``ivf_flat`` index by the true neighbours of some queries.

        Args:
            x_SD: The queries, float32.
            rows_Sk: The pool rows nearest to them.
            allowed_miss: Share of such neighbours that the search may miss.
        """
        assert self._ivf is not None, "a graph has no sketch"
        self._ivf.fit_margins(x_SD, self._number_of_row_P[rows_Sk], allowed_miss)

    def vectors(self, rows_R: Rows) -> Embeddings:
        """Return the vectors of some pool rows, float32 ``[R, D]``."""
        return self._index.vectors(self._number_of_row_P[rows_R])

    def search(self, x_ND: Embeddings, k: int) -> Codes:
        """Return k near pool rows of each vector, nearest first.

        Args:
            x_ND: Vectors, float32.
            k: How many rows to return per vector.

        Returns:
            Pool rows of shape ``[N, k]``, int64.

        Raises:
            CodebookError: If widths differ, or the pool has fewer than k rows.
            DataError: If a value is NaN or infinite.
        """
        check_embeddings(x_ND, self._faiss_index.d)
        if not 0 < k <= len(self._rows_P):
            raise CodebookError(f"k={k} neighbours wanted of {len(self._rows_P)} pool rows")
        x_ND = np.ascontiguousarray(x_ND)
        rows_Nk = np.empty((len(x_ND), k), dtype=np.int64)
        block = max(1, _PAIRS_PER_BLOCK // (k + NUM_SPARE))
        for start in range(0, len(x_ND), block):
            x_BD = x_ND[start : start + block]
            rows_Nk[start : start + block] = self._search_block(x_BD, k)
        return rows_Nk

    def _search_block(self, x_BD: Embeddings, k: int) -> Codes:
        candidates_BC, distances_BC = self._index.candidates(x_BD, min(k, self.num_distinct))
        if distances_BC is not None and self._is_one_each:
            return candidates_BC
        query_T, column_T = np.nonzero(candidates_BC >= 0)
        number_T = candidates_BC[query_T, column_T]
        if distances_BC is None:
            distance_T = self._distances(x_BD, query_T, number_T)
        else:
            distance_T = distances_BC[query_T, column_T]
        # Equal vectors share a distance, so only the k lowest of their rows can be in a code.
        count_T = np.minimum(self._counts_U[number_T], k)
        first_T = np.cumsum(count_T) - count_T
        place_S = np.arange(count_T.sum()) - np.repeat(first_T, count_T)
        row_S = self._rows_P[np.repeat(self._starts_U[number_T], count_T) + place_S]
        keys_S = canonical_keys(np.repeat(distance_T, count_T), row_S)
        return rows_of_keys(_by_query(np.repeat(query_T, count_T), keys_S, len(x_BD)), k)

    def _distances(self, x_BD: Embeddings, query_T: Rows, number_T: Rows) -> Embeddings:
        distance_T = np.empty(len(query_T), dtype=np.float32)
        for start in range(0, len(query_T), _PAIRS_PER_BLOCK):
            block = slice(start, start + _PAIRS_PER_BLOCK)
            vectors_TD = self._index.vectors(number_T[block])
            distance_T[block] = squared_distances(x_BD[query_T[block]], vectors_TD)
        return distance_T


class _Graph:
    """Candidates of an HNSW index: where the walk through its graph ends."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self._flat = load_faiss().downcast_index(index.storage)

    def vectors(self, numbers_R: Rows) -> Embeddings:
        vectors_RD: Embeddings = self._flat.reconstruct_batch(numbers_R)
        return vectors_RD

    def candidates(self, x_BD: Embeddings, k: int) -> tuple[Codes, None]:
        num_wanted = min(max(self._index.hnsw.efSearch, k + NUM_SPARE), self._index.ntotal)
        numbers_BC: Codes = self._index.search(
            x_BD, num_wanted, params=load_faiss().SearchParametersHNSW(efSearch=num_wanted)
        )[1]
        for short in np.flatnonzero((numbers_BC >= 0).sum(axis=1) < k):
            # One at a time: from 20 queries on faiss takes another formula.
            numbers_BC[short] = self._flat.search(x_BD[short : short + 1], num_wanted)[1]
        return numbers_BC, None


def build_lists(x_PD: Embeddings, num_lists: int | Literal["auto"], seed: int) -> PoolIndex:
    """Return an IVF-Flat index of a pool; one list is probed until ``effort`` is set.

    Args:
        x_PD: Pool vectors, float32, row by row.
        num_lists: Lists to sort them into; auto takes the power of two near four times the root
            of their number.
        seed: Seed of the sample that the lists' centroids are trained on.

    Returns:
        The index; the same bytes for the same input.

    Raises:
        CodebookError: If there are fewer distinct vectors than lists.
        MissingDependencyError: If faiss is not installed.
    """
    number_of_row_P, rows_U = _distinct(x_PD)
    size = auto_num_lists(len(rows_U)) if num_lists == "auto" else num_lists
    if size > len(rows_U):
        raise CodebookError(
            f"quantizer.vq.num_lists is {size}, but the pool has only {len(rows_U)} distinct "
            "vectors; lower it or set it to auto"
        )
    index, sketch = build_ivf(x_PD, rows_U, size, seed)
    return PoolIndex(index, number_of_row_P, sketch)


def build_graph(
    x_PD: Embeddings, hnsw_m: int, ef_construction: int, *, num_late: int = 0, seed: int = 0
) -> tuple[PoolIndex, Rows]:
    """Return an HNSW-Flat index of a pool, built by one thread.

    Args:
        x_PD: Pool vectors, float32, row by row.
        hnsw_m: Links of a vector in the graph (twice as many on its lowest layer).
        ef_construction: Candidates that are looked at for them.
        num_late: Most rows to leave out for now; at most a tenth of those whose vector no other
            row holds. They are new to the graph, and may test it, until :meth:`PoolIndex.link`.
        seed: Seed of their choice.

    Returns:
        The index, and the rows that are to be linked yet; the same bytes for the same input.

    Raises:
        MissingDependencyError: If faiss is not installed.
    """
    number_of_row_P, rows_U = _distinct(x_PD)
    single_U = np.flatnonzero(np.bincount(number_of_row_P) == 1)
    size = min(num_late, len(single_U) // 10)
    late = single_U[sample_rows(len(single_U), size, np.random.default_rng(seed))]
    is_late_U = np.zeros(len(rows_U), dtype=bool)
    is_late_U[late] = True
    # A vector's number is its place in the index, where late ones come last.
    order_U = np.argsort(is_late_U, kind="stable")
    place_U = np.argsort(order_U)
    graph = load_faiss().IndexHNSWFlat(x_PD.shape[1], hnsw_m)
    graph.hnsw.efConstruction = ef_construction
    index = PoolIndex(graph, place_U[number_of_row_P])
    linked = rows_U[~is_late_U]
    for start in range(0, len(linked), _ROWS_PER_BLOCK):
        index.link(x_PD[linked[start : start + _ROWS_PER_BLOCK]])
    return index, rows_U[is_late_U]


def canonical_keys(distances_T: Embeddings, rows_T: Rows) -> Rows:
    """Return numbers that sort as the canonical rule does: by distance, then by pool row.

    The bits of floats that are not negative sort as the floats do; rows stay below 2 ** 32.
    """
    keys_T: Rows = (distances_T.view(np.int32).astype(np.int64) << 32) | rows_T
    return keys_T


def rows_of_keys(keys_BC: Rows, k: int) -> Codes:
    """Return the pool rows of the k lowest keys of each row, lowest first."""
    rows_Bk: Codes = np.sort(keys_BC, axis=1)[:, :k] & 0xFFFF_FFFF
    return rows_Bk


def _by_query(query_S: Rows, keys_S: Rows, num_queries: int) -> Rows:
    """Return one row of keys per query, filled up with the largest number."""
    counts_B = np.bincount(query_S, minlength=num_queries)
    starts_B = np.cumsum(counts_B) - counts_B
    keys_BC = np.full((num_queries, counts_B.max(initial=0)), _NO_KEY)
    keys_BC[query_S, np.arange(len(query_S)) - starts_B[query_S]] = keys_S
    return keys_BC


def _distinct(x_PD: Embeddings) -> tuple[Rows, Rows]:
    """Return the number of each row's vector, and the first row of each distinct vector.

    Numbers ascend with the first row that holds the vector.
    """
    weights_D = np.random.default_rng(0).standard_normal(x_PD.shape[1])
    sums_P = np.concatenate(
        [
            fold_sum(x_PD[start : start + _ROWS_PER_BLOCK].astype(np.float64) * weights_D)
            for start in range(0, len(x_PD), _ROWS_PER_BLOCK)
        ]
    )
    order_P = np.argsort(sums_P, kind="stable")
    is_first_P = np.ones(len(x_PD), dtype=bool)
    # Equal vectors have equal sums, so they are neighbours here, in the order of their rows.
    alike = 1 + np.flatnonzero(sums_P[order_P[1:]] == sums_P[order_P[:-1]])
    for start in range(0, len(alike), _ROWS_PER_BLOCK):
        places = alike[start : start + _ROWS_PER_BLOCK]
        is_first_P[places] = (x_PD[order_P[places]] != x_PD[order_P[places - 1]]).any(axis=1)
    first_row_P = np.empty(len(x_PD), dtype=np.int64)
    first_row_P[order_P] = order_P[is_first_P][np.cumsum(is_first_P) - 1]
    rows_U, number_of_row_P = np.unique(first_row_P, return_inverse=True)
    return number_of_row_P, rows_U
