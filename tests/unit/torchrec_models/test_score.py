from copy import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from synthetic import VECTOR_DIM
from test_dataset import make_dataset
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from qarm_feast.codebook import ItemCodes
from qarm_feast.errors import ConfigError
from qarm_feast.online_stores.codec import Column
from qarm_feast.online_stores.rows import ColumnBatch
from qarm_feast.reader import ScoringInputs
from torchrec_models.checkpoint import Checkpoint, CheckpointManifest, build_trained_ranker
from torchrec_models.config import FeatureName, RankerConfig, TaskConfig
from torchrec_models.inputs import TrainInputs
from torchrec_models.ranker import RankerTrainTask, build_ranker, ranker_logits
from torchrec_models.row_columns import Floats, Ints
from torchrec_models.row_store import code_sizes
from torchrec_models.score import OnlineScorer
from torchrec_models.sharding import Ranks, process_group
from torchrec_models.side_tables import SideTables
from torchrec_models.tables import SEARCHED_SEQUENCE
from torchrec_models.training import train
from torchrec_models.vocabulary import Vocabularies

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class StoredReader:
    """An online store that holds what one stored row was joined from."""

    rows: list[dict[str, object]]
    codes: dict[int, list[int]]
    vectors: dict[int, np.ndarray] = field(default_factory=dict)

    def read_scoring_inputs(
        self, user_id: int, item_ids_B: Ints, history_length: int
    ) -> ScoringInputs:
        (row,) = (row for row in self.rows if row["user_id"] == user_id)
        history, present_H = self._read_codes(np.array(row["history_item_ids"], dtype=np.int64))
        times_H = np.array(row["history_timestamps"])
        return ScoringInputs(*self._read_codes(item_ids_B), history, present_H, times_H)

    def _read_codes(self, item_ids_N: Ints) -> tuple[ItemCodes, npt.NDArray[np.bool_]]:
        vq = {row["item_id"]: row["vq_code"] for row in self.rows}
        items = item_ids_N.tolist()
        rq_NL = np.array([self.codes.get(item, [-1, -1]) for item in items], dtype=np.int64)
        vq_NV = np.array([vq.get(item, [-1] * 4) for item in items], dtype=np.int64)
        present_N = np.array([item in self.codes for item in item_ids_N.tolist()], dtype=bool)
        return ItemCodes(item_ids_N, vq_NV, rq_NL.reshape(-1, 2)), present_N

    def read_vectors(self, item_ids_N: Ints) -> tuple[Floats, npt.NDArray[np.bool_]]:
        nothing = np.zeros(VECTOR_DIM, dtype=np.float32)
        stored = [self.vectors.get(item, nothing) for item in item_ids_N.tolist()]
        x_ND = np.array(stored, dtype=np.float16).astype(np.float32).reshape(-1, VECTOR_DIM)
        return x_ND, x_ND.any(axis=1)

    def read_profiles(self, user_ids_N: Ints) -> ColumnBatch:
        (row,) = (row for row in self.rows if row["user_id"] == user_ids_N[0])
        columns = {name: Column(np.array([row[name]]), np.array([1])) for name in ("age", "gender")}
        return ColumnBatch(np.array([True]), columns)


@pytest.fixture(scope="module")
def cross_checkpoint(inputs: TrainInputs, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = str(tmp_path_factory.mktemp("cross_checkpoints"))
    config = RankerConfig(
        checkpoint_dir=folder, num_epochs=1, batch_size=500, features=("item_id", "cross")
    )
    with process_group():
        train(config, inputs)
    return Checkpoint(folder, "ranker_v1")


@pytest.fixture(scope="module")
def checkpoint(inputs: TrainInputs, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    with process_group():
        train(RankerConfig(checkpoint_dir=folder, num_epochs=1, batch_size=500), inputs)
    return Checkpoint(folder, "ranker_v1")


def _stored_rows(inputs: TrainInputs) -> list[dict[str, object]]:
    """The first test row of each user."""
    rows = pq.read_table(inputs.store.split_path("test")).to_pylist()
    return list({row["user_id"]: row for row in reversed(rows)}.values())


def stored_reader(inputs: TrainInputs) -> StoredReader:
    """Return a store that answers with the test rows' values."""
    folder = inputs.store.snapshot_folder
    item_ids, rq = np.load(folder / "item_ids.npy"), np.load(folder / "rq.npy")
    codes = dict(zip(item_ids.tolist(), rq.tolist(), strict=True))
    vectors = dict(zip(item_ids.tolist(), np.load(folder / "vectors_aligned.npy"), strict=True))
    return StoredReader(_stored_rows(inputs), codes, vectors)


def test_serving_builds_the_same_features_as_training(
    inputs: TrainInputs, checkpoint: Checkpoint
) -> None:
    reader = stored_reader(inputs)
    scorer = OnlineScorer(checkpoint, reader)
    config = checkpoint.manifest.config
    dataset = make_dataset(inputs, "test", config, Ranks(0, 1))
    table = pq.read_table(dataset.path)

    for row in reader.rows:
        one = table.filter(pc.equal(table["event_timestamp"], row["event_timestamp"]))
        assert len(one) == 1
        trained = dataset.builder.build(dataset._columns(one)).sparse_features
        served = scorer.batch(row["user_id"], np.array([row["item_id"]]), NOW).sparse_features

        assert served.keys() == trained.keys()
        assert served.values().tolist() == trained.values().tolist()
        assert served.lengths().tolist() == trained.lengths().tolist()


def test_scores_are_probabilities_per_task_in_the_order_asked(
    inputs: TrainInputs, checkpoint: Checkpoint
) -> None:
    reader = stored_reader(inputs)
    scorer = OnlineScorer(checkpoint, reader)
    user = reader.rows[0]["user_id"]
    items = [5000, 5001, 5002]

    scores = scorer.score(user, items, NOW)
    turned = scorer.score(user, items[::-1], NOW)

    assert list(scores) == ["like", "love"]
    assert scores["like"].shape == (3,)
    assert ((scores["like"] > 0) & (scores["like"] < 1)).all()
    np.testing.assert_allclose(turned["love"], scores["love"][::-1], rtol=1e-5)


def test_an_item_without_codes_is_scored_by_what_is_known(
    inputs: TrainInputs, checkpoint: Checkpoint
) -> None:
    reader = stored_reader(inputs)

    scores = OnlineScorer(checkpoint, reader).score(reader.rows[0]["user_id"], [123456], NOW)

    assert np.isfinite(scores["like"]).all()


@pytest.fixture(scope="module")
def vector_checkpoint(inputs: TrainInputs, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = str(tmp_path_factory.mktemp("vector_checkpoints"))
    config = RankerConfig(
        checkpoint_dir=folder,
        num_epochs=1,
        batch_size=500,
        features=("item_id", "vector"),
    )
    with process_group():
        train(config, inputs)
    return Checkpoint(folder, "ranker_v1")


def test_vectors_are_served_as_they_were_trained_but_for_their_rounding(
    inputs: TrainInputs, vector_checkpoint: Checkpoint
) -> None:
    reader = stored_reader(inputs)
    scorer = OnlineScorer(vector_checkpoint, reader)
    dataset = make_dataset(inputs, "test", vector_checkpoint.manifest.config, Ranks(0, 1))
    table = pq.read_table(dataset.path)
    ranker = vector_checkpoint.load_ranker()

    for row in reader.rows[:15]:
        one = table.filter(pc.equal(table["event_timestamp"], row["event_timestamp"]))
        trained = dataset.builder.build(dataset._columns(one))
        served = scorer.batch(row["user_id"], np.array([row["item_id"]]), NOW)
        scores = [ranker_logits(ranker, batch).sigmoid() for batch in (trained, served)]

        # float16 keeps 11 bits: 2^-11 of each number of a vector of length 1, times its scale.
        torch.testing.assert_close(
            served.dense_features, trained.dense_features, rtol=0, atol=5 * 2**-11
        )
        assert not torch.equal(served.dense_features, trained.dense_features)
        torch.testing.assert_close(*scores, rtol=0, atol=1e-3)


def test_a_ranker_of_raw_vectors_is_not_served(
    inputs: TrainInputs, vector_checkpoint: Checkpoint
) -> None:
    config = vector_checkpoint.manifest.config.model_copy(update={"vector_source": "raw"})
    trained = copy(vector_checkpoint)
    trained.manifest = trained.manifest.model_copy(update={"config": config})

    with pytest.raises(ConfigError, match=r"vector_source 'raw', whose vectors are in no online"):
        OnlineScorer(trained, stored_reader(inputs))


def test_aligned_cosines_are_served_whatever_the_source_of_vectors_is(
    inputs: TrainInputs, tmp_path: Path
) -> None:
    config = RankerConfig(
        checkpoint_dir=str(tmp_path),
        num_epochs=1,
        batch_size=500,
        features=("item_id", "aligned_cosine"),
        vector_source="raw",
    )
    with process_group():
        train(config, inputs)
    reader = stored_reader(inputs)
    scorer = OnlineScorer(Checkpoint(str(tmp_path), "ranker_v1"), reader)
    dataset = make_dataset(inputs, "test", config, Ranks(0, 1))
    row = reader.rows[0]
    table = pq.read_table(dataset.path)
    one = table.filter(pc.equal(table["event_timestamp"], row["event_timestamp"]))

    served = scorer.batch(row["user_id"], np.array([row["item_id"]]), NOW).dense_features
    trained = dataset.builder.build(dataset._columns(one)).dense_features

    assert trained.any()
    torch.testing.assert_close(served, trained, rtol=0, atol=5 * 2**-11)


@dataclass(frozen=True)
class EveryFeature:
    """A ranker with random weights that reads every group, of histories cut in two places."""

    inputs: TrainInputs
    folder: Path = Path("made")

    @property
    def manifest(self) -> CheckpointManifest:
        rows = self.inputs.store.manifest
        return CheckpointManifest(
            service=rows.service,
            codebook_version=rows.codebook_version,
            rows_build=rows.build,
            step=0,
            world_size=1,
            config=RankerConfig(
                # `vector` has the cosines of `aligned_cosine` in it.
                features=tuple(n for n in get_args(FeatureName) if n != "aligned_cosine"),
                embedding_dim=8,
                history_length=3,
                long_history_length=5,
                num_searched=2,
            ),
            tasks=tuple(
                TaskConfig(name=name, label_name=f"is_{name}") for name in ("like", "love")
            ),
            sizes=code_sizes(rows),
            metrics={},
        )

    def vocabularies(self) -> Vocabularies:
        return self.inputs.store.run_vocabularies(self.manifest.config)

    def side_tables(self) -> SideTables:
        return self.inputs.store.side_tables().for_serving()

    def load_ranker(self) -> nn.Module:
        torch.manual_seed(0)
        return build_trained_ranker(self.manifest, self.vocabularies(), torch.device("cpu")).eval()


def test_every_feature_group_is_served_as_it_was_trained_for_all_candidates_at_once(
    inputs: TrainInputs,
) -> None:
    reader, trained = stored_reader(inputs), EveryFeature(inputs)
    scorer = OnlineScorer(trained, reader)
    dataset = make_dataset(inputs, "test", trained.manifest.config, Ranks(0, 1))
    table = pq.read_table(dataset.path)
    num_searched = 0

    for row in reader.rows:
        one = table.filter(pc.equal(table["event_timestamp"], row["event_timestamp"]))
        known = dataset.builder.build(dataset._columns(one))
        served = scorer.batch(row["user_id"], np.array([row["item_id"]]), NOW)

        for name, expected in known.sparse_features.to_dict().items():
            assert served.sparse_features[name].values().tolist() == expected.values().tolist()
            assert served.sparse_features[name].lengths().tolist() == expected.lengths().tolist()
        torch.testing.assert_close(served.dense_features, known.dense_features, rtol=0, atol=3e-3)
        num_searched += int(known.sparse_features[SEARCHED_SEQUENCE].lengths()[0])
    # Two of up to five items with two codes each, of most of the forty users.
    assert num_searched > 80

    user = next(row["user_id"] for row in reader.rows if len(row["history_item_ids"]) > 4)
    items = [5000, 123456, 5001, 5059]
    together = scorer.score(user, items, NOW)["love"]
    alone = [scorer.score(user, [item], NOW)["love"][0] for item in items]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_an_item_without_a_vector_is_scored_with_zeros(
    inputs: TrainInputs, vector_checkpoint: Checkpoint
) -> None:
    reader = stored_reader(inputs)
    scorer = OnlineScorer(vector_checkpoint, reader)
    user = next(row["user_id"] for row in reader.rows if row["history_item_ids"])

    batch = scorer.batch(user, np.array([123456, 5000]), NOW)

    assert not batch.dense_features[0, :VECTOR_DIM].any()
    assert not batch.dense_features[0, -2:].any()
    assert batch.dense_features[1, :VECTOR_DIM].any()
    assert np.isfinite(scorer.score(user, [123456, 5000], NOW)["like"]).all()


def test_cross_features_are_served_as_they_were_trained(
    inputs: TrainInputs, cross_checkpoint: Checkpoint
) -> None:
    reader = stored_reader(inputs)
    scorer = OnlineScorer(cross_checkpoint, reader)
    dataset = make_dataset(inputs, "test", cross_checkpoint.manifest.config, Ranks(0, 1))
    table = pq.read_table(dataset.path)
    num_matches = 0

    for row in reader.rows:
        one = table.filter(pc.equal(table["event_timestamp"], row["event_timestamp"]))
        trained = dataset.builder.build(dataset._columns(one)).dense_features
        served = scorer.batch(row["user_id"], np.array([row["item_id"]]), NOW).dense_features

        assert served.tolist() == trained.tolist()
        num_matches += int((trained > 0).any())

    assert num_matches > 5
    scores = scorer.score(reader.rows[0]["user_id"], [5000, 123456], NOW)
    assert np.isfinite(scores["like"]).all()


@pytest.mark.parametrize("name", ["checkpoint", "cross_checkpoint"])
def test_no_candidates_have_no_scores(
    inputs: TrainInputs, name: str, request: pytest.FixtureRequest
) -> None:
    reader = stored_reader(inputs)
    scorer = OnlineScorer(request.getfixturevalue(name), reader)

    scores = scorer.score(reader.rows[0]["user_id"], [], NOW)

    assert {task: len(values) for task, values in scores.items()} == {"like": 0, "love": 0}


def test_a_checkpoint_with_cross_features_fits_no_ranker_without_them(
    cross_checkpoint: Checkpoint,
) -> None:
    manifest = cross_checkpoint.manifest
    config = manifest.config.model_copy(update={"features": ("item_id",)})
    ranker = build_ranker(config, manifest.tasks, cross_checkpoint.vocabularies(), manifest.sizes)

    with pytest.raises(CheckpointException, match="Size mismatch"):
        cross_checkpoint.load_into(RankerTrainTask(ranker, [1.0, 1.0]))
