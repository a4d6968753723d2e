"""What MMoE, PLE and HoME are made of: banks of experts and gates over them.

All layers of one kind are one batched product. Experts that read the same input are one matrix
product on their first layer, the widest of the ranker.
Shape letters: B rows, I inputs, X input width, H hidden width, N banks, M experts of all banks
(bank by bank), Y expert width, O mixtures, G gate input width, R rank.
May import: torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn

_MOMENTUM = 0.1


@dataclass(frozen=True)
class ExpertSizes:
    """Layers of each expert and how many experts a bank has."""

    layer_sizes: Sequence[int]
    experts_per_bank: int

    @property
    def out_features(self) -> int:
        """Return the width of an expert's output."""
        return self.layer_sizes[-1]


class StackedLinear(nn.Module):
    """One linear layer per input, as one batched product: ``[I, B, X]`` to ``[I, B, H]``.

    Starts like ``nn.Linear``: weights and biases uniform within 1 / sqrt(X).
    """

    def __init__(self, num_inputs: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = in_features**-0.5
        weight_IXH = torch.empty(num_inputs, in_features, out_features)
        bias_I1H = torch.empty(num_inputs, 1, out_features)
        self.weight_IXH = nn.Parameter(weight_IXH.uniform_(-bound, bound))
        self.bias_I1H = nn.Parameter(bias_I1H.uniform_(-bound, bound))

    def forward(self, x_IBX: torch.Tensor) -> torch.Tensor:
        """Return ``x_i W_i + b_i`` for each input."""
        return torch.baddbmm(self.bias_I1H, x_IBX, self.weight_IXH)


class ExpertNorm(nn.Module):
    """Batch normalisation of expert outputs ``[B, M, Y]``, the same on all ranks when it scores.

    Training takes mean and variance of the own rank's rows, as PyTorch's does, so that no
    collective stands in the backward pass (``SyncBatchNorm`` has no CPU kernel). What scoring
    takes are running statistics of the rows of *all* ranks: each step averages mean and second
    moment over the ranks, whose batches are equally large. They are the plain mean over the
    first ten steps, and move by a tenth per step from then on.
    """

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.epsilon = 1.0e-5
        self.gain_MY = nn.Parameter(torch.ones(num_experts, width))
        self.bias_MY = nn.Parameter(torch.zeros(num_experts, width))
        self.running_mean_MY: torch.Tensor
        self.running_variance_MY: torch.Tensor
        self.num_steps: torch.Tensor
        self.register_buffer("running_mean_MY", torch.zeros(num_experts, width))
        self.register_buffer("running_variance_MY", torch.ones(num_experts, width))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x_BMY: torch.Tensor) -> torch.Tensor:
        """Return ``gain (x - mean) / sqrt(variance + 1e-5) + bias``; one row is enough."""
        if self.training:
            mean_MY, variance_MY = self._batch_statistics(x_BMY)
        else:
            mean_MY, variance_MY = self.running_mean_MY, self.running_variance_MY
        scale_MY = self.gain_MY * torch.rsqrt(variance_MY + self.epsilon)
        return (x_BMY - mean_MY) * scale_MY + self.bias_MY

    @torch.jit.unused
    def _batch_statistics(self, x_BMY: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        variance_MY, mean_MY = torch.var_mean(x_BMY, dim=0, correction=0)
        self._update_running(mean_MY.detach().double(), variance_MY.detach().double())
        return mean_MY, variance_MY

    def _update_running(self, mean_MY: torch.Tensor, variance_MY: torch.Tensor) -> None:
        # In float64: the variance comes back as a difference of two moments.
        moments_2MY = torch.stack([mean_MY, variance_MY + mean_MY.square()])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(moments_2MY)
            moments_2MY /= dist.get_world_size()
        mean_MY = moments_2MY[0]
        variance_MY = moments_2MY[1] - mean_MY.square()
        self.num_steps += 1
        share = (1.0 / self.num_steps).clamp(min=_MOMENTUM)
        self.running_mean_MY.lerp_(mean_MY.to(self.running_mean_MY.dtype), share)
        self.running_variance_MY.lerp_(variance_MY.to(self.running_variance_MY.dtype), share)


class ExpertBanks(nn.Module):
    """Experts, equally many per input: ``[I, B, X]`` to ``[B, M, Y]``.

    An expert is an MLP with ReLU after each layer; a normalised one (HoME) ends in
    ``Swish(BatchNorm(linear))`` instead, with ``Swish(x) = x sigmoid(x)``.
    """

    def __init__(
        self,
        num_inputs: int,
        in_features: int,
        num_experts: int,
        layer_sizes: Sequence[int],
        enable_norm: bool = False,
    ) -> None:
        super().__init__()
        self.experts_per_input = num_experts // num_inputs
        self.first_layer = StackedLinear(
            num_inputs, in_features, self.experts_per_input * layer_sizes[0]
        )
        self.later_layers = nn.ModuleList(
            StackedLinear(num_experts, *widths) for widths in pairwise(layer_sizes)
        )
        self.activation: nn.Module = nn.ReLU()
        if enable_norm:
            self.activation = nn.Sequential(ExpertNorm(num_experts, layer_sizes[-1]), nn.SiLU())

    def forward(self, x_IBX: torch.Tensor) -> torch.Tensor:
        """Return the outputs of all experts, those of the first input first."""
        hidden_MBH = split_outputs(self.first_layer(x_IBX), self.experts_per_input)
        for layer in self.later_layers:
            hidden_MBH = layer(torch.relu(hidden_MBH))
        experts_BMY: torch.Tensor = self.activation(hidden_MBH.transpose(0, 1))
        return experts_BMY


class ExpertGates(nn.Module):
    """Weights of experts in each mixture: ``[I, B, G]`` to ``[B, O, M]``.

    A softmax over the experts that a mixture may see, or a sigmoid per expert; 0 elsewhere.
    There is one input for all mixtures, or one for each, which further inputs may follow.
    """

    def __init__(
        self, num_inputs: int, in_features: int, seen_OM: torch.Tensor, enable_sigmoid: bool = False
    ) -> None:
        super().__init__()
        self.num_mixtures, self.num_experts = seen_OM.shape
        self.num_inputs = num_inputs
        self.enable_sigmoid = enable_sigmoid
        mixtures_per_input = self.num_mixtures // num_inputs
        self.layer = StackedLinear(num_inputs, in_features, mixtures_per_input * self.num_experts)
        self._hidden_OM: torch.Tensor
        self.register_buffer("_hidden_OM", ~seen_OM, persistent=False)

    def forward(self, x_IBG: torch.Tensor) -> torch.Tensor:
        """Return the weights; those of a softmax sum to one per mixture."""
        logits_IBH = self.layer(x_IBG[: self.num_inputs])
        logits_BOM = logits_IBH.transpose(0, 1).reshape(-1, self.num_mixtures, self.num_experts)
        logits_BOM = logits_BOM.masked_fill(self._hidden_OM, float("-inf"))
        return torch.sigmoid(logits_BOM) if self.enable_sigmoid else logits_BOM.softmax(dim=2)


class ExpertLevel(nn.Module):
    """Experts and the gates that mix them; self-gates add a mixture's own bank once more."""

    def __init__(
        self, experts: ExpertBanks, gates: ExpertGates, self_gates: ExpertGates | None = None
    ) -> None:
        super().__init__()
        self.experts = experts
        self.gates = gates
        self.self_gates = self_gates

    def forward(
        self, expert_inputs_IBX: torch.Tensor, gate_inputs_IBG: torch.Tensor
    ) -> torch.Tensor:
        """Return the mixtures ``[B, O, Y]``: ``sum_m (gate_om + self_gate_om) expert_m``."""
        weights_BOM = self.gates(gate_inputs_IBG)
        if self.self_gates is not None:
            weights_BOM = weights_BOM + self.self_gates(gate_inputs_IBG)
        return torch.bmm(weights_BOM, self.experts(expert_inputs_IBX))


class FeatureGate(nn.Module):
    """Gives each bank its own view of an input: ``[I, B, X]`` to ``[N, B, X]``.

    ``x * 2 sigmoid((x D + d) U + u)`` with D of shape ``[X, R]`` and U ``[R, X]`` per bank;
    there is one input for all banks, or one for each.
    """

    def __init__(self, num_inputs: int, num_banks: int, in_features: int, rank: int) -> None:
        super().__init__()
        self.banks_per_input = num_banks // num_inputs
        self.down = StackedLinear(num_inputs, in_features, self.banks_per_input * rank)
        self.up = StackedLinear(num_banks, rank, in_features)

    def forward(self, x_IBX: torch.Tensor) -> torch.Tensor:
        """Return the gated input of each bank."""
        low_NBR = split_outputs(self.down(x_IBX), self.banks_per_input)
        return x_IBX * (2.0 * torch.sigmoid(self.up(low_NBR)))


def split_outputs(x_IBH: torch.Tensor, parts_per_input: int) -> torch.Tensor:
    """Cut the last axis into parts: ``[I, B, parts * H]`` to ``[I * parts, B, H]``."""
    num_inputs, num_rows, width = x_IBH.shape
    x_IBPH = x_IBH.view(num_inputs, num_rows, parts_per_input, width // parts_per_input)
    return x_IBPH.transpose(1, 2).flatten(0, 1)


def seen_experts(
    banks_seen: Sequence[Sequence[int]], num_banks: int, sizes: ExpertSizes
) -> torch.Tensor:
    """Return the mask ``[O, M]``, bool, of the experts whose bank a mixture sees.

    Args:
        banks_seen: Numbers of the banks that each mixture sees.
        num_banks: Banks of the level.
        sizes: How many experts a bank has.

    Returns:
        True where the mixture may weigh the expert.
    """
    seen_ON = torch.tensor([[bank in banks for bank in range(num_banks)] for banks in banks_seen])
    return seen_ON.repeat_interleave(sizes.experts_per_bank, dim=1)
