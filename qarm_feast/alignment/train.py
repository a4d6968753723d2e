"""Training of the alignment head on item pairs, the backbone frozen.

Shape letters in this file: M train items, E feature width, D embedding width, R pairs,
B pairs of a batch, S items drawn for the geometry term.
May import: torch, numpy, scipy, pyarrow.
"""

import copy
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from scipy import sparse
from torch import Tensor

from qarm_feast.alignment.backbones.opening import open_backbones
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import EncoderManifest, ItemEncoder, backbone_manifests
from qarm_feast.alignment.features import FeatureCache, ItemFeatures, read_features
from qarm_feast.alignment.fusion import ContentFusion, build_fusion, content_width, fusion_sizes
from qarm_feast.alignment.losses import geometry_loss, info_nce, negatives_mask
from qarm_feast.alignment.modalities import choose_modalities
from qarm_feast.errors import DataError
from qarm_feast.input_data import InputData
from qarm_feast.schema import ITEM_ID

logger = logging.getLogger(__name__)

_GEOMETRY_ITEMS = 512
"""Random train items per step whose content cosines are compared."""


@dataclass(frozen=True)
class PairRows:
    """Item pairs as rows of the train items: parallel arrays of length R."""

    triggers: np.ndarray
    targets: np.ndarray
    users: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.triggers)

    def take(self, rows: np.ndarray) -> "PairRows":
        """Return some of the pairs."""
        return PairRows(
            self.triggers[rows], self.targets[rows], self.users[rows], self.weights[rows]
        )


@dataclass(frozen=True)
class TrainingRun:
    """What a training run found.

    ``valid_losses`` starts with the loss before the first epoch; the head of ``best_epoch`` is
    kept, 0 being the untrained one.
    """

    num_train_pairs: int
    num_valid_pairs: int
    best_epoch: int
    valid_losses: list[float]
    seconds: float


def train_encoder(
    checked: InputData,
    pairs: pa.Table,
    config: AlignmentConfig,
    created: datetime,
    parent: ItemEncoder | None = None,
) -> ItemEncoder:
    """Return an encoder trained on pairs of train rows.

    Args:
        checked: Input data; of its items only those with a train row are read.
        pairs: Rows of ``pairs.PAIR_ROWS``.
        config: Section ``alignment``.
        created: Time that the manifest says, aware UTC.
        parent: The encoder that the new one refreshes; the manifest names it.

    Returns:
        The encoder, not yet saved.

    Raises:
        DataError: If the items have no content that an encoder reads, or there are no pairs.
    """
    items = checked.items.filter(
        pc.is_in(checked.items[ITEM_ID], pa.array(checked.train_item_ids()))
    )
    backbones = open_backbones(choose_modalities(items, config.modalities), items, config)
    cache = FeatureCache(config.features_uri)
    features = read_features(items, backbones, cache, checked.directory)
    rows = pair_rows(pairs, items[ITEM_ID].to_numpy())
    head, run = train_head(features, rows, config)
    manifest = EncoderManifest(
        version=config.encoder_version,
        parent=None if parent is None else parent.version,
        embedding_dim=head.linear.out_features,
        backbones=backbone_manifests(backbones),
        fusion=fusion_sizes(config),
        behaviour_cutoff=checked.behaviour_cutoff(),
        created=created,
        training={
            **vars(run),
            "num_train_items": items.num_rows,
            "content": features.counts,
            "seed": config.seed,
        },
        files={},
    )
    return ItemEncoder(manifest, head, backbones, checked.directory)


def pair_rows(pairs: pa.Table, item_ids_M: np.ndarray) -> PairRows:
    """Return the pairs as rows of the given items.

    Args:
        pairs: Rows of ``pairs.PAIR_ROWS``.
        item_ids_M: Ids of the train items, any order.

    Returns:
        Parallel arrays, in the order of ``pairs``.

    Raises:
        DataError: If there are no pairs, or one names an item that is not given.
    """
    if pairs.num_rows == 0:
        raise DataError("there are no item pairs to train on; run `qarm align pairs` again")
    ids = pa.array(item_ids_M)
    triggers = pc.index_in(pairs["trigger_item_id"], ids)
    targets = pc.index_in(pairs["target_item_id"], ids)
    if triggers.null_count or targets.null_count:
        raise DataError(
            "item pairs name items without a train row; run `qarm align pairs` on this data again"
        )
    return PairRows(
        triggers=triggers.to_numpy().astype(np.int64),
        targets=targets.to_numpy().astype(np.int64),
        users=pairs["user_row"].to_numpy(),
        weights=pairs["weight"].to_numpy(),
    )


def train_head(
    features: ItemFeatures, pairs: PairRows, config: AlignmentConfig
) -> tuple[ContentFusion, TrainingRun]:
    """Train the head until the loss on held-out items stops falling.

    A share of the items is held out, and with it every pair that names one of them: a head that
    only learnt its training items by heart does not lower the loss of new ones.

    Args:
        features: Content features of the train items.
        pairs: Pairs as rows of these items.
        config: Sizes, weights, schedule and seed.

    Returns:
        The head of the best epoch, in evaluation mode, and the run's figures.
    """
    started = time.monotonic()
    generator = np.random.default_rng(config.seed)
    train_pairs, valid_pairs = _hold_items_out(pairs, len(features), config, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        width = min(config.embedding_dim, content_width(features.shapes))
        head = build_fusion(features.shapes, width, fusion_sizes(config))
    head.start_from_content(*features.tensors())
    trainer = _HeadTrainer(head, features, pairs, config)
    best, losses, best_epoch = copy.deepcopy(head), [trainer.loss(valid_pairs)], 0
    for epoch in range(1, config.num_epochs + 1):
        train_loss = trainer.train_epoch(train_pairs, generator)
        losses.append(trainer.loss(valid_pairs))
        logger.info("alignment_epoch epoch=%d of=%d train_loss=%.4f valid_loss=%.4f",
                    epoch, config.num_epochs, train_loss, losses[-1])  # fmt: skip
        if losses[-1] < losses[best_epoch]:
            best, best_epoch = copy.deepcopy(head), epoch
        elif epoch - best_epoch >= config.patience:
            break
    run = TrainingRun(
        num_train_pairs=len(train_pairs),
        num_valid_pairs=len(valid_pairs),
        best_epoch=best_epoch,
        valid_losses=[round(loss, 5) for loss in losses],
        seconds=round(time.monotonic() - started, 1),
    )
    return best.eval(), run


def _hold_items_out(
    pairs: PairRows, num_items: int, config: AlignmentConfig, generator: np.random.Generator
) -> tuple[PairRows, PairRows]:
    is_held_M = generator.random(num_items) < config.valid_item_share
    is_valid_R = is_held_M[pairs.triggers] | is_held_M[pairs.targets]
    if is_valid_R.all() or not is_valid_R.any():
        logger.warning(
            "alignment_validation num_pairs=%d: too few to hold any out, so training pairs tell "
            "when to stop", len(pairs),
        )  # fmt: skip
        return pairs, pairs
    return pairs.take(np.flatnonzero(~is_valid_R)), pairs.take(np.flatnonzero(is_valid_R))


class _HeadTrainer:
    """Head, features and optimizer of one run."""

    def __init__(
        self, head: ContentFusion, features: ItemFeatures, pairs: PairRows, config: AlignmentConfig
    ) -> None:
        self._head = head
        self._tensors = features.tensors()
        self._num_items = len(features)
        self._config = config
        self._is_pair = _known_pairs(pairs, len(features))
        self._optimizer = torch.optim.Adam(head.parameters(), lr=config.learning_rate)
        with torch.no_grad():
            self._content = head(*self._tensors)

    def train_epoch(self, pairs: PairRows, generator: np.random.Generator) -> float:
        """Take one pass over the pairs and return the mean loss."""
        total = 0.0
        num_drawn = min(_GEOMETRY_ITEMS, self._num_items)
        for rows in _batches(generator.permutation(len(pairs)), self._config.batch_size):
            batch = pairs.take(rows)
            drawn = generator.choice(self._num_items, num_drawn, replace=False)
            loss = self._step_loss(batch, drawn)
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._optimizer.step()
            total += float(loss.detach()) * len(batch)
        return total / len(pairs)

    @torch.no_grad()
    def loss(self, pairs: PairRows) -> float:
        """Return the pair loss, without the geometry term."""
        embeddings_MD = self._head(*self._tensors)
        # One fixed shuffle: pairs lie sorted by item, and neighbours are poor negatives.
        order = np.random.default_rng(self._config.seed).permutation(len(pairs))
        total = 0.0
        for rows in _batches(order, self._config.batch_size):
            batch = pairs.take(rows)
            triggers_BD, targets_BD = embeddings_MD[batch.triggers], embeddings_MD[batch.targets]
            total += float(self._pair_loss(batch, triggers_BD, targets_BD)) * len(batch)
        return total / len(pairs)

    def _step_loss(self, batch: PairRows, drawn: np.ndarray) -> Tensor:
        """Return pair loss plus weighted geometry loss of the drawn items."""
        wanted = np.concatenate([batch.triggers, batch.targets, drawn])
        # An item stands in many pairs of a batch; the head sees it once.
        items, places = np.unique(wanted, return_inverse=True)
        embeddings = self._embed(torch.from_numpy(items))[torch.from_numpy(places)]
        sizes = [len(batch), len(batch), len(drawn)]
        triggers_BD, targets_BD, drawn_SD = torch.split(embeddings, sizes)
        content_SD = self._content[torch.from_numpy(drawn)]
        geometry = geometry_loss(drawn_SD, content_SD @ content_SD.T)
        pair_loss = self._pair_loss(batch, triggers_BD, targets_BD)
        return pair_loss + self._config.geometry_weight * geometry

    def _embed(self, rows: Tensor) -> Tensor:
        features, present = self._tensors
        embeddings: Tensor = self._head(
            {name: tokens[rows] for name, tokens in features.items()},
            {name: is_present[rows] for name, is_present in present.items()},
        )
        return embeddings

    def _pair_loss(self, batch: PairRows, triggers_BD: Tensor, targets_BD: Tensor) -> Tensor:
        is_pair_BB = self._is_pair[batch.triggers][:, batch.targets].toarray()
        is_negative_BB = negatives_mask(
            torch.from_numpy(batch.triggers),
            torch.from_numpy(batch.targets),
            torch.from_numpy(batch.users),
            torch.from_numpy(is_pair_BB),
        )
        weights_B = torch.from_numpy(batch.weights)
        temperature = self._config.temperature
        return info_nce(triggers_BD, targets_BD, is_negative_BB, weights_B, temperature)


def _known_pairs(pairs: PairRows, num_items: int) -> sparse.csr_array:
    """Return the symmetric matrix of items that are a pair in either order."""
    rows = np.concatenate([pairs.triggers, pairs.targets])
    columns = np.concatenate([pairs.targets, pairs.triggers])
    ones = np.ones(len(rows), dtype=bool)
    return sparse.csr_array((ones, (rows, columns)), shape=(num_items, num_items))


def _batches(rows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    for begin in range(0, len(rows), batch_size):
        yield rows[begin : begin + batch_size]
