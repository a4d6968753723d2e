"""Heads: what the tasks share and what each has of its own.

Shape letters: B rows, X input width, M experts, Y expert width, T tasks.
May import: torch.
"""

from collections.abc import Sequence

import torch
from torch import nn

from torchrec_models.archs import mlp


class Mmoe(nn.Module):
    """Multi-gate mixture of experts: shared experts, one softmax gate per task."""

    def __init__(
        self, in_features: int, expert_layer_sizes: Sequence[int], num_experts: int, num_tasks: int
    ) -> None:
        super().__init__()
        self.out_features = expert_layer_sizes[-1]
        self.experts = nn.ModuleList(
            mlp(in_features, expert_layer_sizes) for _ in range(num_experts)
        )
        self.gates = nn.ModuleList(nn.Linear(in_features, num_experts) for _ in range(num_tasks))

    def forward(self, shared_BX: torch.Tensor) -> list[torch.Tensor]:
        """Return one mixture ``[B, Y]`` per task."""
        experts_BMY = torch.stack([expert(shared_BX) for expert in self.experts], dim=1)
        return [
            torch.bmm(torch.softmax(gate(shared_BX), dim=1).unsqueeze(1), experts_BMY).squeeze(1)
            for gate in self.gates
        ]


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
