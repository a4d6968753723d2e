"""What the tests of the training job run by torchrun: `training_job.py ACTION ROWS OUT`."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
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


FEATURES = (*RankerConfig().features, "attention", "prefix")
# Of eight codes, the first three have moved by one place and the last one is new.
LEVEL = np.array([1, 2, 0, 3, 4, 5, 6, -1])


def config_of(folder: Path, **keys: object) -> RankerConfig:
    small = {
        "features": FEATURES,
        "checkpoint_dir": str(folder),
        "enable_centroid_start": False,
        "batch_size": 64,
        "embedding_dim": 8,
        "num_epochs": 2,
        # In the middle of a pass, with batches in flight.
        "eval_every_steps": 5,
        "checkpoint_every_steps": 7,
        "early_stopping_patience": 9,
        "dense_average_decay": 0.9,
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
    assert resumed.checkpoint is not None
    _start_from_moved_codes(inputs, Checkpoint.at(resumed.checkpoint), out)


def _start_from_moved_codes(inputs: TrainInputs, older: Checkpoint, out: Path) -> None:
    """Start a ranker of two ranks through a map by which codes change the rank that holds them."""
    pool_P = np.arange(older.manifest.sizes.pool_size)
    labels = LabelMap((LEVEL, np.arange(8)), pool_P[::-1].copy())
    config = config_of(out / "moved", num_epochs=0)
    result = train(config, inputs, warm_start=WarmStart(older, labels))
    assert result.checkpoint is not None
    old, new = _tables(older), _tables(Checkpoint.at(result.checkpoint))

    assert old.keys() == new.keys()
    assert {"rq_0.weight", "rq_0.momentum1", "sequence_rq.weight"} < old.keys()
    for name, weights in new.items():
        source = {"rq_0": LEVEL, "vq_code": labels.pool_P}.get(name.partition(".")[0])
        if name.startswith("sequence_rq"):
            source = np.concatenate([LEVEL, np.arange(8, 16)])
        if name.startswith("prefix"):
            # By the codes of each prefix, which its own test follows.
            continue
        places = np.arange(len(weights)) if source is None else source
        goes_on = torch.from_numpy(places != -1)
        assert weights[goes_on].equal(old[name][places[places != -1]]), name
    assert (new["rq_0.momentum1"][7] == 0).all()
    assert not new["rq_0.weight"][7].equal(old["rq_0.weight"][7])


def _tables(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return whole tables and their optimizer's state; on all ranks at once."""
    tables = {}
    for key, shape in checkpoint.shapes().items():
        if key.startswith(("model.", "optimizer.")) and "embedding" in key:
            tensor = torch.zeros(shape)
            checkpoint.read({key: tensor})
            tables[".".join(key.split(".")[-2:])] = tensor
    return tables


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
