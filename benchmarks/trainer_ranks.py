"""What one rank of ``trainer.py`` measures; started by it through torchrun.

Shape letters in this file: B rows, F features, E table width.
"""

import argparse
import ctypes
import gc
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.trainer_rows import LABELS, made_columns, publish_made_rows
from torchrec_models.batch import BatchBuilder, RankingBatch
from torchrec_models.config import CodeSizes, RankerConfig, resolve_tasks
from torchrec_models.dataset import RowDataset
from torchrec_models.inputs import TrainInputs
from torchrec_models.ranker import RankerTrainTask, build_ranker
from torchrec_models.row_store import RowStore, code_sizes
from torchrec_models.sharding import (
    Ranks,
    ShardedRanker,
    current_ranks,
    process_group,
    shard_ranker,
)
from torchrec_models.snapshot import ItemSnapshot
from torchrec_models.tables import ranker_tables, sparse_feature_names
from torchrec_models.training import train
from torchrec_models.vocabulary import IdVocabulary, Vocabularies

NUM_ROUNDS = 3
GROWTH_STEPS, WARM_STEPS = 20, 3
MIB = 1 << 20
_PAGE_BYTES = resource.getpagesize()

Figures = dict[str, float]


def main() -> None:
    """Measure on all ranks; the first one writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--growth", required=True)
    arguments = parser.parse_args()
    folder = Path(arguments.folder)
    config = RankerConfig(
        rows_uri=str(folder / "rows"),
        num_epochs=1,
        batch_size=arguments.batch_size,
        eval_every_steps=10**9,
        enable_centroid_start=False,
    )
    with process_group() as ranks:
        if ranks.is_first:
            publish_made_rows(folder / "rows", arguments.rows, arguments.items)
        dist.barrier()
        figures = measured(config, TrainInputs(RowStore(config.rows_uri, "ranker_v1"), None), ranks)
        for num_rows in (int(size) for size in arguments.growth.split(",") if size):
            figures |= growth(config, num_rows)
        if ranks.is_first:
            (folder / "figures.json").write_text(json.dumps(figures), "utf-8")


def measured(config: RankerConfig, inputs: TrainInputs, ranks: Ranks) -> Figures:
    """Return the speeds of the trainer, its parts and its rivals, in turns, and their ratios.

    Args:
        config: The ranker section.
        inputs: Made rows.
        ranks: This rank.

    Returns:
        Rows of all ranks per second, medians of the rounds, and ratios within rounds.
    """
    store = inputs.store
    vocabularies, sizes = store.run_vocabularies(config), code_sizes(store.manifest)
    builder = batch_builder(config, vocabularies, sizes, store)
    dataset = RowDataset(
        path=store.split_path("train"),
        label_names=LABELS,
        user_columns=(),
        builder=builder,
        ranks=ranks,
        batch_size=config.batch_size,
        num_workers=config.num_input_threads,
    )
    batches = list(_epoch(dataset, config))
    sharded = sharded_ranker(config, vocabularies, sizes)
    plain = PlainLoop(config, vocabularies, sizes)
    train(config, inputs, enable_checkpoint=False)
    speeds: dict[str, list[float]] = {}
    for _ in range(NUM_ROUNDS):
        rounds = {
            "trainer": train(config, inputs, enable_checkpoint=False).samples_per_second,
            "bare_loop": _rows_per_second(lambda: bare_loop(sharded, batches), batches),
            "input": _rows_per_second(lambda: _drain(_epoch(dataset, config)), batches),
            "plain_torch": _rows_per_second(lambda: plain.run(batches), batches),
        }
        for name, speed in rounds.items():
            speeds.setdefault(name, []).append(speed)
    return _speed_figures(speeds) | _shares(sharded, batches, speeds)


def batch_builder(
    config: RankerConfig, vocabularies: Vocabularies, sizes: CodeSizes, store: RowStore
) -> BatchBuilder:
    """Return the builder that training would use."""
    snapshot = ItemSnapshot(store.snapshot_folder, config.vector_source)
    return BatchBuilder(
        config=config,
        vocabularies=vocabularies,
        feature_names=sparse_feature_names(ranker_tables(sizes, vocabularies, config)),
        code_lookup=snapshot,
        vector_lookup=snapshot,
        aligned_lookup=snapshot.with_source("aligned"),
        side_tables=store.side_tables(),
        label_names=LABELS,
        level_sizes=sizes.level_sizes,
    )


def sharded_ranker(
    config: RankerConfig, vocabularies: Vocabularies, sizes: CodeSizes
) -> ShardedRanker:
    """Return the sharded model that training would use."""
    torch.manual_seed(config.seed + current_ranks().rank)
    tasks = resolve_tasks(config, LABELS)
    ranker = build_ranker(config, tasks, vocabularies, sizes, torch.device("meta"))
    return shard_ranker(RankerTrainTask(ranker, [1.0]), config)


def bare_loop(sharded: ShardedRanker, batches: Sequence[RankingBatch]) -> None:
    """Step once over each batch in memory, and do nothing else."""
    sharded.model.train()
    for batch in batches:
        sharded.optimizer.zero_grad()
        loss, _ = sharded.model(batch.to(sharded.device))
        loss.sum().backward()
        sharded.optimizer.step()
    _finish(sharded.device)


class PlainLoop:
    """The same ranker on ``nn.EmbeddingBag`` tables, each rank alone on its own rows.

    Every rank holds all tables and nothing is exchanged between ranks: what PyTorch does without
    sharding, its gradients not even averaged.
    """

    def __init__(self, config: RankerConfig, vocabularies: Vocabularies, sizes: CodeSizes) -> None:
        tasks = resolve_tasks(config, LABELS)
        ranker = build_ranker(config, tasks, vocabularies, sizes, torch.device("meta"))
        ranker.sparse_arch = PlainSparseArch(ranker_tables(sizes, vocabularies, config))
        self._task = RankerTrainTask(ranker, [1.0])
        sparse = list(ranker.sparse_arch.parameters())
        known = {id(parameter) for parameter in sparse}
        dense = [each for each in self._task.parameters() if id(each) not in known]
        self._optimizers = [
            torch.optim.Adagrad(sparse, lr=config.sparse_learning_rate),
            torch.optim.Adam(dense, lr=config.learning_rate, fused=True),
        ]

    def run(self, batches: Sequence[RankingBatch]) -> None:
        """Step once over each batch."""
        # Left open, the question whether to check sparse gradients is a warning.
        with torch.sparse.check_sparse_tensor_invariants(False):
            for batch in batches:
                self._step(batch)

    def _step(self, batch: RankingBatch) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss, _ = self._task(batch)
        loss.sum().backward()
        for optimizer in self._optimizers:
            optimizer.step()


class PlainSparseArch(nn.Module):
    """Looks up every sparse feature in ``nn.EmbeddingBag`` tables: ``[B, F, E]``."""

    def __init__(self, tables: Sequence) -> None:
        super().__init__()
        self.bags = nn.ModuleDict(
            {
                table.name: nn.EmbeddingBag(
                    table.num_embeddings, table.embedding_dim, mode="mean", sparse=True
                )
                for table in tables
            }
        )
        self._table_of = [(name, table.name) for table in tables for name in table.feature_names]
        self.feature_names = [name for name, _ in self._table_of]

    def forward(self, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Return pooled embeddings in table order."""
        parts = sparse_features.to_dict()
        pooled = [
            self.bags[table](parts[name].values(), parts[name].offsets()[:-1])
            for name, table in self._table_of
        ]
        return torch.stack(pooled, dim=1)


def growth(config: RankerConfig, num_rows: int) -> Figures:
    """Return speed and memory of a step with an item table of ``num_rows`` rows.

    Args:
        config: The ranker section.
        num_rows: Rows of the item table; all other tables keep their size.

    Returns:
        Rows of all ranks per second, and MiB that this rank's resident memory grew by.
    """
    gc.collect()
    # What freed tables left in the allocator would hide what the next ones take.
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident_bytes()
    ids_V = np.arange(num_rows, dtype=np.int64)
    vocabularies = Vocabularies(user_ids=IdVocabulary(ids_V[:1000]), item_ids=IdVocabulary(ids_V))
    keys = {"features": ("user_id", "item_id", "history_item_id")}
    config = config.model_copy(update=keys)
    sizes = CodeSizes((2,), 2, 2)
    sharded = sharded_ranker(config, vocabularies, sizes)
    grown_by = _resident_bytes() - before
    tables = ranker_tables(sizes, vocabularies, config)
    builder = BatchBuilder(
        config=config,
        vocabularies=vocabularies,
        feature_names=sparse_feature_names(tables),
        code_lookup=_NoCodes(),
    )
    generator = np.random.default_rng(current_ranks().rank)
    batches = [
        builder.build(made_columns(generator, config.batch_size, num_rows))
        for _ in range(WARM_STEPS + GROWTH_STEPS)
    ]
    bare_loop(sharded, batches[:WARM_STEPS])
    speed = _rows_per_second(lambda: bare_loop(sharded, batches[WARM_STEPS:]), batches[WARM_STEPS:])
    name = f"{num_rows:.0e}".replace("+0", "")
    return {
        f"samples_per_second_{name}_rows": speed,
        f"memory_mib_{name}_rows": grown_by / MIB,
    }


class _NoCodes:
    """Stands where the features read no codes."""

    def history_codes(self, item_ids_H: np.ndarray, label_times_H: np.ndarray) -> None:
        """Never called."""
        raise AssertionError("these features read no codes")


def _epoch(dataset: RowDataset, config: RankerConfig) -> Iterator[RankingBatch]:
    return dataset.train_batches(seed=0, epoch=0, window_rows=config.shuffle_window_rows)


def _drain(batches: Iterator[RankingBatch]) -> None:
    for _ in batches:
        pass


def _rows_per_second(work: Callable[[], None], batches: Sequence[RankingBatch]) -> float:
    """Return rows of all ranks per second of the slowest rank."""
    dist.barrier()
    started = time.perf_counter()
    work()
    dist.barrier()
    num_rows = sum(len(batch.labels) for batch in batches) * current_ranks().world_size
    return num_rows / (time.perf_counter() - started)


def _speed_figures(speeds: dict[str, list[float]]) -> Figures:
    medians = {name: float(np.median(values)) for name, values in speeds.items()}

    def ratio(first: str, second: str) -> float:
        return float(np.median(np.divide(speeds[first], speeds[second])))

    return {
        "trainer_vs_bare_loop": ratio("trainer", "bare_loop"),
        "input_vs_training": ratio("input", "trainer"),
        "trainer_vs_plain_torch": ratio("trainer", "plain_torch"),
        "samples_per_second": medians["trainer"],
        **{f"samples_per_second_{name}": value for name, value in medians.items()},
    }


def _shares(
    sharded: ShardedRanker, batches: Sequence[RankingBatch], speeds: dict[str, list[float]]
) -> Figures:
    """Return which share of a step's time goes into lookups, dense parts and input, one by one."""
    sparse_arch = sharded.model.module.ranker.sparse_arch

    def look_up() -> None:
        for batch in batches:
            sparse_arch(batch.to(sharded.device).sparse_features).sum().backward()
        _finish(sharded.device)

    embedding = 1 / _rows_per_second(look_up, batches)
    step = 1 / float(np.median(speeds["bare_loop"]))
    given = 1 / float(np.median(speeds["input"]))
    seconds = {
        "embedding": min(embedding, step),
        "dense": max(step - embedding, 0.0),
        "input": given,
    }
    return {f"time_share_{name}": value / (step + given) for name, value in seconds.items()}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * _PAGE_BYTES


if __name__ == "__main__":
    main()
