"""What one training step of ``alignment.py`` takes in memory, in a process of its own."""

import multiprocessing
import resource

import numpy as np
import torch

from benchmarks.alignment_steps import lora_features, lora_items, made_pairs, made_titles
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.gathering import Ranks
from qarm_feast.alignment.held_out import PairSplit
from qarm_feast.alignment.pair_rows import BatchNegatives
from qarm_feast.alignment.progress import StepProgress
from qarm_feast.alignment.trainer import PairTask, PairTrainer
from qarm_feast.metrics_log import NoMetricsLog

_PAGE_BYTES = resource.getpagesize()


def step_bytes(backbone: str, num_items: int, batch_size: int, chunk_size: int) -> int:
    """Return by how much memory grows from before a step to its peak.

    Args:
        backbone: Folder of the text model.
        num_items: Items to draw pairs from.
        batch_size: Pairs of the step.
        chunk_size: Items embedded at a time.

    Returns:
        Bytes of resident memory, or of a GPU's.
    """
    # Spawned: a forked child would count its parent's memory.
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (backbone, num_items, batch_size, chunk_size))


def _measure(backbone: str, num_items: int, batch_size: int, chunk_size: int) -> int:
    config = AlignmentConfig(batch_size=batch_size, chunk_size=chunk_size, tuning="lora")
    titles = made_titles(num_items)
    items = lora_items(titles, lora_features(titles, backbone, config), backbone, config)
    pairs = made_pairs(num_items, batch_size)
    split = PairSplit(pairs, pairs, np.zeros(num_items, dtype=bool))
    device = next(items.parameters()).device
    content_MD = torch.nn.functional.normalize(
        torch.randn(num_items, config.embedding_dim, device=device), dim=1
    )
    task = PairTask(items, content_MD, split, BatchNegatives(pairs, num_items), 10.0)
    trainer = PairTrainer(task, config, StepProgress(NoMetricsLog(), Ranks()))
    before = _now()
    trainer.train_epoch(np.random.default_rng(0))
    return _peak() - before


def _now() -> int:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
