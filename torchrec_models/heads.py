"""Heads: what the tasks share and what each has of its own.

Shape letters: B rows, X input width, M experts, Y expert width, T tasks.
May import: torch.
"""

from collections.abc import Sequence

import torch
from torch import nn

from torchrec_models.archs import mlp


class Mmoe(nn.Module):
    """Multi-gate mixture of experts: shared experts, one softmax gate per task.

    The first layers of all experts are one matrix product, and so are all gates: they read the
    widest input of the ranker, where narrow products cost the most.
    """

    def __init__(
        self, in_features: int, expert_layer_sizes: Sequence[int], num_experts: int, num_tasks: int
    ) -> None:
        super().__init__()
        self.out_features = expert_layer_sizes[-1]
        self.num_tasks = num_tasks
        self.first_layers = mlp(in_features, [num_experts * expert_layer_sizes[0]])
        self.later_layers = nn.ModuleList(
            mlp(expert_layer_sizes[0], expert_layer_sizes[1:]) for _ in range(num_experts)
        )
        self.gates = nn.Linear(in_features, num_tasks * num_experts)

    def forward(self, shared_BX: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return one mixture ``[B, Y]`` per task."""
        num_experts = len(self.later_layers)
        hidden = self.first_layers(shared_BX).chunk(num_experts, dim=1)
        experts_BMY = torch.stack(
            [layers(hidden[m]) for m, layers in enumerate(self.later_layers)], dim=1
        )
        gates_BTM = self.gates(shared_BX).unflatten(1, (self.num_tasks, num_experts)).softmax(dim=2)
        return torch.bmm(gates_BTM, experts_BMY).unbind(dim=1)


class TaskArch(nn.Module):
    """One task's tower: ``[B, Y]`` to the logit ``[B, 1]``."""

    def __init__(self, in_features: int, layer_sizes: Sequence[int]) -> None:
        super().__init__()
        hidden = mlp(in_features, layer_sizes[:-1])
        last_width = layer_sizes[-2] if len(layer_sizes) > 1 else in_features
        self.net = nn.Sequential(hidden, nn.Linear(last_width, layer_sizes[-1]))

    def forward(self, mixture_BY: torch.Tensor) -> torch.Tensor:
        """Return the task's logit."""
        logit_B1: torch.Tensor = self.net(mixture_BY)
        return logit_B1
