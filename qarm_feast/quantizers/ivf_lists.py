"""The lists of an IVF-Flat index: how they are built, and what is found in them.

See ``pool_index`` for what is guaranteed of a search, and ``sketch`` for which vectors of the
probed lists count. The compiled kernels scan the lists where the machine can have them, else
faiss proposes candidates, on a GPU if there is one; the codes are the same.

Shape letters in this file: N items, B items of a block, O open items of a block, S sampled items,
P pool rows, U distinct vectors, D embedding width, I lists, M nearest lists of an item,
C candidates per item, R some rows, k neighbours.
May import: NumPy, faiss through ``devices``, torch through ``search``.
"""

import copy
import functools
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from qarm_feast.quantizers.base import Codes, Embeddings
from qarm_feast.quantizers.devices import Gpu, Placement, gpu_owner, load_faiss
from qarm_feast.quantizers.kmeans import lloyd, sample_rows
from qarm_feast.quantizers.native import MAX_TOP_DIM, NativeSketch, kernels
from qarm_feast.quantizers.search import NearestSearch
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
NUM_SPARE = 4
"""Candidates beyond those wanted: they show in most cases that no other can be nearer."""
_FIRST_LIST_ITERATIONS = 10
_FEW_POINTS_PER_LIST = 64
_LAST_LIST_ITERATIONS = 4
_MANY_POINTS_PER_LIST = 256
_FLOAT32_ROUNDOFF = 2.0**-24
_SMALLEST_DISTANCE = 1e-30
"""Absolute slack: below it the squares of differences may have been flushed to zero."""
_PARALLEL_OVER_QUERIES = 3
_MAX_GPU_CANDIDATES = 2048
_ROWS_PER_BLOCK = 1 << 16


class IvfLists:
    """Candidates of an IVF-Flat index: what counts of the lists whose centroids are nearest.

    Args:
        index: The index, which no vector is added to any more.
        sketch: Says what counts.
        placement: Where it is searched.
    """

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
        """Return the vectors of some numbers, float32 ``[R, D]``."""
        vectors_RD: Embeddings = self._index.reconstruct_batch(numbers_R)
        return vectors_RD

    def candidates(self, x_BD: Embeddings, k: int) -> tuple[Codes, Embeddings | None]:
        """Return at least k candidates per row, by number; see ``pool_index``.

        Args:
            x_BD: Checked vectors, float32, contiguous.
            k: How many are wanted, at most the distinct vectors of the index.

        Returns:
            Numbers, int64 ``[B, C]``, -1 where a row has fewer; and their canonical distances,
            float32, where these are known: then a row has k, in the order of the rule.
        """
        num_probes = min(self._index.nprobe, self._index.nlist)
        num_near = min(NUM_NEAR_LISTS, num_probes)
        lists_BI, near_BM = self._coarse.choose(x_BD, (num_probes, num_near))
        distances_BC: Embeddings | None = None
        if self._native is not None:
            margins = self.sketch.margins
            numbers_BC, distances_BC = self._native.search(x_BD, k, lists_BI, near_BM, margins)
        else:
            counting = _Counting(self._lists, self.sketch, x_BD, near_BM)
            numbers_BC = self._candidates(x_BD, k, k + NUM_SPARE, lists_BI, counting)
        is_short_B = (numbers_BC >= 0).sum(axis=1) < k
        if not is_short_B.any():
            return numbers_BC, distances_BC
        # Too few count: then all of the lists do, and of more lists where these are too short.
        wider = self._candidates(x_BD[is_short_B], k, k + NUM_SPARE, lists_BI[is_short_B])
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


def auto_num_lists(num_distinct: int) -> int:
    """Return the power of two near four times the root of a number of distinct vectors."""
    wanted: int = 1 << round(np.log2(4 * np.sqrt(num_distinct)))
    return max(1, min(wanted, num_distinct // POINTS_PER_LIST))


def build_ivf(x_PD: Embeddings, rows_U: Rows, num_lists: int, seed: int) -> tuple[Any, Sketch]:
    """Return an IVF-Flat index of distinct vectors, and its sketch without margins.

    Args:
        x_PD: Pool vectors, float32, row by row.
        rows_U: A row of each distinct vector, in the order of their numbers.
        num_lists: Lists to sort them into.
        seed: Seed of the samples that the lists' centroids are trained on.

    Returns:
        The same bytes for the same input; one list is probed.
    """
    faiss = load_faiss()
    coarse_ID = _coarse_centroids(x_PD, rows_U, num_lists, seed)
    sketch = Sketch.fit(x_PD)
    quantizer = faiss.IndexFlatL2(x_PD.shape[1])
    quantizer.add(coarse_ID)
    index = faiss.IndexIVFFlat(quantizer, x_PD.shape[1], num_lists)
    index.is_trained = True
    _add_by_list(index, x_PD, rows_U, coarse_ID, sketch)
    return index, sketch


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
