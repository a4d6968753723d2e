import itertools
from collections.abc import Callable

import numpy as np
import pyarrow.compute as pc
import pytest

from qarm_feast.alignment.config import AlignmentConfig, PairConfig
from qarm_feast.alignment.pairs import (
    PAIR_ROWS,
    Positives,
    behaviour_vectors,
    build_pairs,
    find_triggers,
    read_pairs,
    read_positives,
    swing_neighbors,
    write_pairs,
)
from qarm_feast.errors import DataError
from qarm_feast.input_data import InputData

Loader = Callable[..., InputData]


def swing_reference(positives: Positives, alpha: float) -> dict[tuple[int, int], float]:
    items_of = [
        set(positives.items_P[positives.users_P == user].tolist())
        for user in range(positives.num_users)
    ]
    scores: dict[tuple[int, int], float] = {}
    for first, second in itertools.combinations(items_of, 2):
        shared = first & second
        weight = 1.0 / np.sqrt(len(first) * len(second)) / (alpha + len(shared))
        for pair in itertools.permutations(shared, 2):
            scores[pair] = scores.get(pair, 0.0) + weight
    return scores


def random_positives(num_users: int, num_items: int, seed: int) -> Positives:
    generator = np.random.default_rng(seed)
    users, items = np.nonzero(generator.random((num_users, num_items)) < 0.3)
    times = generator.permutation(len(users))
    order = np.lexsort((items, times, users))
    return Positives(users[order], items[order], times[order], np.arange(num_items), num_users)


def test_swing_of_two_users_who_share_two_items_by_hand() -> None:
    # Users 0 and 1 share items 0 and 1; user 1 has item 2 too; user 2 has item 2 only.
    positives = Positives(
        users_P=np.array([0, 0, 1, 1, 1, 2]),
        items_P=np.array([0, 1, 0, 1, 2, 2]),
        times_P=np.arange(6),
        item_ids_M=np.arange(3),
        num_users=3,
    )

    items, neighbors, scores = swing_neighbors(positives, 5, alpha=1.0, max_users_per_item=10)

    assert list(zip(items, neighbors, strict=True)) == [(0, 1), (1, 0)]
    np.testing.assert_allclose(scores, 1.0 / np.sqrt(2 * 3) / (1.0 + 2), rtol=1e-6)


def test_swing_equals_the_plain_double_loop() -> None:
    positives = random_positives(num_users=14, num_items=9, seed=3)

    items, neighbors, scores = swing_neighbors(positives, 9, alpha=0.5, max_users_per_item=100)

    expected = swing_reference(positives, alpha=0.5)
    found = dict(zip(zip(items.tolist(), neighbors.tolist(), strict=True), scores, strict=True))
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(
        [found[pair] for pair in expected], list(expected.values()), rtol=1e-5
    )


def test_swing_keeps_the_best_neighbors_of_each_item() -> None:
    positives = random_positives(num_users=20, num_items=8, seed=1)

    items, neighbors, scores = swing_neighbors(positives, 2, alpha=1.0, max_users_per_item=100)

    reference = swing_reference(positives, alpha=1.0)
    for item in range(8):
        of_item = {other: score for (left, other), score in reference.items() if left == item}
        best = sorted(of_item.values(), reverse=True)[:2]
        np.testing.assert_allclose(scores[items == item], best, rtol=1e-5)
        assert item not in neighbors[items == item]


def test_swing_looks_at_the_latest_users_of_a_crowded_item() -> None:
    # Users 0 and 1 came last to item 0; users 2 and 3 share item 2 with it, but came first.
    positives = Positives(
        users_P=np.array([0, 0, 1, 1, 2, 2, 3, 3]),
        items_P=np.array([0, 1, 0, 1, 0, 2, 0, 2]),
        times_P=np.array([90, 91, 92, 93, 1, 2, 3, 4]),
        item_ids_M=np.arange(3),
        num_users=4,
    )

    items, neighbors, _ = swing_neighbors(positives, 5, alpha=1.0, max_users_per_item=2)

    assert neighbors[items == 0].tolist() == [1]


def test_triggers_are_the_most_similar_of_strictly_earlier_positives() -> None:
    vectors_MB = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.96, 0.28]], dtype=np.float32)
    positives = Positives(
        users_P=np.array([0, 0, 0, 1, 1]),
        items_P=np.array([0, 2, 1, 0, 3]),
        times_P=np.array([5, 6, 7, 1, 1]),
        item_ids_M=np.arange(4),
        num_users=2,
    )

    triggers, scores = find_triggers(positives, vectors_MB, history_length=50)

    # Item 1 is nearer to item 0 (cosine .8) than to item 2 (.6). Both events of user 1 are of
    # one time and do not see each other.
    assert triggers[[1, 2]].tolist() == [0, 0]
    np.testing.assert_allclose(scores, [-np.inf, 0.0, 0.8, -np.inf, -np.inf], atol=1e-6)


def test_triggers_come_from_the_latest_positives_only() -> None:
    vectors_MB = np.array([[1, 0], [0, 1], [1, 0]], dtype=np.float32)
    positives = Positives(
        users_P=np.zeros(3, dtype=np.int64),
        items_P=np.array([0, 1, 2]),
        times_P=np.arange(3),
        item_ids_M=np.arange(3),
        num_users=1,
    )

    triggers, scores = find_triggers(positives, vectors_MB, history_length=1)

    assert triggers[2] == 1
    assert scores[2] == 0.0


def test_behaviour_vectors_bring_items_of_the_same_users_together(clustered: InputData) -> None:
    positives = read_positives(clustered)

    vectors_MB = behaviour_vectors(positives, width=4, seed=0)

    cosines_MM = vectors_MB @ vectors_MB.T
    clusters = positives.item_ids_M // 10
    is_same_MM = clusters[:, None] == clusters[None, :]
    assert cosines_MM[is_same_MM].min() > cosines_MM[~is_same_MM].max()


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
    i2i = pairs.filter(pc.equal(pairs["source"], "i2i"))
    assert max(np.unique(u2i["user_row"].to_numpy(), return_counts=True)[1]) == 2
    assert max(np.unique(u2i["target_item_id"].to_numpy(), return_counts=True)[1]) == 3
    assert max(np.unique(i2i["target_item_id"].to_numpy(), return_counts=True)[1]) == 3
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
    clustered: InputData, load_rows: Loader, tmp_path: object
) -> None:
    config = AlignmentConfig(pairs_uri=f"{tmp_path}/pairs")
    with pytest.raises(DataError, match="run `qarm align pairs` first"):
        read_pairs(clustered, config)

    _, pairs = write_pairs(clustered, config)

    assert read_pairs(clustered, config).select(PAIR_ROWS.names).equals(pairs)
    other = load_rows([(1, 10, 1, "train", True), (1, 11, 1, "train", True)])
    with pytest.raises(DataError, match="run `qarm align pairs` again"):
        read_pairs(other, config)
