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

import copy
import functools
import itertools
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from qarm_feast.errors import CodebookError
from qarm_feast.quantizers.base import Arrays, Codes, Embeddings, check_embeddings, fold_sum
from qarm_feast.quantizers.devices import ON_CPU, Gpu, Placement, gpu_owner, load_faiss
from qarm_feast.quantizers.kmeans import lloyd, sample_rows
from qarm_feast.quantizers.native import MAX_TOP_DIM, NativeSketch, kernels
from qarm_feast.quantizers.search import NearestSearch, squared_distances
from qarm_feast.quantizers.sketch import (
    NUM_NEAR_LISTS,
    Margins,
    Sketch,
    SketchedLists,
    fitted_margins,
    leaf_order,
)

Rows = npt.NDArray[np.int64]

POINTS_PER_LIST = 39
"""Fewest distinct vectors per list when the number of lists is left to the data."""
_FIRST_LIST_ITERATIONS = 10
_FEW_POINTS_PER_LIST = 64
_LAST_LIST_ITERATIONS = 4
_MANY_POINTS_PER_LIST = 256
_NUM_SPARE = 4
"""Candidates beyond those wanted: they show in most cases that no other can be nearer."""
_PAIRS_PER_BLOCK = 1 << 16
_ROWS_PER_BLOCK = 1 << 16
_FLOAT32_ROUNDOFF = 2.0**-24
_SMALLEST_DISTANCE = 1e-30
"""Absolute slack: below it the squares of differences may have been flushed to zero."""
_PARALLEL_OVER_QUERIES = 3
_MAX_GPU_CANDIDATES = 2048
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
        self._ivf = None if sketch is None else _Lists(faiss_index, sketch, placement)
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
        block = max(1, _PAIRS_PER_BLOCK // (k + _NUM_SPARE))
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


class _Lists:
    """Candidates of an IVF-Flat index: what counts of the lists whose centroids are nearest."""

    def __init__(self, index: Any, sketch: Sketch, placement: Placement) -> None:
        self._index = index
        # Candidates are read back by number, which needs to know where each vector lies.
        index.make_direct_map()
        # By default only faiss's own choice of lists is spread over threads.
        index.parallel_mode = _PARALLEL_OVER_QUERIES
        self._coarse = NearestSearch(index.quantizer.reconstruct_n(0, index.nlist))
        self._placement = placement
        self._gpu_copy = _GpuCopy(index, placement.gpu) if placement.has_gpu() else None
        self._vectors_I, self._numbers_I = _list_memory(index)
        self.sketch = sketch
        self._native = self._native_sketch() if self._gpu_copy is None else None

    def vectors(self, numbers_R: Rows) -> Embeddings:
        vectors_RD: Embeddings = self._index.reconstruct_batch(numbers_R)
        return vectors_RD

    def candidates(self, x_BD: Embeddings, k: int) -> tuple[Codes, Embeddings | None]:
        num_probes = min(self._index.nprobe, self._index.nlist)
        num_near = min(NUM_NEAR_LISTS, num_probes)
        lists_BI, near_BM = self._coarse.choose(x_BD, (num_probes, num_near))
        distances_BC: Embeddings | None = None
        if self._native is not None:
            margins = self.sketch.margins
            numbers_BC, distances_BC = self._native.search(x_BD, k, lists_BI, near_BM, margins)
        else:
            counting = _Counting(self._lists, self.sketch, x_BD, near_BM)
            numbers_BC = self._candidates(x_BD, k, k + _NUM_SPARE, lists_BI, counting)
        is_short_B = (numbers_BC >= 0).sum(axis=1) < k
        if not is_short_B.any():
            return numbers_BC, distances_BC
        # Too few count: then all of the lists do, and of more lists where these are too short.
        wider = self._candidates(x_BD[is_short_B], k, k + _NUM_SPARE, lists_BI[is_short_B])
        return _replaced(numbers_BC, is_short_B, wider), None

    def fit_margins(self, x_SD: Embeddings, numbers_Sk: Codes, allowed_miss: float) -> None:
        """See :meth:`PoolIndex.fit_margins`."""
        rank = numbers_Sk.shape[1]
        self.sketch = self.sketch.with_margins(Margins(rank))
        digits_SD, _ = self.sketch.digits(x_SD)
        num_near = min(NUM_NEAR_LISTS, self._index.nlist)
        (near_SM,) = self._coarse.choose(x_SD, (num_near,))
        gaps = self._new_lists().gaps(digits_SD, numbers_Sk, near_SM, rank)
        self.sketch = self.sketch.with_margins(fitted_margins(gaps, rank, allowed_miss))

    @functools.cached_property
    def _lists(self) -> SketchedLists:
        """The digits, for those who search without the kernels, which hold a copy of their own."""
        return self._new_lists()

    def _new_lists(self) -> SketchedLists:
        return SketchedLists(self.sketch, self._vectors_I, self._numbers_I)

    def _native_sketch(self) -> NativeSketch | None:
        library = kernels()
        if library is None or self._index.d > MAX_TOP_DIM:
            return None
        return NativeSketch(library, self._new_lists(), self._vectors_I, self._numbers_I)

    def _candidates(
        self,
        x_BD: Embeddings,
        k: int,
        num_wanted: int,
        lists_BI: Codes,
        counting: "_Counting | None" = None,
    ) -> Codes:
        """Return at least k candidates per row, of what counts; without a sketch, of all.

        Where too few count the row ends with -1; without a sketch more lists are probed.
        """
        distances_BC, numbers_BC = self._scan(x_BD, lists_BI, num_wanted)
        is_end_B = (numbers_BC[:, -1] < 0) | (num_wanted >= self._index.ntotal)
        last_B = distances_BC[:, -1]
        if counting is not None:
            distances_BC, numbers_BC = counting.sift(distances_BC, numbers_BC)
        is_short_B = (numbers_BC >= 0).sum(axis=1) < k
        slack = 4 * (x_BD.shape[1] + 8) * _FLOAT32_ROUNDOFF
        limit_B = distances_BC[:, k - 1].astype(np.float64) * (1 + slack) + _SMALLEST_DISTANCE
        # A vector beyond the end of the list might still be nearer by the rule, or as near.
        is_cut_B = ~is_end_B & (is_short_B | (last_B <= limit_B))
        if is_cut_B.any():
            part = None if counting is None else counting.of(is_cut_B)
            wider = self._candidates(x_BD[is_cut_B], k, 2 * num_wanted, lists_BI[is_cut_B], part)
            numbers_BC = _replaced(numbers_BC, is_cut_B, wider)
        is_out_B = is_short_B & is_end_B
        if counting is None and is_out_B.any():
            probes = min(2 * lists_BI.shape[1], self._index.nlist)
            (more_BI,) = self._coarse.choose(x_BD[is_out_B], (probes,))
            wider = self._candidates(x_BD[is_out_B], k, num_wanted, more_BI)
            numbers_BC = _replaced(numbers_BC, is_out_B, wider)
        return numbers_BC

    def _scan(self, x_BD: Embeddings, lists_BI: Codes, num_wanted: int) -> tuple[Embeddings, Codes]:
        """Return faiss's nearest of the lists, ascending; number -1 where there are too few."""
        num_wanted = min(num_wanted, self._index.ntotal)
        fits_gpu = max(num_wanted, lists_BI.shape[1]) <= _MAX_GPU_CANDIDATES
        if self._gpu_copy is not None and fits_gpu:
            try:
                return self._gpu_copy.scan(x_BD, lists_BI, num_wanted)
            except RuntimeError as error:
                self._placement.gpu_lost(error)
                self._gpu_copy = None
        return _scan(self._index, x_BD, lists_BI, num_wanted)


class _Counting:
    """Which candidates of some queries count."""

    def __init__(
        self, lists: SketchedLists, sketch: Sketch, x_BD: Embeddings, near_BM: Codes
    ) -> None:
        self._lists = lists
        self._digits_BD, _ = sketch.digits(x_BD)
        self._limits_3B = lists.limits(self._digits_BD, near_BM, sketch.margins)

    def of(self, is_chosen_B: npt.NDArray[np.bool_]) -> "_Counting":
        """Return the same for some of the queries."""
        chosen = copy.copy(self)
        chosen._digits_BD = self._digits_BD[is_chosen_B]
        chosen._limits_3B = self._limits_3B[:, is_chosen_B]
        return chosen

    def sift(self, distances_BC: Embeddings, numbers_BC: Codes) -> tuple[Embeddings, Codes]:
        """Return what counts of ascending candidates in order; -1 and infinity at the end."""
        scores_3BC = self._lists.scores(self._digits_BD, numbers_BC)
        counts_BC = (scores_3BC >= self._limits_3B[:, :, None]).all(axis=0) & (numbers_BC >= 0)
        order_BC = np.argsort(~counts_BC, axis=1, kind="stable")
        distances_BC = np.where(counts_BC, distances_BC, np.inf).astype(np.float32)
        numbers_BC = np.where(counts_BC, numbers_BC, -1)
        return (
            np.take_along_axis(distances_BC, order_BC, axis=1),
            np.take_along_axis(numbers_BC, order_BC, axis=1),
        )


class _Graph:
    """Candidates of an HNSW index: where the walk through its graph ends."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self._flat = load_faiss().downcast_index(index.storage)

    def vectors(self, numbers_R: Rows) -> Embeddings:
        vectors_RD: Embeddings = self._flat.reconstruct_batch(numbers_R)
        return vectors_RD

    def candidates(self, x_BD: Embeddings, k: int) -> tuple[Codes, None]:
        num_wanted = min(max(self._index.hnsw.efSearch, k + _NUM_SPARE), self._index.ntotal)
        numbers_BC: Codes = self._index.search(
            x_BD, num_wanted, params=load_faiss().SearchParametersHNSW(efSearch=num_wanted)
        )[1]
        for short in np.flatnonzero((numbers_BC >= 0).sum(axis=1) < k):
            # One at a time: from 20 queries on faiss takes another formula.
            numbers_BC[short] = self._flat.search(x_BD[short : short + 1], num_wanted)[1]
        return numbers_BC, None


class _GpuCopy:
    """A GPU's copy of an IVF-Flat index, asked by the one thread that owns it."""

    def __init__(self, index: Any, gpu: Gpu) -> None:
        self._gpu_index = gpu_owner().copy_to_gpu(index, gpu)

    def scan(self, x_BD: Embeddings, lists_BI: Codes, num_wanted: int) -> tuple[Embeddings, Codes]:
        """Return what :func:`_scan` does, up to float32 rounding."""
        found: tuple[Embeddings, Codes] = gpu_owner().run(
            _scan, self._gpu_index, x_BD, lists_BI, num_wanted
        )
        return found


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
    faiss = load_faiss()
    number_of_row_P, rows_U = _distinct(x_PD)
    size = _auto_num_lists(len(rows_U)) if num_lists == "auto" else num_lists
    if size > len(rows_U):
        raise CodebookError(
            f"quantizer.vq.num_lists is {size}, but the pool has only {len(rows_U)} distinct "
            "vectors; lower it or set it to auto"
        )
    coarse_ID = _coarse_centroids(x_PD, rows_U, size, seed)
    sketch = Sketch.fit(x_PD)
    quantizer = faiss.IndexFlatL2(x_PD.shape[1])
    quantizer.add(coarse_ID)
    index = faiss.IndexIVFFlat(quantizer, x_PD.shape[1], size)
    index.is_trained = True
    _add_by_list(index, x_PD, rows_U, coarse_ID, sketch)
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


def _replaced(numbers_BC: Codes, is_open_B: npt.NDArray[np.bool_], wider_OC: Codes) -> Codes:
    numbers_BC = _widened(numbers_BC, wider_OC.shape[1])
    numbers_BC[is_open_B] = _widened(wider_OC, numbers_BC.shape[1])
    return numbers_BC


def _list_memory(index: Any) -> tuple[list[Embeddings], list[Rows]]:
    """Return vectors and numbers of each list, as views of faiss's own memory.

    The index keeps it where it is: nothing is added any more.
    """
    lists, rev_swig_ptr = index.invlists, load_faiss().rev_swig_ptr
    vectors_I, numbers_I = [], []
    for number in range(lists.nlist):
        size = lists.list_size(number)
        codes = rev_swig_ptr(lists.get_codes(number), size * lists.code_size)
        vectors_I.append(codes.view(np.float32).reshape(size, index.d))
        numbers_I.append(rev_swig_ptr(lists.get_ids(number), size))
    return vectors_I, numbers_I


def _widened(numbers_BC: Codes, width: int) -> Codes:
    missing = max(0, width - numbers_BC.shape[1])
    return np.pad(numbers_BC, ((0, 0), (0, missing)), constant_values=-1)


def _scan(
    index: Any, x_BD: Embeddings, lists_BI: Codes, num_wanted: int
) -> tuple[Embeddings, Codes]:
    faiss = load_faiss()
    distances_BC = np.empty((len(x_BD), num_wanted), dtype=np.float32)
    numbers_BC = np.empty((len(x_BD), num_wanted), dtype=np.int64)
    # Read by indexes over residuals only; these hold the vectors themselves.
    no_distances_BI = np.zeros(lists_BI.shape, dtype=np.float32)
    arrays = (lists_BI, no_distances_BI, distances_BC, numbers_BC)
    index.search_preassigned_c(
        len(x_BD), faiss.swig_ptr(x_BD), num_wanted, *map(faiss.swig_ptr, arrays), False,
        faiss.SearchParametersIVF(nprobe=lists_BI.shape[1]),
    )  # fmt: skip
    return distances_BC, numbers_BC


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


def _auto_num_lists(num_distinct: int) -> int:
    wanted: int = 1 << round(np.log2(4 * np.sqrt(num_distinct)))
    return max(1, min(wanted, num_distinct // POINTS_PER_LIST))


def _coarse_centroids(x_PD: Embeddings, rows_U: Rows, num_lists: int, seed: int) -> Embeddings:
    generator = np.random.default_rng(seed)
    few_RD = _sampled(x_PD, rows_U, _FEW_POINTS_PER_LIST * num_lists, generator)
    start_ID = few_RD[sample_rows(len(few_RD), num_lists, generator)]
    centroids_ID = lloyd(few_RD, start_ID, _FIRST_LIST_ITERATIONS)
    del few_RD
    # Fitted to more of the vectors that will lie in the lists: fewer lists for the same recall.
    many_RD = _sampled(x_PD, rows_U, _MANY_POINTS_PER_LIST * num_lists, generator)
    return lloyd(many_RD, centroids_ID, _LAST_LIST_ITERATIONS)


def _sampled(
    x_PD: Embeddings, rows_U: Rows, size: int, generator: np.random.Generator
) -> Embeddings:
    rows_R = rows_U[sample_rows(len(rows_U), size, generator)]
    # All of a large pool: a copy would take as much again.
    return x_PD if len(rows_R) == len(x_PD) else x_PD[rows_R]


def _add_by_list(
    index: Any, x_PD: Embeddings, rows_U: Rows, coarse_ID: Embeddings, sketch: Sketch
) -> None:
    """Put each distinct vector into the list of its nearest centroid, list after list.

    So a list's memory is asked for once, not grown; a list is in the order of its leaves.
    """
    faiss = load_faiss()
    coarse = NearestSearch(coarse_ID)
    blocks = [
        coarse.search(x_PD[rows_U[start : start + _ROWS_PER_BLOCK]])[:, 0]
        for start in range(0, len(rows_U), _ROWS_PER_BLOCK)
    ]
    lists_U = np.concatenate(blocks)
    order_U = np.argsort(lists_U, kind="stable")
    starts_I = np.searchsorted(lists_U[order_U], np.arange(len(coarse_ID) + 1))
    for number, (start, end) in enumerate(itertools.pairwise(starts_I)):
        if start == end:
            continue
        numbers_R = order_U[start:end]
        x_RD = x_PD[rows_U[numbers_R]]
        order_R = leaf_order(sketch.digits(x_RD)[0])
        x_RD, numbers_R = np.ascontiguousarray(x_RD[order_R]), numbers_R[order_R]
        lists_R = np.full(len(order_R), number)
        index.add_core(len(x_RD), *map(faiss.swig_ptr, (x_RD, numbers_R, lists_R)))
