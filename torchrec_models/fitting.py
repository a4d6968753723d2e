"""The loop over the train rows: steps, evaluations, early stopping, stop requests, checkpoints.

What is saved after a step is all that the next step depends on, so a run that goes on from there
does what the run would have done. Batches in flight are not saved: they are read again.
Shape letters: B rows, T tasks.
May import: torch, torchrec.
"""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_models.batch import RankingBatch
from torchrec_models.checkpoint import FitState
from torchrec_models.config import RankerConfig
from torchrec_models.dense_average import DenseAverage
from torchrec_models.early_stopping import EarlyStopping
from torchrec_models.interruption import AGREE_EVERY_STEPS, StopRequest
from torchrec_models.metrics import defined_metrics
from torchrec_models.progress import Progress
from torchrec_models.ranker import StepOutput
from torchrec_models.sharding import ShardedRanker, WarmUp

Pipeline: TypeAlias = TrainPipelineSparseDist[RankingBatch, StepOutput]


class FitRun(Protocol):
    """What the loop works on and calls."""

    def train_batches(self, epoch: int, first_batch: int) -> Generator[RankingBatch]:
        """Yield the batches of a pass, the first ones left out."""
        ...

    def evaluate(self, split: str) -> dict[str, float]:
        """Return the metrics of a split."""
        ...

    def save_unfinished(self, state: FitState) -> None:
        """Save all that it takes to go on from a state."""
        ...


@dataclass
class FitLoop:
    """Trains until the last epoch, early stopping or a stop request ends it."""

    config: RankerConfig
    sharded: ShardedRanker
    average: DenseAverage
    stopping: EarlyStopping
    progress: Progress
    run: FitRun
    task_names: list[str]
    stop: StopRequest

    def fit(self, state: FitState) -> tuple[FitState, int]:
        """Train on from a state.

        Args:
            state: Where to start.

        Returns:
            Where it ended, and the number of the signal that ended it, 0 for none.
        """
        self.sharded.model.train()
        pipeline = self._pipeline()
        warm_up = WarmUp(self.sharded.optimizer, self.config.warmup_steps)
        while state.epoch < self.config.num_epochs and not self.stopping.is_exhausted:
            batches = self.run.train_batches(state.epoch, state.batch)
            with closing(batches):
                state, signal_number = self._fit_epoch(pipeline, batches, warm_up, state)
            # Evaluation calls the model itself; a stopped pass leaves batches in the pipeline.
            pipeline.detach()
            if signal_number:
                self.run.save_unfinished(self._whole(state))
                return state, signal_number
            if not _is_due(state.batch, self.config.eval_every_steps):
                state = self._judged(state)
            state = state.model_copy(update={"epoch": state.epoch + 1, "batch": 0})
        return self._whole(state), 0

    def _fit_epoch(
        self,
        pipeline: Pipeline,
        batches: Generator[RankingBatch],
        warm_up: WarmUp,
        state: FitState,
    ) -> tuple[FitState, int]:
        pipeline.reset()
        warm_up.set_rates(state.step)
        for logits_BT, labels_BT in _outputs(pipeline, batches):
            state = state.model_copy(update={"batch": state.batch + 1, "step": state.step + 1})
            self.average.update(state.step)
            self.progress.add_step(state.step, logits_BT, labels_BT)
            if _is_due(state.batch, self.config.eval_every_steps):
                with _paused(pipeline):
                    state = self._judged(state)
                if self.stopping.is_exhausted:
                    break
            if signal_number := self._agreed_signal(state.step):
                return state, signal_number
            if _is_due(state.step, self.config.checkpoint_every_steps):
                with _paused(pipeline):
                    self.run.save_unfinished(self._whole(state))
                self.progress.forget_pause()
            warm_up.set_rates(state.step)
        return state, 0

    def _judged(self, state: FitState) -> FitState:
        with self.average.in_model():
            metrics = defined_metrics(self.run.evaluate("valid"))
            self.stopping.judge(metrics, state.step)
        self.progress.add_evaluation(state.step, metrics, self.task_names)
        return state.model_copy(update={"valid_metrics": metrics})

    def _whole(self, state: FitState) -> FitState:
        return state.model_copy(update={"stopping": self.stopping.state})

    def _agreed_signal(self, step: int) -> int:
        return self.stop.agreed_signal() if _is_due(step, AGREE_EVERY_STEPS) else 0

    def _pipeline(self) -> Pipeline:
        pipeline: Pipeline = TrainPipelineSparseDist(
            self.sharded.model,
            self.sharded.optimizer,
            self.sharded.device,
            custom_model_fwd=self._forward,
        )
        return pipeline

    def _forward(self, batch: RankingBatch) -> StepOutput:
        device_type = self.sharded.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.config.enable_bf16):
            output: StepOutput = self.sharded.model(batch)
        return output


@contextmanager
def _paused(pipeline: Pipeline) -> Iterator[None]:
    """Give the model back between two steps, while the batches in flight stay where they are."""
    pipeline.detach()
    yield
    # Left to itself the pipeline would start the exchange of the next batch's ids a second time
    # and never end it, without which no table of sequences finds its ids.
    pipeline.attach(sparse_dist=False)


def _outputs(
    pipeline: Pipeline, batches: Iterator[RankingBatch]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        try:
            output: tuple[torch.Tensor, torch.Tensor] = pipeline.progress(batches)
        except StopIteration:
            return
        yield output


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step > 0 and step % every == 0
