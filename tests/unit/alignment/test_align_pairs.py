import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from qarm_feast.alignment import judge
from qarm_feast.alignment.config import AlignmentConfig, PairConfig
from qarm_feast.alignment.pairs import (
    PAIR_ROWS,
    best_per_group,
    build_pairs,
    read_pairs,
    report_of,
    write_pairs,
)
from qarm_feast.alignment.positives import read_positives
from qarm_feast.errors import ConfigError, ContractError, DataError
from qarm_feast.input_data import DataConfig, InputData, load_input_data

Loader = Callable[..., InputData]


def test_pairs_come_from_positive_train_rows_only(load_rows: Loader) -> None:
    checked = load_rows(
        [
            (1, 10, 1, "train", True),
            (1, 11, 2, "train", True),
            (1, 12, 3, "train", False),
            (1, 13, 4, "valid", True),
            (2, 10, 1, "train", True),
            (2, 11, 2, "train", True),
            (2, 13, 4, "test", True),
        ]
    )

    pairs = build_pairs(checked, PairConfig(min_similarity=-1), seed=0)

    assert pairs.schema == PAIR_ROWS
    assert set(pairs["trigger_item_id"].to_pylist()) == {10, 11}
    assert set(pairs["target_item_id"].to_pylist()) == {10, 11}
    rows = pairs.select(["source", "trigger_item_id", "target_item_id", "user_row"]).to_pylist()
    assert [tuple(row.values()) for row in rows if row["source"] == "u2i"] == [
        ("u2i", 10, 11, 0),
        ("u2i", 10, 11, 1),
    ]


def test_pairs_of_a_user_and_of_an_item_are_capped(clustered: InputData) -> None:
    caps = {"min_similarity": -1.0, "num_neighbors": 3}
    config = PairConfig(max_pairs_per_user=2, max_pairs_per_item=3, **caps)

    pairs = build_pairs(clustered, config, seed=0)

    u2i = pairs.filter(pc.equal(pairs["source"], "u2i"))
    swing = pairs.filter(pc.equal(pairs["source"], "swing"))
    assert max(np.unique(u2i["user_row"].to_numpy(), return_counts=True)[1]) == 2
    assert max(np.unique(u2i["target_item_id"].to_numpy(), return_counts=True)[1]) == 3
    assert max(np.unique(swing["target_item_id"].to_numpy(), return_counts=True)[1]) == 3
    weights = pairs["weight"].to_numpy()
    assert weights.min() > 0
    assert weights.max() == 1


def test_a_repeated_positive_counts_once_at_its_first_time(load_rows: Loader) -> None:
    rows = [(1, 10, 5, "train", True), (1, 11, 6, "train", True), (1, 10, 9, "train", True)]

    positives = read_positives(load_rows(rows))

    assert positives.items_P.tolist() == [0, 1]
    assert np.diff(positives.times_P).tolist() == [1_000_000]


def test_data_without_positive_train_rows_is_refused(load_rows: Loader) -> None:
    checked = load_rows([(1, 10, 1, "train", False), (1, 10, 2, "valid", True)])

    with pytest.raises(DataError, match="no train row with is_click true"):
        build_pairs(checked, PairConfig(), seed=0)


def test_data_whose_items_share_no_user_is_refused(load_rows: Loader) -> None:
    checked = load_rows([(1, 10, 1, "train", True), (2, 11, 1, "train", True)])

    with pytest.raises(DataError, match=r"no two items .* share a user"):
        build_pairs(checked, PairConfig(), seed=0)


def test_stored_pairs_are_read_back_and_refused_for_other_data(
    clustered: InputData, load_rows: Loader, tmp_path: Path
) -> None:
    config = AlignmentConfig(pairs_uri=f"{tmp_path}/pairs")
    with pytest.raises(DataError, match="run `qarm align pairs` first"):
        read_pairs(clustered, config)

    _, pairs = write_pairs(clustered, config)

    assert read_pairs(clustered, config).select(PAIR_ROWS.names).equals(pairs)
    other = load_rows([(1, 10, 1, "train", True), (1, 11, 1, "train", True)])
    with pytest.raises(DataError, match="run `qarm align pairs` again"):
        read_pairs(other, config)


def test_the_best_rows_of_each_group_are_kept_ties_by_the_earlier_row() -> None:
    groups_P = np.array([0, 1, 0, 1, 0, 0])
    scores_P = np.array([1.0, 5.0, 2.0, 5.0, 2.0, 2.0])

    assert best_per_group(np.arange(6), groups_P, scores_P, 2).tolist() == [1, 2, 3, 4]
    assert best_per_group(np.array([0, 3, 5]), groups_P, scores_P, 1).tolist() == [3, 5]


def test_item_cf_is_a_source_of_its_own(clustered: InputData) -> None:
    config = PairConfig(sources=("item_cf",), min_shared_users=1, num_neighbors=4)

    pairs = build_pairs(clustered, config, seed=0)

    assert set(pairs["source"].to_pylist()) == {"item_cf"}
    assert set(pairs["user_row"].to_pylist()) == {-1}
    # Users stay in clusters of ten items, so neighbours do.
    same = pairs["trigger_item_id"].to_numpy() // 10 == pairs["target_item_id"].to_numpy() // 10
    assert same.all()


@pytest.mark.parametrize(
    ("source", "key"),
    [("swing", "min_swing_score"), ("item_cf", "min_item_cf_score"), ("u2i", "min_similarity")],
)
def test_pairs_below_the_threshold_of_their_source_are_left_out_and_counted(
    source: str, key: str, clustered: InputData
) -> None:
    every = build_pairs(clustered, PairConfig(sources=(source,), **{key: 0.0}), seed=0)
    limit = float(np.median(every["score"].to_numpy()))

    kept = build_pairs(clustered, PairConfig(sources=(source,), **{key: limit}), seed=0)

    assert 0 < kept.num_rows < every.num_rows
    assert kept["score"].to_numpy().min() >= limit
    steps = list(report_of(kept).sources[source].steps.values())
    assert steps[-1] == kept.num_rows
    assert steps == sorted(steps, reverse=True)


def test_a_popularity_correction_gives_places_to_rarer_neighbors(load_rows: Loader) -> None:
    # Items 10 and 11 share both their users, items 10 and 12 three of the thirteen that 12 has.
    rows = [(user, item, user, "train", True) for user in (1, 2) for item in (10, 11, 12)]
    rows += [(3, 10, 1, "train", True), (3, 12, 2, "train", True)]
    rows += [(user, 12, 1, "train", True) for user in range(4, 14)]
    checked = load_rows(rows)

    best = {
        power: build_pairs(
            checked, PairConfig(sources=("swing",), num_neighbors=1, popularity_power=power), 0
        )
        for power in (0.0, 1.0)
    }

    of_10 = {
        power: pairs.filter(pc.equal(pairs["target_item_id"], 10))["trigger_item_id"].to_pylist()
        for power, pairs in best.items()
    }
    assert of_10 == {0.0: [12], 1.0: [11]}


def test_a_popularity_correction_divides_the_score_of_u2i_and_leaves_its_threshold(
    load_rows: Loader,
) -> None:
    # Three groups of four users with items of their own, and item 99 that everybody has first.
    groups = ((10, 11, 12), (20, 21, 22), (30, 31, 32))
    rows = [
        (user, item, second, "train", True)
        for user in range(12)
        for second, item in enumerate((99, *groups[user % 3]))
    ]
    checked = load_rows(rows)
    plain = PairConfig(sources=("u2i",), behaviour_dim=2, num_processes=1, min_similarity=0.0)

    found = {
        power: build_pairs(checked, plain.model_copy(update={"u2i_popularity_power": power}), 0)
        for power in (0.0, 0.5)
    }

    before, after = (
        {row["target_item_id"]: row for row in found[power].to_pylist()} for power in (0.0, 0.5)
    )
    # Item 11's histories hold 10, of 4 users, and 99, of 12.
    assert before[11]["trigger_item_id"] == after[11]["trigger_item_id"] == 10
    assert after[11]["score"] == pytest.approx(before[11]["score"] / 2)
    limit = {"min_similarity": before[11]["score"] - 0.01, "u2i_popularity_power": 0.5}
    above = build_pairs(checked, plain.model_copy(update=limit), 0)
    assert 11 in above["target_item_id"].to_pylist()


def keep_titles_alike(pairs: pa.Table) -> pa.ChunkedArray:
    return pc.equal(pairs["trigger_title"], pairs["target_title"])


def keep_nothing(pairs: pa.Table) -> np.ndarray:
    return np.zeros(pairs.num_rows, dtype=bool)


def one_too_few(pairs: pa.Table) -> np.ndarray:
    return np.ones(pairs.num_rows - 1, dtype=bool)


def scores_not_bools(pairs: pa.Table) -> np.ndarray:
    return pairs["score"].to_numpy()


@pytest.fixture
def liked(load_rows: Loader) -> InputData:
    rows = [(user, item, item, "train", True) for user in (1, 2, 3) for item in (10, 11, 12)]
    return load_rows(rows, item_id=[10, 11, 12], title=["a", "a", "b"])


def judged_by(name: str) -> PairConfig:
    return PairConfig(judge=f"{__name__}:{name}", min_similarity=-1)


def test_a_judge_keeps_pairs_by_the_content_of_both_items(liked: InputData) -> None:
    pairs = build_pairs(liked, judged_by("keep_titles_alike"), seed=0)

    found = set(zip(*(pairs[c].to_pylist() for c in PAIR_ROWS.names[:2]), strict=True))
    assert found <= {(10, 11), (11, 10)}
    steps = report_of(pairs).sources["swing"].steps
    assert (steps["min_score"], steps["judge"]) == (6, 2)
    assert pairs.column_names == PAIR_ROWS.names


def test_a_judge_sees_the_same_content_however_many_pairs_a_call_holds(
    liked: InputData, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = build_pairs(liked, judged_by("keep_titles_alike"), seed=0)

    monkeypatch.setattr(judge, "PAIRS_PER_CALL", 1)

    assert build_pairs(liked, judged_by("keep_titles_alike"), seed=0).equals(at_once)


def test_the_folder_of_temporary_files_may_have_a_quote_in_its_name(
    liked: InputData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o'brien").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "o'brien"))

    assert read_positives(liked).num_items > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_too_few", "returned bool of shape"),
        ("scores_not_bools", "returned float32 of shape"),
        ("keep_nothing", "no pair of .* is left .*judge"),
    ],
)
def test_a_judge_that_answers_wrongly_or_keeps_nothing_is_told(
    name: str, message: str, liked: InputData
) -> None:
    with pytest.raises(DataError, match=message):
        build_pairs(liked, judged_by(name), seed=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package.judges:keep", "no_such_package.judges cannot be imported"),
        ("json:keep", "has no function 'keep'"),
    ],
)
def test_a_judge_that_is_not_there_is_a_configuration_error(
    name: str, message: str, liked: InputData
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_pairs(liked, PairConfig(judge=name), seed=0)


def test_the_report_lies_beside_the_pairs_and_counts_what_was_left_out(
    load_rows: Loader, tmp_path: Path
) -> None:
    rows = [(user, item, item, "train", True) for user in (1, 2) for item in (10, 11)]
    # Twice the same item, an item that nobody shares, more items than the cap allows.
    rows += [(1, 10, 50, "train", True), (3, 12, 1, "train", True)]
    rows += [(4, item, item, "train", True) for item in (10, 11, 12)]
    checked = load_rows(rows, item_id=[10, 11, 12, 13], title=["a", "b", "c", "d"])
    pairs_config = PairConfig(max_items_per_user=2, max_users_per_item=2, min_similarity=-1)
    config = AlignmentConfig(pairs_uri=f"{tmp_path}/pairs", pairs=pairs_config)

    path, pairs = write_pairs(checked, config)

    report = json.loads(path.with_suffix(".json").read_text())
    assert report["events"] == {
        "events": 9,
        "repeated_events": 1,
        "unknown_item_events": 0,
        "users": 4,
        "users_capped": 1,
        "items_capped": 2,
        "catalogue_items": 4,
        "items": 3,
    }
    assert report["items_without_positive"] == 1
    num_pairs = {
        name: len(pairs.filter(pc.equal(pairs["source"], name))) for name in ("swing", "u2i")
    }
    assert {name: counts["steps"].popitem()[1] for name, counts in report["sources"].items()} == (
        num_pairs
    )
    assert report_of(pq.read_table(path)) == report_of(pairs)
    covered = set(pairs["trigger_item_id"].to_pylist()) | set(pairs["target_item_id"].to_pylist())
    assert report["items_without_pair"] == 3 - len(covered)


def test_interactions_of_unknown_items_are_refused_or_dropped_and_counted(
    load_rows: Loader, tmp_path: Path
) -> None:
    rows = [(user, item, item, "train", True) for user in (1, 2) for item in (10, 11, 99)]
    with pytest.raises(ContractError, match=r"unknown_items: drop .* row 2, counted from 0; 2 row"):
        load_rows(rows, item_id=[10, 11], title=["a", "b"])

    config = DataConfig(input_dir=str(tmp_path / "input"), unknown_items="drop")
    checked = load_input_data(config)

    pairs = build_pairs(checked, PairConfig(), seed=0)
    assert report_of(pairs).events.unknown_item_events == 2
    assert checked.num_unknown_interactions == 2
    assert set(pairs["target_item_id"].to_pylist()) <= {10, 11}


def test_data_that_names_unknown_items_only_is_refused(load_rows: Loader, tmp_path: Path) -> None:
    with pytest.raises(ContractError):
        load_rows([(1, 99, 1, "train", True)], item_id=[10], title=["a"])

    with pytest.raises(ContractError, match="names no item that items"):
        load_input_data(DataConfig(input_dir=str(tmp_path / "input"), unknown_items="drop"))


def test_a_user_with_100_000_events_is_capped_and_costs_seconds(tmp_path: Path) -> None:
    num_events = 100_000
    folder = tmp_path / "input"
    folder.mkdir()
    # Twice each of 50,000 items; 40 other users share the first hundred.
    items = np.concatenate([np.tile(np.arange(50_000), 2), np.tile(np.arange(100), 40)])
    users = np.concatenate([np.zeros(num_events, int), 1 + np.arange(4000) // 100])
    times = np.concatenate([np.arange(num_events) // 3, np.arange(4000)]) + 1_700_000_000
    stamps = pa.array(times).cast(pa.timestamp("s")).cast(pa.timestamp("us", tz="UTC"))
    likes = np.ones(len(items), dtype=bool)
    names = ["user_id", "item_id", "event_timestamp", "is_like", "split"]
    split = pa.repeat(pa.scalar("train"), len(items))
    pq.write_table(
        pa.table([users, items, stamps, likes, split], names), folder / "interactions.parquet"
    )
    catalogue = {
        "item_id": np.arange(50_000),
        "upload_timestamp": pa.repeat(stamps[0], 50_000),
        "title": pa.repeat(pa.scalar("x"), 50_000),
    }
    pq.write_table(pa.table(catalogue), folder / "items.parquet")
    checked = load_input_data(DataConfig(input_dir=str(folder)))

    pairs = build_pairs(checked, PairConfig(behaviour_dim=8), seed=0)

    events = report_of(pairs).events
    assert (events.events, events.repeated_events, events.users) == (104_000, 50_000, 41)
    assert events.users_capped == 1
    num_of_user = np.bincount(pairs["user_row"].to_numpy() + 1)[1]
    assert 0 < num_of_user <= PairConfig().max_pairs_per_user
