"""Parts of the ranker below the interaction: sparse lookup, dense net, dropout of their outputs.

Shape letters: B rows, F features, E table width, W dense width.
May import: torch, torchrec.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

_DRAWS_PER_INT64 = 4
_NUM_DRAWS = 1 << 16


class SparseArch(nn.Module):
    """Looks up every sparse feature: ``KeyedJaggedTensor`` to ``[B, F, E]``.

    Args:
        embedding_bag_collection: The tables.
        frozen_tables: Tables that get no gradient: whatever steps them, they keep their weights.
    """

    def __init__(
        self, embedding_bag_collection: EmbeddingBagCollection, frozen_tables: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.embedding_bag_collection = embedding_bag_collection
        configs = embedding_bag_collection.embedding_bag_configs()
        self.feature_names = [name for config in configs for name in config.feature_names]
        self._embedding_dim = configs[0].embedding_dim
        is_frozen = [
            config.name in frozen_tables for config in configs for _ in config.feature_names
        ]
        self._has_frozen = any(is_frozen)
        self._is_frozen_F1: torch.Tensor
        self.register_buffer(
            "_is_frozen_F1", torch.tensor(is_frozen).unsqueeze(1), persistent=False
        )

    def forward(self, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Return pooled embeddings in table order, whatever order the sharding plan gave them."""
        embeddings = self.embedding_bag_collection(sparse_features)
        grouped = KeyedTensor.regroup([embeddings], [self.feature_names])[0]
        embeddings_BFE: torch.Tensor = grouped.view(
            -1, len(self.feature_names), self._embedding_dim
        )
        if self._has_frozen:
            embeddings_BFE = torch.where(
                self._is_frozen_F1, embeddings_BFE.detach(), embeddings_BFE
            )
        return embeddings_BFE


class DenseArch(nn.Module):
    """Brings dense features to the width of a table: ``[B, W]`` to ``[B, E]``."""

    def __init__(self, in_features: int, layer_sizes: Sequence[int], embedding_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            mlp(in_features, layer_sizes), nn.Linear(layer_sizes[-1], embedding_dim)
        )

    def forward(self, dense_features_BW: torch.Tensor) -> torch.Tensor:
        """Return one embedding per row."""
        embedding_BE: torch.Tensor = self.net(dense_features_BW)
        return embedding_BE


class EmbeddingDropout(nn.Module):
    """Dropout at a third of the time that torch's takes on a CPU.

    A draw of 16 bits per number decides, four to a draw of torch's generator, where
    ``nn.Dropout`` makes a float for each. The share is kept to 1 in 65,536.

    Args:
        share: Share of the numbers that read as 0 in training, 0 to below 1.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        # One draw of all is kept at least: the scale would be infinite.
        self._num_dropped = min(round(share * _NUM_DRAWS), _NUM_DRAWS - 1)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return a tensor of any shape, in training with zeros and the rest scaled up."""
        if not self.training or not self._num_dropped:
            return embeddings
        num_numbers = embeddings.numel()
        draws = torch.empty(
            math.ceil(num_numbers / _DRAWS_PER_INT64), dtype=torch.int64, device=embeddings.device
        ).random_(-(2**63), None)
        is_kept = draws.view(torch.int16)[:num_numbers] >= self._num_dropped - _NUM_DRAWS // 2
        factors = is_kept.to(embeddings.dtype).mul_(_NUM_DRAWS / (_NUM_DRAWS - self._num_dropped))
        return embeddings * factors.view(embeddings.shape)


def mlp(in_features: int, layer_sizes: Sequence[int]) -> nn.Sequential:
    """Return linear layers of the given sizes, each followed by a ReLU."""
    layers: list[nn.Module] = []
    for out_features in layer_sizes:
        layers += [nn.Linear(in_features, out_features), nn.ReLU()]
        in_features = out_features
    return nn.Sequential(*layers)
