import math

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss as reference_log_loss
from sklearn.metrics import roc_auc_score

from qarm_feast.errors import ConfigError
from torchrec_models.metrics import (
    Predictions,
    auc,
    calibration,
    expected_calibration_error,
    log_loss,
    normalized_entropy,
    ranking_metrics,
    user_auc,
)
from torchrec_models.sharding import Ranks
from torchrec_models.slices import COLD, HEAD


def _draw(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many ties, labels, users; some users have one class only."""
    rng = np.random.default_rng(seed)
    scores_N = rng.integers(-8, 9, 500) / 4
    labels_N = rng.random(500) < 1 / (1 + np.exp(-scores_N))
    users_N = rng.integers(0, 60, 500)
    labels_N[users_N < 5] = True
    return scores_N, labels_N, users_N


@pytest.mark.parametrize("seed", range(5))
def test_auc_equals_scikit_learn(seed: int) -> None:
    scores_N, labels_N, _ = _draw(seed)

    assert auc(scores_N, labels_N) == pytest.approx(roc_auc_score(labels_N, scores_N), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_gauc_and_uauc_equal_a_loop_over_users(seed: int) -> None:
    scores_N, labels_N, users_N = _draw(seed)
    per_user = [
        (roc_auc_score(labels_N[users_N == user], scores_N[users_N == user]), sum(users_N == user))
        for user in np.unique(users_N)
        if len(set(labels_N[users_N == user])) == 2
    ]

    gauc, uauc = user_auc(scores_N, labels_N, users_N)

    aucs, counts = np.array(per_user).T
    assert len(per_user) < len(np.unique(users_N))
    assert gauc == pytest.approx((aucs * counts).sum() / counts.sum(), abs=1e-12)
    assert uauc == pytest.approx(aucs.mean(), abs=1e-12)


def test_normalized_entropy_equals_log_loss_over_base_rate_log_loss() -> None:
    logits_N, labels_N, _ = _draw(0)
    base_rate_N = np.full(len(labels_N), labels_N.mean())

    expected = reference_log_loss(labels_N, 1 / (1 + np.exp(-logits_N)))

    assert log_loss(logits_N, labels_N) == pytest.approx(expected, abs=1e-9)
    expected /= reference_log_loss(labels_N, base_rate_N)
    assert normalized_entropy(logits_N, labels_N) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_calibration_error_equals_scikit_learns_curve_weighted_by_bin_size(seed: int) -> None:
    # No score at a bin's edge, where the two put it into different bins.
    logits_N = np.random.default_rng(seed).normal(size=500) * 2
    _, labels_N, _ = _draw(seed)
    predictions_N = 1 / (1 + np.exp(-logits_N))
    rates, means = calibration_curve(labels_N, predictions_N, n_bins=10)
    sizes = np.histogram(predictions_N, bins=10, range=(0, 1))[0]

    expected = np.average(np.abs(rates - means), weights=sizes[sizes > 0])

    assert expected_calibration_error(logits_N, labels_N) == pytest.approx(expected, abs=1e-9)


def test_calibration_is_mean_prediction_over_base_rate() -> None:
    # Predictions .5 and .5, base rate 1/2; then .5 and .9 (the odds of 9 to 1).
    labels_N = np.array([True, False])

    assert calibration(np.array([0.0, 0.0]), labels_N) == pytest.approx(1.0)
    assert calibration(np.array([0.0, np.log(9.0)]), labels_N) == pytest.approx(1.4)


def test_metrics_without_both_classes_are_not_a_number() -> None:
    scores_N, labels_N = np.array([0.1, 0.2]), np.array([True, True])

    assert math.isnan(auc(scores_N, labels_N))
    assert all(math.isnan(value) for value in user_auc(scores_N, labels_N, np.array([1, 2])))
    assert math.isnan(normalized_entropy(scores_N, labels_N))
    nothing = np.zeros(0), np.zeros(0, dtype=bool)
    assert math.isnan(calibration(np.zeros(2), np.array([False, False])))
    for metric in (auc, log_loss, calibration, expected_calibration_error):
        assert math.isnan(metric(*nothing))


def test_a_diverged_run_gets_no_metrics() -> None:
    predictions = Predictions(
        logits_NT=torch.tensor([[float("nan")], [1.0]]),
        labels_NT=torch.tensor([[1.0], [0.0]]),
        user_ids_N=torch.tensor([1, 1]),
        slices_N=torch.zeros(2, dtype=torch.uint8),
    )

    with pytest.raises(ConfigError, match="1 of 2 rows have a logit that is not finite"):
        ranking_metrics(predictions, ["like"])


def test_each_slice_is_judged_by_its_own_rows(ranks: Ranks) -> None:
    predictions = Predictions(
        logits_NT=torch.tensor([[2.0], [1.0], [0.0], [3.0]]),
        labels_NT=torch.tensor([[1.0], [0.0], [1.0], [0.0]]),
        user_ids_N=torch.tensor([1, 1, 2, 2]),
        slices_N=torch.tensor([HEAD, HEAD, COLD, COLD], dtype=torch.uint8),
    )

    metrics = ranking_metrics(predictions.gathered(), ["like"])

    assert [metrics[f"{name}rows"] for name in ("", "cold_", "tail_", "middle_", "head_")] == [
        4, 2, 0, 0, 2,
    ]  # fmt: skip
    assert metrics["head_auc/like"] == 1.0
    assert math.isnan(metrics["tail_auc/like"])
    assert metrics["auc/like"] == 0.25
    assert metrics["cold_auc/like"] == 0.0
    assert metrics["gauc/like"] == 0.5
