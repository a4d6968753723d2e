"""Ranking metrics per task, over the rows of all ranks, for all items and per slice of items.

AUC; GAUC = sum n_u AUC_u / sum n_u and UAUC = mean AUC_u over the users with both classes;
NE = log loss / entropy of the base rate; calibration = mean prediction / base rate; ECE = expected
calibration error over ten equally wide bins of the prediction. A metric that is not defined (one
class only) is NaN.
Shape letters: N rows, T tasks, G groups (users), C calibration bins.
May import: numpy, scipy, torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from scipy.special import expit

from qarm_feast.errors import ConfigError
from torchrec_models.slices import SLICES

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Predictions:
    """Logits with what is needed to judge them."""

    logits_NT: torch.Tensor
    labels_NT: torch.Tensor
    user_ids_N: torch.Tensor
    slices_N: torch.Tensor
    """Slice of each row's item, a place in :data:`~torchrec_models.slices.SLICES`, uint8."""

    @staticmethod
    def concatenate(parts: Sequence["Predictions"]) -> "Predictions":
        """Return the rows of all parts, in order."""
        return Predictions(
            logits_NT=torch.cat([part.logits_NT for part in parts]),
            labels_NT=torch.cat([part.labels_NT for part in parts]),
            user_ids_N=torch.cat([part.user_ids_N for part in parts]),
            slices_N=torch.cat([part.slices_N for part in parts]),
        )

    def first(self, num_rows: int) -> "Predictions":
        """Return the first rows."""
        return Predictions(
            logits_NT=self.logits_NT[:num_rows],
            labels_NT=self.labels_NT[:num_rows],
            user_ids_N=self.user_ids_N[:num_rows],
            slices_N=self.slices_N[:num_rows],
        )

    def gathered(self) -> "Predictions":
        """Return the rows of all ranks, on every rank, in memory of the CPU."""
        return Predictions(
            logits_NT=_all_rows(self.logits_NT),
            labels_NT=_all_rows(self.labels_NT),
            user_ids_N=_all_rows(self.user_ids_N),
            slices_N=_all_rows(self.slices_N),
        )


def _all_rows(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.cpu()
    world_size = dist.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(counts, torch.tensor([len(rows)]))
    most = int(max(counts))
    padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype)
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(count)] for part, count in zip(gathered, counts, strict=True)])


def ranking_metrics(predictions: Predictions, task_names: Sequence[str]) -> dict[str, float]:
    """Return every metric under its key, for example ``auc/like`` and ``cold_auc/like``.

    Args:
        predictions: Rows of all ranks; a row whose label of a task is NaN does not count there.
        task_names: One name per column of the logits.

    Returns:
        ``rows``, and per task AUC, GAUC, UAUC, NE, log loss, calibration and ECE; the same of each
        slice with the slice's name before it.

    Raises:
        ConfigError: If a logit is not finite: it would still be ranked, and look like a result.
    """
    num_bad = int((~torch.isfinite(predictions.logits_NT)).any(dim=1).sum())
    if num_bad:
        raise ConfigError(
            f"{num_bad} of {len(predictions.logits_NT)} rows have a logit that is not finite: the "
            "training diverged; lower ranker.learning_rate or ranker.sparse_learning_rate"
        )
    slices_N = predictions.slices_N.numpy()
    user_ids_N = predictions.user_ids_N.numpy()
    chosen = {"": np.ones(len(slices_N), dtype=np.bool_)}
    chosen |= {f"{name}_": slices_N == number for number, name in enumerate(SLICES)}
    metrics: dict[str, float] = {
        f"{prefix}rows": int(rows.sum()) for prefix, rows in chosen.items()
    }
    for task, name in enumerate(task_names):
        logits_N = predictions.logits_NT[:, task].double().numpy()
        is_labelled_N = ~predictions.labels_NT[:, task].isnan().numpy()
        labels_N = predictions.labels_NT[:, task].numpy() > 0.5
        for prefix, chosen_N in chosen.items():
            rows = chosen_N & is_labelled_N
            values = _task_metrics(logits_N[rows], labels_N[rows], user_ids_N[rows])
            metrics |= {f"{prefix}{metric}/{name}": value for metric, value in values.items()}
    return metrics


def _task_metrics(logits_N: Floats, labels_N: Bools, user_ids_N: Ints) -> dict[str, float]:
    gauc, uauc = user_auc(logits_N, labels_N, user_ids_N)
    return {
        "auc": auc(logits_N, labels_N),
        "gauc": gauc,
        "uauc": uauc,
        "ne": normalized_entropy(logits_N, labels_N),
        "log_loss": log_loss(logits_N, labels_N),
        "calibration": calibration(logits_N, labels_N),
        "ece": expected_calibration_error(logits_N, labels_N),
    }


def defined_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that are defined: JSON has no NaN."""
    return {key: value for key, value in metrics.items() if not math.isnan(value)}


def auc(scores_N: Floats, labels_N: Bools) -> float:
    """Return the area under the ROC curve, ties counted half; NaN without both classes."""
    auc_G, _ = _group_aucs(scores_N, labels_N, np.zeros(len(scores_N), dtype=np.int64))
    return float(auc_G[0]) if len(auc_G) else float("nan")


def user_auc(scores_N: Floats, labels_N: Bools, user_ids_N: Ints) -> tuple[float, float]:
    """Return GAUC and UAUC over the users that have both classes; NaN when there is none."""
    auc_G, rows_G = _group_aucs(scores_N, labels_N, user_ids_N)
    if not len(auc_G):
        return float("nan"), float("nan")
    return float((auc_G * rows_G).sum() / rows_G.sum()), float(auc_G.mean())


def log_loss(logits_N: Floats, labels_N: Bools) -> float:
    """Return the mean binary cross entropy in nats; NaN without rows."""
    if not len(labels_N):
        return float("nan")
    return float((np.logaddexp(0.0, logits_N) - labels_N * logits_N).mean())


def normalized_entropy(logits_N: Floats, labels_N: Bools) -> float:
    """Return log loss divided by the log loss of always saying the base rate; NaN for one class."""
    base_rate = labels_N.mean() if len(labels_N) else 0.0
    if not 0.0 < base_rate < 1.0:
        return float("nan")
    entropy = -(base_rate * np.log(base_rate) + (1 - base_rate) * np.log(1 - base_rate))
    return float(log_loss(logits_N, labels_N) / entropy)


def calibration(logits_N: Floats, labels_N: Bools) -> float:
    """Return the mean predicted probability divided by the base rate; NaN without positives."""
    if not labels_N.any():
        return float("nan")
    return float(expit(logits_N).mean() / labels_N.mean())


def expected_calibration_error(logits_N: Floats, labels_N: Bools) -> float:
    """Return sum over bins of n_c / N * |mean prediction - base rate|; NaN without rows.

    The formula of Guo et al. (arXiv 1706.04599) over :data:`CALIBRATION_BINS` equally wide bins.
    """
    if not len(labels_N):
        return float("nan")
    predictions_N = expit(logits_N)
    bins_N = np.minimum((predictions_N * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    gaps_C = np.bincount(bins_N, weights=predictions_N - labels_N, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps_C).sum() / len(labels_N))


def _group_aucs(scores_N: Floats, labels_N: Bools, groups_N: Ints) -> tuple[Floats, Ints]:
    """Return AUC and row count of each group with both classes.

    The rank-sum formula over all groups at once: rows are sorted by (group, score), and rows of
    equal group and score share their mean rank.
    """
    if not len(scores_N):
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    order_N = np.lexsort((scores_N, groups_N))
    scores_N, labels_N, groups_N = scores_N[order_N], labels_N[order_N], groups_N[order_N]
    is_new_group_N = np.concatenate([[True], groups_N[1:] != groups_N[:-1]])
    is_new_tie_N = is_new_group_N | np.concatenate([[True], scores_N[1:] != scores_N[:-1]])
    group_N = np.cumsum(is_new_group_N) - 1
    tie_N = np.cumsum(is_new_tie_N) - 1
    tie_starts = np.flatnonzero(is_new_tie_N)
    tie_sizes = np.diff(np.append(tie_starts, len(scores_N)))
    group_starts_N = np.flatnonzero(is_new_group_N)[group_N]
    mean_rank_N = (tie_starts + (tie_sizes + 1) / 2)[tie_N] - group_starts_N
    rows_G = np.bincount(group_N)
    positives_G = np.bincount(group_N, weights=labels_N)
    negatives_G = rows_G - positives_G
    rank_sums_G = np.bincount(group_N, weights=mean_rank_N * labels_N)
    has_both_G = (positives_G > 0) & (negatives_G > 0)
    wins_G = (rank_sums_G - positives_G * (positives_G + 1) / 2)[has_both_G]
    return wins_G / (positives_G * negatives_G)[has_both_G], rows_G[has_both_G]
