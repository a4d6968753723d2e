import os
import signal
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from synthetic import write_synthetic_rows
from test_dataset import make_dataset

from qarm_feast.errors import CodebookMismatchError, ConfigError, DataError
from torchrec_models import checkpoint as checkpoint_module
from torchrec_models.checkpoint import Checkpoint
from torchrec_models.config import RankerConfig
from torchrec_models.inputs import TrainInputs
from torchrec_models.interruption import StopRequest, TrainingInterruptedError
from torchrec_models.metrics import Predictions, defined_metrics, ranking_metrics
from torchrec_models.ranker import RankerTrainTask, build_ranker
from torchrec_models.row_store import RowStore
from torchrec_models.sharding import Ranks
from torchrec_models.slices import item_slices
from torchrec_models.training import train


def _config(folder: Path, **keys: object) -> RankerConfig:
    small = {
        "checkpoint_dir": str(folder),
        "batch_size": 200,
        "embedding_dim": 8,
        "num_epochs": 3,
        "id_dropout": 0.2,
    }
    return RankerConfig.model_validate(small | keys)


def test_a_saved_run_scores_alike_when_loaded_into_an_unsharded_model(
    inputs: TrainInputs, ranks: Ranks, tmp_path: Path
) -> None:
    # HoME's running statistics are state that is no parameter; a chain decides which rows count.
    like, love = ({"name": name, "label_name": f"is_{name}"} for name in ("like", "love"))
    config = _config(
        tmp_path, head="home", expert_layer_sizes=(16,), tasks=[like, love | {"after": "like"}]
    )
    result = train(config, inputs)
    checkpoint = Checkpoint(str(tmp_path), "ranker_v1")
    manifest = checkpoint.manifest

    ranker = build_ranker(
        manifest.config,
        manifest.tasks,
        checkpoint.vocabularies(),
        manifest.sizes,
        torch.device("cpu"),
    )
    task = RankerTrainTask(ranker, [1.0, 1.0]).eval()
    checkpoint.load_into(task)
    slices_V = torch.from_numpy(item_slices(inputs.store, checkpoint.vocabularies().item_ids))
    batches = list(make_dataset(inputs, "test", config, ranks).eval_batches())
    with torch.no_grad():
        parts = [
            Predictions(*task(batch)[1], batch.user_ids, slices_V[batch.item_rows])
            for batch in batches
        ]
    metrics = ranking_metrics(Predictions.concatenate(parts), ["like", "love"])

    assert result.checkpoint == checkpoint.folder
    assert manifest.codebook_version == "v1"
    assert manifest.step == result.num_steps == 3 * 8
    assert metrics == pytest.approx(result.metrics, abs=1e-5, nan_ok=True)
    assert metrics["auc/like"] > 0.8


def test_a_checkpoint_that_lacks_weights_of_a_ranker_is_refused_by_name(
    inputs: TrainInputs, ranks: Ranks, tmp_path: Path
) -> None:
    train(_config(tmp_path, head="shared_bottom", num_epochs=1), inputs)
    checkpoint = Checkpoint(str(tmp_path), "ranker_v1")
    manifest = checkpoint.manifest
    config = manifest.config.model_copy(update={"head": "mmoe"})
    other = build_ranker(
        config, manifest.tasks, checkpoint.vocabularies(), manifest.sizes, torch.device("cpu")
    )

    with pytest.raises(DataError, match=r"has no model\.ranker\.head\.level.* train a checkpoint"):
        checkpoint.load_into(RankerTrainTask(other, [1.0, 1.0]))


def test_two_runs_of_one_seed_are_equal_and_another_seed_is_not(
    inputs: TrainInputs, ranks: Ranks, tmp_path: Path
) -> None:
    results = [
        train(_config(tmp_path, num_epochs=1, seed=seed), inputs, enable_checkpoint=False)
        for seed in (3, 3, 4)
    ]

    first, again, other = (defined_metrics(result.metrics) for result in results)
    assert first == again
    assert first != other
    assert results[0].checkpoint is None
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_service_is_refused(
    inputs: TrainInputs, ranks: Ranks, tmp_path: Path
) -> None:
    train(_config(tmp_path, num_epochs=1), inputs)
    os.rename(tmp_path / "ranker_v1", tmp_path / "ranker_v2")

    with pytest.raises(CodebookMismatchError, match="'ranker_v1', but this process loaded"):
        Checkpoint(str(tmp_path), "ranker_v2")


def test_rows_and_a_checkpoint_of_another_form_are_refused_by_name(tmp_path: Path) -> None:
    folders = [tmp_path / "ranker_v1", tmp_path / "ranker_v1" / "step-00000001"]
    for folder in folders:
        folder.mkdir()
        (folder / "manifest.json").write_text('{"service": "ranker_v1"}')

    with pytest.raises(DataError, match=r"another form than .*; run `qarm-rank rows` again: "):
        RowStore(str(tmp_path), "ranker_v1")
    with pytest.raises(DataError, match=r"step-00000001/manifest.json has another form"):
        Checkpoint(str(tmp_path), "ranker_v1", "step-00000001")


def test_without_a_checkpoint_the_error_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="torchrun"):
        Checkpoint(str(tmp_path), "ranker_v1")


def test_a_save_that_dies_before_the_rename_leaves_the_old_checkpoint(
    inputs: TrainInputs, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(_config(tmp_path, num_epochs=1), inputs)
    before = Checkpoint(str(tmp_path), "ranker_v1").manifest

    def die(folder: Path) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(checkpoint_module, "sync_folder", die)
    with pytest.raises(OSError, match="the disk is gone"):
        train(_config(tmp_path, num_epochs=2), inputs)

    assert Checkpoint(str(tmp_path), "ranker_v1").manifest == before


@pytest.mark.parametrize("num_done", [0, 1], ids=["folder", "pointer"])
def test_a_save_that_dies_between_two_renames_leaves_the_old_checkpoint(
    inputs: TrainInputs,
    ranks: Ranks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_done: int,
) -> None:
    """The new run has the same number of steps, so the same name."""
    config = _config(tmp_path, num_epochs=1, keep_checkpoints=1)
    first = train(config, inputs)
    replace, calls = os.replace, iter(range(10))

    def die(source: Path, target: Path) -> None:
        if next(calls) == num_done:
            raise OSError("killed between two renames")
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="killed between"):
        train(config.model_copy(update={"seed": 1}), inputs)
    monkeypatch.setattr(os, "replace", replace)

    old = Checkpoint(str(tmp_path), "ranker_v1")
    again = train(config.model_copy(update={"seed": 2}), inputs)
    new = Checkpoint(str(tmp_path), "ranker_v1")
    assert (old.folder, old.manifest.config.seed) == (first.checkpoint, 0)
    assert (new.folder, new.manifest.config.seed) == (again.checkpoint, 2)
    assert list((tmp_path / "ranker_v1").glob("step-*")) == [new.folder]


def test_a_centroid_start_without_a_codebook_is_refused(
    inputs: TrainInputs, ranks: Ranks, tmp_path: Path
) -> None:
    bare = TrainInputs(store=inputs.store, codebook=None)

    with pytest.raises(ConfigError, match="enable_centroid_start"):
        train(_config(tmp_path), bare, enable_checkpoint=False)

    result = train(
        _config(tmp_path, enable_centroid_start=False, num_epochs=1), bare, enable_checkpoint=False
    )
    assert result.num_steps == 8


def test_the_newest_finished_checkpoints_are_kept_whatever_form_they_have(
    inputs: TrainInputs, ranks: Ranks, tmp_path: Path
) -> None:
    config = _config(tmp_path, num_epochs=0, keep_checkpoints=2)
    foreign = tmp_path / "ranker_v1" / "step-00000007"
    foreign.mkdir(parents=True)
    (foreign / "manifest.json").write_text('{"form": "older"}')
    os.utime(foreign / "manifest.json", (0, 0))

    saved = [train(config, inputs).checkpoint for _ in range(3)]

    assert sorted((tmp_path / "ranker_v1").glob("step-*")) == sorted(saved[1:])
    assert Checkpoint(str(tmp_path), "ranker_v1").folder == saved[2]


def test_the_checkpoint_that_is_named_stays_where_a_dead_run_left_a_newer_one_and_a_half(
    inputs: TrainInputs, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path, num_epochs=1, keep_checkpoints=1)
    named = train(config, inputs).checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_atomically", _die)
        with pytest.raises(OSError, match="killed before the pointer"):
            train(config, inputs)
    (tmp_path / "ranker_v1" / ".step-00000003.tmp").mkdir()

    # An unfinished checkpoint of a third run, which does not become the named one.
    with pytest.raises(TrainingInterruptedError):
        train(config, inputs, stop=_asked())

    assert Checkpoint(str(tmp_path), "ranker_v1").folder == named
    assert not list((tmp_path / "ranker_v1").glob(".step-*"))


def _die(path: Path, text: str) -> None:
    raise OSError("killed before the pointer")


def _asked() -> StopRequest:
    stop = StopRequest()
    stop.ask(signal.SIGTERM)
    return stop


def test_a_split_without_rows_is_refused_before_the_first_step(
    ranks: Ranks, tmp_path: Path
) -> None:
    inputs = write_synthetic_rows(tmp_path / "rows")
    path = inputs.store.split_path("test")
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    config = _config(tmp_path / "checkpoints", num_epochs=1)

    with pytest.raises(DataError, match=r"test\.parquet has 0 rows for 1 ranks"):
        train(config, inputs)

    assert not (tmp_path / "checkpoints").exists()


def test_a_run_leaves_no_thread(inputs: TrainInputs, ranks: Ranks, tmp_path: Path) -> None:
    before = set(threading.enumerate())

    train(_config(tmp_path, num_epochs=1), inputs)

    assert list(tmp_path.glob("ranker_v1/logs/*/events.out.tfevents.*"))
    assert [thread.name for thread in set(threading.enumerate()) - before] == []
