"""The canonical nearest rule: which centroids are nearest to a vector, bit for bit.

The rule. The distance of a vector and a centroid is the sum of their squared differences, each
taken in float64, added in the fixed order of :func:`fold_sum`, and rounded to float32. Nearer
comes first; of equal distances the lower index comes first. Only elementwise operations decide,
so codes are bit-equal at any batch size, thread count and row order.

The speed. One of two filters leaves a short list for the rule. On a CPU whose machine can have them
the compiled kernels of ``native`` filter: products of bfloat16 numbers for the one nearest centroid
and for unordered sets, of 8-bit integers for the k nearest, each with a measured error bound,
explained in ``native_kernels.cpp``. All else goes through a float32 matrix product in torch, as
follows. Vectors and centroids are centred first, which changes no distance but
keeps an offset that all share out of the error; the centre is the median of each coordinate, which
one huge centroid cannot pull away. With x the centred vector and c a centred centroid, the score
|c|^2 - 2 x.c differs from the squared distance by |x|^2, the same for all centroids. In whatever
order the product adds, the computed score is off by at most ``slack * (|x|^2 + |c|^2)``, where
``slack = (D + 16) u`` and u is float32's unit roundoff: D for the dot product (its 2|x||c| is below
|x|^2 + |c|^2), the 16 for centring, the bias, and the final rounding to float32. Every centroid
whose score could still be among the k smallest within that bound goes to the rule. The part of the
bound that belongs to c lies in c's own bias, so that one huge centroid loosens the filter for
itself only.

Shape letters in this file: N items, B items of a block, K centroids, D embedding width,
M short-listed centroids per item, P (item, centroid) pairs, k nearest wanted, S and T some points.
May import: NumPy, torch. The one file that multiplies matrices.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from qarm_feast.errors import CodebookError
from qarm_feast.quantizers.base import Codes, Embeddings, check_embeddings, fold_sum
from qarm_feast.quantizers.native import MAX_TOP_DIM, NativeSearch, NativeTop, kernels

_CENTRE_SAMPLE_SIZE = 4096
_SCORES_PER_BLOCK = 1 << 23
_MAX_ROWS_PER_BLOCK = 2048
_PAIRS_PER_BLOCK = 1 << 15
_TRIALS_PER_BLOCK = 1024
_TERMS_PER_BLOCK = 1 << 20
_NUM_SPARE = 4
"""Extra short-listed centroids per item when k > 1: they spare most rows a full scan."""
_FLOAT32_ROUNDOFF = 2.0**-24
_REDUCED_ERROR = 3 * 2.0**-8
"""Error of a product of two numbers rounded to bfloat16 or, less, TF32: a process may allow it."""
_SMALLEST_SCORE = 1e-30
"""Absolute slack: below it the products of a score may have been flushed to zero."""


def nearest(x_ND: Embeddings, centroids_KD: Embeddings, k: int = 1) -> Codes:
    """Return the indices of the k nearest centroids of each row, nearest first.

    Args:
        x_ND: Vectors, float32.
        centroids_KD: Centroids, float32.
        k: How many centroids to return per vector.

    Returns:
        Indices of shape ``[N, k]``, int64, each in ``[0, K)``.

    Raises:
        CodebookError: If widths differ, or there are fewer than k centroids.
        DataError: If a value is NaN or infinite.
    """
    return NearestSearch(centroids_KD).search(x_ND, k)


def squared_distances(x_ND: Embeddings, y_ND: Embeddings) -> Embeddings:
    """Return the canonical squared distance of each row of ``x_ND`` to its row of ``y_ND``."""
    distances = _pair_distances(_tensor(x_ND), _tensor(y_ND))
    result: Embeddings = distances.numpy()
    return result


class NearestSearch:
    """Searches one set of centroids, prepared once, by the canonical rule.

    Holds the centroids twice: as given, and as the filter in use wants them. Safe to share between
    threads. On another device ("cuda") torch's filter and the rule both run there: the filter's
    bound holds for any order of additions, and the rule is elementwise float64, so the codes are
    those of the CPU.
    """

    def __init__(self, centroids_KD: Embeddings, device: str = "cpu") -> None:
        check_embeddings(centroids_KD)
        if len(centroids_KD) == 0:
            raise CodebookError("there are no centroids to search")
        self._device = torch.device(device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise CodebookError(f"device={device!r}, but torch finds no GPU; use device='cpu'")
        stride = -(-len(centroids_KD) // _CENTRE_SAMPLE_SIZE)
        centre_D = _tensor(centroids_KD)[::stride].median(dim=0).values
        self._centroids_KD = _tensor(centroids_KD).to(self._device)
        self._centre_D = centre_D.to(self._device)
        # Here and not in the first search: they may have to be compiled, which takes seconds.
        self._library = kernels() if self._device.type == "cpu" else None

    def search(self, x_ND: Embeddings, k: int = 1) -> Codes:
        """Return the k nearest centroids of each row; see :func:`nearest`."""
        num_centroids, embedding_dim = self._centroids_KD.shape
        check_embeddings(x_ND, embedding_dim)
        if not 0 < k <= num_centroids:
            raise CodebookError(f"k={k} neighbours wanted of {num_centroids} centroids")
        if k == 1 and self._native is not None:
            codes_Nk = self._native.search(_tensor(x_ND))[:, None]
        elif k > 1 and self._native_top is not None:
            return self._native_top.search(np.ascontiguousarray(x_ND), k)
        else:
            codes_Nk = self._search(_tensor(x_ND), k)
        result: Codes = codes_Nk.numpy()
        return result

    def choose(self, x_ND: Embeddings, sizes: Sequence[int]) -> list[Codes]:
        """Return the nearest centroids of each row in no particular order.

        Cheaper than :meth:`search`: most centroids need no exact distance.

        Args:
            x_ND: Checked vectors, float32.
            sizes: How many to return per row, each at most K; several share one product.

        Returns:
            For each size k indices of shape ``[N, k]``, int64.
        """
        if self._native is None:
            codes_NM = self.search(x_ND, max(sizes))
            return [codes_NM[:, :k] for k in sizes]
        return self._native.choose(_tensor(x_ND), sizes)

    def subtract_nearest(self, residual_ND: Embeddings) -> Codes:
        """Replace each row by what its nearest centroid leaves over, and return those centroids.

        Args:
            residual_ND: Checked vectors, float32, contiguous; overwritten.

        Returns:
            Indices of shape ``[N]``, int64.
        """
        residual = torch.from_numpy(residual_ND)
        if self._native is not None:
            codes_N = self._native.search(residual, is_subtracted=True)
        else:
            codes_N = self._search(residual, 1)[:, 0]
            residual -= self._centroids_KD[codes_N.to(self._device)].cpu()
        result: Codes = codes_N.numpy()
        return result

    def decide(self, x_ND: Embeddings, listed_NM: Codes, k: int) -> Codes:
        """Return the k nearest of a short list of centroids per row, nearest first.

        Args:
            x_ND: Checked vectors, float32.
            listed_NM: Distinct centroids of each row, in any order, at least k.
            k: How many to return per row.

        Returns:
            Indices of shape ``[N, k]``, int64.
        """
        x, listed = (torch.from_numpy(array).to(self._device) for array in (x_ND, listed_NM))
        codes_Nk: Codes = self._decide_listed(x, listed, k).cpu().numpy()
        return codes_Nk

    def centroids(self, codes_N: Codes) -> Embeddings:
        """Return the centroid of each index, float32 ``[N, D]``."""
        codes = torch.from_numpy(codes_N).to(self._device)
        centroids_ND: Embeddings = self._centroids_KD[codes].cpu().numpy()
        return centroids_ND

    # Prepared when first wanted: a search needs one of the two. Made twice by two threads, it is
    # the same both times.
    @functools.cached_property
    def _native(self) -> NativeSearch | None:
        if self._library is None:
            return None
        return NativeSearch(self._library, self._centroids_KD, self._centre_D)

    @functools.cached_property
    def _native_top(self) -> NativeTop | None:
        library = kernels() if self._device.type == "cpu" else None
        if library is None or self._centroids_KD.shape[1] > MAX_TOP_DIM:
            return None
        return NativeTop(library, self._centroids_KD.numpy(), self._centre_D.numpy())

    @functools.cached_property
    def _centred(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Centred centroids, float32 ``[D, K]``, and their squared norms, float64 ``[K]``."""
        centred_KD = self._centroids_KD - self._centre_D
        return centred_KD.T.contiguous(), centred_KD.double().square().sum(dim=1)

    def _search(self, x_ND: torch.Tensor, k: int) -> torch.Tensor:
        codes_Nk = torch.empty((len(x_ND), k), dtype=torch.int64)
        rows = max(1, min(_MAX_ROWS_PER_BLOCK, _SCORES_PER_BLOCK // len(self._centroids_KD)))
        for start in range(0, len(x_ND), rows):
            x_BD = x_ND[start : start + rows].to(self._device)
            codes_Nk[start : start + rows] = self._search_block(x_BD, k)
        return codes_Nk

    def _search_block(self, x_BD: torch.Tensor, k: int) -> torch.Tensor:
        slack = _slack(x_BD.shape[1], self._device)
        centred_BD = x_BD - self._centre_D
        centred_DK, squared_norms_K = self._centred
        bias_K = (squared_norms_K * (1 - slack)).float()
        scores_BK = torch.addmm(bias_K, centred_BD, centred_DK, alpha=-2)
        spare = min(k + _NUM_SPARE, scores_BK.shape[1]) if k > 1 else 1
        listed_BM = scores_BK.topk(spare, largest=False).indices if k > 1 else _argmin(scores_BK)
        limit_B = self._limit(scores_BK, listed_BM[:, :k], centred_BD, slack)
        # A row is settled when no centroid outside its short list can be among its k nearest.
        is_open_B = _lowest_unlisted(scores_BK, listed_BM) <= limit_B
        codes_Bk = listed_BM if k == 1 else self._decide_listed(x_BD, listed_BM, k)
        if bool(is_open_B.any()):
            open_rows = is_open_B.nonzero()[:, 0]
            is_near = scores_BK[open_rows] <= limit_B[open_rows, None]
            codes_Bk[open_rows] = self._decide_open(x_BD[open_rows], is_near, k)
        return codes_Bk

    def _limit(
        self,
        scores_BK: torch.Tensor,
        best_Bk: torch.Tensor,
        centred_BD: torch.Tensor,
        slack: float,
    ) -> torch.Tensor:
        """Return per row the score above which no centroid can be among the k nearest."""
        row_slack_B = 2 * slack * centred_BD.double().square().sum(dim=1)
        worst_B = (
            scores_BK.gather(1, best_Bk).double() + 2 * slack * self._centred[1][best_Bk]
        ).amax(dim=1)
        limit_B = worst_B + row_slack_B + _SMALLEST_SCORE
        # Rounding to float32 may go down; the next number up keeps the limit safe.
        return torch.nextafter(limit_B.float(), torch.tensor(torch.inf, device=limit_B.device))

    def _decide_listed(self, x_BD: torch.Tensor, listed_BM: torch.Tensor, k: int) -> torch.Tensor:
        """Order a short list of equal length per row by the rule and return its first k."""
        ordered_BM = listed_BM.sort(dim=1).values
        num_rows, num_listed = ordered_BM.shape
        rows_P = torch.arange(num_rows, device=x_BD.device).repeat_interleave(num_listed)
        distances_P = self._distances(x_BD, rows_P, ordered_BM.flatten())
        # Stable, and the list ascends: of equal distances the lower index stays first.
        order_BM = distances_P.view(num_rows, num_listed).sort(dim=1, stable=True).indices
        return ordered_BM.gather(1, order_BM)[:, :k]

    def _decide_open(self, x_BD: torch.Tensor, is_near_BK: torch.Tensor, k: int) -> torch.Tensor:
        """Order lists of unequal length by the rule and return the first k of each."""
        rows_P, columns_P = is_near_BK.nonzero(as_tuple=True)
        distances_P = self._distances(x_BD, rows_P, columns_P)
        by_distance_P = distances_P.sort(stable=True).indices
        order_P = by_distance_P[rows_P[by_distance_P].sort(stable=True).indices]
        counts_B = is_near_BK.sum(dim=1)
        starts_B = counts_B.cumsum(dim=0) - counts_B
        return columns_P[order_P[starts_B[:, None] + torch.arange(k, device=x_BD.device)]]

    def _distances(
        self, x_BD: torch.Tensor, rows_P: torch.Tensor, columns_P: torch.Tensor
    ) -> torch.Tensor:
        distances_P = torch.empty(len(rows_P), device=x_BD.device)
        for start in range(0, len(rows_P), _PAIRS_PER_BLOCK):
            block = slice(start, start + _PAIRS_PER_BLOCK)
            distances_P[block] = _pair_distances(
                x_BD[rows_P[block]], self._centroids_KD[columns_P[block]]
            )
        return distances_P


class RoughDistances:
    """Squared distances between points of one set, off by float32 rounding: for sampling only."""

    def __init__(self, points_ND: Embeddings) -> None:
        # torch owns the memory: its alignment, and with it the product's bits, is always the same.
        points = torch.from_numpy(points_ND).clone()
        points -= points.mean(dim=0)
        self._points_ND = points
        self._squared_norms_N = points.square().sum(dim=1)

    def between(
        self, rows_T: npt.NDArray[np.int64], rows_S: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return the distances of some points to some others, float32 ``[T, S]``, at least 0."""
        columns = torch.from_numpy(rows_S)
        distances_TS = self._expanded(
            torch.from_numpy(rows_T), self._points_ND[columns], self._squared_norms_N[columns]
        )
        # A point is at no distance from itself, whatever the rounding.
        distances_TS[torch.from_numpy(rows_T[:, None] == rows_S)] = 0.0
        distances: npt.NDArray[np.float32] = distances_TS.clamp_(min=0).numpy()
        return distances

    def to_nearest(self, rows_T: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return every point's distance to the nearest of some, float32 ``[N]``, at least 0."""
        rows = torch.from_numpy(rows_T)
        nearest_N = torch.full_like(self._squared_norms_N, torch.inf)
        for _, points, terms_TB in self._blocks(rows, self._squared_norms_N):
            nearest_N[points] = torch.minimum(nearest_N[points], terms_TB.amin(dim=0))
        nearest_N[rows] = 0.0
        distances: npt.NDArray[np.float32] = nearest_N.clamp_(min=0).numpy()
        return distances

    def gains(
        self, rows_T: npt.NDArray[np.int64], closest_N: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float64]:
        """Return how much each of some points would lower the sum of ``closest_N``: ``[T]``."""
        gains_T = torch.zeros(len(rows_T), dtype=torch.float64)
        excess_N = self._squared_norms_N - torch.from_numpy(closest_N)
        for trials, _, terms_TB in self._blocks(torch.from_numpy(rows_T), excess_N):
            gains_T[trials] -= terms_TB.clamp_(max=0).sum(dim=1)
        gains: npt.NDArray[np.float64] = gains_T.numpy()
        return gains

    def _blocks(
        self, rows_T: torch.Tensor, bias_N: torch.Tensor
    ) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Yield ``|t|^2 - 2 t.n + bias`` of some points and all, in blocks that fit the cache."""
        for first in range(0, len(rows_T), _TRIALS_PER_BLOCK):
            trials = slice(first, first + _TRIALS_PER_BLOCK)
            num_points = _TERMS_PER_BLOCK // len(rows_T[trials])
            for start in range(0, len(bias_N), num_points):
                points = slice(start, start + num_points)
                terms_TB = self._expanded(rows_T[trials], self._points_ND[points], bias_N[points])
                yield trials, points, terms_TB

    def _expanded(
        self, rows_T: torch.Tensor, points_SD: torch.Tensor, bias_S: torch.Tensor
    ) -> torch.Tensor:
        """Return ``|t|^2 - 2 t.s + bias`` of some points and others, ``[T, S]``."""
        terms_TS = torch.addmm(bias_S, self._points_ND[rows_T], points_SD.T, alpha=-2)
        return terms_TS.add_(self._squared_norms_N[rows_T, None])


def _tensor(x_ND: Embeddings) -> torch.Tensor:
    # torch warns of read-only memory (an Arrow column's, for example), so that is copied.
    return torch.from_numpy(np.require(x_ND, requirements=["C", "W"]))


def _argmin(scores_BK: torch.Tensor) -> torch.Tensor:
    return scores_BK.min(dim=1, keepdim=True).indices


def _lowest_unlisted(scores_BK: torch.Tensor, listed_BM: torch.Tensor) -> torch.Tensor:
    """Return each row's lowest score outside its list; infinite if there is none."""
    # In place and back again: a copy of the scores would cost as much as the search for it.
    listed_scores_BM = scores_BK.gather(1, listed_BM)
    lowest_B = scores_BK.scatter_(1, listed_BM, torch.inf).amin(dim=1)
    scores_BK.scatter_(1, listed_BM, listed_scores_BM)
    return lowest_B


def _pair_distances(x_PD: torch.Tensor, y_PD: torch.Tensor) -> torch.Tensor:
    """Return the canonical squared distance of each pair of rows, float32."""
    terms_PD = x_PD.double() - y_PD.double()
    return fold_sum(terms_PD.square_()).float()


def _slack(embedding_dim: int, device: torch.device) -> float:
    """Return the relative error bound of a score under this process's settings of torch."""
    # get_float32_matmul_precision() raises when a process mixed torch's two ways to set this.
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    is_full = backend.matmul.fp32_precision in ("none", "ieee")
    return (embedding_dim + 16) * _FLOAT32_ROUNDOFF + (0.0 if is_full else _REDUCED_ERROR)
