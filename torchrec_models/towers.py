"""Towers: from one vector per task to logits, chained where one task presupposes another.

Shape letters: B rows, Y vector width, T tasks.
May import: torch.
"""

from collections.abc import Sequence

import torch
from torch import nn

from torchrec_models.archs import mlp
from torchrec_models.config import TaskConfig, parents_first


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


class TaskChain(nn.Module):
    """What ``after`` of a task means for its logits and labels.

    A task t after p is learnt in one of two ways:

    - masked: only rows with label 1 of p have a label of t; the tower says ``P(t | p)``.
    - ESMM (Ma et al., SIGIR 2018): the tower says ``P(t | p)``, but the task is
      ``P(p and t) = P(p) P(t | p)``, which has a label wherever p has one, so that the tower
      learns from the entire space.

    Either way the logits are those of the probability that the task stands for.
    """

    def __init__(self, tasks: Sequence[TaskConfig], enable_esmm: bool) -> None:
        super().__init__()
        self.num_tasks = len(tasks)
        names = [task.name for task in tasks]
        # Parents come first: a chain of three multiplies what is multiplied already.
        self.links = [
            (task, names.index(str(tasks[task].after)))
            for task in parents_first(tasks)
            if tasks[task].after is not None
        ]
        self.enable_esmm = enable_esmm

    def forward(self, logits_BT: torch.Tensor) -> torch.Tensor:
        """Return the logits of the tasks' probabilities from those of the towers.

        The logit of a product of two probabilities with logits a and b is
        ``-log(exp(-a) + exp(-b) + exp(-a - b))``, exact at any size of a and b.
        """
        if not self.enable_esmm:
            return logits_BT
        columns = list(logits_BT.unbind(dim=1))
        for task, parent in self.links:
            a_B, b_B = columns[parent], columns[task]
            terms = torch.stack([-a_B, -b_B, -a_B - b_B])
            columns[task] = -torch.logsumexp(terms, dim=0)
        return torch.stack(columns, dim=1)


class TaskLabels(nn.Module):
    """The labels that tasks are judged by, see :class:`TaskChain`."""

    def __init__(self, chain: TaskChain) -> None:
        super().__init__()
        self.links = chain.links
        self.enable_esmm = chain.enable_esmm

    def forward(self, labels_BT: torch.Tensor) -> torch.Tensor:
        """Return the labels of the chained tasks, NaN where a task has none.

        Args:
            labels_BT: 0, 1, or NaN for a row without that label.

        Returns:
            Labels of the same shape: NaN off the parent's positives, or with ESMM that both
            happened.
        """
        columns = list(labels_BT.unbind(dim=1))
        for task, parent in self.links:
            parent_B = columns[parent]
            absent_B = parent_B if self.enable_esmm else torch.full_like(parent_B, float("nan"))
            columns[task] = torch.where(parent_B == 1.0, columns[task], absent_B)
        return torch.stack(columns, dim=1)


class TaskTowers(nn.Module):
    """All tasks' towers and their chain: ``[B, T, Y]`` to logits ``[B, T]``."""

    def __init__(self, in_features: int, layer_sizes: Sequence[int], chain: TaskChain) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            TaskArch(in_features, layer_sizes) for _ in range(chain.num_tasks)
        )
        self.chain = chain

    def forward(self, mixtures_BTY: torch.Tensor) -> torch.Tensor:
        """Return the logits of the tasks' probabilities."""
        logits = [tower(mixtures_BTY[:, task]) for task, tower in enumerate(self.towers)]
        # Also under autocast, chain and loss are computed in float32.
        logits_BT: torch.Tensor = self.chain(torch.cat(logits, dim=1).float())
        return logits_BT
