"""Continuity: a refreshed codebook whose codes keep the meaning that the parent's have.

A row (level, code) of an embedding table holds learned weights. A plain refit (below: the naive
refit) names and cuts all cells anew, so those weights would stand for other items. Here:

1. Each level starts from the means of the parent's members in the new space. Only which item had
   which code is read, so the new vectors may have another width or come from another encoder.
2. An item keeps its old code while ``d2_old <= (1 + hysteresis) * d2_best``, level by level on
   what the codes kept so far leave over. A code that is not the nearest is stored as an override,
   by item id and content hash; centroids end as the means of the items that hold their code.
3. Where the mean squared error on the training items is above ``(1 + mse_budget)`` times the naive
   refit's, a few k-means iterations are taken, then more, then the hysteresis is lowered; at last
   the naive refit itself is taken, its labels matched. A thin level has less than
   ``POINTS_PER_CENTROID`` items per code: what a refit gains on just these items it has mostly
   learnt by heart. There the budget is stretched by as much, unless the naive refit changes few
   codes (``FEW_CHANGES``): in the same space none but those that a cap had moved.
4. A level cannot start from members if its size differs from the parent's, or if fewer than half
   of the parent's codes have a member among the training items. Such a level is trained afresh,
   and its codes get the parent's labels by Hungarian matching of the items they share.
5. An FSQ level keeps what each bit means: its directions are fitted to the signs of the parent's
   codes, so all codes go on, also those without members. In place of (3)'s Hungarian matching the
   bits of the naive lattice are paired with the parent's. A parent whose level is of another kind
   or size has no such bits; the level is then fresh.
6. Pool items that survive keep their row; freed rows go to new items. Lists of pool rows keep old
   neighbours that are near enough, see :mod:`qarm_feast.list_continuity`.

An item with new content is a new item here: its old code says nothing about it.

Shape letters in this file: N items, D embedding width, L levels, K codes of a level, M members,
O codes of the parent's level, P pool rows, S surviving pool items, F free rows.
May import: NumPy, scipy, the codebook and its quantizers.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from qarm_feast.codebook import Codebook, ItemIds, ItemVectors, check_distinct
from qarm_feast.codebook_config import ContinuityConfig, LevelKind
from qarm_feast.errors import CodebookError, DataError
from qarm_feast.list_continuity import HeldLists, held_lists
from qarm_feast.overrides import NO_ROW, Overrides, content_order, find_content, hash_array
from qarm_feast.quantizers.balance import balanced_lloyd
from qarm_feast.quantizers.base import Codes, Embeddings, unit_rows
from qarm_feast.quantizers.fsq import fit_lattice, paired_codes, train_lattice
from qarm_feast.quantizers.kmeans import cell_means, lloyd, plus_plus_start, sample_rows
from qarm_feast.quantizers.rq import (
    POINTS_PER_CENTROID,
    ResidualQuantizer,
    RqConfig,
    level_kinds,
)
from qarm_feast.quantizers.search import nearest, squared_distances
from qarm_feast.quantizers.vq import NeighborQuantizer
from qarm_feast.training_reference import TrainingReference

logger = logging.getLogger(__name__)

NO_CODE = -1
"""In place of a parent's code: there is none."""
FEW_CHANGES = 0.25
"""A naive refit that changes at most this share of full codes needs no stretched budget."""
MIN_SHARE_WITH_MEMBERS = 0.5
"""Below this share of the parent's codes with a member, a level is matched instead."""
NUM_HELD_MEANS = 2
"""Means taken of the items as they hold their codes, after the k-means iterations."""
NUM_BISECTIONS = 4
"""Steps in which the largest hysteresis within the budget is looked for."""


@dataclass(frozen=True)
class ParentCodes:
    """What a refresh reads of the parent: the codes it serves, and its pool.

    ``rq_NL`` and ``vq_NV`` hold the codes of each item with just that content.
    """

    version: str
    level_sizes: tuple[int, ...]
    level_kinds: tuple[LevelKind, ...]
    behaviour_cutoff: datetime | None
    pool_item_ids_P: ItemIds
    item_ids_N: ItemIds
    content_hashes_N: Sequence[str]
    rq_NL: Codes
    vq_NV: Codes

    @classmethod
    def served_by(cls, codebook: Codebook, items: ItemVectors) -> "ParentCodes":
        """Return the codes that ``codebook`` serves for ``items``, its overrides included.

        Args:
            codebook: The parent.
            items: Items with the vectors of the parent's encoder.

        Returns:
            Codes in the order of the items.
        """
        served = codebook.encode(items.item_ids_N, items.content_hashes_N, items.x_ND)
        return cls(
            version=codebook.version,
            level_sizes=codebook.manifest.level_sizes,
            level_kinds=codebook.manifest.kinds,
            behaviour_cutoff=codebook.manifest.behaviour_cutoff,
            pool_item_ids_P=codebook.vq.pool_item_ids_P,
            item_ids_N=items.item_ids_N,
            content_hashes_N=items.content_hashes_N,
            rq_NL=served.rq_NL,
            vq_NV=served.vq_NV,
        )

    def goes_on(self, number: int, size: int, kind: LevelKind) -> bool:
        """Return whether the parent has a level ``number`` of just that size and kind."""
        if number >= len(self.level_sizes):
            return False
        return (self.level_sizes[number], self.level_kinds[number]) == (size, kind)

    def codes_of(self, item_ids_N: ItemIds, content_hashes_N: Sequence[str]) -> Codes:
        """Return the parent's RQ codes of items; ``NO_CODE`` for a new item or new content."""
        return self._of(self.rq_NL, item_ids_N, content_hashes_N)

    def lists_of(self, item_ids_N: ItemIds, content_hashes_N: Sequence[str]) -> Codes:
        """Return the parent's VQ lists; ``NO_NEIGHBOR`` for a new item or new content."""
        return self._of(self.vq_NV, item_ids_N, content_hashes_N)

    def _of(self, own_NC: Codes, item_ids_N: ItemIds, content_hashes_N: Sequence[str]) -> Codes:
        hashes_M = hash_array(self.content_hashes_N)
        order_M = content_order(self.item_ids_N, hashes_M)
        rows_N = find_content(
            self.item_ids_N[order_M], hashes_M[order_M], item_ids_N, hash_array(content_hashes_N)
        )
        is_known_N = rows_N != NO_ROW
        codes_NC = np.full((len(rows_N), own_NC.shape[1]), NO_CODE, dtype=np.int64)
        codes_NC[is_known_N] = own_NC[order_M[rows_N[is_known_N]]]
        return codes_NC


@dataclass(frozen=True)
class FittedLevel:
    """One level of a refreshed codebook.

    ``parent_code_K`` names the parent's code that each code goes on from, or ``NO_CODE``;
    ``start`` tells how: from members, matched with them afterwards, or with nothing to go by.
    """

    centroids_KD: Embeddings
    parent_code_K: Codes
    start: Literal["warm", "matched", "fresh"]

    def to_own(self, old_N: Codes) -> Codes:
        """Return the codes of this level that go on from the parent's, or ``NO_CODE``."""
        size = 1 + max(int(old_N.max(initial=0)), int(self.parent_code_K.max(initial=0)))
        # One place more than codes: NO_CODE indexes the last.
        own_of_O = np.full(size + 1, NO_CODE, dtype=np.int64)
        goes_on_K = np.flatnonzero(self.parent_code_K != NO_CODE)
        own_of_O[self.parent_code_K[goes_on_K]] = goes_on_K
        own_N: Codes = own_of_O[old_N]
        return own_N


@dataclass(frozen=True)
class _Items:
    """Sorted by id: vectors of length 1, the parent's codes, and which items train."""

    vectors: ItemVectors
    old_NL: Codes
    is_train_N: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Fit:
    """The levels of one attempt, what they were fitted with, and what they cost."""

    levels: Sequence[FittedLevel]
    hysteresis: float
    num_iterations: int
    quantization_mse: float


def refresh_codebook(
    naive: Codebook,
    items: ItemVectors,
    train_item_ids: ItemIds,
    parent: ParentCodes,
    config: ContinuityConfig,
    rq_config: RqConfig,
) -> Codebook:
    """Return a codebook of new vectors whose codes keep the parent's labels.

    Args:
        naive: The naive refit: trained on the new vectors without a look at the parent. Version,
            sizes and encoder come from it.
        items: Every item of the catalogue, each once, with its new vector.
        train_item_ids: The items that ``naive`` was trained on; others may keep their code, and
            shape nothing.
        parent: The parent's codes.
        config: Hysteresis of codes and of lists, iterations and budget.
        rq_config: Seed, sample size and most iterations.

    Returns:
        A codebook that is not stored yet. Its manifest names the parent and holds the label map,
        the pool rows that start anew, and as ``continuity`` the churn and the error beside those
        of the naive refit, see :func:`codes_churn` and
        :func:`~qarm_feast.list_continuity.held_lists`.

    Raises:
        CodebookError: If the refreshed version has the parent's name.
        DataError: If an item comes twice, or an item to train on has no vector.
    """
    if naive.version == parent.version:
        raise CodebookError(
            f"codebook version {naive.version!r} cannot be its own parent; use another "
            "--codebook-version"
        )
    prepared = _prepared(items, train_item_ids, parent)
    fit = _fit_within_budget(naive, prepared, parent, config, rq_config)
    rq = ResidualQuantizer(codebooks=[level.centroids_KD for level in fit.levels])
    served_NL = held_codes(fit.levels, prepared.vectors.x_ND, prepared.old_NL, fit.hysteresis)
    vq, reset_rows = _recycled_pool(naive.vq, parent.pool_item_ids_P, prepared)
    lists = _held_lists(vq, prepared.vectors, parent, reset_rows, config)
    cutoffs = (naive.manifest.behaviour_cutoff, parent.behaviour_cutoff)
    update = {
        "parent": parent.version,
        "behaviour_cutoff": max((time for time in cutoffs if time is not None), default=None),
        "label_map": tuple(tuple(level.parent_code_K.tolist()) for level in fit.levels),
        "reset_pool_rows": tuple(reset_rows.tolist()),
        "search_settings": vq.search_settings,
        "search_recall": vq.search_recall,
        "continuity": _report(naive, fit, served_NL, prepared, parent, len(reset_rows))
        | {"lists": lists.figures},
    }
    overrides = _overrides(prepared.vectors, served_NL, rq.encode(prepared.vectors.x_ND))
    manifest = naive.manifest.model_copy(update=update)
    training = TrainingReference.of(rq, prepared.vectors.x_ND[prepared.is_train_N])
    listed = lists.overrides(prepared.vectors)
    return Codebook(manifest, rq, vq, overrides, training, listed).with_hashes()


def held_codes(
    levels: Sequence[FittedLevel], x_ND: Embeddings, old_NL: Codes, hysteresis: float
) -> Codes:
    """Return the codes that items get: the old one while it is near enough, else the nearest.

    Args:
        levels: The refreshed levels.
        x_ND: Vectors of length 1, float32.
        old_NL: The parent's codes, ``NO_CODE`` where there is none.
        hysteresis: An old code is kept while its squared distance is at most ``1 + hysteresis``
            times the least, on what the codes of the levels before leave over.

    Returns:
        Codes of shape ``[N, L]``, int64, in the labels of ``levels``.
    """
    residual_ND = np.array(x_ND, order="C")
    codes_NL = np.empty((len(x_ND), len(levels)), dtype=np.int64)
    for number, level in enumerate(levels):
        own_N = level.to_own(_level_codes(old_NL, number))
        codes_NL[:, number] = _near_enough(residual_ND, level.centroids_KD, own_N, hysteresis)
        residual_ND -= level.centroids_KD[codes_NL[:, number]]
    return codes_NL


def match_labels(old_M: Codes, new_M: Codes, num_old: int, num_new: int) -> Codes:
    """Return for each new code the old code it is matched with, so that most items agree.

    Args:
        old_M: Old code of each item.
        new_M: New code of each item.
        num_old: Size of the old level.
        num_new: Size of the new level.

    Returns:
        Old codes of shape ``[num_new]``, each at most once; ``NO_CODE`` for a new code that got
        none or shares no item with it.
    """
    counts_OK = np.bincount(old_M * num_new + new_M, minlength=num_old * num_new)
    counts_OK = counts_OK.reshape(num_old, num_new)
    old_codes, new_codes = linear_sum_assignment(counts_OK, maximize=True)
    shares_item = counts_OK[old_codes, new_codes] > 0
    matched_K = np.full(num_new, NO_CODE, dtype=np.int64)
    matched_K[new_codes[shares_item]] = old_codes[shares_item]
    return matched_K


def codes_churn(old_NL: Codes, codes_NL: Codes, label_map: Sequence[Codes]) -> dict[str, Any]:
    """Return which share of items changed their code, as the label map reads it.

    Args:
        old_NL: The parent's codes of items that it has coded.
        codes_NL: New codes of the same items.
        label_map: Per new level and code the parent's code, or ``NO_CODE``.

    Returns:
        ``full``, ``prefixes`` and ``levels`` (lists from level 1 on, as far as both versions
        have levels); a codebook with another number of levels changes every full code.
    """
    num_levels = min(old_NL.shape[1], codes_NL.shape[1])
    if len(old_NL) == 0:
        return {"full": 0.0, "prefixes": [0.0] * num_levels, "levels": [0.0] * num_levels}
    read_NL = np.stack([label_map[number][codes_NL[:, number]] for number in range(num_levels)], 1)
    is_same_NL = read_NL == old_NL[:, :num_levels]
    is_same_prefix_NL = np.logical_and.accumulate(is_same_NL, axis=1)
    prefixes = (1 - is_same_prefix_NL.mean(axis=0)).tolist()
    is_comparable = old_NL.shape[1] == codes_NL.shape[1]
    return {
        "full": prefixes[-1] if is_comparable else 1.0,
        "prefixes": prefixes,
        "levels": (1 - is_same_NL.mean(axis=0)).tolist(),
    }


def _prepared(items: ItemVectors, train_item_ids: ItemIds, parent: ParentCodes) -> _Items:
    order_N = np.argsort(items.item_ids_N, kind="stable")
    ids_N = items.item_ids_N[order_N].astype(np.int64)
    check_distinct(ids_N)
    is_train_N = np.isin(ids_N, train_item_ids)
    if int(is_train_N.sum()) != len(np.unique(train_item_ids)):
        raise DataError(
            f"{len(np.unique(train_item_ids)) - int(is_train_N.sum())} items to train on have no "
            "vector; run `qarm align export` again"
        )
    hashes_N = [items.content_hashes_N[row] for row in order_N.tolist()]
    vectors = ItemVectors(ids_N, hashes_N, unit_rows(items.x_ND[order_N]))
    return _Items(vectors, parent.codes_of(ids_N, hashes_N), is_train_N)


def _fit_within_budget(
    naive: Codebook,
    items: _Items,
    parent: ParentCodes,
    config: ContinuityConfig,
    rq_config: RqConfig,
) -> _Fit:
    train_rows = np.flatnonzero(items.is_train_N)
    generator = np.random.default_rng(rq_config.seed)
    rows_M = train_rows[sample_rows(len(train_rows), rq_config.train_sample_size, generator)]
    x_MD, old_ML = items.vectors.x_ND[rows_M], items.old_NL[rows_M]
    naive_mse = _mse(x_MD, naive.decode_rq(naive.rq.encode(x_MD)))
    limit = (1 + config.mse_budget) * naive_mse
    trainer = _LevelTrainer(x_MD, old_ML, naive.rq.level_sizes, parent, rq_config)
    search = _BudgetSearch(trainer, limit, naive_mse)
    fit = search.more_iterations(config, rq_config.num_iterations) or search.less_hysteresis()
    if fit is not None:
        return fit
    kinds = level_kinds(rq_config, naive.rq.level_sizes)
    matched = _Fit(_matched_levels(naive, x_MD, old_ML, parent, kinds), 0.0, 0, naive_mse)
    stretched = search.first_within((1 + _thinness(x_MD, naive) * config.mse_budget) * naive_mse)
    if stretched is not None and _full_churn(matched, x_MD, old_ML) > FEW_CHANGES:
        return stretched
    logger.warning(
        "codebook_refresh_over_budget mse_budget=%.3f: the naive refit is taken, labels matched",
        config.mse_budget,
    )
    return matched


def _full_churn(fit: _Fit, x_MD: Embeddings, old_ML: Codes) -> float:
    """Return which share of the items that the parent has coded change their full code."""
    is_known_M = old_ML[:, 0] != NO_CODE
    codes_ML = held_codes(fit.levels, x_MD[is_known_M], old_ML[is_known_M], fit.hysteresis)
    label_map = [level.parent_code_K for level in fit.levels]
    churn: float = codes_churn(old_ML[is_known_M], codes_ML, label_map)["full"]
    return churn


def _thinness(x_MD: Embeddings, naive: Codebook) -> float:
    """Return how many times too few items the largest level has, at least 1."""
    wanted = POINTS_PER_CENTROID * max(naive.rq.level_sizes)
    return max(1.0, wanted / len(np.unique(x_MD, axis=0)))


class _BudgetSearch:
    """Looks for a fit within the budget that keeps as many codes as it can."""

    def __init__(self, trainer: "_LevelTrainer", limit: float, naive_mse: float) -> None:
        self._trainer = trainer
        self._limit = limit
        self._naive_mse = naive_mse
        self._last: _Fit | None = None
        self._tried: list[_Fit] = []

    def more_iterations(self, config: ContinuityConfig, most_iterations: int) -> _Fit | None:
        """Return the first fit within the budget of ever more iterations, None if there is none."""
        # None at first: in the same space k-means would only move on from codes that still serve.
        num_iterations = 0
        while self._last is None or self._last.num_iterations < most_iterations:
            fit = self._try(config.hysteresis, num_iterations)
            if fit is not None:
                return fit
            num_iterations = min(max(config.num_iterations, 2 * num_iterations), most_iterations)
        return None

    def less_hysteresis(self) -> _Fit | None:
        """Return the fit of the largest hysteresis within the budget, found by bisection."""
        assert self._last is not None, "more iterations are tried first"
        high, num_iterations = self._last.hysteresis, self._last.num_iterations
        best = self._try(0.0, num_iterations) if high > 0 else None
        if best is None:
            return None
        low = 0.0
        for _ in range(NUM_BISECTIONS):
            middle = (low + high) / 2
            fit = self._try(middle, num_iterations)
            if fit is None:
                high = middle
            else:
                best, low = fit, middle
        return best

    def first_within(self, limit: float) -> _Fit | None:
        """Return the one of the fits tried that keeps most codes at an error up to ``limit``."""
        # They come in the order in which they give up codes.
        return next((fit for fit in self._tried if fit.quantization_mse <= limit), None)

    def _try(self, hysteresis: float, num_iterations: int) -> _Fit | None:
        fit = self._last = self._trainer.fit(hysteresis, num_iterations)
        self._tried.append(fit)
        logger.info(
            "codebook_refresh hysteresis=%.4f num_iterations=%d mse_over_naive=%.4f",
            hysteresis, num_iterations, fit.quantization_mse / self._naive_mse - 1,
        )  # fmt: skip
        return fit if fit.quantization_mse <= self._limit else None


class _LevelTrainer:
    """Fits all levels to the training items; every fit starts from the parent's members."""

    def __init__(
        self,
        x_MD: Embeddings,
        old_ML: Codes,
        sizes: tuple[int, ...],
        parent: ParentCodes,
        rq_config: RqConfig,
    ) -> None:
        self._x_MD, self._old_ML = x_MD, old_ML
        self._sizes = sizes
        self._kinds = level_kinds(rq_config, sizes)
        self._parent = parent
        self._rq_config = rq_config

    def fit(self, hysteresis: float, num_iterations: int) -> _Fit:
        """Return the levels after so many iterations each, and their mean squared error."""
        residual_MD = np.array(self._x_MD, order="C")
        levels: list[FittedLevel] = []
        for number in range(len(self._sizes)):
            old_M = _level_codes(self._old_ML, number)
            if self._can_start_warm(number, old_M):
                level = self._warm(residual_MD, old_M, number, hysteresis, num_iterations)
            else:
                level = self._fresh_level(residual_MD, old_M, number)
            own_M = level.to_own(old_M)
            codes_M = _near_enough(residual_MD, level.centroids_KD, own_M, hysteresis)
            residual_MD -= level.centroids_KD[codes_M]
            levels.append(level)
        mse = float(np.square(residual_MD, dtype=np.float64).mean())
        return _Fit(levels, hysteresis, num_iterations, mse)

    def _can_start_warm(self, number: int, old_M: Codes) -> bool:
        size, kind = self._sizes[number], self._kinds[number]
        if not self._parent.goes_on(number, size, kind):
            return False
        num_members = int((old_M != NO_CODE).sum())
        # Members tell the means of their own codes, but the directions of all codes of a lattice.
        num_told = len(np.unique(old_M[old_M != NO_CODE])) if kind == "kmeans" else num_members
        return num_told >= MIN_SHARE_WITH_MEMBERS * size

    def _warm(
        self,
        residual_MD: Embeddings,
        old_M: Codes,
        number: int,
        hysteresis: float,
        num_iterations: int,
    ) -> FittedLevel:
        size = self._sizes[number]
        if self._kinds[number] == "fsq":
            return _warm_lattice(residual_MD, old_M, size, hysteresis)
        return _warm_level(residual_MD, old_M, size, hysteresis, num_iterations)

    def _fresh_level(self, residual_MD: Embeddings, old_M: Codes, number: int) -> FittedLevel:
        size = self._sizes[number]
        if self._kinds[number] == "fsq":
            goes_on = self._parent.goes_on(number, size, "fsq")
            return _rebitted(train_lattice(residual_MD, size), residual_MD, old_M, goes_on)
        generator = np.random.default_rng([self._rq_config.seed, number])
        start_KD = plus_plus_start(residual_MD, size, generator)
        iterate = balanced_lloyd if self._rq_config.enable_balance else lloyd
        centroids_KD = iterate(residual_MD, start_KD, self._rq_config.num_iterations)
        codes_M = nearest(residual_MD, centroids_KD)[:, 0]
        return _relabelled(centroids_KD, codes_M, old_M, _parent_size(self._parent, number))


def _warm_level(
    residual_MD: Embeddings, old_M: Codes, size: int, hysteresis: float, num_iterations: int
) -> FittedLevel:
    """Return a level started at its old members' means; a code that loses all starts anew.

    K-means first, then a few means of the items that will hold each code: they cost no code and
    win back much of the error that kept codes add.
    """
    is_member_M = old_M != NO_CODE
    goes_on_K = np.bincount(old_M[is_member_M], minlength=size) > 0
    origin_KD = np.zeros((size, residual_MD.shape[1]), dtype=np.float32)
    # A code without members starts at the member farthest from the origin.
    centroids_KD = cell_means(residual_MD[is_member_M], old_M[is_member_M], origin_KD)
    for step in range(num_iterations + NUM_HELD_MEANS):
        held = hysteresis if step >= num_iterations else 0.0
        own_M = np.where(goes_on_K[old_M], old_M, NO_CODE)
        codes_M = _near_enough(residual_MD, centroids_KD, own_M, held)
        goes_on_K &= np.bincount(codes_M, minlength=size) > 0
        centroids_KD = cell_means(residual_MD, codes_M, centroids_KD)
    parent_code_K = np.where(goes_on_K, np.arange(size), NO_CODE)
    return FittedLevel(centroids_KD, parent_code_K, "warm")


def _warm_lattice(
    residual_MD: Embeddings, old_M: Codes, size: int, hysteresis: float
) -> FittedLevel:
    """Return a lattice whose bits mean what the old members' bits mean.

    Few directions follow from many members, so there are no iterations to win back error with:
    free steps would only turn the lattice away from the codes that items hold.
    """
    is_member_M = old_M != NO_CODE
    centroids_KD = fit_lattice(residual_MD[is_member_M], old_M[is_member_M], size)
    for _ in range(NUM_HELD_MEANS):
        codes_M = _near_enough(residual_MD, centroids_KD, old_M, hysteresis)
        centroids_KD = fit_lattice(residual_MD, codes_M, size)
    return FittedLevel(centroids_KD, np.arange(size), "warm")


def _matched_levels(
    naive: Codebook,
    x_MD: Embeddings,
    old_ML: Codes,
    parent: ParentCodes,
    kinds: tuple[LevelKind, ...],
) -> list[FittedLevel]:
    residual_MD = np.array(x_MD, order="C")
    levels = []
    for number, (centroids_KD, kind) in enumerate(zip(naive.rq.codebooks, kinds, strict=True)):
        old_M = _level_codes(old_ML, number)
        codes_M = nearest(residual_MD, centroids_KD)[:, 0]
        if kind == "fsq":
            goes_on = parent.goes_on(number, len(centroids_KD), kind)
            levels.append(_rebitted(centroids_KD, residual_MD, old_M, goes_on))
        else:
            num_old = _parent_size(parent, number)
            levels.append(_relabelled(centroids_KD, codes_M, old_M, num_old))
        residual_MD -= centroids_KD[codes_M]
    return levels


def _parent_size(parent: ParentCodes, number: int) -> int:
    """Return the size of the parent's level, 0 if it has none."""
    return parent.level_sizes[number] if number < len(parent.level_sizes) else 0


def _rebitted(
    centroids_KD: Embeddings, residual_MD: Embeddings, old_M: Codes, goes_on: bool
) -> FittedLevel:
    """Return the lattice with its bits paired with the parent's, where that had such a lattice."""
    size = len(centroids_KD)
    is_member_M = old_M != NO_CODE
    if not (goes_on and is_member_M.any()):
        return FittedLevel(centroids_KD, np.full(size, NO_CODE, dtype=np.int64), "fresh")
    codes_M = nearest(residual_MD[is_member_M], centroids_KD)[:, 0]
    source_K = paired_codes(old_M[is_member_M], codes_M, size)
    return FittedLevel(centroids_KD[source_K], np.arange(size), "matched")


def _relabelled(
    centroids_KD: Embeddings, codes_M: Codes, old_M: Codes, num_old: int
) -> FittedLevel:
    """Return the level with its codes matched to the parent's, under the same number if it can."""
    size = len(centroids_KD)
    is_member_M = old_M != NO_CODE
    if not is_member_M.any():
        return FittedLevel(centroids_KD, np.full(size, NO_CODE, dtype=np.int64), "fresh")
    matched_K = match_labels(old_M[is_member_M], codes_M[is_member_M], num_old, size)
    source_K = np.full(size, NO_CODE, dtype=np.int64)
    keeps_number_K = (matched_K != NO_CODE) & (matched_K < size)
    source_K[matched_K[keeps_number_K]] = np.flatnonzero(keeps_number_K)
    source_K[source_K == NO_CODE] = np.flatnonzero(~keeps_number_K)
    return FittedLevel(centroids_KD[source_K], matched_K[source_K], "matched")


def _near_enough(
    residual_ND: Embeddings, centroids_KD: Embeddings, own_N: Codes, hysteresis: float
) -> Codes:
    codes_N = nearest(residual_ND, centroids_KD)[:, 0]
    rows_S = np.flatnonzero((own_N != NO_CODE) & (own_N != codes_N))
    held_SD = residual_ND[rows_S]
    best_S = squared_distances(held_SD, centroids_KD[codes_N[rows_S]]).astype(np.float64)
    old_S = squared_distances(held_SD, centroids_KD[own_N[rows_S]]).astype(np.float64)
    kept_rows = rows_S[old_S <= (1 + hysteresis) * best_S]
    codes_N[kept_rows] = own_N[kept_rows]
    return codes_N


def _level_codes(old_NL: Codes, number: int) -> Codes:
    """Return the parent's codes of a level; none where the parent has fewer levels."""
    if number < old_NL.shape[1]:
        return old_NL[:, number]
    return np.full(len(old_NL), NO_CODE, dtype=np.int64)


def _recycled_pool(
    naive: NeighborQuantizer, parent_ids_P: ItemIds, items: _Items
) -> tuple[NeighborQuantizer, npt.NDArray[np.int64]]:
    """Return a pool as large as the naive one, and its rows that do not go on.

    Items of the parent's pool that still train stay in it, each in its row unless the pool has
    become too short; then come items of the naive pool, by id, in the lowest free rows.
    """
    size = len(naive.pool_item_ids_P)
    train_ids = items.vectors.item_ids_N[items.is_train_N]
    surviving_S = parent_ids_P[np.isin(parent_ids_P, train_ids)][:size]
    keeps_row_P = np.isin(parent_ids_P, surviving_S)[:size]
    is_free_P = np.ones(size, dtype=bool)
    is_free_P[: len(keeps_row_P)] = ~keeps_row_P
    moved_S = surviving_S[~np.isin(surviving_S, parent_ids_P[:size])]
    new_ids = np.setdiff1d(naive.pool_item_ids_P, surviving_S)
    ids_P = np.empty(size, dtype=np.int64)
    ids_P[~is_free_P] = parent_ids_P[:size][keeps_row_P]
    reset_F = np.flatnonzero(is_free_P)
    ids_P[reset_F] = np.concatenate([moved_S, new_ids])[: len(reset_F)]
    vectors_PD = items.vectors.x_ND[np.searchsorted(items.vectors.item_ids_N, ids_P)]
    return naive.with_pool(vectors_PD, ids_P), reset_F


def _held_lists(
    vq: NeighborQuantizer,
    vectors: ItemVectors,
    parent: ParentCodes,
    reset_rows: npt.NDArray[np.int64],
    config: ContinuityConfig,
) -> HeldLists:
    old_NV = parent.lists_of(vectors.item_ids_N, vectors.content_hashes_N)
    return held_lists(vq, vectors, old_NV, reset_rows, config.list_hysteresis)


def _overrides(vectors: ItemVectors, served_NL: Codes, nearest_NL: Codes) -> Overrides:
    rows = np.flatnonzero((served_NL != nearest_NL).any(axis=1))
    hashes = [vectors.content_hashes_N[row] for row in rows.tolist()]
    return Overrides.from_rows(vectors.item_ids_N[rows], hashes, served_NL[rows])


def _report(
    naive: Codebook,
    fit: _Fit,
    served_NL: Codes,
    items: _Items,
    parent: ParentCodes,
    num_reset_rows: int,
) -> dict[str, Any]:
    x_ND = items.vectors.x_ND
    naive_NL = naive.rq.encode(x_ND)
    decoded_ND = ResidualQuantizer(codebooks=[level.centroids_KD for level in fit.levels]).decode(
        served_NL
    )
    naive_decoded_ND = naive.decode_rq(naive_NL)
    train_N = items.is_train_N
    is_known_N = (items.old_NL != NO_CODE).any(axis=1)
    has_old_id_N = np.isin(items.vectors.item_ids_N, parent.item_ids_N)
    same_numbers = [np.arange(size) for size in naive.rq.level_sizes]
    label_map = [level.parent_code_K for level in fit.levels]
    old_NL = items.old_NL[is_known_N]
    return {
        "hysteresis": fit.hysteresis,
        "num_iterations": fit.num_iterations,
        "level_starts": [level.start for level in fit.levels],
        "num_items": {
            "compared": int(is_known_N.sum()),
            "edited": int((has_old_id_N & ~is_known_N).sum()),
            "new": int((~has_old_id_N).sum()),
            "gone": int((~np.isin(parent.item_ids_N, items.vectors.item_ids_N)).sum()),
        },
        "quantization_mse": _mse(x_ND[train_N], decoded_ND[train_N]),
        "naive_quantization_mse": _mse(x_ND[train_N], naive_decoded_ND[train_N]),
        "catalogue_mse": _mse(x_ND, decoded_ND),
        "naive_catalogue_mse": _mse(x_ND, naive_decoded_ND),
        "churn": codes_churn(old_NL, served_NL[is_known_N], label_map),
        "naive_churn": codes_churn(old_NL, naive_NL[is_known_N], same_numbers),
        "pool": _pool_churn(naive.vq.pool_item_ids_P, parent.pool_item_ids_P, num_reset_rows),
    }


def _pool_churn(naive_ids_P: ItemIds, parent_ids_P: ItemIds, num_reset: int) -> dict[str, Any]:
    """Return kept and reset rows, and the share of the parent's rows that did not go on."""
    num_kept = len(naive_ids_P) - num_reset
    both = min(len(naive_ids_P), len(parent_ids_P))
    num_kept_naive = int((naive_ids_P[:both] == parent_ids_P[:both]).sum())
    return {
        "num_kept": num_kept,
        "num_reset": num_reset,
        "churn": 1 - num_kept / len(parent_ids_P),
        "naive_churn": 1 - num_kept_naive / len(parent_ids_P),
    }


def _mse(x_ND: Embeddings, decoded_ND: Embeddings) -> float:
    return float(np.square(x_ND - decoded_ND, dtype=np.float64).mean())
