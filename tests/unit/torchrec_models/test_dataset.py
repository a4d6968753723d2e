import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from qarm_feast.errors import DataError
from torchrec_models import dataset as dataset_module
from torchrec_models.batch import BatchBuilder, RankingBatch
from torchrec_models.config import RankerConfig
from torchrec_models.dataset import RowDataset
from torchrec_models.inputs import TrainInputs
from torchrec_models.row_store import code_sizes
from torchrec_models.sharding import Ranks
from torchrec_models.snapshot import ItemSnapshot
from torchrec_models.tables import ranker_tables, sparse_feature_names


def make_dataset(inputs: TrainInputs, split: str, config: RankerConfig, ranks: Ranks) -> RowDataset:
    store = inputs.store
    vocabularies = store.run_vocabularies(config)
    snapshot = ItemSnapshot(store.snapshot_folder, config.vector_source)
    tables = ranker_tables(code_sizes(store.manifest), vocabularies, config)
    return RowDataset(
        path=store.split_path(split),
        label_names=store.manifest.label_names,
        user_columns=store.manifest.user_columns,
        builder=BatchBuilder(
            config=config,
            vocabularies=vocabularies,
            feature_names=sparse_feature_names(tables),
            code_lookup=snapshot,
            vector_lookup=snapshot,
            aligned_lookup=snapshot.with_source("aligned"),
            side_tables=store.side_tables(),
            label_names=store.manifest.label_names,
            level_sizes=store.manifest.level_sizes,
        ),
        ranks=ranks,
        batch_size=config.batch_size,
    )


def _users(batches: list[RankingBatch]) -> Counter[int]:
    return Counter(np.concatenate([batch.user_ids.numpy() for batch in batches]).tolist())


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("window_rows", [1, 300, 10_000])
def test_ranks_see_each_row_once_in_equally_many_batches(
    inputs: TrainInputs, monkeypatch: pytest.MonkeyPatch, world_size: int, window_rows: int
) -> None:
    monkeypatch.setattr(dataset_module, "_SCAN_ROWS", 130)
    config = RankerConfig(batch_size=101)
    passes = [
        list(
            make_dataset(inputs, "train", config, Ranks(rank, world_size)).train_batches(
                seed=0, epoch=0, window_rows=window_rows
            )
        )
        for rank in range(world_size)
    ]

    stored = pq.read_table(inputs.store.split_path("train"))["user_id"].to_pylist()
    seen = sum((_users(batches) for batches in passes), Counter())
    sizes = [[len(batch.user_ids) for batch in batches] for batches in passes]
    # 1600 rows: of three ranks, the last two are one row short and repeat one of their own.
    assert (seen - Counter(stored)).total() == -1600 % world_size
    assert not Counter(stored) - seen
    assert all(own == sizes[0] for own in sizes)
    assert max(sizes[0]) <= 101


def test_an_evaluation_holds_each_row_once_among_the_own_rows(inputs: TrainInputs) -> None:
    datasets = [
        make_dataset(inputs, "test", RankerConfig(batch_size=64), Ranks(rank, 3))
        for rank in range(3)
    ]
    users = [
        torch.cat([batch.user_ids for batch in dataset.eval_batches()]).tolist()
        for dataset in datasets
    ]

    stored = pq.read_table(inputs.store.split_path("test"))["user_id"].to_pylist()
    assert [dataset.num_own_rows() for dataset in datasets] == [67, 67, 66]
    assert [len(own) for own in users] == [67, 67, 67]
    assert users[2][66] == users[2][65]
    assert [own[: len(stored[rank::3])] for rank, own in enumerate(users)] == [
        stored[rank::3] for rank in range(3)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rows_per_group", [2, 70, 100, 1600])
def test_row_groups_go_round_the_ranks_and_each_row_is_read_once(
    inputs: TrainInputs, tmp_path: Path, world_size: int, rows_per_group: int
) -> None:
    stored = pq.read_table(inputs.store.split_path("train"))
    path = tmp_path / "train.parquet"
    pq.write_table(stored, path, row_group_size=rows_per_group)
    datasets = [
        replace(
            make_dataset(inputs, "train", RankerConfig(batch_size=101), Ranks(rank, world_size)),
            path=path,
            num_workers=2,
        )
        for rank in range(world_size)
    ]

    passes = [list(dataset.eval_batches()) for dataset in datasets]

    own = [
        torch.cat([batch.user_ids for batch in batches])[: dataset.num_own_rows()].tolist()
        for dataset, batches in zip(datasets, passes, strict=True)
    ]
    sizes = [[len(batch.user_ids) for batch in batches] for batches in passes]
    assert Counter(chain.from_iterable(own)) == Counter(stored["user_id"].to_pylist())
    assert all(found == sizes[0] for found in sizes)
    if rows_per_group == 70 and world_size > 1:
        # The second rank begins with the second group.
        assert own[1][:70] == stored["user_id"][70:140].to_pylist()


def test_a_pass_goes_on_behind_the_batches_that_are_left_out(inputs: TrainInputs) -> None:
    dataset = make_dataset(inputs, "train", RankerConfig(batch_size=200), Ranks(0, 1))

    def values(first_batch: int, num_workers: int) -> list[list[int]]:
        batches = replace(dataset, num_workers=num_workers).train_batches(
            seed=1, epoch=2, window_rows=500, first_batch=first_batch
        )
        return [batch.sparse_features.values().tolist() for batch in batches]

    assert values(3, 2) == values(0, 0)[3:]


def test_memory_is_flat_however_many_rows_there_are(tmp_path: Path) -> None:
    """Ten times the rows, in ten times the row groups, are read within the same memory."""
    script = Path(__file__).parent / "memory_pass.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path), "30000", "300000"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-4000:]
    first_peak, second_peak, bytes_of_rows = (int(line) for line in done.stdout.split())
    assert second_peak - first_peak < bytes_of_rows / 2


def test_the_same_seed_and_epoch_give_the_same_batches(inputs: TrainInputs) -> None:
    dataset = make_dataset(inputs, "train", RankerConfig(batch_size=200), Ranks(0, 2))

    def values(seed: int, epoch: int) -> list[int]:
        batches = dataset.train_batches(seed=seed, epoch=epoch, window_rows=500)
        return [v for batch in batches for v in batch.sparse_features.values().tolist()]

    assert values(1, 0) == values(1, 0)
    assert values(1, 0) != values(1, 1)
    assert values(1, 0) != values(2, 0)


def test_arms_of_one_seed_see_their_rows_in_the_same_order(
    inputs: TrainInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many windows: each draws its order after the batches before it drew what they drop.
    monkeypatch.setattr(dataset_module, "_SCAN_ROWS", 130)

    def users(config: RankerConfig) -> list[int]:
        dataset = make_dataset(inputs, "train", config, Ranks(0, 1))
        batches = dataset.train_batches(seed=0, epoch=0, window_rows=300)
        return [user for batch in batches for user in batch.user_ids.tolist()]

    with_ids = users(RankerConfig(batch_size=100))
    without_ids = users(RankerConfig(batch_size=100, features=("rq_code",)))

    assert with_ids == without_ids


def test_a_train_pass_is_shuffled_and_an_evaluation_is_not(inputs: TrainInputs) -> None:
    dataset = make_dataset(inputs, "train", RankerConfig(batch_size=4000), Ranks(0, 1))
    stored = pq.read_table(inputs.store.split_path("train"))["user_id"].to_pylist()

    shuffled = next(dataset.train_batches(seed=0, epoch=0, window_rows=10_000)).user_ids.tolist()
    in_order = next(dataset.eval_batches()).user_ids.tolist()

    assert in_order == stored
    assert shuffled != stored


def test_id_dropout_hits_the_target_ids_of_train_rows_only(inputs: TrainInputs) -> None:
    config = RankerConfig(batch_size=4000, id_dropout=0.5)
    dataset = make_dataset(inputs, "train", config, Ranks(0, 1))

    trained = next(dataset.train_batches(seed=0, epoch=0, window_rows=10_000)).sparse_features
    evaluated = next(dataset.eval_batches()).sparse_features

    for name in ("user_id", "item_id"):
        assert 0.45 < (trained[name].values() == 0).float().mean() < 0.55
        assert (evaluated[name].values() != 0).all()
    assert (trained["history_item_id"].values() != 0).all()


def test_code_dropout_hits_the_codes_of_train_candidates_only(inputs: TrainInputs) -> None:
    features = ("rq_code", "vq_code", "history_rq_code", "cross")
    config = RankerConfig(features=features, batch_size=4000, code_dropout=0.5)
    dataset = make_dataset(inputs, "train", config, Ranks(0, 1))

    trained = next(dataset.train_batches(seed=0, epoch=0, window_rows=10_000))
    evaluated = next(dataset.eval_batches())

    lost = trained.sparse_features["rq_0"].lengths() == 0
    assert 0.45 < lost.float().mean() < 0.55
    for name in ("rq_1", "vq_code"):
        assert torch.equal(trained.sparse_features[name].lengths() == 0, lost)
    assert not trained.dense_features[lost].any()
    assert trained.sparse_features["history_rq_0"].lengths()[lost].any()
    assert evaluated.sparse_features["rq_0"].lengths().all()


def test_item_rows_stay_themselves_where_ids_are_dropped(inputs: TrainInputs) -> None:
    dataset = make_dataset(inputs, "train", RankerConfig(batch_size=4000), Ranks(0, 1))
    items = pq.read_table(inputs.store.split_path("train"))["item_id"].to_numpy()

    batch = next(dataset.train_batches(seed=0, epoch=0, window_rows=10_000))

    rows = dataset.builder.vocabularies.item_ids.rows(items)
    assert Counter(batch.item_rows.tolist()) == Counter(rows.tolist())


def test_fewer_rows_than_ranks_are_refused(inputs: TrainInputs) -> None:
    dataset = make_dataset(inputs, "test", RankerConfig(), Ranks(0, 1))

    with pytest.raises(DataError, match="has 200 rows for 201 ranks"):
        replace(dataset, ranks=Ranks(0, 201)).num_batches()
