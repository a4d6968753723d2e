"""One training run: rows in, metrics and a checkpoint out; many may follow in one process.

May import: torch, torchrec.
"""

import time
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from qarm_feast.errors import ConfigError, DataError
from qarm_feast.metrics_log import FileMetricsLog, MetricsLog, NoMetricsLog
from qarm_feast.schema import SPLITS
from torchrec_models.batch import BatchBuilder, RankingBatch
from torchrec_models.checkpoint import Checkpoint, CheckpointManifest, FitState, save_checkpoint
from torchrec_models.config import RankerConfig, TaskConfig, resolve_tasks
from torchrec_models.dataset import RowDataset
from torchrec_models.dense_average import DenseAverage
from torchrec_models.early_stopping import EarlyStopping
from torchrec_models.fitting import FitLoop
from torchrec_models.inputs import TrainInputs
from torchrec_models.interruption import StopRequest, TrainingInterruptedError
from torchrec_models.losses import build_content_id_loss
from torchrec_models.metrics import Predictions, defined_metrics, ranking_metrics
from torchrec_models.prefixes import prefix_start
from torchrec_models.progress import Progress
from torchrec_models.ranker import RankerTrainTask, build_ranker
from torchrec_models.row_store import code_sizes
from torchrec_models.sharding import Ranks, ShardedRanker, current_ranks, shard_ranker, start_tables
from torchrec_models.slices import item_slices
from torchrec_models.snapshot import ItemSnapshot
from torchrec_models.tables import (
    PREFIX_FEATURE,
    centroid_start,
    code_tables,
    prefix_tables,
    ranker_tables,
    rq_feature,
    sequence_tables,
    sparse_feature_names,
)
from torchrec_models.vocabulary import Vocabularies
from torchrec_models.warm_start import WarmStart, take_over


@dataclass(frozen=True)
class TrainResult:
    """What a run reached; metrics (test rows) have the keys of ``ranking_metrics``.

    ``valid_metrics`` are those that are defined.
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
    config: RankerConfig,
    inputs: TrainInputs,
    *,
    enable_checkpoint: bool = True,
    resume: bool = False,
    warm_start: WarmStart | None = None,
    stop: StopRequest | None = None,
) -> TrainResult:
    """Train one ranker on this process group's ranks and evaluate it on the test rows.

    Args:
        config: The ranker section.
        inputs: Rows, and the codebook where code tables start from its centroids.
        enable_checkpoint: Save the trained weights, and logs, under ``config.checkpoint_dir``.
        resume: Go on with the run that a signal stopped, or that died after a checkpoint.
        warm_start: Older ranker whose weights are taken over first; with ``num_epochs=0`` the
            ranker is evaluated as it was taken over, not retrained. Ignored by a resumed run,
            whose weights hold it.
        stop: Asked while training for whether to stop; None: nobody asks.

    Returns:
        The result, the same on every rank but for ``masked_history_share`` (own rows only).

    Raises:
        TrainingInterruptedError: If a rank was asked to stop; the run is saved before, if
            checkpoints are enabled.
        DataError: If there is no run to resume, or it was another one.
    """
    started = time.monotonic()
    run = _Run.create(config, inputs, enable_checkpoint=enable_checkpoint)
    run.check_rows()
    if warm_start is not None and not resume:
        take_over(run.sharded, warm_start, run.builder.vocabularies)
    fitted = run.fit(run.resumed() if resume else run.fresh(), stop or StopRequest())
    checkpoint = run.save(fitted) if enable_checkpoint else None
    predictions = run.predict("test")
    return TrainResult(
        metrics=ranking_metrics(predictions, run.task_names),
        valid_metrics=fitted.valid_metrics,
        test_predictions=predictions,
        checkpoint=checkpoint,
        num_steps=fitted.step,
        samples_per_second=run.samples_per_second,
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
    average: DenseAverage
    stopping: EarlyStopping
    slices_V: torch.Tensor
    enable_checkpoint: bool
    samples_per_second: float = 0.0
    held_batches: list[RankingBatch] = field(default_factory=list)
    """Batches of the valid rows, once they were built, where they are few."""
    resumable: Path | None = None
    """Newest checkpoint from which this run could go on."""

    @staticmethod
    def create(config: RankerConfig, inputs: TrainInputs, *, enable_checkpoint: bool) -> "_Run":
        ranks = current_ranks()
        # Each rank draws the first weights of its own table rows; dense ones are broadcast.
        torch.manual_seed(config.seed * 1_000_003 + ranks.rank)
        store = inputs.store
        tasks = resolve_tasks(config, store.manifest.label_names)
        vocabularies, sizes = store.run_vocabularies(config), code_sizes(store.manifest)
        ranker = build_ranker(config, tasks, vocabularies, sizes, torch.device("meta"))
        weights = [task.weight for task in tasks]
        content_id_loss = build_content_id_loss(config, sizes)
        task = RankerTrainTask(ranker, weights, content_id_loss, config.embedding_dropout)
        sharded = shard_ranker(task, config)
        _start_code_tables(sharded, config, inputs, vocabularies)
        snapshot = ItemSnapshot(store.snapshot_folder, config.vector_source)
        builder = BatchBuilder(
            config=config,
            vocabularies=vocabularies,
            feature_names=sparse_feature_names(ranker_tables(sizes, vocabularies, config)),
            code_lookup=snapshot,
            vector_lookup=snapshot,
            aligned_lookup=snapshot.with_source("aligned"),
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
            average=DenseAverage(sharded.model, config.dense_average_decay),
            stopping=EarlyStopping(config, sharded.model),
            slices_V=torch.from_numpy(item_slices(store, vocabularies.item_ids)),
            enable_checkpoint=enable_checkpoint,
        )

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in the order of the logits."""
        return [task.name for task in self.tasks]

    def check_rows(self) -> None:
        """Refuse a split without rows now, not when training has come to evaluate on it."""
        for split in SPLITS:
            self._dataset(split).num_rows()

    def fresh(self) -> FitState:
        """Return the state of a run that has not begun."""
        return FitState(run_name=f"run-{datetime.now(UTC):%Y%m%dT%H%M%S%f}")

    def resumed(self) -> FitState:
        """Load what an unfinished run saved and return how far it was."""
        service = self.inputs.store.manifest.service
        checkpoint = Checkpoint.to_resume(self.config.checkpoint_dir, service)
        state = checkpoint.manifest.unfinished
        assert state is not None, "the pointer names unfinished runs only"
        _check_same_run(checkpoint, self._manifest(state))
        self.stopping.go_on(state.stopping)
        tensors = self._tensors(with_rank_state=True)
        checkpoint.read(tensors)
        self.sharded.model.load_state_dict(tensors["model"])
        torch.set_rng_state(tensors[self._rank_key]["rng"])
        return state

    def fit(self, state: FitState, stop: StopRequest) -> FitState:
        """Train on until the run ends; leave the best weights and return their metrics."""
        with closing(self._metrics_log(state)) as log:
            progress = Progress(
                num_planned=self._dataset("train").num_batches() * self.config.num_epochs,
                world_size=self.ranks.world_size,
                log=log,
                is_first=self.ranks.is_first,
            )
            loop = FitLoop(
                config=self.config,
                sharded=self.sharded,
                average=self.average,
                stopping=self.stopping,
                progress=progress,
                run=self,
                task_names=self.task_names,
                stop=stop,
            )
            state, signal_number = loop.fit(state)
        if signal_number:
            raise TrainingInterruptedError(signal_number, self.resumable, state.step)
        self.samples_per_second = progress.samples_per_second
        if self.stopping.best_weights:
            self.stopping.restore_best()
        elif state.step:
            self.average.exchange()
        metrics = state.stopping.best_metrics or state.valid_metrics
        metrics = metrics or defined_metrics(self.evaluate("valid"))
        return state.model_copy(update={"valid_metrics": metrics})

    def train_batches(self, epoch: int, first_batch: int) -> Generator[RankingBatch]:
        """Yield the batches of a pass, the first ones left out."""
        return self._dataset("train").train_batches(
            seed=self.config.seed,
            epoch=epoch,
            window_rows=self.config.shuffle_window_rows,
            first_batch=first_batch,
        )

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
            for batch in self._eval_batches(split):
                _, (logits_BT, labels_BT) = model(batch.to(self.sharded.device))
                slices_B = self.slices_V[batch.item_rows]
                parts.append(Predictions(logits_BT, labels_BT, batch.user_ids, slices_B))
        model.train()
        return Predictions.concatenate(parts).first(dataset.num_own_rows()).gathered()

    def _eval_batches(self, split: str) -> Iterable[RankingBatch]:
        dataset = self._dataset(split)
        if split != "valid" or dataset.num_own_rows() > self.config.held_eval_rows:
            return dataset.eval_batches()
        self.held_batches = self.held_batches or list(dataset.eval_batches())
        return self.held_batches

    def save(self, state: FitState) -> Path:
        """Save the finished run from all ranks."""
        manifest = self._manifest(state).model_copy(update={"unfinished": None})
        return self._save(self._tensors(with_rank_state=False), manifest)

    def save_unfinished(self, state: FitState) -> None:
        """Save from all ranks what it takes to go on, if checkpoints are enabled."""
        if self.enable_checkpoint:
            tensors = self._tensors(with_rank_state=True)
            self.resumable = self._save(tensors, self._manifest(state))

    def _save(self, tensors: dict[str, Any], manifest: CheckpointManifest) -> Path:
        return save_checkpoint(
            self.config.checkpoint_dir,
            tensors,
            manifest,
            self.builder.vocabularies,
            self.inputs.store.side_tables().for_serving(),
        )

    def _tensors(self, *, with_rank_state: bool) -> dict[str, Any]:
        tensors = {
            "model": self.sharded.model.state_dict(),
            "optimizer": self.sharded.optimizer.state_dict()["state"],
        }
        if with_rank_state:
            tensors[self._rank_key] = {
                "rng": torch.get_rng_state(),
                "best": self.stopping.best_weights,
                "average": self.average.averages,
            }
        return tensors

    def _manifest(self, state: FitState) -> CheckpointManifest:
        rows = self.inputs.store.manifest
        return CheckpointManifest(
            service=rows.service,
            codebook_version=rows.codebook_version,
            rows_build=rows.build,
            step=state.step,
            world_size=self.ranks.world_size,
            config=self.config,
            tasks=self.tasks,
            sizes=code_sizes(rows),
            metrics=state.valid_metrics,
            unfinished=state,
        )

    def _metrics_log(self, state: FitState) -> MetricsLog:
        if not (self.enable_checkpoint and self.ranks.is_first):
            return NoMetricsLog()
        service = self.inputs.store.manifest.service
        return FileMetricsLog(Path(self.config.checkpoint_dir) / service / "logs" / state.run_name)

    @property
    def _rank_key(self) -> str:
        """Under which a checkpoint holds what is of this rank only."""
        return f"rank_{self.ranks.rank}"

    def _dataset(self, split: str) -> RowDataset:
        manifest = self.inputs.store.manifest
        return RowDataset(
            path=self.inputs.store.split_path(split),
            label_names=tuple(task.label_name for task in self.tasks),
            user_columns=manifest.user_columns,
            builder=self.builder,
            ranks=self.ranks,
            batch_size=self.config.batch_size,
            num_workers=self.config.num_input_threads,
        )


def _start_code_tables(
    sharded: ShardedRanker, config: RankerConfig, inputs: TrainInputs, vocabularies: Vocabularies
) -> None:
    sizes = code_sizes(inputs.store.manifest)
    prefixes = prefix_tables(vocabularies, config)
    tables = [*code_tables(sizes, config), *sequence_tables(sizes, config), *prefixes]
    if not config.enable_centroid_start or not tables:
        return
    if inputs.codebook is None:
        raise ConfigError(
            "ranker.enable_centroid_start needs the codebook's centroids, but none were loaded; "
            "set it to false or pass the codebook"
        )
    weights = dict(
        centroid_start(inputs.codebook.codebooks, inputs.codebook.pool_vectors_PD, config)
    )
    if prefixes and vocabularies.prefixes is not None:
        levels = [weights[rq_feature(level)] for level in range(len(sizes.level_sizes))]
        decoded_RE = prefix_start(vocabularies.prefixes, levels)
        # Hashed prefixes share rows: no vector is theirs alone, so they keep their random start.
        weights |= {} if decoded_RE is None else {PREFIX_FEATURE: decoded_RE}
    start_tables(sharded.model, weights)


def _check_same_run(checkpoint: Checkpoint, wanted: CheckpointManifest) -> None:
    saved = checkpoint.manifest
    then, now = (_run_facts(manifest) for manifest in (saved, wanted))
    changed = {key: (then.get(key), now.get(key)) for key in then | now}
    changed = {key: pair for key, pair in changed.items() if pair[0] != pair[1]}
    if changed:
        shown = ", ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise DataError(
            f"{checkpoint.folder} cannot be resumed: {shown}; set them back, or train without "
            "--resume"
        )


def _run_facts(manifest: CheckpointManifest) -> dict[str, Any]:
    """Return what must not change in the middle of a run, by name."""
    facts = {"ranks": manifest.world_size, "rows build": manifest.rows_build}
    config = manifest.config.model_dump(exclude={"checkpoint_dir", "rows_uri", "keep_checkpoints"})
    return facts | {f"ranker.{key}": value for key, value in config.items()}
