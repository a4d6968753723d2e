"""The integer sketch of a pool: which vectors of the probed lists count as candidates of a code.

Scanning whole lists costs one product per vector and column. The sketch leaves most vectors out
after a share of that, by arithmetic on integers only, so that the same vectors count on every
processor, with and without the compiled kernels, on a GPU, at any batch size.

    digits  A vector is centred, turned onto the pool's principal axes (in 14-bit fixed point) and
            rounded to one signed 8-bit digit per axis, of falling variance.
    score   of a vector for a query: the product of their first 64 digits, minus half the vector's
            square. The greater, the nearer; the full score takes all digits.
    leaf    Each list lies in leaves of 16 vectors that are near each other; a leaf's head is the
            mean of their digits and of their squares, its score an estimate of theirs.
    limits  Among the vectors of the 8 nearest lists, the best score number ``rank`` is a query's
            mark; the best full score number ``rank``, of those that reach the mark less the score
            margin, its full mark.

A vector of a probed list counts if its leaf's score reaches the mark less the leaf margin, its own
the mark less the score margin, and its full score the full mark less the full margin. The margins
are set when the index is built: true neighbours of pool items shall count but for a small share of
what ``min_recall`` allows to miss. With no margins set, everything counts.

Shape letters in this file: N items, B items of a block, P pool rows, R rows of one list,
U distinct vectors, D embedding width, L leaves, I lists, M nearest lists of an item, k neighbours.
May import: NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qarm_feast.quantizers.base import Arrays, Codes, Embeddings

Digits = npt.NDArray[np.int8]
Integers = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]

SCORE_DIGITS = 64
LEAF_SIZE = 16
NUM_NEAR_LISTS = 8
COUNTS_ALL = -(1 << 29)
"""A limit below every score: squares are cut at 2 ** 28, products stay far below that."""
NO_MARGIN = 1 << 29

_MOST_SQUARE = 1 << 28
_MOST_DIGIT = 127
_AXIS_UNIT = 1 << 14
_FINE_STEPS = 256
"""Steps of a centred value per step of a digit: what is rounded twice is rounded finely first."""
_MOST_FINE = 1 << 19
_FIT_VALUES = 1 << 23
_VALUES_PER_BLOCK = 1 << 21
_LEAVES_PER_BLOCK = 1 << 16
_SPREAD = 8
"""Digits reach that many times the standard deviation of the first axis, if not the whole pool."""
_POWER_STEPS = 4


@dataclass(frozen=True)
class Margins:
    """How far below a query's marks scores may lie; ``rank`` says which score is the mark."""

    rank: int = 1
    leaf: int = NO_MARGIN
    score: int = NO_MARGIN
    full: int = NO_MARGIN

    def named(self) -> list[tuple[str, int]]:
        """Return the three margins by name, for a manifest."""
        return [("leaf", self.leaf), ("score", self.score), ("full", self.full)]


@dataclass(frozen=True)
class Sketch:
    """How vectors become digits, and which of them count.

    Attributes:
        centre_D: Subtracted from every vector, float32.
        axes_DD: Principal axes as columns, of falling variance, in units of 2 ** -14, int16.
        step: Length of one step of a digit.
        margins: Of the scores.
    """

    centre_D: Embeddings
    axes_DD: npt.NDArray[np.int16]
    step: float
    margins: Margins = Margins()

    @classmethod
    def fit(cls, x_PD: Embeddings) -> "Sketch":
        """Return the sketch of a pool, its margins not set.

        Args:
            x_PD: Pool vectors, float32.

        Returns:
            The sketch.
        """
        num_rows = max(1, _FIT_VALUES // x_PD.shape[1])
        sample_RD = x_PD[:: -(-len(x_PD) // num_rows)].astype(np.float64)
        centre_D = sample_RD.mean(axis=0).astype(np.float32)
        sample_RD -= centre_D
        variances_D, axes_DD = np.linalg.eigh(sample_RD.T @ sample_RD / len(sample_RD))
        reach = min(np.abs(sample_RD @ axes_DD).max(), _SPREAD * np.sqrt(max(variances_D[-1], 0)))
        axes = np.rint(axes_DD[:, ::-1] * _AXIS_UNIT).astype(np.int16)
        return cls(centre_D, axes, float(reach) / _MOST_DIGIT or 1.0)

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "Sketch":
        """Return a stored sketch; ``arrays`` are what :meth:`arrays` gave."""
        return cls(
            arrays["sketch_centre"].astype(np.float32, copy=False),
            arrays["sketch_axes"].astype(np.int16, copy=False),
            float(arrays["sketch_step"][0]),
            Margins(*(int(value) for value in arrays["sketch_margins"])),
        )

    def arrays(self) -> Arrays:
        """Return ``sketch_centre``, ``sketch_axes``, ``sketch_step`` and ``sketch_margins``."""
        own = self.margins
        return {
            "sketch_centre": self.centre_D,
            "sketch_axes": self.axes_DD,
            "sketch_step": np.array([self.step]),
            "sketch_margins": np.array([own.rank, own.leaf, own.score, own.full], dtype=np.int64),
        }

    def digits(self, x_ND: Embeddings) -> tuple[Digits, Integers]:
        """Return the digits of vectors, int8 ``[N, D]``, and half their squares, int32 ``[N]``.

        Every sum is one of integers below 2 ** 53, so float64 holds it exactly in any order.
        """
        digits_ND = np.empty(x_ND.shape, dtype=np.int8)
        halves_N = np.empty(len(x_ND), dtype=np.int32)
        centre_D, axes_DD = self.centre_D.astype(np.float64), self.axes_DD.astype(np.float64)
        num_rows = max(1, _VALUES_PER_BLOCK // x_ND.shape[1])
        for start in range(0, len(x_ND), num_rows):
            block = slice(start, start + num_rows)
            fine_BD = np.rint((x_ND[block] - centre_D) * (_FINE_STEPS / self.step))
            np.clip(fine_BD, -_MOST_FINE, _MOST_FINE, out=fine_BD)
            turned_BD = np.rint(fine_BD @ axes_DD / (_FINE_STEPS * _AXIS_UNIT))
            digits_ND[block] = np.clip(turned_BD, -_MOST_DIGIT, _MOST_DIGIT, out=turned_BD)
            halves_B = np.rint(np.einsum("bd,bd->b", fine_BD, fine_BD) / (2 * _FINE_STEPS**2))
            halves_N[block] = np.minimum(halves_B, _MOST_SQUARE)
        return digits_ND, halves_N

    def with_margins(self, margins: Margins) -> "Sketch":
        """Return the same digits with other margins."""
        return replace(self, margins=margins)


class SketchedLists:
    """The digits of an index's vectors, in the order in which its lists hold them.

    Args:
        sketch: How they are made.
        vectors_I: The vectors of each list, float32 ``[size, D]``; leaf after leaf.
        numbers_I: Their numbers, int64 ``[size]``; every number from 0 on stands in one list.
    """

    def __init__(
        self, sketch: Sketch, vectors_I: Sequence[Embeddings], numbers_I: Sequence[Rows]
    ) -> None:
        self.sketch = sketch
        sizes_I = np.array([len(rows) for rows in vectors_I], dtype=np.int64)
        self.first_place_I = np.concatenate([[0], np.cumsum(sizes_I)])
        self.first_leaf_I = np.concatenate([[0], np.cumsum(-(-sizes_I // LEAF_SIZE))])
        self.digits_UD = np.empty((sizes_I.sum(), len(sketch.centre_D)), dtype=np.int8)
        self.halves_U = np.empty(sizes_I.sum(), dtype=np.int32)
        for first, rows_RD in zip(self.first_place_I, vectors_I, strict=False):
            places = slice(first, first + len(rows_RD))
            self.digits_UD[places], self.halves_U[places] = sketch.digits(rows_RD)
        self._place_U = np.argsort(np.concatenate([np.empty(0, dtype=np.int64), *numbers_I]))
        self.leaf_U = self._leaves(sizes_I)
        self.head_digits_LD, self.head_halves_L = self._heads()

    def limits(self, digits_ND: Digits, near_NM: Codes, margins: Margins) -> Rows:
        """Return what leaf score, score and full score must reach for each query.

        Args:
            digits_ND: Digits of the queries.
            near_NM: Their nearest lists, in any order.
            margins: How far below the marks scores may lie.

        Returns:
            Limits, int64 ``[3, N]``.
        """
        marks_2N = self._marks(digits_ND, near_NM, margins.rank, margins.score)
        below_3 = np.array([margins.leaf, margins.score, margins.full])
        limits_3N: Rows = np.maximum(marks_2N[[0, 0, 1]] - below_3[:, None], COUNTS_ALL)
        return limits_3N

    def gaps(self, digits_ND: Digits, numbers_Nk: Codes, near_NM: Codes, rank: int) -> Rows:
        """Return how far below the marks the scores of some vectors lie.

        Args:
            digits_ND: Digits of the queries.
            numbers_Nk: Numbers of vectors.
            near_NM: The queries' nearest lists.
            rank: Which score is the mark.

        Returns:
            Gaps of leaf score, score and full score, ``[3, N, k]``; below 0 for a better score.
        """
        marks_2N = self._marks(digits_ND, near_NM, rank, NO_MARGIN)
        return marks_2N[[0, 0, 1], :, None] - self.scores(digits_ND, numbers_Nk)

    def scores(self, digits_ND: Digits, numbers_NC: Codes) -> Rows:
        """Return leaf score, score and full score of vectors for each query, ``[3, N, C]``."""
        places_NC = self._place_U[numbers_NC]
        leaves_NC = self.leaf_U[places_NC]
        leaf_NC = _products(digits_ND, self.head_digits_LD, leaves_NC, SCORE_DIGITS)
        own_NC = _products(digits_ND, self.digits_UD, places_NC, SCORE_DIGITS)
        full_NC = _products(digits_ND, self.digits_UD, places_NC, digits_ND.shape[1])
        halves_NC = self.halves_U[places_NC]
        return np.stack(
            [leaf_NC - self.head_halves_L[leaves_NC], own_NC - halves_NC, full_NC - halves_NC]
        )

    def _marks(self, digits_ND: Digits, near_NM: Codes, rank: int, score_margin: int) -> Rows:
        """Return mark and full mark of each query, int64 ``[2, N]``."""
        marks_2N = np.empty((2, len(digits_ND)), dtype=np.int64)
        for number, (digits_D, near_M) in enumerate(zip(digits_ND, near_NM, strict=True)):
            places_R = np.concatenate([self._places_of(near) for near in near_M])
            rows_RD, digits = self.digits_UD[places_R].astype(np.int32), digits_D.astype(np.int32)
            own_R = rows_RD[:, :SCORE_DIGITS] @ digits[:SCORE_DIGITS] - self.halves_U[places_R]
            rest_R = rows_RD[:, SCORE_DIGITS:] @ digits[SCORE_DIGITS:]
            mark = _kth_greatest(own_R, rank)
            full_R = (own_R + rest_R)[own_R >= max(mark - score_margin, COUNTS_ALL)]
            marks_2N[:, number] = mark, _kth_greatest(full_R, rank)
        return marks_2N

    def _places_of(self, number: int) -> Rows:
        return np.arange(self.first_place_I[number], self.first_place_I[number + 1])

    def _leaves(self, sizes_I: Rows) -> Rows:
        """Return the leaf of each place."""
        lists_U = np.repeat(np.arange(len(sizes_I)), sizes_I)
        within_U = np.arange(len(lists_U)) - self.first_place_I[lists_U]
        leaves_U: Rows = self.first_leaf_I[lists_U] + within_U // LEAF_SIZE
        return leaves_U

    def _heads(self) -> tuple[Digits, Integers]:
        starts_L = np.searchsorted(self.leaf_U, np.arange(self.first_leaf_I[-1]))
        counts_L = np.diff(np.append(starts_L, len(self.leaf_U)))
        digits_LD = np.empty((len(starts_L), self.digits_UD.shape[1]), dtype=np.int8)
        # Some leaves at a time: their vectors' digits widen on the way.
        for start in range(0, len(starts_L), _LEAVES_PER_BLOCK):
            block = slice(start, start + _LEAVES_PER_BLOCK)
            ends = np.append(starts_L, len(self.leaf_U))[start : start + _LEAVES_PER_BLOCK + 1]
            rows_RD = self.digits_UD[ends[0] : ends[-1]]
            sums_BD = np.add.reduceat(rows_RD, ends[:-1] - ends[0], axis=0, dtype=np.int64)
            digits_LD[block] = np.rint(sums_BD / counts_L[block, None])
        sums_L = np.add.reduceat(self.halves_U, starts_L, dtype=np.int64)
        return digits_LD, np.rint(sums_L / counts_L).astype(np.int32)


def leaf_order(digits_RD: Digits) -> Rows:
    """Return an order of a list's vectors in which every 16 that follow each other are near.

    The vectors are halved, at a multiple of 16, across the direction in which they spread most,
    then each half likewise.

    Args:
        digits_RD: Their digits.

    Returns:
        Places of the vectors.
    """
    parts = [np.arange(len(digits_RD))]
    ordered: list[Rows] = []
    while parts:
        rows = parts.pop()
        if len(rows) <= LEAF_SIZE:
            ordered.append(rows)
            continue
        along_R = _spread(digits_RD[rows].astype(np.float32))
        by_place = rows[np.argsort(along_R, kind="stable")]
        num_leaves = -(-len(rows) // LEAF_SIZE)
        cut = num_leaves // 2 * LEAF_SIZE
        parts += [by_place[cut:], by_place[:cut]]
    return np.concatenate(ordered)


def fitted_margins(gaps_3Nk: Rows, rank: int, allowed_miss: float) -> Margins:
    """Return margins that let true neighbours count, but for a share of them.

    Args:
        gaps_3Nk: What :meth:`SketchedLists.gaps` gives of true neighbours.
        rank: Which score is the mark.
        allowed_miss: Share of the neighbours that may be missed in all; the three margins
            together take less than two thirds of it, the lists that are not probed the rest.

    Returns:
        The margins, none below 0.
    """
    shares = (0.5, 0.1, 0.05)
    fitted = [
        max(0, int(np.quantile(gaps_Nk, 1 - share * allowed_miss, method="higher")))
        for gaps_Nk, share in zip(gaps_3Nk, shares, strict=True)
    ]
    return Margins(rank, *fitted)


def _spread(rows_RD: Embeddings) -> Embeddings:
    """Return each row's place along the direction in which the rows spread most, roughly."""
    rows_RD = rows_RD - rows_RD.mean(axis=0)
    along_R: Embeddings = rows_RD @ rows_RD[np.argmax(np.einsum("rd,rd->r", rows_RD, rows_RD))]
    for _ in range(_POWER_STEPS):
        direction_D = along_R @ rows_RD
        length = np.linalg.norm(direction_D)
        if length == 0:
            break
        along_R = rows_RD @ (direction_D / length)
    return along_R


def _kth_greatest(scores_R: npt.NDArray[np.int32], k: int) -> int:
    if len(scores_R) < k:
        return COUNTS_ALL
    return int(np.partition(scores_R, len(scores_R) - k)[len(scores_R) - k])


def _products(digits_ND: Digits, rows_RD: Digits, places_NC: Rows, width: int) -> Rows:
    """Return the products of each query's first digits with those of some rows, ``[N, C]``."""
    rows_NCD = rows_RD[places_NC, :width].astype(np.float64)
    queries_ND = digits_ND[:, :width].astype(np.float64)
    products_NC: Rows = np.einsum("ncd,nd->nc", rows_NCD, queries_ND).astype(np.int64)
    return products_NC
