"""Feature interactions: embeddings ``[B, F, E]`` to one vector ``[B, X]``.

Shape letters: B rows, F features, P pairs of features, E table width, X interaction width,
M feature maps of a convolution, N new features.
May import: torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qarm_feast.errors import ConfigError
from torchrec_models.config import RankerConfig


class DotInteraction(nn.Module):
    """DLRM's dot interaction: all embeddings and the dot product of every pair, ``[B, X]``."""

    def __init__(self, num_features: int, embedding_dim: int) -> None:
        super().__init__()
        self.out_features = num_features * embedding_dim + num_features * (num_features - 1) // 2
        self._pairs: torch.Tensor
        first, second = torch.triu_indices(num_features, num_features, offset=1)
        # Places in the flattened matrix: the backward of a two-index lookup is far slower.
        self.register_buffer("_pairs", first * num_features + second, persistent=False)

    def forward(self, features_BFE: torch.Tensor) -> torch.Tensor:
        """Return the flattened embeddings followed by the pairwise dot products."""
        dots_BFF = torch.bmm(features_BFE, features_BFE.transpose(1, 2))
        dots_BP = dots_BFF.flatten(1).index_select(1, self._pairs)
        return torch.cat([features_BFE.flatten(1), dots_BP], dim=1)


class DcnInteraction(nn.Module):
    """DCN-v2's cross network (Wang et al., arXiv 2008.13535) over the flattened embeddings.

    ``x_{l+1} = x_0 * (W_l x_l + b_l) + x_l``; with a rank, ``W_l = U_l V_l`` of that rank.
    """

    def __init__(
        self, num_features: int, embedding_dim: int, num_layers: int, rank: int | None
    ) -> None:
        super().__init__()
        self.out_features = width = num_features * embedding_dim
        self.layers = nn.ModuleList(_cross_weights(width, rank) for _ in range(num_layers))

    def forward(self, features_BFE: torch.Tensor) -> torch.Tensor:
        """Return the last cross layer's output, as wide as the embeddings together."""
        first_BX = crossed_BX = features_BFE.flatten(1)
        for layer in self.layers:
            crossed_BX = first_BX * layer(crossed_BX) + crossed_BX
        return crossed_BX


def _cross_weights(width: int, rank: int | None) -> nn.Module:
    if rank is None:
        return nn.Linear(width, width)
    return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))


@dataclass(frozen=True)
class FgcnnSizes:
    """Sizes of the convolutions that make new features.

    ``num_maps`` and ``num_new_maps`` have one entry per layer: feature maps of its convolution,
    and of its recombination.
    """

    num_maps: Sequence[int]
    num_new_maps: Sequence[int]
    kernel_height: int
    pooling_height: int


class FgcnnInteraction(nn.Module):
    """FGCNN with an inner-product network (Liu et al., arXiv 1904.04447).

    The embeddings are an image of F x E. A layer makes M maps of it by a convolution over
    ``kernel_height`` neighbouring features (zeros beyond the ends), takes tanh, and keeps the
    largest of each ``pooling_height`` features, ``F' = floor(F / pooling_height)``. A
    recombination, ``tanh(W flat + b)``, makes ``F' * num_new_maps`` new features of width E of
    it; the next layer reads the pooled maps. Raw and new features go through DLRM's dot
    interaction, which is IPNN's input. Unlike the paper, both read the same embeddings.
    """

    def __init__(self, num_features: int, embedding_dim: int, sizes: FgcnnSizes) -> None:
        super().__init__()
        convolutions: list[nn.Module] = []
        recombinations: list[nn.Module] = []
        num_maps, height, num_new = 1, num_features, 0
        for next_maps, new_maps in zip(sizes.num_maps, sizes.num_new_maps, strict=True):
            convolutions.append(_convolution(num_maps, next_maps, sizes))
            num_maps, height = next_maps, height // sizes.pooling_height
            width = height * embedding_dim
            recombinations.append(nn.Linear(num_maps * width, new_maps * width))
            num_new += new_maps * height
        self.embedding_dim = embedding_dim
        self.convolutions = nn.ModuleList(convolutions)
        self.recombinations = nn.ModuleList(recombinations)
        self.products = DotInteraction(num_features + num_new, embedding_dim)
        self.out_features = self.products.out_features

    def forward(self, features_BFE: torch.Tensor) -> torch.Tensor:
        """Return raw and new embeddings followed by the dot products of all their pairs."""
        features = [features_BFE]
        maps_BMFE = features_BFE.unsqueeze(1)
        for convolution, recombination in zip(self.convolutions, self.recombinations, strict=True):
            maps_BMFE = convolution(maps_BMFE)
            new_BX = torch.tanh(recombination(maps_BMFE.flatten(1)))
            features.append(new_BX.view(new_BX.shape[0], -1, self.embedding_dim))
        products_BX: torch.Tensor = self.products(torch.cat(features, dim=1))
        return products_BX


def _convolution(in_maps: int, out_maps: int, sizes: FgcnnSizes) -> nn.Sequential:
    height = sizes.kernel_height
    return nn.Sequential(
        nn.Conv2d(in_maps, out_maps, (height, 1), padding=(height // 2, 0)),
        nn.Tanh(),
        nn.MaxPool2d((sizes.pooling_height, 1)),
    )


Interaction = DotInteraction | DcnInteraction | FgcnnInteraction


def build_interaction(config: RankerConfig, num_features: int) -> Interaction:
    """Return the interaction that ``ranker.interaction`` names.

    Args:
        config: The ranker section.
        num_features: Embeddings of a row.

    Returns:
        An interaction with random weights.

    Raises:
        ConfigError: If FGCNN's pooling needs more features than there are.
    """
    width = config.embedding_dim
    if config.interaction == "dot":
        return DotInteraction(num_features, width)
    if config.interaction == "dcn":
        return DcnInteraction(num_features, width, config.dcn_num_layers, config.dcn_rank)
    sizes = FgcnnSizes(
        config.fgcnn_num_maps,
        config.fgcnn_num_new_maps,
        config.fgcnn_kernel_height,
        config.fgcnn_pooling_height,
    )
    needed = sizes.pooling_height ** len(sizes.num_maps)
    if num_features < needed:
        raise ConfigError(
            f"ranker.interaction is fgcnn, whose {len(sizes.num_maps)} poolings by "
            f"{sizes.pooling_height} need {needed} features, but ranker.features gives "
            f"{num_features}; add features or shorten ranker.fgcnn_num_maps and "
            "ranker.fgcnn_num_new_maps"
        )
    return FgcnnInteraction(num_features, width, sizes)
