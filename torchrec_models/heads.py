"""Heads: what the tasks share and what each has of its own, ``[B, X]`` to ``[B, T, Y]``.

A head reads the interaction's output and, beside it, the dense features as they are. Every head
gives one vector per task; towers make logits of them.
Shape letters: B rows, L interaction width, W dense width, X = L + W input width, N banks of
experts, O mixtures, G gate input width, Y expert width, T tasks.
May import: torch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from qarm_feast.errors import ConfigError
from torchrec_models.archs import mlp
from torchrec_models.config import RankerConfig, TaskConfig
from torchrec_models.experts import (
    ExpertBanks,
    ExpertGates,
    ExpertLevel,
    ExpertSizes,
    FeatureGate,
    seen_experts,
)


class SharedBottom(nn.Module):
    """One MLP that all tasks read.

    Its first layer takes its inputs apart: dense features, often the wider one, need no gradient,
    which the product for a joined input would work out.
    """

    def __init__(self, in_features: int, layer_sizes: Sequence[int], num_tasks: int) -> None:
        super().__init__()
        self.out_features = layer_sizes[-1]
        self.num_tasks = num_tasks
        # Any: of a layer of a sequence nobody knows that it has weights.
        self.bottom: Any = mlp(in_features, layer_sizes)

    def forward(self, interactions_BL: torch.Tensor, dense_BW: torch.Tensor) -> torch.Tensor:
        """Return the same vector for each task."""
        first, width = self.bottom[0], interactions_BL.shape[1]
        bottom_BY = linear(interactions_BL, first.weight[:, :width], first.bias)
        bottom_BY = bottom_BY + linear(dense_BW, first.weight[:, width:])
        # TorchScript does not call the layers of a slice.
        for place, layer in enumerate(self.bottom):
            if place > 0:
                bottom_BY = layer(bottom_BY)
        return bottom_BY.unsqueeze(1).expand(-1, self.num_tasks, -1)


def _joined(interactions_BL: torch.Tensor, dense_BW: torch.Tensor) -> torch.Tensor:
    """Return the one input ``[1, B, X]`` of experts and gates."""
    return torch.cat([interactions_BL, dense_BW], dim=1).unsqueeze(0)


class Mmoe(nn.Module):
    """Multi-gate mixture of experts (Ma et al., KDD 2018): shared experts, one gate per task.

    ``y_t = sum_m softmax(x G_t)_m expert_m(x)``.
    """

    def __init__(
        self, in_features: int, expert_layer_sizes: Sequence[int], num_experts: int, num_tasks: int
    ) -> None:
        super().__init__()
        self.out_features = expert_layer_sizes[-1]
        seen_OM = torch.ones(num_tasks, num_experts, dtype=torch.bool)
        self.level = ExpertLevel(
            ExpertBanks(1, in_features, num_experts, expert_layer_sizes),
            ExpertGates(1, in_features, seen_OM),
        )

    def forward(self, interactions_BL: torch.Tensor, dense_BW: torch.Tensor) -> torch.Tensor:
        """Return one mixture per task."""
        input_1BX = _joined(interactions_BL, dense_BW)
        mixtures_BTY: torch.Tensor = self.level(input_1BX, input_1BX)
        return mixtures_BTY


class Ple(nn.Module):
    """Progressive layered extraction (Tang et al., RecSys 2020).

    A level has a bank of experts per task and a shared one. With ``z`` the level's inputs (the
    ranker's input on the first level), a task mixes its own and the shared bank, gated by its
    own input: ``z'_t = sum_m softmax(z_t G_t)_m {experts_t(z_t), experts_s(z_s)}_m``; between
    levels the shared input mixes all banks, gated by ``z_s``. One level is CGC.
    """

    def __init__(
        self, in_features: int, sizes: ExpertSizes, num_tasks: int, num_levels: int
    ) -> None:
        super().__init__()
        self.out_features = sizes.out_features
        self.levels = nn.ModuleList(
            _ple_level(
                in_features if level == 0 else sizes.out_features,
                sizes,
                num_tasks,
                is_first=level == 0,
                is_last=level == num_levels - 1,
            )
            for level in range(num_levels)
        )

    def forward(self, interactions_BL: torch.Tensor, dense_BW: torch.Tensor) -> torch.Tensor:
        """Return one mixture per task."""
        inputs_NBX = _joined(interactions_BL, dense_BW)
        for level in self.levels:
            inputs_NBX = level(inputs_NBX, inputs_NBX).transpose(0, 1)
        return inputs_NBX.transpose(0, 1)


def _ple_level(
    in_features: int, sizes: ExpertSizes, num_tasks: int, *, is_first: bool, is_last: bool
) -> ExpertLevel:
    num_banks = num_tasks + 1
    shared_bank = num_tasks
    banks_seen: list[Sequence[int]] = [(task, shared_bank) for task in range(num_tasks)]
    if not is_last:
        banks_seen.append(range(num_banks))
    # On the first level all read one input: its experts are one product, and so are its gates.
    num_inputs = 1 if is_first else num_banks
    num_gate_inputs = 1 if is_first else len(banks_seen)
    num_experts = num_banks * sizes.experts_per_bank
    return ExpertLevel(
        ExpertBanks(num_inputs, in_features, num_experts, sizes.layer_sizes),
        ExpertGates(num_gate_inputs, in_features, seen_experts(banks_seen, num_banks, sizes)),
    )


class Home(nn.Module):
    """Hierarchy of multi-gate experts (Kuaishou, arXiv 2408.05430), in two levels.

    Every expert is ``Swish(BatchNorm(MLP(.)))``, so that all experts speak in one scale, and
    reads its input through the feature gate of its bank, ``F(v) = v * 2 sigmoid(v D U)`` of low
    rank. The self-gate S (a softmax; a sigmoid where a bank has one expert) adds a mixture's
    own bank as a residual, so that sparse tasks' experts are trained. With ``E_b`` the experts
    of bank b, ``a`` a group of tasks, ``s`` what all share and ``|`` concatenation:

        z_a = sum G_a(v) {E_s(F_s(v)), E_a(F_a(v))} + sum S_a(v) E_a(F_a(v))
        z_s = sum G_s(v) {all banks}                + sum S_s(v) E_s(F_s(v))
        y_t = sum G_t(u) {E'_s(F'_s(z_s)), E'_a(F'_a(z_a)), E'_t(F'_t(z_a))}
              + sum S_t(u) E'_t(F'_t(z_a)),   u = z_a | z_s,  a the group of t

    Against the paper: one low-rank pair per gate instead of several, one gate per bank instead
    of per expert, and all linear maps have biases. Banks are ordered s, groups, tasks.
    """

    def __init__(
        self,
        in_features: int,
        sizes: ExpertSizes,
        group_of_task: Sequence[int],
        feature_gate_rank: int,
    ) -> None:
        super().__init__()
        self.out_features = width = sizes.out_features
        num_groups = max(group_of_task) + 1
        num_meta, num_banks = 1 + num_groups, 1 + num_groups + len(group_of_task)
        groups = [1 + group for group in group_of_task]
        tasks = range(num_meta, num_banks)
        self.meta_feature_gate = FeatureGate(1, num_meta, in_features, feature_gate_rank)
        self.meta_level = _home_level(
            (num_meta, in_features),
            (1, in_features),
            sizes,
            [range(num_meta), *((0, group) for group in range(1, num_meta))],
            range(num_meta),
        )
        self.task_feature_gate = FeatureGate(num_banks, num_banks, width, feature_gate_rank)
        self.task_level = _home_level(
            (num_banks, width),
            (len(groups), 2 * width),
            sizes,
            [(0, group, task) for group, task in zip(groups, tasks, strict=True)],
            tasks,
        )
        self._input_of_bank: torch.Tensor
        self._group_of_task: torch.Tensor
        self.register_buffer(
            "_input_of_bank", torch.tensor([*range(num_meta), *groups]), persistent=False
        )
        self.register_buffer("_group_of_task", torch.tensor(groups), persistent=False)

    def forward(self, interactions_BL: torch.Tensor, dense_BW: torch.Tensor) -> torch.Tensor:
        """Return one mixture per task."""
        input_1BX = _joined(interactions_BL, dense_BW)
        meta_BOY = self.meta_level(self.meta_feature_gate(input_1BX), input_1BX)
        meta_OBY = meta_BOY.transpose(0, 1)
        bank_inputs_NBY = meta_OBY.index_select(0, self._input_of_bank)
        groups_TBY = meta_OBY.index_select(0, self._group_of_task)
        gate_inputs_TBG = torch.cat([groups_TBY, meta_OBY[:1].expand_as(groups_TBY)], dim=2)
        mixtures_BTY: torch.Tensor = self.task_level(
            self.task_feature_gate(bank_inputs_NBY), gate_inputs_TBG
        )
        return mixtures_BTY


def _home_level(
    bank_shape: tuple[int, int],
    gate_shape: tuple[int, int],
    sizes: ExpertSizes,
    banks_seen: Sequence[Sequence[int]],
    own_banks: Sequence[int],
) -> ExpertLevel:
    """Return a level of banks, gates over ``banks_seen`` and self-gates over ``own_banks``.

    Both shapes are ``(inputs, input width)``; every bank has an input of its own.
    """
    num_banks, in_features = bank_shape
    num_experts = num_banks * sizes.experts_per_bank
    own = seen_experts([(bank,) for bank in own_banks], num_banks, sizes)
    return ExpertLevel(
        ExpertBanks(num_banks, in_features, num_experts, sizes.layer_sizes, enable_norm=True),
        ExpertGates(*gate_shape, seen_experts(banks_seen, num_banks, sizes)),
        ExpertGates(*gate_shape, own, enable_sigmoid=sizes.experts_per_bank == 1),
    )


Head = SharedBottom | Mmoe | Ple | Home


def build_head(config: RankerConfig, in_features: int, tasks: Sequence[TaskConfig]) -> Head:
    """Return the head that ``ranker.head`` names.

    Args:
        config: The ranker section.
        in_features: Width of the interaction's output and the dense features together.
        tasks: Resolved tasks.

    Returns:
        A head with random weights.

    Raises:
        ConfigError: If ``task_groups`` does not hold every task exactly once.
    """
    num_tasks = len(tasks)
    sizes = ExpertSizes(config.expert_layer_sizes, config.experts_per_bank)
    if config.head == "shared_bottom":
        return SharedBottom(in_features, config.expert_layer_sizes, num_tasks)
    if config.head == "mmoe":
        return Mmoe(in_features, config.expert_layer_sizes, config.num_experts, num_tasks)
    if config.head == "ple":
        return Ple(in_features, sizes, num_tasks, config.num_levels)
    return Home(in_features, sizes, _group_of_task(config, tasks), config.feature_gate_rank)


def _group_of_task(config: RankerConfig, tasks: Sequence[TaskConfig]) -> list[int]:
    names = [task.name for task in tasks]
    if config.task_groups == "auto":
        return [0] * len(names)
    grouped = [name for group in config.task_groups for name in group]
    if sorted(grouped) != sorted(names):
        raise ConfigError(
            f"ranker.task_groups holds {grouped}, but the tasks are {names}; name each task in "
            "exactly one group, or set it to auto"
        )
    group_of = {name: number for number, group in enumerate(config.task_groups) for name in group}
    return [group_of[name] for name in names]
