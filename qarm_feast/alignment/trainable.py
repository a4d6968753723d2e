"""What can be trained: a head over features that lie in memory.

Shape letters in this file: M train items, N of them, D embedding width.
May import: torch, numpy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qarm_feast.alignment.features import ItemFeatures


class HeadItems:
    """Items whose backbones are frozen: their features are read once, the head is trained.

    Args:
        head: A fusion; trained in place, and moved to the device.
        features: Content features of the items.
        device: Where features and head lie.
    """

    def __init__(self, head: nn.Module, features: ItemFeatures, device: torch.device) -> None:
        self._head = head.to(device)
        self._num_items = len(features)
        tokens, present = features.tensors()
        self._tokens = {name: tensor.to(device) for name, tensor in tokens.items()}
        self._present = {name: tensor.to(device) for name, tensor in present.items()}
        self._device = device

    @property
    def module(self) -> nn.Module:
        """The head."""
        return self._head

    def __len__(self) -> int:
        """Return the number of items M."""
        return self._num_items

    def parameter_groups(self) -> Sequence[Mapping[str, Any]]:
        """Return the head's parameters, at the common rate."""
        return [{"params": list(self._head.parameters())}]

    @torch.no_grad()
    def embeddings(self) -> Tensor:
        """Return the embeddings of all items as they are now ``[M, D]``."""
        embeddings_MD: Tensor = self._head(self._tokens, self._present)
        return embeddings_MD

    def embed(self, rows: np.ndarray) -> Tensor:
        """Return the head's output ``[N, D]`` for some items."""
        rows_N = torch.from_numpy(rows).to(self._device)
        embeddings_ND: Tensor = self._head(
            {name: tokens[rows_N] for name, tokens in self._tokens.items()},
            {name: is_present[rows_N] for name, is_present in self._present.items()},
        )
        return embeddings_ND
