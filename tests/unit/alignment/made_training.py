"""Made items and pairs, and one step of training on them; also what each of two ranks runs."""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import features_of_vectors
from qarm_feast.alignment.gathering import current_ranks
from qarm_feast.alignment.held_out import hold_items_out
from qarm_feast.alignment.pair_rows import BatchNegatives, PairRows
from qarm_feast.alignment.progress import StepProgress
from qarm_feast.alignment.train import start_head, train_head
from qarm_feast.alignment.trainable import HeadItems
from qarm_feast.alignment.trainer import PairTask, PairTrainer
from qarm_feast.metrics_log import NoMetricsLog

# Odd numbers: no share of a rank and no chunk comes out even.
NUM_ITEMS, NUM_PAIRS, WIDTH = 61, 301, 32
SMALL = AlignmentConfig(
    embedding_dim=16, hidden_dim=16, batch_size=64, learning_rate=3e-3, num_epochs=3, device="cpu"
)
ONE_STEP = SMALL.model_copy(update={"batch_size": NUM_PAIRS, "learn_temperature": True})
CPU = torch.device("cpu")


def made_features() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(NUM_ITEMS, WIDTH)).astype(np.float32)


def made_pairs() -> PairRows:
    """Pairs of items whose numbers lie near each other."""
    generator = np.random.default_rng(2)
    triggers = generator.integers(0, NUM_ITEMS, NUM_PAIRS)
    targets = (triggers + generator.integers(1, 4, NUM_PAIRS)) % NUM_ITEMS
    weights = generator.random(NUM_PAIRS).astype(np.float32) + 0.1
    return PairRows(triggers, targets, generator.integers(-1, 20, NUM_PAIRS), weights)


def one_step(chunk_size: int | None) -> dict[str, Tensor]:
    """Take one step on all pairs: gradients, summed over ranks, loss and learned temperature."""
    config = ONE_STEP.model_copy(update={"chunk_size": chunk_size})
    features, pairs = features_of_vectors(made_features()), made_pairs()
    items = HeadItems(start_head(features, config), features, CPU)
    # A start without a correction has no gradient below it.
    torch.nn.init.normal_(
        items.module.correction.weight, generator=torch.Generator().manual_seed(0)
    )
    split = hold_items_out(pairs, NUM_ITEMS, 1e-9, seed=0)
    content_MD = torch.randn(NUM_ITEMS, 16, generator=torch.Generator().manual_seed(1))
    content_MD = torch.nn.functional.normalize(content_MD, dim=1)
    task = PairTask(items, content_MD, split, BatchNegatives(pairs, NUM_ITEMS), 10.0)
    trainer = PairTrainer(task, config, StepProgress(NoMetricsLog(), current_ranks()))
    loss = trainer.train_epoch(np.random.default_rng(0))
    gradients = {name: one.grad for name, one in items.module.named_parameters()}
    return gradients | {
        "loss": torch.tensor(loss),
        "temperature": torch.tensor(trainer.temperature),
        "valid_loss": torch.tensor(trainer.valid_loss()),
    }


def trained(**changed: Any) -> dict[str, Tensor]:
    """Train a head for some epochs and return its weights."""
    config = SMALL.model_copy(update=changed)
    head, _ = train_head(features_of_vectors(made_features()), made_pairs(), config)
    return head.state_dict()


def rank_job(rank: int, folder: str) -> None:
    """Do on one of two ranks what a test compares with one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {"plain": one_step(None), "chunks": one_step(7), "head": trained(chunk_size=16)}
    flat = {f"{part}.{name}": t for part, named in results.items() for name, t in named.items()}
    safetensors.torch.save_file(flat, Path(folder) / f"rank{rank}.safetensors")
    dist.destroy_process_group()
