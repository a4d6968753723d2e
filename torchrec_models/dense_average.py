"""Moving average of the dense weights: what is evaluated, saved and served, not the last step's.

Polyak and Juditsky's averaging (1992) with an exponential window that grows with the steps. Sharded
tables are not averaged: few of their rows move in a step, and averaging would touch all of them.
May import: torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

_WARM_UP = 9
"""After n steps the average reaches back about n / 9 steps at most, so first weights soon go."""


class DenseAverage:
    """Averages of all floating-point weights and buffers that are not sharded.

    After step n, from 1 on, ``average += (1 - d) (weights - average)`` with
    ``d = min(decay, (n - 1) / (n - 1 + 9))``: the first step's average is its weights.
    Dense weights are equal on all ranks, and so are their averages.

    Args:
        model: The sharded model.
        decay: From 0, no averages are kept and nothing below does anything, to below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        state: dict[str, Any] = model.state_dict() if decay else {}
        self._decay = decay
        self._weights: dict[str, torch.Tensor] = {
            key: value.detach()
            for key, value in state.items()
            if not isinstance(value, ShardedTensor) and value.is_floating_point()
        }
        self.averages = {key: weight.clone() for key, weight in self._weights.items()}
        """By name; a run that goes on reads them into these tensors."""

    def update(self, step: int) -> None:
        """Take the weights after a step into account.

        Args:
            step: Steps trained so far, from 1.
        """
        if not self.averages:
            return
        decay = min(self._decay, (step - 1) / (step - 1 + _WARM_UP))
        averages, weights = list(self.averages.values()), list(self._weights.values())
        torch._foreach_lerp_(averages, weights, 1.0 - decay)

    def exchange(self) -> None:
        """Let model and averages change their values, without another copy of either."""
        for key, weight in self._weights.items():
            trained = weight.clone()
            weight.copy_(self.averages[key])
            self.averages[key].copy_(trained)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Let the model have the averages for a while."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()
