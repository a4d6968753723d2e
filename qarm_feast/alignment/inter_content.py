"""A first stage that ties the modalities of each item together (AlignRec, inter-content).

What one modality alone says of an item is a *view* of it: the fusion's output with all others
absent. Two views of one item are a pair, those of other items in the batch its negatives: the same
contrastive task as that of behaviour pairs, and trained by the same trainer. The geometry term
keeps the cosines of views near those of the whole content, so the views learn what it says, and
an item that lacks a modality is placed nearly as if it had it.

Shape letters in this file: M items, V views of them, D embedding width.
May import: torch, numpy.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from qarm_feast.alignment.held_out import PairSplit
from qarm_feast.alignment.pair_rows import BatchNegatives, PairRows
from qarm_feast.alignment.trainer import PairTask, TrainableItems
from qarm_feast.errors import DataError


class ItemsWithViews(TrainableItems, Protocol):
    """Items that can be embedded from one modality alone."""

    @property
    def present(self) -> Mapping[str, np.ndarray]:
        """Which items have a modality, bool ``[M]``, by modality."""
        ...

    def embed_view(self, modality: str, rows: np.ndarray) -> Tensor:
        """Return what one modality says of some items that have it."""
        ...


class Views:
    """The views of items, one after the other, as trainable items of their own.

    ``items_V`` tells the item of each view.

    Args:
        items: The items.
    """

    def __init__(self, items: ItemsWithViews) -> None:
        self._items = items
        self._modalities = list(items.present)
        rows = [np.flatnonzero(items.present[name]) for name in self._modalities]
        self.items_V = np.concatenate(rows)
        self._modality_V = np.repeat(np.arange(len(rows)), [len(part) for part in rows])

    @property
    def module(self) -> nn.Module:
        """The items' model."""
        return self._items.module

    def __len__(self) -> int:
        """Return the number of views V."""
        return len(self.items_V)

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return those of the items."""
        return self._items.backbone_parameters()

    def embed(self, rows: np.ndarray) -> Tensor:
        """Return the embeddings of some views, any of any modality."""
        modality_N = self._modality_V[rows]
        parts, places = [], []
        for number, name in enumerate(self._modalities):
            at = np.flatnonzero(modality_N == number)
            if len(at):
                parts.append(self._items.embed_view(name, self.items_V[rows[at]]))
                places.append(at)
        order = torch.from_numpy(np.argsort(np.concatenate(places)))
        gathered = torch.cat(parts)
        return gathered[order.to(gathered.device)]

    def pairs(self) -> PairRows:
        """Return every two views of one item, once each, modalities in their order."""
        num_items = len(self._items)
        views_of = np.full((len(self._modalities), num_items), -1)
        views_of[self._modality_V, self.items_V] = np.arange(len(self))
        both = [
            np.stack([one, other])[:, (one >= 0) & (other >= 0)]
            for one, other in combinations(views_of, 2)
        ]
        triggers, targets = np.concatenate([np.empty((2, 0), dtype=np.int64), *both], axis=1)
        return PairRows(
            triggers, targets, np.full(len(triggers), -1), np.ones(len(triggers), np.float32)
        )


def inter_content_task(
    items: ItemsWithViews, content_MD: Tensor, is_held_M: np.ndarray, geometry_weight: float
) -> PairTask:
    """Return the task of the first stage.

    Args:
        items: Items and model.
        content_MD: Embeddings of the whole content before training, on the model's device.
        is_held_M: Items that tell when to stop.
        geometry_weight: Weight of the geometry term.

    Returns:
        Views as items, every two views of one item as a pair.

    Raises:
        DataError: If no item has two modalities.
    """
    views = Views(items)
    pairs = views.pairs()
    if not len(pairs):
        raise DataError(
            "alignment.inter_content_epochs ties the modalities of an item together, and no item "
            f"has two: they have {' or '.join(items.present)}; set it to 0"
        )
    is_valid_R = is_held_M[views.items_V[pairs.triggers]]
    train, valid = (pairs.take(np.flatnonzero(rows)) for rows in (~is_valid_R, is_valid_R))
    if not len(train) or not len(valid):
        train = valid = pairs
    split = PairSplit(train, valid, is_held_M)
    content_VD = content_MD[torch.from_numpy(views.items_V).to(content_MD.device)]
    return PairTask(views, content_VD, split, BatchNegatives(pairs, len(views)), geometry_weight)
