import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qarm_feast.errors import DataError
from qarm_feast.metrics_log import FileMetricsLog
from torchrec_models.checkpoint import Checkpoint
from torchrec_models.config import RankerConfig
from torchrec_models.inputs import TrainInputs
from torchrec_models.interruption import StopRequest, TrainingInterruptedError, stop_on_signals
from torchrec_models.sharding import Ranks
from torchrec_models.training import TrainResult, train


def _config(folder: Path, **keys: object) -> RankerConfig:
    """Eleven steps per pass, evaluated after the fourth, the eighth and the last."""
    small = {
        "checkpoint_dir": str(folder),
        "batch_size": 150,
        "shuffle_window_rows": 400,
        "embedding_dim": 8,
        "num_epochs": 2,
        "warmup_steps": 9,
        "max_gradient_norm": 1.0,
        "eval_every_steps": 4,
        "early_stopping_patience": 20,
    }
    return RankerConfig.model_validate(small | keys)


def _assert_same(result: TrainResult, expected: TrainResult) -> None:
    assert result.num_steps == expected.num_steps
    assert result.valid_metrics == expected.valid_metrics
    assert torch.equal(result.test_predictions.logits_NT, expected.test_predictions.logits_NT)


def _asked() -> StopRequest:
    stop = StopRequest()
    stop.ask(signal.SIGTERM)
    return stop


@pytest.mark.parametrize("decay", [0.0, 0.9], ids=["last weights", "averages"])
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(
    inputs: TrainInputs, ranks: Ranks, tmp_path: Path, decay: float
) -> None:
    expected = train(_config(tmp_path / "whole", dense_average_decay=decay), inputs)
    config = _config(tmp_path / "parts", dense_average_decay=decay)

    # Asked before the start: the ranks first look after eight of eleven steps.
    with pytest.raises(
        TrainingInterruptedError, match=r"SIGTERM after step 8: saved .*step-"
    ) as info:
        train(config, inputs, stop=_asked())
    folder = Checkpoint.to_resume(config.checkpoint_dir, "ranker_v1").folder
    result = train(config, inputs, resume=True)

    assert info.value.exit_code == 143
    _assert_same(result, expected)
    assert Checkpoint(config.checkpoint_dir, "ranker_v1").folder == result.checkpoint
    assert not folder.exists()
    with pytest.raises(DataError, match="holds no unfinished run to resume"):
        train(config, inputs, resume=True)
    lines = [
        json.loads(line)
        for path in (tmp_path / "parts").glob("ranker_v1/logs/*/metrics.jsonl")
        for line in path.read_text().splitlines()
    ]
    evaluations = [line for line in lines if "eval/auc/like" in line]
    assert [line["step"] for line in evaluations] == [4, 8, 11, 15, 19, 22]
    assert 0 < evaluations[-1]["eval/auc/like"] < 1


@pytest.mark.parametrize(
    ("every_steps", "saved_step"), [(5, 10), (11, 11)], ids=["in a pass", "at the end of a pass"]
)
def test_a_run_that_dies_goes_on_from_its_last_checkpoint(
    inputs: TrainInputs,
    ranks: Ranks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every_steps: int,
    saved_step: int,
) -> None:
    # Without early stopping, with averaged weights, and with batches built by several threads.
    keys: dict[str, object] = {"early_stopping_patience": 0, "num_input_threads": 2}
    keys |= {"checkpoint_every_steps": every_steps, "dense_average_decay": 0.9}
    expected = train(_config(tmp_path / "whole", **keys), inputs)
    config = _config(tmp_path / "parts", **keys)

    with monkeypatch.context() as patch:
        dies = _dying_after(12)
        patch.setattr(FileMetricsLog, "add", dies)
        with pytest.raises(OSError, match="the disk is full"):
            train(config, inputs)
    saved = Checkpoint.to_resume(config.checkpoint_dir, "ranker_v1").manifest
    result = train(config, inputs, resume=True)

    assert saved.step == saved_step
    _assert_same(result, expected)


def _dying_after(last_step: int) -> Callable[[FileMetricsLog, int, object], None]:
    def add(_: FileMetricsLog, step: int, values: object) -> None:
        if step >= last_step:
            raise OSError("the disk is full")

    return add


def test_another_run_is_not_resumed(inputs: TrainInputs, ranks: Ranks, tmp_path: Path) -> None:
    config = _config(tmp_path)
    with pytest.raises(TrainingInterruptedError):
        train(config, inputs, stop=_asked())

    with pytest.raises(DataError, match=r"ranker\.seed was 0, is 1; set them back"):
        train(config.model_copy(update={"seed": 1}), inputs, resume=True)


def test_a_signal_only_asks_and_its_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)

    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        asked = stop._own_signal  # what agreed_signal tells the other ranks

    assert asked == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
