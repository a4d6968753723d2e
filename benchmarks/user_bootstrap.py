"""Intervals of AUCs and of their differences by drawing users.

Shape letters in this file: N rows, U users, B draws, Q ties (rows of one score), S seeds.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_DRAWS_AT_ONCE = 50
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
        ``[B + 1, N]``; the first row is all ones: the rows as they are.
    """
    users, users_N = np.unique(user_ids_N, return_inverse=True)
    generator = np.random.default_rng(seed)
    counts_BU = generator.multinomial(len(users), np.full(len(users), 1 / len(users)), num_draws)
    weights_BN = counts_BU.astype(np.float32)[:, users_N]
    return np.concatenate([np.ones((1, len(users_N)), dtype=np.float32), weights_BN])


def weighted_aucs(
    scores_N: npt.NDArray[np.float32],
    labels_N: npt.NDArray[np.bool_],
    weights_BN: npt.NDArray[np.float32],
) -> Floats:
    """Return the AUC of each weighting of the rows, ties counted half; NaN for one class.

    Args:
        scores_N: Scores.
        labels_N: True for positives.
        weights_BN: How often each row counts.

    Returns:
        ``[B]``.
    """
    order_N = np.argsort(scores_N, kind="stable")
    sorted_N = scores_N[order_N]
    starts_Q = np.flatnonzero(np.append(True, sorted_N[1:] != sorted_N[:-1])[: len(sorted_N)])
    if not len(starts_Q):
        return np.full(len(weights_BN), np.nan)
    labels_N = labels_N[order_N]
    parts = [
        _aucs(
            weights_BN[first : first + _DRAWS_AT_ONCE][:, order_N].astype(float), labels_N, starts_Q
        )
        for first in range(0, len(weights_BN), _DRAWS_AT_ONCE)
    ]
    return np.concatenate(parts)


def _aucs(
    weights_BN: Floats, labels_N: npt.NDArray[np.bool_], starts_Q: npt.NDArray[np.int64]
) -> Floats:
    positives_BQ = np.add.reduceat(weights_BN * labels_N, starts_Q, axis=1)
    negatives_BQ = np.add.reduceat(weights_BN * ~labels_N, starts_Q, axis=1)
    below_BQ = np.cumsum(negatives_BQ, axis=1) - negatives_BQ / 2
    wins_B = (positives_BQ * below_BQ).sum(axis=1)
    pairs_B = positives_BQ.sum(axis=1) * negatives_BQ.sum(axis=1)
    with np.errstate(invalid="ignore"):
        aucs_B: Floats = wins_B / pairs_B
    return aucs_B


def seed_mean_aucs(
    scores_SN: Sequence[npt.NDArray[np.float32]],
    labels_N: npt.NDArray[np.bool_],
    weights_BN: npt.NDArray[np.float32],
) -> Floats:
    """Return the AUC of each weighting, averaged over the seeds: ``[B]``."""
    aucs_SB = [weighted_aucs(scores_N, labels_N, weights_BN) for scores_N in scores_SN]
    mean_B: Floats = np.mean(aucs_SB, axis=0)
    return mean_B


def interval(values_B: Floats) -> tuple[float, float]:
    """Return the 95 % interval of the draws: all values but the first, of the rows as they are."""
    low, high = np.nanquantile(values_B[1:], INTERVAL)
    return float(low), float(high)
