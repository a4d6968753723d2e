"""Epochs until the loss on held-out items stops falling, saved one by one.

May import: torch, numpy.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.gathering import current_ranks
from qarm_feast.alignment.progress import StepProgress
from qarm_feast.alignment.trainer import PairTask, PairTrainer
from qarm_feast.alignment.training_state import FitProgress, TrainingFile, TrainingState
from qarm_feast.metrics_log import FileMetricsLog, MetricsLog, NoMetricsLog

logger = logging.getLogger(__name__)

_NOW, _BEST, _OPTIMIZER = "now/", "best/", "optimizer/"


@dataclass(frozen=True)
class TrainingRun:
    """What a training run found.

    Attributes:
        num_train_pairs: Pairs that steps were taken on.
        num_valid_pairs: Pairs that told when to stop.
        best_epoch: The epoch whose model is kept; 0 is the untrained one.
        valid_losses: Loss before the first epoch, and after each.
        temperature: At the end.
        geometry_weight: Of the kept model; None if ``auto`` kept the untrained one.
        held_out_auc: How well the pairs of held-out items are ranked by the ``raw`` content, the
            ``untrained`` and the kept model (``trained``), and by what else was tried; empty if
            no item was held out.
        seconds: Time of this process.
    """

    num_train_pairs: int
    num_valid_pairs: int
    best_epoch: int
    valid_losses: list[float]
    temperature: float
    geometry_weight: float | None
    held_out_auc: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class RunFiles:
    """Where a training keeps what it would need to go on, and its numbers.

    Attributes:
        states: Folder of one state file per run.
        logs: Folder of one folder of numbers per run.
    """

    states: Path
    logs: Path


@dataclass(frozen=True)
class RunPlace:
    """Where one run keeps its state and its numbers; nowhere without ``files``.

    Attributes:
        name: Names the run among those of one training.
        files: Where all of them are kept.
        fingerprint: Names settings and data.
    """

    name: str
    files: RunFiles | None = None
    fingerprint: str = ""

    def state(self) -> TrainingFile | None:
        """Return the run's state file."""
        if self.files is None:
            return None
        return TrainingFile(self.files.states / f"{self.name}.safetensors", self.fingerprint)

    def metrics_log(self) -> MetricsLog:
        """Return where the run's numbers go; only the first rank writes."""
        if self.files is None or not current_ranks().is_first:
            return NoMetricsLog()
        return FileMetricsLog(self.files.logs / self.name)


class Fit:
    """One run of epochs with early stopping.

    Args:
        task: Model and data; the model ends as it was in its best epoch.
        config: Section ``alignment``.
        place: Where the run is kept.
    """

    def __init__(
        self,
        task: PairTask,
        config: AlignmentConfig,
        place: RunPlace,
    ) -> None:
        self._task = task
        self._config = config
        self._file = place.state()
        self._log = place.metrics_log()
        self._steps = StepProgress(self._log, current_ranks())
        self._trainer = PairTrainer(task, config, self._steps)
        self._best: dict[str, Tensor] = {}

    def run(self, generator: np.random.Generator) -> TrainingRun:
        """Train, or go on training, and put the best epoch's weights into the model.

        Args:
            generator: Shuffles pairs and draws items; a run that goes on takes the saved one.

        Returns:
            The run's figures.
        """
        started = time.monotonic()
        progress = self._resumed(generator) or self._fresh(generator)
        while not self._is_over(progress):
            progress = self._epoch(progress, generator)
        temperature = self._trainer.temperature
        self._trainer.restore(self._best, {})
        self._log.close()
        self._task.items.module.eval()
        return TrainingRun(
            num_train_pairs=len(self._task.split.train),
            num_valid_pairs=len(self._task.split.valid),
            best_epoch=progress.best_epoch,
            valid_losses=[round(loss, 5) for loss in progress.valid_losses],
            temperature=round(temperature, 5),
            geometry_weight=self._task.geometry_weight,
            held_out_auc={},
            seconds=round(time.monotonic() - started, 1),
        )

    def _is_over(self, progress: FitProgress) -> bool:
        # An epoch that is the best yet always gets another one after it.
        num_worse = progress.epoch - progress.best_epoch
        return progress.epoch >= self._config.num_epochs or num_worse >= self._config.patience

    def _fresh(self, generator: np.random.Generator) -> FitProgress:
        self._best = _copies(self._trainer.tensors())
        return FitProgress(
            generator=dict(generator.bit_generator.state),
            valid_losses=[self._trainer.valid_loss()],
        )

    def _resumed(self, generator: np.random.Generator) -> FitProgress | None:
        state = None if self._file is None else self._file.read()
        if state is None:
            return None
        self._trainer.restore(_named(state, _NOW), _named(state, _OPTIMIZER))
        self._trainer.num_steps = state.progress.num_steps
        self._best = _named(state, _BEST)
        generator.bit_generator.state = state.progress.generator
        logger.info("alignment_resumed epoch=%d step=%d", state.progress.epoch,
                    state.progress.num_steps)  # fmt: skip
        return state.progress

    def _epoch(self, progress: FitProgress, generator: np.random.Generator) -> FitProgress:
        train_loss = self._trainer.train_epoch(generator)
        valid_loss = self._trainer.valid_loss()
        progress = progress.after_epoch(
            valid_loss, self._trainer.num_steps, generator.bit_generator.state
        )
        if progress.best_epoch == progress.epoch:
            self._best = _copies(self._trainer.tensors())
        self._tell(progress, train_loss)
        if self._file is not None:
            self._file.write(self._state(progress))
        return progress

    def _tell(self, progress: FitProgress, train_loss: float) -> None:
        valid_loss, temperature = progress.valid_losses[-1], self._trainer.temperature
        if current_ranks().is_first:
            logger.info(
                "alignment_epoch epoch=%d of=%d train_loss=%.4f valid_loss=%.4f",
                progress.epoch,
                self._config.num_epochs,
                train_loss,
                valid_loss,
            )
        figures = {"train/epoch_loss": train_loss, "eval/pair_loss": valid_loss}
        self._steps.add_epoch(progress.num_steps, figures | {"train/temperature": temperature})

    def _state(self, progress: FitProgress) -> TrainingState:
        parts = (
            (_NOW, self._trainer.tensors()),
            (_BEST, self._best),
            (_OPTIMIZER, self._trainer.optimizer_tensors()),
        )
        tensors = {f"{part}{name}": t for part, named in parts for name, t in named.items()}
        return TrainingState(progress, tensors)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _named(state: TrainingState, part: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(part): tensor
        for name, tensor in state.tensors.items()
        if name.startswith(part)
    }
