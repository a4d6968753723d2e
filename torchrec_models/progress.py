"""What a run of the ranker tells while it trains: a log line and its metrics log.

    <checkpoint_dir>/<service>/logs/<run>/metrics.jsonl     {"step": 120, "train/loss": 0.41, ...}
    <checkpoint_dir>/<service>/logs/<run>/events.out.tfevents.*

Keys are ``train/loss``, ``train/samples_per_second`` and ``eval/`` before each metric on valid
rows. A run that goes on after a crash may tell the same step twice; the later line counts.
Shape letters: B rows, T tasks.
May import: torch.
"""

import logging
import time
from collections.abc import Mapping

import torch

from qarm_feast.metrics_log import MetricsLog

logger = logging.getLogger(__name__)

_LOG_SECONDS = 5.0


class Progress:
    """Tells every few seconds how fast and how well the steps go.

    Args:
        num_planned: Steps that the whole run has at most.
        world_size: Ranks that train equally many rows each.
        log: Where the numbers go.
        is_first: Whether this rank logs.
    """

    def __init__(
        self, *, num_planned: int, world_size: int, log: MetricsLog, is_first: bool
    ) -> None:
        self._num_planned = num_planned
        self._world_size = world_size
        self._log = log
        self._is_first = is_first
        self._train_seconds = 0.0
        self._marked = self._logged = time.monotonic()
        self._num_rows = self._rows_since_log = 0

    @property
    def samples_per_second(self) -> float:
        """Rows of all ranks per second of training, evaluations left out; 0 before a step."""
        return self._num_rows / self._train_seconds if self._num_rows else 0.0

    def add_step(self, step: int, logits_BT: torch.Tensor, labels_BT: torch.Tensor) -> None:
        """Count a step's rows and time; tell of it if the last line is old enough."""
        now = time.monotonic()
        self._train_seconds += now - self._marked
        self._marked = now
        num_rows = len(labels_BT) * self._world_size
        self._rows_since_log += num_rows
        self._num_rows += num_rows
        if self._is_first and now - self._logged >= _LOG_SECONDS:
            self._tell(step, logits_BT, labels_BT)

    def forget_pause(self) -> None:
        """Leave the time since the last step out of training time and samples per second."""
        now = time.monotonic()
        self._logged += now - self._marked
        self._marked = now

    def add_evaluation(
        self, step: int, metrics: Mapping[str, float], task_names: list[str]
    ) -> None:
        """Tell of an evaluation on valid rows by its metrics that are defined."""
        self.forget_pause()
        if not self._is_first:
            return
        shown = " ".join(
            f"{key}={metrics[key]:.4f}"
            for name in task_names
            for key in (f"auc/{name}", f"gauc/{name}", f"ne/{name}", f"cold_auc/{name}")
            if key in metrics
        )
        logger.info("evaluated split=valid step=%d %s", step, shown)
        values = {f"eval/{key}": value for key, value in metrics.items()}
        speed = {"train/samples_per_second": self.samples_per_second}
        self._log.add(step, values | (speed if self._num_rows else {}))

    def _tell(self, step: int, logits_BT: torch.Tensor, labels_BT: torch.Tensor) -> None:
        is_labelled_BT = ~labels_BT.isnan()
        loss = float(
            torch.nn.functional.binary_cross_entropy_with_logits(
                logits_BT[is_labelled_BT], labels_BT[is_labelled_BT]
            )
        )
        speed = self._rows_since_log / (self._marked - self._logged)
        logger.info(
            "trained step=%d/%d samples_per_second=%.0f loss=%.4f",
            step,
            self._num_planned,
            speed,
            loss,
        )
        self._log.add(step, {"train/loss": loss, "train/samples_per_second": speed})
        self._logged, self._rows_since_log = self._marked, 0
