"""One training run: rows in, metrics and a checkpoint out; many may follow in one process.

May import: torch, torchrec.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from qarm_feast.errors import ConfigError
from torchrec_models.batch import BatchBuilder, RankingBatch
from torchrec_models.checkpoint import CheckpointManifest, save_checkpoint
from torchrec_models.config import RankerConfig, TaskConfig, resolve_tasks
from torchrec_models.dataset import RowDataset
from torchrec_models.inputs import TrainInputs
from torchrec_models.metrics import Predictions, defined_metrics, ranking_metrics
from torchrec_models.ranker import RankerTrainTask, StepOutput, build_ranker
from torchrec_models.row_store import code_sizes
from torchrec_models.sharding import Ranks, ShardedRanker, current_ranks, shard_ranker, start_tables
from torchrec_models.snapshot import ItemSnapshot
from torchrec_models.tables import (
    centroid_start,
    code_tables,
    ranker_tables,
    sparse_feature_names,
)

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class TrainResult:
    """What a run reached; metrics (test rows) have the keys of ``ranking_metrics``."""

    metrics: dict[str, float]
    valid_metrics: dict[str, float]
    checkpoint: Path | None
    num_steps: int
    samples_per_second: float
    seconds: float
    masked_history_share: float


def train(
    config: RankerConfig, inputs: TrainInputs, *, enable_checkpoint: bool = True
) -> TrainResult:
    """Train one ranker on this process group's ranks and evaluate it on the test rows.

    Args:
        config: The ranker section.
        inputs: Rows, and the codebook where code tables start from its centroids.
        enable_checkpoint: Save the trained weights under ``config.checkpoint_dir``.

    Returns:
        The result, the same on every rank but for ``masked_history_share`` (own rows only).
    """
    started = time.monotonic()
    run = _Run.create(config, inputs)
    num_steps, train_seconds = run.fit()
    valid_metrics = run.evaluate("valid")
    checkpoint = run.save(num_steps, valid_metrics) if enable_checkpoint else None
    metrics = run.evaluate("test")
    return TrainResult(
        metrics=metrics,
        valid_metrics=valid_metrics,
        checkpoint=checkpoint,
        num_steps=num_steps,
        samples_per_second=inputs.store.manifest.num_rows["train"]
        * config.num_epochs
        / train_seconds,
        seconds=time.monotonic() - started,
        masked_history_share=run.snapshot.masked_share,
    )


@dataclass
class _Run:
    config: RankerConfig
    inputs: TrainInputs
    tasks: tuple[TaskConfig, ...]
    snapshot: ItemSnapshot
    builder: BatchBuilder
    sharded: ShardedRanker
    ranks: Ranks

    @staticmethod
    def create(config: RankerConfig, inputs: TrainInputs) -> "_Run":
        ranks = current_ranks()
        # Each rank draws the first weights of its own table rows; dense ones are broadcast.
        torch.manual_seed(config.seed * 1_000_003 + ranks.rank)
        store = inputs.store
        tasks = resolve_tasks(config, store.manifest.label_names)
        vocabularies, sizes = store.vocabularies(), code_sizes(store.manifest)
        ranker = build_ranker(config, tasks, vocabularies, sizes, torch.device("meta"))
        task = RankerTrainTask(ranker, [task.weight for task in tasks])
        sharded = shard_ranker(task, config)
        _start_code_tables(sharded, config, inputs)
        snapshot = ItemSnapshot(store.snapshot_folder)
        builder = BatchBuilder(
            config=config,
            vocabularies=vocabularies,
            feature_names=sparse_feature_names(ranker_tables(sizes, vocabularies, config)),
            code_lookup=snapshot,
            vector_lookup=snapshot,
        )
        return _Run(config, inputs, tasks, snapshot, builder, sharded, ranks)

    def fit(self) -> tuple[int, float]:
        """Train for all epochs; return the steps and the seconds spent in them."""
        pipeline = self._pipeline()
        dataset = self._dataset("train")
        progress = _Progress(dataset.num_batches() * self.config.num_epochs, self.ranks)
        self.sharded.model.train()
        for epoch in range(self.config.num_epochs):
            batches = dataset.train_batches(
                seed=self.config.seed, epoch=epoch, window_rows=self.config.shuffle_window_rows
            )
            for logits_BT, labels_BT in _steps(pipeline, batches):
                progress.add_step(logits_BT, labels_BT)
                if progress.num_steps % self.config.eval_every_steps == 0:
                    # Evaluation calls the model itself; batches in flight stay in the pipeline.
                    pipeline.detach()
                    self._log_evaluation(progress)
        pipeline.detach()
        return progress.num_steps, progress.train_seconds

    def evaluate(self, split: str) -> dict[str, float]:
        """Return the metrics of a split's rows over all ranks."""
        model = self.sharded.model
        model.eval()
        dataset = self._dataset(split)
        parts = []
        with torch.no_grad():
            for batch in dataset.eval_batches():
                _, (logits_BT, labels_BT) = model(batch)
                parts.append(Predictions(logits_BT, labels_BT, batch.user_ids, batch.is_cold))
        model.train()
        predictions = Predictions.concatenate(parts).first(dataset.num_own_rows()).gathered()
        return ranking_metrics(predictions, [task.name for task in self.tasks])

    def save(self, num_steps: int, metrics: dict[str, float]) -> Path:
        """Save a checkpoint of all ranks."""
        rows = self.inputs.store.manifest
        manifest = CheckpointManifest(
            service=rows.service,
            codebook_version=rows.codebook_version,
            rows_build=rows.build,
            step=num_steps,
            world_size=self.ranks.world_size,
            config=self.config,
            tasks=self.tasks,
            sizes=code_sizes(rows),
            metrics=defined_metrics(metrics),
        )
        return save_checkpoint(
            self.config.checkpoint_dir, self.sharded.model, manifest, self.builder.vocabularies
        )

    def _log_evaluation(self, progress: "_Progress") -> None:
        metrics = self.evaluate("valid")
        progress.forget_pause()
        if self.ranks.is_first:
            shown = " ".join(f"{key}={value:.4f}" for key, value in sorted(metrics.items()))
            logger.info("evaluated split=valid step=%d %s", progress.num_steps, shown)

    def _pipeline(self) -> TrainPipelineSparseDist[RankingBatch, StepOutput]:
        return TrainPipelineSparseDist(
            self.sharded.model, self.sharded.optimizer, torch.device("cpu")
        )

    def _dataset(self, split: str) -> RowDataset:
        manifest = self.inputs.store.manifest
        return RowDataset(
            path=self.inputs.store.split_path(split),
            label_names=tuple(task.label_name for task in self.tasks),
            user_columns=manifest.user_columns,
            builder=self.builder,
            ranks=self.ranks,
            batch_size=self.config.batch_size,
        )


def _start_code_tables(sharded: ShardedRanker, config: RankerConfig, inputs: TrainInputs) -> None:
    if not config.enable_centroid_start or not code_tables(
        code_sizes(inputs.store.manifest), config
    ):
        return
    if inputs.codebook is None:
        raise ConfigError(
            "ranker.enable_centroid_start needs the codebook's centroids, but none were loaded; "
            "set it to false or pass the codebook"
        )
    weights = centroid_start(inputs.codebook.codebooks, inputs.codebook.pool_vectors_PD, config)
    start_tables(sharded.model, weights)


def _steps(
    pipeline: TrainPipelineSparseDist[RankingBatch, StepOutput], batches: Iterator[RankingBatch]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    pipeline.reset()
    while True:
        try:
            output: tuple[torch.Tensor, torch.Tensor] = pipeline.progress(batches)
        except StopIteration:
            return
        yield output


class _Progress:
    """Counts steps and logs a line every few seconds: samples per second and loss."""

    def __init__(self, num_planned: int, ranks: Ranks) -> None:
        self.num_steps = 0
        self.train_seconds = 0.0
        self._num_planned = num_planned
        self._ranks = ranks
        self._marked = self._logged = time.monotonic()
        self._rows_since_log = 0

    def add_step(self, logits_BT: torch.Tensor, labels_BT: torch.Tensor) -> None:
        """Count one step; on the first rank, log it when the last line is old enough."""
        now = time.monotonic()
        self.num_steps += 1
        self.train_seconds += now - self._marked
        self._marked = now
        self._rows_since_log += len(labels_BT) * self._ranks.world_size
        if not self._ranks.is_first or now - self._logged < _PROGRESS_SECONDS:
            return
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits_BT, labels_BT)
        logger.info(
            "trained step=%d/%d samples_per_second=%.0f loss=%.4f",
            self.num_steps,
            self._num_planned,
            self._rows_since_log / (now - self._logged),
            loss,
        )
        self._logged, self._rows_since_log = now, 0

    def forget_pause(self) -> None:
        """Leave the time since the last step out of training time and samples per second."""
        now = time.monotonic()
        self._logged += now - self._marked
        self._marked = now
