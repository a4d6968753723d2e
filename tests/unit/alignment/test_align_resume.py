import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_training import NUM_ITEMS, SMALL, made_features, made_pairs
from torch import Tensor

from qarm_feast.alignment.features import features_of_vectors
from qarm_feast.alignment.fitting import RunFiles, TrainingRun
from qarm_feast.alignment.train import train_head
from qarm_feast.alignment.training_state import TrainingFile, TrainingState

LONG = SMALL.model_copy(update={"num_epochs": 5, "patience": 5, "learn_temperature": True})


class KilledError(Exception):
    """Stands for the signal that ends a process."""


def run(folder: Path | None, **changed: object) -> tuple[dict[str, Tensor], TrainingRun]:
    files = None if folder is None else RunFiles(folder / "states", folder / "logs")
    config = LONG.model_copy(update=changed)
    head, figures = train_head(features_of_vectors(made_features()), made_pairs(), config, files)
    return head.state_dict(), figures


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the run die when it saves its epoch: before that or after."""

    def arm(num_saved: int, *, is_saved: bool) -> None:
        write, calls = TrainingFile.write, []

        def dies(file: TrainingFile, state: TrainingState) -> None:
            calls.append(state.progress.epoch)
            if len(calls) != num_saved or is_saved:
                write(file, state)
            if len(calls) == num_saved:
                monkeypatch.setattr(TrainingFile, "write", write)
                raise KilledError

        monkeypatch.setattr(TrainingFile, "write", dies)

    return arm


@pytest.mark.parametrize("is_saved", [True, False])
@pytest.mark.parametrize("num_saved", [1, 3])
def test_a_killed_run_goes_on_to_the_bits_of_one_that_was_not(
    num_saved: int, is_saved: bool, kill_at: Callable[..., None], tmp_path: Path
) -> None:
    expected, figures = run(None)

    kill_at(num_saved, is_saved=is_saved)
    with pytest.raises(KilledError):
        run(tmp_path)
    weights, resumed = run(tmp_path)

    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert resumed.valid_losses == figures.valid_losses
    assert resumed.temperature == figures.temperature


def test_a_run_that_chooses_a_weight_keeps_the_finished_ones(
    kill_at: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    auto = {"geometry_weight": "auto", "num_epochs": 2}
    expected, _ = run(None, **auto)

    kill_at(5, is_saved=True)
    with pytest.raises(KilledError):
        run(tmp_path, **auto)
    with caplog.at_level("INFO", logger="qarm_feast"):
        weights, _ = run(tmp_path, **auto)

    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    # Two finished weights, and the third after its first epoch.
    assert caplog.text.count("alignment_resumed epoch=2") == 2
    assert caplog.text.count("alignment_resumed epoch=1") == 1


def test_a_state_of_other_settings_is_left_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path)
    expected, _ = run(None, seed=3)

    with caplog.at_level("WARNING", logger="qarm_feast"):
        weights, _ = run(tmp_path, seed=3)

    assert "alignment_started_anew" in caplog.text
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_state_of_items_with_other_ids_is_left_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = features_of_vectors(made_features())
    files = RunFiles(tmp_path / "states", tmp_path / "logs")

    # The same rows, but other items among them are held out.
    for first_id in (0, 1000):
        item_ids_M = np.arange(first_id, first_id + NUM_ITEMS)
        train_head(features, replace(made_pairs(), item_ids_M=item_ids_M), LONG, files)

    assert "alignment_started_anew" in caplog.text


def test_each_epoch_leaves_its_numbers(tmp_path: Path) -> None:
    _, figures = run(tmp_path)

    folder = tmp_path / "logs/head_weight_10"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [round(line["eval/pair_loss"], 5) for line in lines] == figures.valid_losses[1:]
    assert lines[-1].keys() == {"step", "train/epoch_loss", "eval/pair_loss", "train/temperature"}
    assert list(folder.glob("events.out.tfevents.*"))
