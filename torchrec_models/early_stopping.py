"""Early stopping: when evaluations on valid rows no longer get better, and the best weights so far.

May import: pydantic, torch.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from qarm_feast.errors import ConfigError
from torchrec_models.config import RankerConfig, StoppingMetric

_LESS_IS_BETTER: tuple[StoppingMetric, ...] = ("ne", "log_loss")


class StoppingState(BaseModel):
    """What early stopping has seen so far; the metrics are those of the best evaluation."""

    best_step: int = 0
    best_metrics: dict[str, float] = {}
    num_worse: int = 0


class EarlyStopping:
    """Judges evaluations and keeps this rank's part of the best weights in memory.

    The metric is averaged over the tasks. All ranks see the same metrics, so they agree.

    Args:
        config: The ranker section: metric and patience.
        model: The sharded model.
    """

    def __init__(self, config: RankerConfig, model: nn.Module) -> None:
        self.state = StoppingState()
        self.best_weights: dict[str, torch.Tensor] = {}
        self._metric = config.early_stopping_metric
        self._patience = config.early_stopping_patience
        self._model = model

    @property
    def is_on(self) -> bool:
        """Whether training may stop early at all."""
        return self._patience > 0

    @property
    def is_exhausted(self) -> bool:
        """Whether training should stop now."""
        return self.is_on and self.state.num_worse >= self._patience

    def judge(self, metrics: Mapping[str, float], step: int) -> None:
        """Take one evaluation into account; the weights are copied if it is the best so far.

        Args:
            metrics: Metrics on valid rows by key.
            step: Steps trained before the evaluation.

        Raises:
            ConfigError: If the metric is defined for no task.
        """
        if not self.is_on:
            return
        if self.state.best_metrics and not self._is_better(metrics):
            self.state = self.state.model_copy(update={"num_worse": self.state.num_worse + 1})
            return
        self._value(metrics)
        self.state = StoppingState(best_step=step, best_metrics=dict(metrics))
        self.best_weights = self._copies()

    def go_on(self, state: StoppingState) -> None:
        """Take over what another run has seen; its best weights are to be loaded in place."""
        self.state = state
        self.best_weights = self._copies() if state.best_metrics else {}

    def restore_best(self) -> None:
        """Put the best weights back into the model."""
        for key, tensor in local_tensors(self._model).items():
            tensor.copy_(self.best_weights[key])

    def _copies(self) -> dict[str, torch.Tensor]:
        return {key: value.detach().clone() for key, value in local_tensors(self._model).items()}

    def _is_better(self, metrics: Mapping[str, float]) -> bool:
        found, best = self._value(metrics), self._value(self.state.best_metrics)
        return found < best if self._metric in _LESS_IS_BETTER else found > best

    def _value(self, metrics: Mapping[str, float]) -> float:
        values = [value for key, value in metrics.items() if key.startswith(f"{self._metric}/")]
        defined = [value for value in values if not math.isnan(value)]
        if not defined:
            raise ConfigError(
                f"ranker.early_stopping_metric is {self._metric!r}, which is defined for no task "
                "on the valid rows: they hold one class only; give them both, or set "
                "ranker.early_stopping_patience to 0"
            )
        return sum(defined) / len(defined)


def local_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return this rank's part of all weights by name; writing to them changes the model."""
    state: dict[str, Any] = model.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, ShardedTensor):
            tensors[key] = value
            continue
        for number, shard in enumerate(value.local_shards()):
            tensors[f"{key}#{number}"] = shard.tensor
    return tensors
