"""What can be trained: a head over features that lie in memory.

Shape letters in this file: M train items, N of them, D embedding width.
May import: torch, numpy.
"""

import os
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import ItemFeatures
from qarm_feast.errors import ConfigError

_ROWS = 8192
"""Items of a pass over all of them: what a fusion holds between its layers does not grow."""


class HeadItems:
    """Items whose backbones are frozen: their features are read once, the head is trained.

    Args:
        head: A fusion; trained in place, and moved to the device.
        features: Content features of the items.
        device: Where features and head lie.
    """

    def __init__(self, head: nn.Module, features: ItemFeatures, device: torch.device) -> None:
        self._head = head.to(device)
        self._features = features
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
        return len(self._features)

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return none: backbones are frozen."""
        return []

    @property
    def present(self) -> Mapping[str, np.ndarray]:
        """Which items have a modality, bool ``[M]``, by modality."""
        return self._features.present

    @torch.no_grad()
    def embeddings(self) -> Tensor:
        """Return the embeddings of all items as they are now ``[M, D]``."""
        every_M = np.arange(len(self))
        parts = [self.embed(every_M[n : n + _ROWS]) for n in range(0, len(self), _ROWS)]
        return torch.cat(parts)

    def embed(self, rows: np.ndarray) -> Tensor:
        """Return the head's output ``[N, D]`` for some items."""
        rows_N = torch.from_numpy(rows).to(self._device)
        embeddings_ND: Tensor = self._head(
            {name: tokens[rows_N] for name, tokens in self._tokens.items()},
            {name: is_present[rows_N] for name, is_present in self._present.items()},
        )
        return embeddings_ND

    def embed_view(self, modality: str, rows: np.ndarray) -> Tensor:
        """Return what one modality alone says of some items that have it ``[N, D]``."""
        rows_N = torch.from_numpy(rows).to(self._device)
        embeddings_ND: Tensor = self._head(
            {name: tokens[rows_N] for name, tokens in self._tokens.items()},
            only(modality, self._present, rows_N),
        )
        return embeddings_ND


def only(modality: str, present: Mapping[str, Tensor], rows_N: Tensor) -> dict[str, Tensor]:
    """Return that of some items, which have it, one modality is present and no other."""
    return {name: is_present[rows_N] & (name == modality) for name, is_present in present.items()}


def training_device(config: AlignmentConfig) -> torch.device:
    """Return where this rank trains: its GPU of this machine, or the CPU.

    Args:
        config: Section ``alignment``.

    Returns:
        The device, made the current one.

    Raises:
        ConfigError: If a GPU is wanted and there is none.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "alignment.device is cuda, and torch finds no GPU here; set it to auto or cpu"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
