"""What a training run tells: log lines, JSON lines and TensorBoard events.

    <encoder_uri>/<version>.logs/metrics.jsonl     {"step": 120, "train/loss": 2.41, ...}
    <encoder_uri>/<version>.logs/events.out.tfevents.*

Keys are ``train/loss``, ``train/pairs_per_second``, ``train/temperature`` and, once an epoch,
``train/epoch_loss`` and ``eval/pair_loss``. A run that goes on after it was killed may tell the
same step twice; the later line counts.
May import: torch.
"""

import logging
import time

from torch import Tensor

from qarm_feast.alignment.gathering import Ranks
from qarm_feast.metrics_log import MetricsLog

logger = logging.getLogger(__name__)

_LOG_SECONDS = 5.0


class StepProgress:
    """Tells every few seconds how fast and how well the steps go.

    Args:
        log: Where the numbers go.
        ranks: Who trains; only the first one tells.
    """

    def __init__(self, log: MetricsLog, ranks: Ranks) -> None:
        self._log = log
        self._ranks = ranks
        self._told = time.monotonic()
        self._num_pairs = 0

    def add_step(self, step: int, num_pairs: int, own_loss: Tensor) -> None:
        """Count a step; tell of it if the last line is old enough.

        Args:
            step: Steps taken so far.
            num_pairs: Pairs of the step, of all ranks.
            own_loss: This rank's share of the step's loss.
        """
        self._num_pairs += num_pairs
        now = time.monotonic()
        if not self._ranks.is_first or now - self._told < _LOG_SECONDS:
            return
        # The ranks' shares are alike; the exact sum would cost an exchange.
        loss = float(own_loss) * self._ranks.size
        speed = self._num_pairs / (now - self._told)
        logger.info("alignment_step step=%d pairs_per_second=%.0f loss=%.4f", step, speed, loss)
        self._log.add(step, {"train/loss": loss, "train/pairs_per_second": speed})
        self._told, self._num_pairs = now, 0

    def add_epoch(self, step: int, losses: dict[str, float]) -> None:
        """Keep the numbers of an epoch; the time since the last step was no training."""
        if self._ranks.is_first:
            self._log.add(step, losses)
        self._told, self._num_pairs = time.monotonic(), 0
