"""One training run: rows in, metrics and a checkpoint out; many may follow in one process.

May import: torch, torchrec.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from qarm_feast.errors import ConfigError
from torchrec_models.batch import BatchBuilder, RankingBatch
from torchrec_models.checkpoint import CheckpointManifest, save_checkpoint
from torchrec_models.config import RankerConfig, TaskConfig, resolve_tasks
from torchrec_models.dataset import RowDataset
from torchrec_models.early_stopping import EarlyStopping
from torchrec_models.inputs import TrainInputs
from torchrec_models.losses import build_content_id_loss
from torchrec_models.metrics import Predictions, defined_metrics, ranking_metrics
from torchrec_models.ranker import RankerTrainTask, StepOutput, build_ranker
from torchrec_models.row_store import code_sizes
from torchrec_models.sharding import Ranks, ShardedRanker, current_ranks, shard_ranker, start_tables
from torchrec_models.slices import item_slices
from torchrec_models.snapshot import ItemSnapshot
from torchrec_models.tables import (
    centroid_start,
    code_tables,
    ranker_tables,
    sequence_tables,
    sparse_feature_names,
)

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class TrainResult:
    """What a run reached; metrics (test rows) have the keys of ``ranking_metrics``.

    With early stopping, weights and metrics are those of the best evaluation; ``num_steps`` counts
    the steps after it, too. ``test_predictions`` are equal on all ranks, and in the same order for
    every run on the same rows and number of ranks.
    """

    metrics: dict[str, float]
    valid_metrics: dict[str, float]
    test_predictions: Predictions
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
    progress = run.fit()
    checkpoint = run.save(progress.num_steps) if enable_checkpoint else None
    predictions = run.predict("test")
    return TrainResult(
        metrics=ranking_metrics(predictions, run.task_names),
        valid_metrics=run.valid_metrics,
        test_predictions=predictions,
        checkpoint=checkpoint,
        num_steps=progress.num_steps,
        samples_per_second=progress.samples_per_second,
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
    stopping: EarlyStopping
    slices_V: torch.Tensor
    valid_metrics: dict[str, float] = field(default_factory=dict)
    """Of the latest evaluation; after :meth:`fit`, of the weights that it leaves."""

    @staticmethod
    def create(config: RankerConfig, inputs: TrainInputs) -> "_Run":
        ranks = current_ranks()
        # Each rank draws the first weights of its own table rows; dense ones are broadcast.
        torch.manual_seed(config.seed * 1_000_003 + ranks.rank)
        store = inputs.store
        tasks = resolve_tasks(config, store.manifest.label_names)
        vocabularies, sizes = store.vocabularies(), code_sizes(store.manifest)
        ranker = build_ranker(config, tasks, vocabularies, sizes, torch.device("meta"))
        weights = [task.weight for task in tasks]
        task = RankerTrainTask(ranker, weights, build_content_id_loss(config))
        sharded = shard_ranker(task, config)
        _start_code_tables(sharded, config, inputs)
        snapshot = ItemSnapshot(store.snapshot_folder, config.vector_source)
        builder = BatchBuilder(
            config=config,
            vocabularies=vocabularies,
            feature_names=sparse_feature_names(ranker_tables(sizes, vocabularies, config)),
            code_lookup=snapshot,
            vector_lookup=snapshot,
            side_tables=store.side_tables(),
            label_names=tuple(task.label_name for task in tasks),
            level_sizes=sizes.level_sizes,
        )
        return _Run(
            config=config,
            inputs=inputs,
            tasks=tasks,
            snapshot=snapshot,
            builder=builder,
            sharded=sharded,
            ranks=ranks,
            stopping=EarlyStopping(config, sharded.model),
            slices_V=torch.from_numpy(item_slices(store)),
        )

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in the order of the logits."""
        return [task.name for task in self.tasks]

    def fit(self) -> "_Progress":
        """Train until the last epoch or until early stopping ends it; leave the best weights."""
        dataset = self._dataset("train")
        progress = _Progress(dataset.num_batches() * self.config.num_epochs, self.ranks)
        self.sharded.model.train()
        pipeline = self._pipeline()
        for epoch in range(self.config.num_epochs):
            batches = dataset.train_batches(
                seed=self.config.seed, epoch=epoch, window_rows=self.config.shuffle_window_rows
            )
            self._fit_epoch(pipeline, batches, progress)
            if self.stopping.is_exhausted:
                break
        if self.stopping.best_weights:
            self.stopping.restore_best()
            self.valid_metrics = self.stopping.state.best_metrics
        if not self.valid_metrics:
            self.valid_metrics = self.evaluate("valid")
        return progress

    def _fit_epoch(
        self,
        pipeline: TrainPipelineSparseDist[RankingBatch, StepOutput],
        batches: Iterator[RankingBatch],
        progress: "_Progress",
    ) -> None:
        for logits_BT, labels_BT in _steps(pipeline, batches):
            progress.add_step(logits_BT, labels_BT)
            if progress.num_steps % self.config.eval_every_steps == 0:
                # Evaluation calls the model itself; batches in flight stay in the pipeline.
                pipeline.detach()
                self._judge(progress)
                if self.stopping.is_exhausted:
                    return
        pipeline.detach()
        if progress.num_steps % self.config.eval_every_steps:
            self._judge(progress)

    def _judge(self, progress: "_Progress") -> None:
        self.valid_metrics = self.evaluate("valid")
        self.stopping.judge(self.valid_metrics, progress.num_steps)
        progress.forget_pause()
        if self.ranks.is_first:
            shown = " ".join(
                f"{key}={self.valid_metrics[key]:.4f}"
                for name in self.task_names
                for key in (f"auc/{name}", f"gauc/{name}", f"ne/{name}", f"cold_auc/{name}")
            )
            logger.info("evaluated split=valid step=%d %s", progress.num_steps, shown)

    def evaluate(self, split: str) -> dict[str, float]:
        """Return the metrics of a split's rows over all ranks."""
        return ranking_metrics(self.predict(split), self.task_names)

    def predict(self, split: str) -> Predictions:
        """Return the predictions for a split's rows of all ranks, on every rank."""
        model = self.sharded.model
        model.eval()
        dataset = self._dataset(split)
        parts = []
        with torch.no_grad():
            for batch in dataset.eval_batches():
                _, (logits_BT, labels_BT) = model(batch)
                slices_B = self.slices_V[batch.item_rows]
                parts.append(Predictions(logits_BT, labels_BT, batch.user_ids, slices_B))
        model.train()
        return Predictions.concatenate(parts).first(dataset.num_own_rows()).gathered()

    def save(self, num_steps: int) -> Path:
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
            metrics=defined_metrics(self.valid_metrics),
        )
        return save_checkpoint(
            self.config.checkpoint_dir,
            self.sharded.model,
            manifest,
            self.builder.vocabularies,
            self.inputs.store.side_tables().for_serving(),
        )

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
    sizes = code_sizes(inputs.store.manifest)
    tables = [*code_tables(sizes, config), *sequence_tables(sizes, config)]
    if not config.enable_centroid_start or not tables:
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
        self._rows_since_log = self._num_rows = 0

    @property
    def samples_per_second(self) -> float:
        """Rows of all ranks per second of training, evaluations left out; 0 before a step."""
        return self._num_rows / self.train_seconds if self._num_rows else 0.0

    def add_step(self, logits_BT: torch.Tensor, labels_BT: torch.Tensor) -> None:
        """Count one step; on the first rank, log it when the last line is old enough."""
        now = time.monotonic()
        self.num_steps += 1
        self.train_seconds += now - self._marked
        self._marked = now
        num_rows = len(labels_BT) * self._ranks.world_size
        self._rows_since_log += num_rows
        self._num_rows += num_rows
        if not self._ranks.is_first or now - self._logged < _PROGRESS_SECONDS:
            return
        is_labelled_BT = ~labels_BT.isnan()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits_BT[is_labelled_BT], labels_BT[is_labelled_BT]
        )
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
