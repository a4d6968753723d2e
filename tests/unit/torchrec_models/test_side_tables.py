from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from test_dataset import make_dataset
from test_score import NOW, stored_reader

from qarm_feast.errors import ConfigError
from torchrec_models.checkpoint import Checkpoint
from torchrec_models.config import FeatureName, RankerConfig
from torchrec_models.inputs import TrainInputs
from torchrec_models.score import OnlineScorer
from torchrec_models.sharding import Ranks, process_group
from torchrec_models.side_tables import SideTables
from torchrec_models.training import train

SIDE_FEATURES: tuple[FeatureName, ...] = (
    "item_id",
    "item_columns",
    "popularity",
    "item_cf",
    "code_cf",
    "prefix",
    "history_prefix",
)


@pytest.fixture(scope="module")
def side_checkpoint(inputs: TrainInputs, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = str(tmp_path_factory.mktemp("side_checkpoints"))
    config = RankerConfig(
        checkpoint_dir=folder, num_epochs=1, batch_size=500, features=SIDE_FEATURES
    )
    with process_group():
        train(config, inputs)
    return Checkpoint(folder, "ranker_v1")


def test_side_tables_come_back_as_they_were_saved(inputs: TrainInputs, tmp_path: Path) -> None:
    tables = inputs.store.side_tables()

    tables.save(tmp_path / "saved")
    loaded = SideTables.load(tmp_path / "saved")

    assert list(loaded.pairs) == ["item", "c1", "c1_c2"]
    for part, again in (
        (tables.item_columns, loaded.item_columns),
        (tables.popularity, loaded.popularity),
        *((tables.pairs[name], loaded.pairs[name]) for name in tables.pairs),
    ):
        saved, found = part.arrays(), again.arrays()
        assert saved.keys() == found.keys()
        for name, array in saved.items():
            np.testing.assert_array_equal(array, found[name])
    assert loaded.popularity.labels == ("is_like", "is_love")
    assert loaded.item_columns.names == ("brand", "price")


def test_a_checkpoint_keeps_what_serving_reads(
    inputs: TrainInputs, side_checkpoint: Checkpoint
) -> None:
    kept, built = side_checkpoint.side_tables(), inputs.store.side_tables()

    assert len(kept.popularity.times_E) == len(kept.pairs["item"].own_keys_M) == 0
    np.testing.assert_array_equal(kept.popularity.totals_IC, built.popularity.totals_IC)
    np.testing.assert_array_equal(kept.item_columns.rows_IC, built.item_columns.rows_IC)


@pytest.mark.parametrize("split", ["train", "test"])
def test_batches_hold_the_columns_and_counts_of_their_rows(inputs: TrainInputs, split: str) -> None:
    config = RankerConfig(features=SIDE_FEATURES, batch_size=4096)
    rows = pq.read_table(inputs.store.split_path(split))
    tables = inputs.store.side_tables()

    batch = next(make_dataset(inputs, split, config, Ranks(0, 1)).eval_batches())

    items_B, times_B = rows["item_id"].to_numpy(), rows["event_timestamp"].cast("int64").to_numpy()
    is_train_B = np.full(len(rows), split == "train")
    counts_BW = tables.popularity.features(
        items_B, times_B, is_train_B, ("is_like", "is_love"), np.zeros(len(rows), dtype=np.bool_)
    )
    history = rows["history_item_ids"]
    lifts_B2 = tables.pairs["item"].features(
        rows["user_id"].to_numpy(),
        items_B,
        pc.list_flatten(history).to_numpy(),
        pc.list_value_length(history).to_numpy(),
        is_train_B,
    )
    assert batch.dense_features.shape == (len(rows), 5 + 2 + 4)
    np.testing.assert_array_equal(batch.dense_features[:, :5].numpy(), counts_BW)
    np.testing.assert_array_equal(batch.dense_features[:, 5:7].numpy(), lifts_B2)
    assert (batch.dense_features[:, 7:].numpy() != 0).any(axis=0).all()
    brands = batch.sparse_features["item_brand"].values().numpy()
    np.testing.assert_array_equal(brands, tables.item_columns.rows("brand", items_B))


def test_side_features_are_served_as_they_were_trained(
    inputs: TrainInputs, side_checkpoint: Checkpoint
) -> None:
    reader = stored_reader(inputs)
    scorer = OnlineScorer(side_checkpoint, reader)
    dataset = make_dataset(inputs, "test", side_checkpoint.manifest.config, Ranks(0, 1))
    table = pq.read_table(dataset.path)

    for row in reader.rows:
        one = table.filter(pc.equal(table["event_timestamp"], row["event_timestamp"]))
        trained = dataset.builder.build(dataset._columns(one))
        served = scorer.batch(row["user_id"], np.array([row["item_id"]]), NOW)

        assert served.dense_features.tolist() == trained.dense_features.tolist()
        assert served.sparse_features.keys() == trained.sparse_features.keys()
        assert served.sparse_features.values().tolist() == trained.sparse_features.values().tolist()

    scores = scorer.score(reader.rows[0]["user_id"], [5000, 123456], NOW)
    assert np.isfinite(scores["like"]).all()


def test_counts_that_the_rows_were_not_built_with_are_asked_for_by_name(
    inputs: TrainInputs,
) -> None:
    tables = replace(inputs.store.side_tables(), pairs={})

    with pytest.raises(ConfigError, match="run `qarm-rank rows` again"):
        tables.pair_counts("c1")


def test_id_dropout_hides_the_counts_of_the_items_that_it_hides(inputs: TrainInputs) -> None:
    config = RankerConfig(features=("item_id", "popularity"), id_dropout=0.5, batch_size=4096)
    dataset = make_dataset(inputs, "train", config, Ranks(0, 1))

    batch = next(dataset.train_batches(seed=0, epoch=0, window_rows=4096))

    is_hidden_B = batch.sparse_features["item_id"].values() == 0
    assert 0.4 < is_hidden_B.float().mean() < 0.6
    assert (batch.dense_features[is_hidden_B, :3] == 0).all()
    assert (batch.dense_features[~is_hidden_B, 0] > 0).float().mean() > 0.9
