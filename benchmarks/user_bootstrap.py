"""Intervals of AUCs and of their differences by drawing users.

Shape letters in this file: N rows, U users, B draws, P positive rows, Q places between negative
rows, S seeds.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_DRAWS_AT_ONCE = 125
INTERVAL = (0.025, 0.975)


def user_weights(
    user_ids_N: npt.NDArray[np.int64], num_draws: int, seed: int = 0
) -> npt.NDArray[np.float32]:
    """Return how often each row counts in each draw of as many users as there are.

    Args:
        user_ids_N: User of each row.
        num_draws: Draws, with replacement.
        seed: Seed of the draws.

    Returns:
        ``[N, B + 1]``; the first column is all ones: the rows as they are.
    """
    users, users_N = np.unique(user_ids_N, return_inverse=True)
    generator = np.random.default_rng(seed)
    counts_BU = generator.multinomial(len(users), np.full(len(users), 1 / len(users)), num_draws)
    weights_UB = np.concatenate([np.ones((1, len(users)), dtype=np.float32), counts_BU]).T
    return np.ascontiguousarray(weights_UB, dtype=np.float32)[users_N]


def weighted_aucs(
    scores_N: npt.NDArray[np.float32],
    labels_N: npt.NDArray[np.bool_],
    weights_NB: npt.NDArray[np.float32],
) -> Floats:
    """Return the AUC of each weighting of the rows, ties counted half; NaN for one class.

    Args:
        scores_N: Scores.
        labels_N: True for positives.
        weights_NB: How often each row counts in each draw.

    Returns:
        ``[B]``.
    """
    positives, negatives = np.flatnonzero(labels_N), np.flatnonzero(~labels_N)
    negatives = negatives[np.argsort(scores_N[negatives], kind="stable")]
    # In this order neighbours read neighbouring sums.
    positives = positives[np.argsort(scores_N[positives], kind="stable")]
    below = [
        np.searchsorted(scores_N[negatives], scores_N[positives], side)
        for side in ("left", "right")
    ]
    blocks = [
        _aucs(weights_NB[:, first : first + _DRAWS_AT_ONCE], positives, negatives, below)
        for first in range(0, weights_NB.shape[1], _DRAWS_AT_ONCE)
    ]
    return np.concatenate(blocks)


def _aucs(
    weights_NB: npt.NDArray[np.float32],
    positives: npt.NDArray[np.intp],
    negatives: npt.NDArray[np.intp],
    below: Sequence[npt.NDArray[np.intp]],
) -> Floats:
    """Return the AUCs of some draws.

    Args:
        weights_NB: Of the rows as they are given.
        positives: Their places.
        negatives: Their places, by ascending score.
        below: Of each positive, how many negatives lie below it, and how many not above it.
    """
    # Sums of counts below 2^24 are exact in float32, which moves half the bytes.
    sums_QB = np.zeros((len(negatives) + 1, weights_NB.shape[1]), dtype=np.float32)
    np.cumsum(weights_NB[negatives], axis=0, out=sums_QB[1:])
    firsts, lasts = below
    below_PB = sums_QB[firsts].astype(np.float64) + sums_QB[lasts]
    positives_PB = weights_NB[positives]
    wins_B = np.einsum("pb,pb->b", positives_PB, below_PB) / 2
    pairs_B = positives_PB.sum(axis=0, dtype=np.float64) * sums_QB[-1]
    with np.errstate(invalid="ignore"):
        aucs_B: Floats = wins_B / pairs_B
    return aucs_B


def seed_mean_aucs(
    scores_SN: Sequence[npt.NDArray[np.float32]],
    labels_N: npt.NDArray[np.bool_],
    weights_NB: npt.NDArray[np.float32],
) -> Floats:
    """Return the AUC of each weighting, averaged over the seeds: ``[B]``."""
    aucs_SB = [weighted_aucs(scores_N, labels_N, weights_NB) for scores_N in scores_SN]
    mean_B: Floats = np.mean(aucs_SB, axis=0)
    return mean_B


def interval(values_B: Floats) -> tuple[float, float]:
    """Return the 95 % interval of the draws: all values but the first, of the rows as they are."""
    low, high = np.nanquantile(values_B[1:], INTERVAL)
    return float(low), float(high)
