import json
import os
import shutil
import subprocess
import sys
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_score import stored_reader
from torch import nn
from torchrec.modules.embedding_configs import (
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from qarm_feast.errors import CodebookMismatchError, CorruptArtifactError, DataError
from torchrec_models.checkpoint import Checkpoint
from torchrec_models.config import RankerConfig
from torchrec_models.export import Export, export_checkpoint, open_rows
from torchrec_models.inputs import TrainInputs
from torchrec_models.quantized import quantize_tables
from torchrec_models.score import OnlineScorer
from torchrec_models.sharding import process_group
from torchrec_models.training import train

RUN_PROGRAM = """
import sys
import fbgemm_gpu, numpy, torch

program = torch.export.load(sys.argv[1]).module()
batch = numpy.load(sys.argv[2] + "/batch.npz")
logits_BT = program(*(torch.from_numpy(batch[name]) for name in ("values", "lengths", "dense")))
numpy.save(sys.argv[2] + "/logits.npy", logits_BT.numpy())
assert not {"torchrec", "torchrec_models"} & set(sys.modules)
"""
NOW = datetime(2026, 1, 1, tzinfo=UTC)
FEATURES = ("user_id", "item_id", "history_item_id", "rq_code", "vq_code", "cross", "attention")


@pytest.fixture(scope="module")
def checkpoint(inputs: TrainInputs, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    config = RankerConfig(checkpoint_dir=folder, features=FEATURES, num_epochs=1, batch_size=300)
    with process_group():
        train(config, inputs)
    return Checkpoint(folder, "ranker_v1")


@pytest.fixture(scope="module")
def export(
    inputs: TrainInputs, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Export:
    folder = tmp_path_factory.mktemp("exports")
    rows = open_rows(checkpoint, inputs.store, "valid")
    made = export_checkpoint(str(folder), checkpoint, rows, "valid")
    return Export(str(folder), "ranker_v1", made.name)


def rowwise_int8(x_ND: np.ndarray) -> np.ndarray:
    """Eight bits per number, a scale and an offset per row in float16."""
    low_N1 = x_ND.min(axis=1, keepdims=True).astype(np.float16).astype(np.float32)
    scale_N1 = (x_ND.max(axis=1, keepdims=True) - low_N1) / 255
    scale_N1 = scale_N1.astype(np.float16).astype(np.float32)
    return np.clip(np.rint((x_ND - low_N1) / scale_N1), 0, 255) * scale_N1 + low_N1


class BothKinds(nn.Module):
    """Pooled and sequence lookups, one of them in a child."""

    def __init__(self, device: str) -> None:
        super().__init__()
        pooled = EmbeddingBagConfig(
            name="t",
            embedding_dim=8,
            num_embeddings=5,
            feature_names=["f"],
            pooling=PoolingType.MEAN,
        )
        sequence = EmbeddingConfig(name="s", embedding_dim=8, num_embeddings=5, feature_names=["g"])
        self.pooled = EmbeddingBagCollection(tables=[pooled], device=torch.device(device))
        self.child = nn.Sequential(
            EmbeddingCollection(tables=[sequence], device=torch.device(device))
        )

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pooled(features)["f"], self.child(features)["g"].values()


def test_int8_tables_hold_each_row_rounded_to_its_own_255_steps() -> None:
    torch.manual_seed(0)
    model = BothKinds("cpu")
    tables = [
        model.pooled.embedding_bags["t"].weight.detach().numpy().copy(),
        model.child[0].embeddings["s"].weight.detach().numpy().copy(),
    ]
    features = KeyedJaggedTensor(
        ["f", "g"],
        torch.tensor([1, 2, 4, 0, 3]),
        lengths=torch.tensor([2, 1, 0, 2], dtype=torch.int32),
    )

    quantize_tables(model)
    pooled_BE, sequence_NE = model(features)

    rounded = [rowwise_int8(table) for table in tables]
    means = [rounded[0][[1, 2]].mean(axis=0), rounded[0][4]]
    np.testing.assert_allclose(pooled_BE.numpy(), means, atol=1e-6)
    np.testing.assert_allclose(sequence_NE.numpy(), rounded[1][[0, 3]], atol=1e-6)


def test_an_export_scores_online_as_its_checkpoint_within_the_error_it_names(
    inputs: TrainInputs, checkpoint: Checkpoint, export: Export
) -> None:
    reader = stored_reader(inputs)
    error = export.facts.error
    items = list(range(5000, 5060))
    scorers = [OnlineScorer(checkpoint, reader), OnlineScorer(export, reader)]
    differences = []

    for row in reader.rows[:12]:
        before, after = (scorer.score(row["user_id"], items, NOW) for scorer in scorers)
        differences += [np.abs(after[name] - before[name]) for name in ("like", "love")]

    assert error.num_rows == inputs.store.manifest.num_rows["valid"]
    assert 0 < error.mean_score_difference <= error.max_score_difference < 0.02
    assert sorted(error.auc_difference) == ["like", "love"]
    assert 0 < np.mean(differences) < 2 * error.mean_score_difference
    # These are more rows, and other ones, than the manifest's figure was taken over.
    assert np.max(differences) < 4 * error.max_score_difference


def test_an_exported_program_runs_without_this_project_and_holds_no_pickle(
    inputs: TrainInputs, checkpoint: Checkpoint, export: Export, tmp_path: Path
) -> None:
    batch = next(iter(open_rows(checkpoint, inputs.store, "valid").eval_batches()))
    features = batch.sparse_features
    arrays = {
        "values": features.values(),
        "lengths": features.lengths().view(len(features.keys()), -1),
        "dense": batch.dense_features,
    }
    np.savez(tmp_path / "batch.npz", **{name: each.numpy() for name, each in arrays.items()})

    command = [sys.executable, "-c", RUN_PROGRAM, export.folder / "model.pt2", tmp_path]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})

    ran_BT = np.load(tmp_path / "logits.npy")
    expected_BT = export.load_ranker()(features, batch.dense_features).numpy()
    np.testing.assert_array_equal(ran_BT, expected_BT)
    with zipfile.ZipFile(export.folder / "model.pt2") as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    # A pickle of protocol 2 or later, and the archive into which torch.save puts one.
    starts = (b"\x80\x02c", b"\x80\x02}", b"\x80\x04\x95", b"PK\x03\x04")
    assert not [name for name, each in contents.items() if each.startswith(starts)]
    assert not [name for name, each in contents.items() if b'"use_pickle": true' in each]
    (inputs_file,) = (each for name, each in contents.items() if "sample_inputs" in name)
    assert inputs_file == b""


def test_the_error_in_the_manifest_is_that_of_the_loaded_export(
    inputs: TrainInputs, checkpoint: Checkpoint, export: Export
) -> None:
    rankers = [checkpoint.load_ranker(), export.load_ranker()]
    scores = []
    with torch.inference_mode():
        for ranker in rankers:
            batches = open_rows(checkpoint, inputs.store, "valid").eval_batches()
            logits = [ranker(batch.sparse_features, batch.dense_features) for batch in batches]
            scores.append(torch.cat(logits).double().sigmoid())

    differences = (scores[0] - scores[1]).abs()

    assert float(differences.max()) == pytest.approx(export.facts.error.max_score_difference)
    assert float(differences.mean()) == pytest.approx(export.facts.error.mean_score_difference)


def test_a_masked_tasks_auc_is_of_the_rows_where_the_one_before_it_happened(
    inputs: TrainInputs, tmp_path: Path
) -> None:
    like, love = ({"name": name, "label_name": f"is_{name}"} for name in ("like", "love"))
    config = RankerConfig.model_validate(
        {"tasks": (like, love | {"after": "like"}), "features": FEATURES, "num_epochs": 1}
        | {"checkpoint_dir": str(tmp_path), "batch_size": 300}
    )
    with process_group():
        train(config, inputs)
    checkpoint = Checkpoint(str(tmp_path), "ranker_v1")
    rows = open_rows(checkpoint, inputs.store, "valid")
    folder = export_checkpoint(str(tmp_path / "exports"), checkpoint, rows, "valid")
    made = Export(str(tmp_path / "exports"), "ranker_v1", folder.name)

    aucs = []
    with torch.inference_mode():
        for ranker in (made.load_ranker(), checkpoint.load_ranker()):
            [batch] = rows.eval_batches()
            scores_B = ranker(batch.sparse_features, batch.dense_features)[:, 1].double().sigmoid()
            liked_B = batch.labels[:, 0] == 1
            aucs.append(roc_auc_score(batch.labels[liked_B, 1], scores_B[liked_B]))

    assert made.facts.error.auc_difference["love"] == pytest.approx(aucs[0] - aucs[1], abs=1e-12)


def test_an_export_of_another_service_or_none_is_refused(export: Export, tmp_path: Path) -> None:
    other = tmp_path / "ranker_v2"
    other.mkdir()
    (other / "step-1").symlink_to(export.folder)

    with pytest.raises(CodebookMismatchError, match=r"ranker_v1.*loaded 'ranker_v2'"):
        Export(str(tmp_path), "ranker_v2", "step-1")
    with pytest.raises(DataError, match="qarm-rank export"):
        Export(str(tmp_path), "ranker_v3")


@pytest.mark.parametrize(
    "name", ["model.pt2", "vocabularies.json", "side_tables/popularity.totals.npy"]
)
def test_a_damaged_file_of_an_export_is_refused(export: Export, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "ranker_v1" / export.folder.name
    shutil.copytree(export.folder, folder)
    payload = bytearray((folder / name).read_bytes())
    payload[-2] ^= 1
    (folder / name).write_bytes(payload)

    with pytest.raises(CorruptArtifactError, match=f"{name} has SHA-256"):
        Export(str(tmp_path), "ranker_v1", folder.name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"torch_version": "2.9"}, r"exported by torch 2\.9, .*run `qarm-rank export` again"),
        ({"torch_version": None}, r"another form than this version reads; run `qarm-rank export`"),
    ],
)
def test_an_export_of_another_torch_or_of_an_older_form_is_refused(
    export: Export, tmp_path: Path, changed: dict[str, str | None], message: str
) -> None:
    folder = tmp_path / "ranker_v1" / export.folder.name
    shutil.copytree(export.folder, folder)
    facts = json.loads((folder / "manifest.json").read_text()) | changed
    (folder / "manifest.json").write_text(json.dumps(facts))

    with pytest.raises(DataError, match=message):
        Export(str(tmp_path), "ranker_v1", folder.name)


def test_a_second_export_leaves_the_first_one_and_becomes_the_newest(
    inputs: TrainInputs, checkpoint: Checkpoint, export: Export, tmp_path: Path
) -> None:
    folders = [tmp_path / "ranker_v1" / checkpoint.folder.name]
    shutil.copytree(export.folder, folders[0])
    rows = open_rows(checkpoint, inputs.store, "valid")
    folders.append(export_checkpoint(str(tmp_path), checkpoint, rows, "valid"))

    newest = Export(str(tmp_path), "ranker_v1")

    assert newest.folder == folders[1] == folders[0].with_name(f"{checkpoint.folder.name}-2")
    assert sorted(path.name for path in folders[0].iterdir()) == [
        "manifest.json",
        "model.pt2",
        "side_tables",
        "vocabularies.json",
    ]
    assert json.loads((folders[0] / "manifest.json").read_text())["table_precision"] == "int8"
