"""Training steps of ``alignment.py``: the trainer beside a bare loop over the same batches.

Shape letters in this file: B pairs of a batch, D embedding width, U unique items of a step,
S items of the geometry term, R rows of a pass, T tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from qarm_feast.alignment.backbones.text import TextBackbone, pool_tokens
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import ItemFeatures, features_of_vectors, read_features
from qarm_feast.alignment.gathering import Ranks
from qarm_feast.alignment.held_out import PairSplit
from qarm_feast.alignment.losses import WHOLE, geometry_loss, info_nce, pair_logits
from qarm_feast.alignment.pair_rows import BatchNegatives, PairRows
from qarm_feast.alignment.progress import StepProgress
from qarm_feast.alignment.train import start_head
from qarm_feast.alignment.trainable import HeadItems, training_device
from qarm_feast.alignment.trainer import (
    GEOMETRY_ITEMS,
    PairTask,
    PairTrainer,
    TrainableItems,
    batches,
)
from qarm_feast.alignment.tuning import TunedItems, start_tuning
from qarm_feast.metrics_log import NoMetricsLog

FEATURE_DIM = 384
PAIRS_PER_ITEM = 8
HEAD_BATCH, LORA_BATCH = 1024, 64
WHOLE_STEP = 1 << 20
"""A chunk that no step fills: nothing is embedded twice, as in the bare loop."""
_VOCABULARY = 5_000


@dataclass(frozen=True)
class Sizes:
    """How much is made and measured."""

    head_items: int
    head_steps: int
    lora_items: int
    lora_steps: int
    export_items: int
    memory_items: int


def made_titles(num_items: int) -> list[str]:
    """Return titles of 4 to 20 made-up words."""
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(generator.choice(letters, 6)) for _ in range(_VOCABULARY)]
    lengths = generator.integers(4, 21, num_items)
    return [" ".join(words[n] for n in generator.integers(0, _VOCABULARY, k)) for k in lengths]


def made_pairs(num_items: int, num_pairs: int) -> PairRows:
    """Return pairs of items by Zipf's law, half of them with a user."""
    generator = np.random.default_rng(1)
    shares = 1 / np.arange(1, num_items + 1)
    triggers, targets = generator.choice(num_items, size=(2, num_pairs), p=shares / shares.sum())
    targets = np.where(targets == triggers, (targets + 1) % num_items, targets)
    users = generator.integers(-num_pairs, num_pairs, num_pairs)
    return PairRows(triggers, targets, users, generator.random(num_pairs).astype(np.float32) + 0.1)


@dataclass(frozen=True)
class Batch:
    """What a step needs, made before the clock starts."""

    items: np.ndarray
    places: Tensor
    sizes: list[int]
    content_SD: Tensor
    is_blocked_BB: Tensor
    weights_B: Tensor
    trigger_shares_B: Tensor
    target_shares_B: Tensor


class Arms:
    """The trainer and a bare loop, each with a model of its own.

    Args:
        make_items: Makes items with their untrained model.
        config: Section ``alignment``.
        num_pairs: Pairs of an epoch.
    """

    def __init__(
        self, make_items: Callable[[], TrainableItems], config: AlignmentConfig, num_pairs: int
    ) -> None:
        self._config = config
        items, self._bare_items = make_items(), make_items()
        pairs = made_pairs(len(items), num_pairs)
        split = PairSplit(pairs, pairs, np.zeros(len(items), dtype=bool))
        negatives = BatchNegatives(pairs, len(items))
        device = training_device(config)
        content = torch.randn(len(items), config.embedding_dim, device=device)
        self._content_MD = nn.functional.normalize(content, dim=1)
        assert config.geometry_weight != "auto", "a number, which the bare loop takes, too"
        self._weight = config.geometry_weight
        task = PairTask(items, self._content_MD, split, negatives, self._weight)
        self._trainer = PairTrainer(task, config, StepProgress(NoMetricsLog(), Ranks()))
        self._optimizer = torch.optim.Adam(
            [one for one in self._bare_items.module.parameters() if one.requires_grad],
            lr=config.learning_rate,
        )
        self._batches = [self._batch(part, negatives) for part in self._drawn(pairs)]
        self._embed = self._bare_embeddings([batch.items for batch in self._batches])

    def trainer(self) -> float:
        """Return steps per second of an epoch of the trainer."""
        return self._steps_per_second(lambda: self._trainer.train_epoch(np.random.default_rng(0)))

    def bare_loop(self) -> float:
        """Return steps per second of the bare loop."""
        self._bare_items.module.train()
        return self._steps_per_second(self._bare_epoch)

    def _bare_epoch(self) -> None:
        for number, batch in enumerate(self._batches):
            embeddings = self._embed(number)[batch.places]
            triggers_BD, targets_BD, drawn_SD = torch.split(embeddings, batch.sizes)
            logits_BB = pair_logits(
                triggers_BD, targets_BD, batch.is_blocked_BB, self._config.temperature
            )
            pair_loss = info_nce(
                logits_BB - batch.target_shares_B, logits_BB.T - batch.trigger_shares_B,
                batch.weights_B,
            )  # fmt: skip
            loss = pair_loss + self._weight * geometry_loss(drawn_SD, batch.content_SD)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()

    def _bare_embeddings(self, items: Sequence[np.ndarray]) -> Callable[[int], Tensor]:
        """Return what embeds the items of a batch, whatever it takes being in memory."""
        return lambda number: self._bare_items.embed(items[number])

    def _drawn(self, pairs: PairRows) -> list[tuple[PairRows, np.ndarray]]:
        """Return the batches and the items of the geometry term that the trainer draws."""
        generator = np.random.default_rng(0)
        order = generator.permutation(len(pairs))
        num_items = len(self._bare_items)
        num_drawn = min(GEOMETRY_ITEMS, num_items)
        return [
            (pairs.take(rows), generator.choice(num_items, num_drawn, replace=False))
            for rows in batches(order, self._config.batch_size)
        ]

    def _batch(self, part: tuple[PairRows, np.ndarray], negatives: BatchNegatives) -> Batch:
        pairs, drawn = part
        device = self._content_MD.device
        wanted = np.concatenate([pairs.triggers, pairs.targets, drawn])
        items, places = np.unique(wanted, return_inverse=True)
        shares_M = negatives.log_shares_M
        return Batch(
            items=items,
            places=torch.from_numpy(places).to(device),
            sizes=[len(pairs), len(pairs), len(drawn)],
            content_SD=self._content_MD[torch.from_numpy(drawn).to(device)],
            is_blocked_BB=negatives.blocked(pairs, WHOLE).to(device),
            weights_B=torch.from_numpy(pairs.weights).to(device),
            trigger_shares_B=shares_M[pairs.triggers].to(device),
            target_shares_B=shares_M[pairs.targets].to(device),
        )

    def _steps_per_second(self, epoch: Callable[[], object]) -> float:
        started = seconds()
        epoch()
        return len(self._batches) / (seconds() - started)


class HeadArms(Arms):
    """A head over frozen features.

    Args:
        sizes: Numbers of items and steps.
    """

    def __init__(self, sizes: Sizes) -> None:
        config = AlignmentConfig(batch_size=HEAD_BATCH)
        x = np.random.default_rng(0).normal(size=(sizes.head_items, FEATURE_DIM))
        features = features_of_vectors(x.astype(np.float32))

        def make_items() -> HeadItems:
            return HeadItems(start_head(features, config), features, training_device(config))

        super().__init__(make_items, config, HEAD_BATCH * sizes.head_steps)


class LoraArms(Arms):
    """LoRA over a text model and a head.

    Args:
        sizes: Numbers of items and steps.
        backbone: Folder of the text model.
    """

    def __init__(self, sizes: Sizes, backbone: str) -> None:
        config = AlignmentConfig(batch_size=LORA_BATCH, chunk_size=WHOLE_STEP, tuning="lora")
        self._titles = made_titles(sizes.lora_items)
        self._max_tokens = config.max_tokens
        self._folder = Path(backbone)
        features = lora_features(self._titles, backbone, config)

        def make_items() -> TunedItems:
            return lora_items(self._titles, features, backbone, config)

        super().__init__(make_items, config, LORA_BATCH * sizes.lora_steps)

    def _bare_embeddings(self, items: Sequence[np.ndarray]) -> Callable[[int], Tensor]:
        """Tokens of each batch lie on the device in passes of one length, as training has them."""
        reader = TextBackbone(self._folder, self._max_tokens)
        device = self._content_MD.device
        prepared = []
        for rows in items:
            passes = reader.passes([self._titles[row] for row in rows], is_fixed=False)
            order = np.argsort(np.concatenate([one.rows for one in passes]))
            tensors = [(one.ids_RT.to(device), one.is_token_RT.to(device)) for one in passes]
            prepared.append((tensors, torch.from_numpy(order).to(device)))
        model = self._bare_items.module
        present = {"text": torch.ones(len(self._titles), dtype=torch.bool, device=device)}

        def embed(number: int) -> Tensor:
            passes, order = prepared[number]
            network = model.backbones["text"]
            features = torch.cat([pooled(network, ids, mask) for ids, mask in passes])[order]
            return model.fusion({"text": features}, {"text": present["text"][: len(order)]})

        return embed


def lora_features(titles: list[str], backbone: str, config: AlignmentConfig) -> ItemFeatures:
    """Return the features of titles by the untuned model."""
    items = pa.table({"title": titles})
    return read_features(items, {"text": TextBackbone(Path(backbone), config.max_tokens)})


def lora_items(
    titles: list[str], features: ItemFeatures, backbone: str, config: AlignmentConfig
) -> TunedItems:
    """Return titles with a text model and adapters of their own, on the device."""
    reader = TextBackbone(Path(backbone), config.max_tokens)
    torch.manual_seed(0)
    tuned = start_tuning({"text": reader}, config)
    table = pa.table({"title": titles})
    items = TunedItems(table, features, tuned, start_head(features, config), None)
    return items.to(training_device(config))


def pooled(network: nn.Module, ids_RT: Tensor, is_token_RT: Tensor) -> Tensor:
    """Return what training and export make of tokens."""
    num_rows, length = ids_RT.shape
    mask = is_token_RT[:, None, None, :].expand(num_rows, 1, length, length)
    hidden_RTE = network(input_ids=ids_RT, attention_mask=mask).last_hidden_state
    return pool_tokens(hidden_RTE, is_token_RT, 1)


def seconds() -> float:
    """Return a clock's reading: of CPU time, or with a GPU of time once it has done its work."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
