"""The weight of the geometry term, chosen on the pairs of held-out items.

Thin or noisy behaviour must not destroy the content geometry, which is all that an item without
behaviour has. So a weight has to prove itself on items that no training pair names.

Shape letters in this file: Q held-out items.
May import: numpy.
"""

from collections.abc import Mapping, Sequence

import numpy as np

GEOMETRY_WEIGHTS = (100.0, 30.0, 10.0, 3.0, 1.0)
"""What ``auto`` tries, the one that keeps most of the content first."""
DEFAULT_WEIGHT = 10.0
"""That of stages which nothing chooses for."""
_SURE = 2.0
"""Standard errors by which a trained head has to be better than the content."""


def choose(aucs_Q: Mapping[str, np.ndarray], content_aucs_Q: Sequence[np.ndarray]) -> str | None:
    """Return the name of the model that is used.

    It is the first that ranks no worse than the best by more than a standard error: where the
    data cannot tell two weights apart, the content is kept.

    Args:
        aucs_Q: AUC per held-out item by name, in the order of ``GEOMETRY_WEIGHTS``.
        content_aucs_Q: AUC per held-out item of each kind of vectors without training.

    Returns:
        A key of ``aucs_Q``; None if none of them is surely better than every content.
    """
    sure = [
        name
        for name, aucs in aucs_Q.items()
        if all(_is_surely_better(aucs, content) for content in content_aucs_Q)
    ]
    if not sure:
        return None
    best = max(sure, key=lambda name: float(aucs_Q[name].mean()))
    return next(name for name in sure if _is_as_good(aucs_Q[name], aucs_Q[best]))


def _is_surely_better(aucs_Q: np.ndarray, content_Q: np.ndarray) -> bool:
    mean, error = _mean_and_error(aucs_Q - content_Q)
    return mean > _SURE * error


def _is_as_good(aucs_Q: np.ndarray, best_Q: np.ndarray) -> bool:
    mean, error = _mean_and_error(best_Q - aucs_Q)
    return mean <= error


def _mean_and_error(differences_Q: np.ndarray) -> tuple[float, float]:
    """Return mean and standard error; of fewer than two values the error has no end."""
    if len(differences_Q) < 2:
        return 0.0, np.inf
    deviation = differences_Q.std(ddof=1)
    return float(differences_Q.mean()), float(deviation / np.sqrt(len(differences_Q)))
