"""Fusions: feature tokens of some modalities become one aligned embedding per item.

They start as the content geometry itself: a linear map holds the PCA of the training items' centred
unit features, and what is added to it is zero before any training.

Shape letters in this file: N items, T feature tokens of a modality, E their width, C width of all
modalities side by side, D embedding width, H hidden width.
May import: torch.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.config import Section

Shapes = Mapping[str, tuple[int, int]]
"""Feature tokens and their width, ``(T, E)``, by modality."""
Features = Mapping[str, Tensor]
"""Feature tokens by modality: float32 ``[N, T, E]``, not normalised."""
Present = Mapping[str, Tensor]
"""Which items have a modality: bool ``[N]``, by modality."""


class FusionSizes(Section):
    """Kind and sizes of a fusion, as an encoder's manifest holds them."""

    kind: Literal["concat"] = Field(default="concat", description="How modalities are fused.")
    hidden_dim: int = Field(default=256, description="Width of the hidden layer.")


def fusion_sizes(config: AlignmentConfig) -> FusionSizes:
    """Return what the configuration says of the fusion."""
    return FusionSizes(hidden_dim=config.hidden_dim)


def build_fusion(shapes: Shapes, embedding_dim: int, sizes: FusionSizes) -> "AlignmentHead":
    """Return an untrained fusion.

    Args:
        shapes: What it reads.
        embedding_dim: D.
        sizes: Its kind and sizes.

    Returns:
        A module with :meth:`AlignmentHead.forward` and :meth:`AlignmentHead.start_from_content`.
    """
    return AlignmentHead(shapes, embedding_dim, sizes.hidden_dim)


class AlignmentHead(nn.Module):
    """Concatenation and a multilayer perceptron: a linear map plus a correction by a hidden layer.

    Args:
        shapes: What is read; of several tokens of a modality the mean.
        embedding_dim: D.
        hidden_dim: H.

    Attributes:
        mean_E: Means of the training items' unit features, modalities side by side.
    """

    mean_E: Tensor

    def __init__(self, shapes: Shapes, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        width = content_width(shapes)
        self.register_buffer("mean_E", torch.zeros(width))
        self.linear = nn.Linear(width, embedding_dim, bias=False)
        self.hidden = nn.Linear(width, hidden_dim)
        self.correction = nn.Linear(hidden_dim, embedding_dim, bias=False)
        nn.init.zeros_(self.correction.weight)

    @torch.no_grad()
    def start_from_content(self, features: Features, present: Present) -> None:
        """Set mean and linear map from the features of the training items."""
        mean_C, map_DC = principal_map(features, present, self.linear.out_features)
        self.mean_E.copy_(mean_C)
        self.linear.weight.copy_(map_DC)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Return L2-normalised embeddings ``[N, D]``."""
        centred_NC = centred_content(features, present, self.mean_E)
        # Components of unit vectors are small; the hidden layer gets them near unit variance.
        hidden_NH = functional.gelu(self.hidden(centred_NC * centred_NC.shape[1] ** 0.5))
        return functional.normalize(self.linear(centred_NC) + self.correction(hidden_NH), dim=1)


def content_width(shapes: Shapes) -> int:
    """Return the width of all modalities side by side, C."""
    return sum(width for _, width in shapes.values())


def centred_content(features: Features, present: Present, mean_C: Tensor) -> Tensor:
    """Return the unit means of each modality's tokens, centred, side by side.

    An absent modality counts as the mean of those who have it, so it says nothing; the rest is
    divided by the root of the number of modalities that an item has.

    Args:
        features: Feature tokens.
        present: Which items have them.
        mean_C: Means of the unit vectors, modalities side by side in the order of ``features``.

    Returns:
        Float32 ``[N, C]``, of length 2 at most.
    """
    blocks, begin = [], 0
    for name, tokens_NTE in features.items():
        unit_NE = functional.normalize(tokens_NTE.mean(dim=1), dim=1)
        centred_NE = unit_NE - mean_C[begin : begin + unit_NE.shape[1]]
        blocks.append(centred_NE * present[name][:, None])
        begin += unit_NE.shape[1]
    count_N = torch.stack([present[name] for name in features]).sum(dim=0)
    return torch.cat(blocks, dim=1) / count_N.clamp(min=1).sqrt()[:, None]


def principal_map(
    features: Features, present: Present, num_directions: int
) -> tuple[Tensor, Tensor]:
    """Return the means of unit features and the directions in which they vary most.

    Args:
        features: Feature tokens of the training items.
        present: Which of them have each modality; a modality that none has keeps a mean of zero.
        num_directions: D, at most C.

    Returns:
        ``mean_C`` and ``map_DC``, float64, directions by falling variance.
    """
    doubles = {name: tokens.double() for name, tokens in features.items()}
    means = []
    for name, tokens_NTE in doubles.items():
        unit_NE = functional.normalize(tokens_NTE.mean(dim=1), dim=1)[present[name]]
        means.append(unit_NE.mean(dim=0) if len(unit_NE) else unit_NE.sum(dim=0))
    mean_C = torch.cat(means)
    centred_NC = centred_content(doubles, present, mean_C)
    _, directions_CC = torch.linalg.eigh(centred_NC.T @ centred_NC)
    # eigh sorts by rising variance; the map keeps the directions of most.
    return mean_C, directions_CC.T.flip(0)[:num_directions]
