"""The training loop: whatever embeds items is trained on pairs of them.

One step of all ranks together: the items of a batch of pairs are embedded once each, every rank a
share of them; the loss of the pairs plus the geometry term of some random items goes backward;
the ranks' gradients are summed. N ranks therefore do what one process does with the same
``batch_size``, up to rounding.

Shape letters in this file: M train items, D embedding width, R pairs, B pairs of a batch,
U unique items of a step, S items drawn for the geometry term.
May import: torch, numpy.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from qarm_feast.alignment import gradient_cache
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.gathering import (
    current_ranks,
    gather_rows,
    own_rows,
    said_by_first,
    sum_gradients,
    sum_over_ranks,
    take_from_first,
)
from qarm_feast.alignment.held_out import PairSplit
from qarm_feast.alignment.losses import (
    WHOLE,
    Temperature,
    anchor_loss,
    geometry_loss,
    info_nce,
    pair_logits,
)
from qarm_feast.alignment.pair_rows import BatchNegatives, PairRows
from qarm_feast.alignment.progress import StepProgress

GEOMETRY_ITEMS = 512
"""Random train items per step whose cosines are compared with what they shall stay."""
_EMBED_ROWS = 8192
_EMBED_ROWS_TUNED = 128
"""Items at a time where backbones read them anew: a picture's first layers alone take megabytes."""


class TrainableItems(Protocol):
    """Items whose embeddings can be trained."""

    @property
    def module(self) -> nn.Module:
        """All that is trained; what needs no gradient in it is neither trained nor saved."""
        ...

    def __len__(self) -> int:
        """Return the number of items M."""
        ...

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return what is trained at the backbones' rate; the rest is at the common one."""
        ...

    def embed(self, rows: np.ndarray) -> Tensor:
        """Return the L2-normalised embeddings of some items, with a graph where that is on."""
        ...


@dataclass(frozen=True)
class PairTask:
    """What a trainer learns from.

    Attributes:
        items: The items, and the model that embeds them.
        content_MD: Embeddings whose cosines the geometry term keeps, on the model's device.
        split: Training pairs, and those that tell when to stop.
        negatives: Knows all pairs.
        geometry_weight: Weight of the geometry term.
        anchor_weight: Weight of the term that keeps items at ``content_MD`` itself; above zero
            where that is a parent's, in whose space the training starts.
    """

    items: TrainableItems
    content_MD: Tensor
    split: PairSplit
    negatives: BatchNegatives
    geometry_weight: float
    anchor_weight: float = 0.0


class PairTrainer:
    """Takes steps on batches of pairs.

    Args:
        task: Model and data.
        config: Temperature, rates, batch and chunk sizes, seed. Without a chunk size, tuned
            backbones embed 128 items at a time: what a step's items hold at once takes gigabytes.
        progress: Is told of each step.
    """

    def __init__(self, task: PairTask, config: AlignmentConfig, progress: StepProgress) -> None:
        self.num_steps = 0
        self._task = task
        self._config = config
        self._progress = progress
        self._device = task.content_MD.device
        self._chunk_size = config.chunk_size
        if self._chunk_size is None and task.items.backbone_parameters():
            self._chunk_size = _EMBED_ROWS_TUNED
        self._temperature = Temperature(config.temperature, config.learn_temperature)
        self._temperature.to(self._device)
        groups = _parameter_groups(task.items, self._temperature, config)
        self._optimizer = torch.optim.Adam(groups, lr=config.learning_rate)
        self._trained = [parameter for group in groups for parameter in group["params"]]
        take_from_first(self.tensors().values())

    @property
    def temperature(self) -> float:
        """The temperature now."""
        return self._temperature.value

    def train_epoch(self, generator: np.random.Generator) -> float:
        """Take one pass over the training pairs and return the mean loss.

        Args:
            generator: Shuffles them and draws the items of the geometry term; the same on all
                ranks.

        Returns:
            The loss of the steps, geometry term included, averaged over pairs.
        """
        self._task.items.module.train()
        pairs = self._task.split.train
        num_items = len(self._task.items)
        num_drawn = min(GEOMETRY_ITEMS, num_items)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        with torch.random.fork_rng(self._generator_devices()):
            for rows in batches(generator.permutation(len(pairs)), self._config.batch_size):
                batch = pairs.take(rows)
                drawn = generator.choice(num_items, num_drawn, replace=False)
                loss = self._step(batch, drawn)
                total += loss * len(batch)
                self._progress.add_step(self.num_steps, len(batch), loss)
        return float(sum_over_ranks(total)) / len(pairs)

    @torch.no_grad()
    def valid_loss(self) -> float:
        """Return the loss of the held-out pairs, without the geometry term.

        It is taken at the temperature of the start: a learned one would make two epochs
        incomparable.

        Returns:
            The mean over pairs in batches of the training's size; the same on all ranks.
        """
        pairs = self._task.split.valid
        items, places = np.unique(
            np.concatenate([pairs.triggers, pairs.targets]), return_inverse=True
        )
        embeddings_UD = embeddings(self._task.items, items)
        trigger_places, target_places = np.split(places, 2)
        # One fixed shuffle: pairs lie sorted by item, and neighbours are poor negatives.
        order = np.random.default_rng(self._config.seed).permutation(len(pairs))
        total = 0.0
        for rows in batches(order, self._config.batch_size):
            triggers_BD = embeddings_UD[self._moved(trigger_places[rows])]
            targets_BD = embeddings_UD[self._moved(target_places[rows])]
            loss = self._pair_loss(
                pairs.take(rows), triggers_BD, targets_BD, self._temperature.start, WHOLE
            )
            total += float(loss) * len(rows)
        return said_by_first(total / len(pairs))

    def tensors(self) -> dict[str, Tensor]:
        """Return all that training changes but the optimizer, by name; not copied."""
        model, loss = trained_tensors(self._task.items.module), trained_tensors(self._temperature)
        return {f"model.{name}": tensor for name, tensor in model.items()} | {
            f"loss.{name}": tensor for name, tensor in loss.items()
        }

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state by place and name; empty before the first step."""
        places: dict[int, dict[str, Tensor]] = self._optimizer.state_dict()["state"]
        return {
            f"{place}.{name}": tensor
            for place, tensors in places.items()
            for name, tensor in tensors.items()
        }

    def restore(self, tensors: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` and :meth:`optimizer_tensors` returned once."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        places: dict[int, dict[str, Tensor]] = {}
        for name, tensor in optimizer.items():
            place, _, key = name.partition(".")
            places.setdefault(int(place), {})[key] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": places, "param_groups": groups})

    def _step(self, batch: PairRows, drawn: np.ndarray) -> Tensor:
        """Train on a batch and return this rank's share of its loss."""
        wanted = np.concatenate([batch.triggers, batch.targets, drawn])
        # An item stands in many pairs of a batch; the model sees it once.
        items, places = np.unique(wanted, return_inverse=True)
        self._optimizer.zero_grad()
        loss = gradient_cache.backward(
            self._embed,
            own_rows(items),
            partial(self._step_loss, batch, drawn, self._moved(places), len(items)),
            self._chunk_size,
            self._step_seed(),
        )
        sum_gradients(self._trained)
        self._optimizer.step()
        self._temperature.clamp()
        self.num_steps += 1
        return loss

    def _step_loss(
        self, batch: PairRows, drawn: np.ndarray, places: Tensor, num_items: int, own_PD: Tensor
    ) -> Tensor:
        """Return this rank's share of pair loss plus weighted geometry and anchor loss."""
        embeddings_UD = gather_rows(own_PD, num_items)
        sizes = [len(batch), len(batch), len(drawn)]
        triggers_BD, targets_BD, drawn_SD = torch.split(embeddings_UD[places], sizes)
        ranks = current_ranks()
        content_SD = self._task.content_MD[self._moved(drawn)]
        own = ranks.share(len(drawn))
        geometry = self._task.geometry_weight * geometry_loss(drawn_SD, content_SD, own)
        if self._task.anchor_weight:
            geometry = geometry + self._task.anchor_weight * anchor_loss(drawn_SD, content_SD, own)
        pair_loss = self._pair_loss(
            batch, triggers_BD, targets_BD, self._temperature(), ranks.share(len(batch))
        )
        return pair_loss + geometry

    def _pair_loss(
        self,
        batch: PairRows,
        triggers_BD: Tensor,
        targets_BD: Tensor,
        temperature: float | Tensor,
        own: slice,
    ) -> Tensor:
        is_blocked_QB = self._task.negatives.blocked(batch, own).to(self._device)
        by_trigger_QB = pair_logits(triggers_BD[own], targets_BD, is_blocked_QB, temperature)
        if current_ranks().size == 1:
            # What blocks a target from a trigger blocks the trigger from the target.
            by_target_QB = by_trigger_QB.T
        else:
            is_blocked_QB = self._task.negatives.blocked(batch.swapped(), own).to(self._device)
            by_target_QB = pair_logits(targets_BD[own], triggers_BD, is_blocked_QB, temperature)
        if weight := self._config.logq_weight:
            log_shares_M = self._task.negatives.log_shares_M
            by_trigger_QB = by_trigger_QB - weight * self._moved(log_shares_M[batch.targets])
            by_target_QB = by_target_QB - weight * self._moved(log_shares_M[batch.triggers])
        weights_B = self._moved(batch.weights)
        return info_nce(by_trigger_QB, by_target_QB, weights_B, own)

    def _embed(self, rows: np.ndarray) -> Tensor:
        if not self._config.enable_bf16:
            return self._task.items.embed(rows)
        with torch.autocast(self._device.type, torch.bfloat16):
            embeddings_ND = self._task.items.embed(rows)
        return functional.normalize(embeddings_ND.float(), dim=1)

    def _moved(self, values: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(values).to(self._device)

    def _step_seed(self) -> int:
        """Return a seed that no other step and no other rank has."""
        ranks = current_ranks()
        return (self._config.seed << 32) + self.num_steps * ranks.size + ranks.rank

    def _generator_devices(self) -> list[torch.device]:
        return [self._device] if self._device.type == "cuda" else []


def _parameter_groups(
    items: TrainableItems, temperature: Temperature, config: AlignmentConfig
) -> list[dict[str, Any]]:
    backbone = items.backbone_parameters()
    known = {id(parameter) for parameter in backbone}
    trained = [*items.module.parameters(), *temperature.parameters()]
    others = [p for p in trained if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [{"params": others}]
    if backbone:
        groups.append({"params": backbone, "lr": config.backbone_learning_rate})
    return groups


@torch.no_grad()
def embeddings(items: TrainableItems, rows: np.ndarray) -> Tensor:
    """Return embeddings ``[N, D]`` of some items as they are now, float32, by all ranks."""
    items.module.eval()
    num_rows = _EMBED_ROWS_TUNED if items.backbone_parameters() else _EMBED_ROWS
    parts = [items.embed(part) for part in batches(own_rows(rows), num_rows)]
    return gather_rows(torch.cat(parts), len(rows))


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what training changes in a module, by name: writing to it changes the module."""
    trained = {name: p.data for name, p in module.named_parameters() if p.requires_grad}
    return trained | dict(module.named_buffers())


def batches(rows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Yield the rows in parts of ``batch_size``; the last one may be shorter."""
    for begin in range(0, len(rows), batch_size):
        yield rows[begin : begin + batch_size]
