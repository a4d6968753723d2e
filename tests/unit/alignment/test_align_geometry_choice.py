import numpy as np
import pytest

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import features_of_vectors
from qarm_feast.alignment.geometry_choice import choose
from qarm_feast.alignment.held_out import HeldOutRanking, PairSplit, hold_items_out
from qarm_feast.alignment.pair_rows import BatchNegatives, PairRows
from qarm_feast.alignment.train import train_head

AUTO = AlignmentConfig(
    embedding_dim=16,
    hidden_dim=16,
    batch_size=256,
    learning_rate=3e-3,
    num_epochs=6,
    geometry_weight="auto",
    valid_item_share=0.3,
    device="cpu",
)
NUM_ITEMS, NUM_GROUPS = 200, 10


def pairs_of(triggers: np.ndarray, targets: np.ndarray) -> PairRows:
    size = len(triggers)
    return PairRows(triggers, targets, np.full(size, -1), np.ones(size, dtype=np.float32))


def auc_reference(embeddings: np.ndarray, query: int, answers: set[int], near: set[int]) -> float:
    """Every answer of a held-out item against every item that makes no pair with it."""
    others = [item for item in range(len(embeddings)) if item not in near and item != query]
    scores = embeddings @ embeddings[query]
    wins = [
        1.0 if scores[answer] > scores[other] else 0.5 if scores[answer] == scores[other] else 0.0
        for answer in answers
        for other in others
    ]
    return float(np.mean(wins))


def test_held_out_auc_equals_the_plain_count() -> None:
    generator = np.random.default_rng(0)
    embeddings = generator.integers(-2, 3, size=(40, 3)).astype(np.float32)
    pairs = pairs_of(*generator.integers(0, 40, size=(2, 90)))
    split = hold_items_out(pairs, 40, 0.3, seed=0)

    ranking = HeldOutRanking(split, BatchNegatives(pairs, 40), seed=0)
    aucs_Q = ranking.aucs(embeddings[ranking.items])

    near: dict[int, set[int]] = {item: set() for item in range(40)}
    for trigger, target in zip(pairs.triggers, pairs.targets, strict=True):
        near[trigger].add(target)
        near[target].add(trigger)
    queries = [item for item in np.flatnonzero(split.is_held_M) if near[item]]
    expected = [auc_reference(embeddings, item, near[item], near[item]) for item in queries]
    np.testing.assert_allclose(aucs_Q, expected)


def test_no_training_pair_names_a_held_out_item_and_each_valid_pair_does() -> None:
    pairs = pairs_of(*np.random.default_rng(0).integers(0, 50, size=(2, 200)))

    split = hold_items_out(pairs, 50, 0.2, seed=1)

    for part, expected in ((split.train, False), (split.valid, True)):
        names_held = split.is_held_M[part.triggers] | split.is_held_M[part.targets]
        assert (names_held == expected).all()
    assert len(split.train) + len(split.valid) == 200


def test_the_heaviest_weight_that_is_as_good_as_the_best_is_chosen() -> None:
    content = np.array([0.5, 0.6, 0.4, 0.5])
    same = np.array([0.01, -0.01, 0.02, -0.02])
    aucs = {
        "weight_100": content + 0.1,
        "weight_10": content + 0.2 + same,
        "weight_1": content + 0.2,
    }

    assert choose(aucs, [content]) == "weight_10"


def test_no_weight_is_chosen_that_is_not_surely_better_than_every_content() -> None:
    content = np.array([0.5, 0.6, 0.4, 0.5])
    unsure = content + np.array([0.2, -0.1, 0.2, -0.1])

    assert choose({"weight_10": unsure}, [content]) is None
    assert choose({"weight_10": content + 0.1}, [content, content + 0.2]) is None
    assert choose({"weight_10": content + 0.1}, [content, content + 0.05]) == "weight_10"
    assert choose({"weight_10": np.array([0.9])}, [np.array([0.1])]) is None


def grouped_features(noise: float) -> np.ndarray:
    """Unit vectors near one of ten directions, half of whose coordinates are noise alone."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(NUM_GROUPS, 16))
    x = centres[np.arange(NUM_ITEMS) % NUM_GROUPS] + noise * generator.normal(size=(NUM_ITEMS, 16))
    return np.concatenate([x, 2.0 * generator.normal(size=(NUM_ITEMS, 16))], axis=1).astype(
        np.float32
    )


def test_pairs_that_say_nothing_leave_the_content_as_it_is() -> None:
    features = features_of_vectors(grouped_features(noise=1.0))
    random_pairs = pairs_of(*np.random.default_rng(1).integers(0, NUM_ITEMS, size=(2, 2000)))

    head, run = train_head(features, random_pairs, AUTO)

    start, _ = train_head(features, random_pairs, AUTO.model_copy(update={"num_epochs": 0}))
    assert run.geometry_weight is None
    assert run.best_epoch == 0
    assert run.held_out_auc["trained"] == run.held_out_auc["untrained"]
    assert all((head.state_dict()[name] == one).all() for name, one in start.state_dict().items())


def test_pairs_that_say_much_train_a_head_that_ranks_unseen_items_better() -> None:
    generator = np.random.default_rng(1)
    features = features_of_vectors(grouped_features(noise=1.0))
    triggers = generator.integers(0, NUM_ITEMS, 2000)
    targets = (triggers + NUM_GROUPS * generator.integers(1, 20, 2000)) % NUM_ITEMS

    _, run = train_head(features, pairs_of(triggers, targets), AUTO)

    aucs = run.held_out_auc
    assert run.geometry_weight is not None
    assert aucs["trained"] > max(aucs["untrained"], aucs["raw"]) + 0.05
    assert aucs["trained"] == aucs[f"weight_{run.geometry_weight:g}"]


def test_without_held_out_items_nothing_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    features = features_of_vectors(np.eye(3, 16, dtype=np.float32))

    _, run = train_head(features, pairs_of(np.array([0]), np.array([1])), AUTO)

    assert run.geometry_weight is None
    assert run.held_out_auc == {}
    assert "too few to hold any out" in caplog.text


def test_a_split_that_leaves_no_pair_on_one_side_is_none() -> None:
    pairs = pairs_of(np.array([0, 1]), np.array([1, 0]))

    split = hold_items_out(pairs, 2, 1.0 - 1e-9, seed=0)

    assert split == PairSplit(pairs, pairs, split.is_held_M)
    assert not split.is_held_M.any()
