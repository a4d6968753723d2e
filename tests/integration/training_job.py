"""What the tests of the training job run by torchrun: `training_job.py ACTION ROWS OUT`."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.elastic.multiprocessing.errors import record

from torchrec_models.checkpoint import Checkpoint
from torchrec_models.config import RankerConfig
from torchrec_models.inputs import TrainInputs
from torchrec_models.interruption import StopRequest, TrainingInterruptedError
from torchrec_models.label_maps import LabelMap
from torchrec_models.metrics import Predictions
from torchrec_models.row_store import RowStore
from torchrec_models.sharding import Ranks, process_group
from torchrec_models.training import train
from torchrec_models.warm_start import WarmStart

SERVICE = "ranker_v1"


def config_of(folder: Path, **keys: object) -> RankerConfig:
    small = {
        "checkpoint_dir": str(folder),
        "enable_centroid_start": False,
        "batch_size": 64,
        "embedding_dim": 8,
        "num_epochs": 2,
        "early_stopping_patience": 9,
    }
    return RankerConfig.model_validate(small | keys)


def resume(inputs: TrainInputs, out: Path, ranks: Ranks) -> None:
    """One rank of two is asked to stop; the run that goes on equals one that was never asked."""
    whole = train(config_of(out / "whole"), inputs)
    stop = StopRequest()
    if ranks.rank == 1:
        stop.ask(signal.SIGTERM)
    config = config_of(out / "parts")
    with pytest.raises(TrainingInterruptedError) as info:
        train(config, inputs, stop=stop)
    assert info.value.exit_code == 128 + signal.SIGTERM
    assert Checkpoint.to_resume(config.checkpoint_dir, SERVICE).manifest.step == 8
    resumed = train(config, inputs, resume=True)

    assert resumed.num_steps == whole.num_steps == 26
    assert resumed.valid_metrics == whole.valid_metrics
    found, expected = resumed.test_predictions.logits_NT, whole.test_predictions.logits_NT
    assert found.equal(expected), (found - expected).abs().max()
    _write_scores(resumed.test_predictions, out, ranks)


def take_over(inputs: TrainInputs, out: Path, ranks: Ranks) -> None:
    """Load what other ranks saved, save it from these, and score."""
    older = Checkpoint.at(Path((out / "newest").read_text()))
    sizes = older.manifest.sizes
    labels = LabelMap.same_numbers(sizes.level_sizes, sizes.pool_size)
    config = config_of(out / f"ranks-{ranks.world_size}", num_epochs=0)
    result = train(config, inputs, warm_start=WarmStart(older, labels))
    _write_scores(result.test_predictions, out, ranks)
    if ranks.is_first:
        (out / "newest").write_text(str(result.checkpoint))


def fail(inputs: TrainInputs, out: Path, ranks: Ranks) -> None:
    """Let one rank fail in the middle of its steps, while the other waits for it."""

    class Failing(StopRequest):
        def agreed_signal(self) -> int:
            if ranks.rank == 1:
                raise RuntimeError("planted in the second rank")
            return super().agreed_signal()

    train(config_of(out / "failed"), inputs, stop=Failing())


def _write_scores(predictions: Predictions, out: Path, ranks: Ranks) -> None:
    """Write the scores in the order of the file: each rank had every w-th row of its one group."""
    logits_NT = predictions.logits_NT.numpy()
    places = np.concatenate(
        [np.arange(rank, len(logits_NT), ranks.world_size) for rank in range(ranks.world_size)]
    )
    ordered_NT = np.empty_like(logits_NT)
    ordered_NT[places] = logits_NT
    if ranks.is_first:
        np.save(out / f"scores-{ranks.world_size}.npy", ordered_NT)


@record
def main() -> None:
    action, rows, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    actions = {"resume": resume, "take_over": take_over, "fail": fail}
    inputs = TrainInputs(store=RowStore(rows, SERVICE), codebook=None)
    with process_group() as ranks:
        actions[action](inputs, out, ranks)


if __name__ == "__main__":
    main()
