import math

import numpy as np
import pytest
import torch

from qarm_feast.alignment.losses import (
    Temperature,
    anchor_loss,
    geometry_loss,
    info_nce,
    pair_logits,
)
from qarm_feast.alignment.pair_rows import BatchNegatives, PairRows


def _pairs(triggers: list[int], targets: list[int], users: list[int]) -> PairRows:
    columns = (np.array(column, dtype=np.int64) for column in (triggers, targets, users))
    return PairRows(*columns, np.ones(len(triggers), dtype=np.float32))


def test_blocked_are_repeated_same_user_and_known_pairs_but_never_a_rows_own_target() -> None:
    batch = _pairs([0, 1, 2, 3], [10, 11, 10, 0], [-1, 5, 5, -1])
    known = _pairs([0, 1, 2, 3, 11], [10, 11, 10, 0, 3], [-1] * 5)

    blocked_BB = BatchNegatives(known, num_items=12).blocked(batch, slice(None))

    assert blocked_BB.int().tolist() == [
        [0, 0, 1, 1],  # row 2 has the same target; row 3's target is this row's trigger
        [0, 0, 1, 0],  # row 2 is of the same user
        [1, 1, 0, 0],  # row 0 has the same target, row 1 the same user
        [0, 1, 0, 0],  # row 1's target is a known pair
    ]


def blocked_reference(batch: PairRows, known: PairRows) -> np.ndarray:
    """The rules one by one, in the words of the docstring."""
    pairs = {*zip(known.triggers, known.targets, strict=True)}
    pairs |= {(target, trigger) for trigger, target in pairs}
    size = len(batch)
    blocked_BB = np.zeros((size, size), dtype=bool)
    for a in range(size):
        for b in range(size):
            trigger, target = batch.triggers[a], batch.targets[b]
            is_known = (trigger, target) in pairs or trigger == target
            is_same_user = batch.users[a] == batch.users[b] >= 0
            is_repeated = batch.targets[a] == target or trigger == batch.triggers[b]
            blocked_BB[a, b] = a != b and (is_known or is_same_user or is_repeated)
    return blocked_BB


def test_blocked_equals_the_rules_one_by_one_for_any_share_of_the_rows_and_both_directions() -> (
    None
):
    generator = np.random.default_rng(0)
    triggers, targets = generator.integers(0, 30, size=(2, 60))
    known = PairRows(triggers, targets, generator.integers(-1, 8, 60), np.ones(60, np.float32))
    batch = known.take(generator.permutation(60)[:24])
    negatives = BatchNegatives(known, num_items=30)

    expected_BB = blocked_reference(batch, known)

    for own in (slice(None), slice(0, 12), slice(12, 24), slice(24, 24)):
        by_trigger_QB = negatives.blocked(batch, own).numpy()
        by_target_QB = negatives.blocked(batch.swapped(), own).numpy()
        np.testing.assert_array_equal(by_trigger_QB, expected_BB[own])
        np.testing.assert_array_equal(by_target_QB, expected_BB.T[own])


def test_log_shares_count_each_place_in_a_pair_and_one_more() -> None:
    negatives = BatchNegatives(_pairs([0, 0], [1, 2], [-1, -1]), num_items=4)

    np.testing.assert_allclose(
        negatives.log_shares_M.numpy(), np.log(np.array([3, 2, 2, 1]) / 8), rtol=1e-6
    )


def info_nce_reference(
    triggers_BD: np.ndarray, targets_BD: np.ndarray, mask_BB: np.ndarray, weights_B: np.ndarray
) -> float:
    logits_BB = triggers_BD @ targets_BD.T / 0.5
    total = 0.0
    for row, weight in enumerate(weights_B):
        own = np.exp(logits_BB[row, row])
        by_trigger = own / np.exp(logits_BB[row])[~mask_BB[row]].sum()
        by_target = own / np.exp(logits_BB[:, row])[~mask_BB[:, row]].sum()
        total -= weight * (np.log(by_trigger) + np.log(by_target)) / 2
    return float(total / weights_B.sum())


def test_info_nce_equals_the_plain_formula_whole_and_as_a_sum_of_shares() -> None:
    generator = np.random.default_rng(0)
    triggers_BD, targets_BD = generator.normal(size=(2, 5, 3)).astype(np.float32)
    mask_BB = generator.random((5, 5)) < 0.4
    np.fill_diagonal(mask_BB, False)
    weights_B = generator.random(5).astype(np.float32) + 0.1

    def share(own: slice) -> float:
        triggers, targets, mask, weights = (
            torch.from_numpy(array) for array in (triggers_BD, targets_BD, mask_BB, weights_B)
        )
        by_trigger_QB = pair_logits(triggers[own], targets, mask[own], 0.5)
        by_target_QB = pair_logits(targets[own], triggers, mask.T[own], 0.5)
        return float(info_nce(by_trigger_QB, by_target_QB, weights, own))

    expected = info_nce_reference(triggers_BD, targets_BD, mask_BB, weights_B)
    np.testing.assert_allclose(share(slice(None)), expected, rtol=1e-5)
    np.testing.assert_allclose(share(slice(0, 2)) + share(slice(2, 5)), expected, rtol=1e-5)


def test_info_nce_of_a_pair_without_negatives_is_zero_and_has_a_finite_gradient() -> None:
    embeddings_BD = torch.ones(1, 2, requires_grad=True)
    logits_BB = pair_logits(embeddings_BD, embeddings_BD, torch.zeros(1, 1, dtype=torch.bool), 0.1)

    loss = info_nce(logits_BB, logits_BB.T, torch.ones(1))
    loss.backward()

    assert loss.item() == 0.0
    assert torch.equal(embeddings_BD.grad, torch.zeros(1, 2))


def test_geometry_loss_is_the_mean_squared_change_of_cosines_whole_and_as_a_sum_of_shares() -> None:
    embeddings_SD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    content_SD = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])

    shares = [float(geometry_loss(embeddings_SD, content_SD, slice(a, a + 1))) for a in range(3)]

    # Of nine cosines four are changed, each by one.
    assert float(geometry_loss(embeddings_SD, content_SD)) == pytest.approx(4 / 9)
    assert sum(shares) == pytest.approx(4 / 9)
    assert float(geometry_loss(embeddings_SD, content_SD, slice(3, 3))) == 0.0


def test_a_learned_temperature_starts_where_it_is_told_and_stays_within_its_bounds() -> None:
    temperature = Temperature(0.5, is_learned=True)
    assert temperature.value == pytest.approx(0.5)

    for logarithm, expected in ((math.log(1e-4), 0.01), (3.0, 1.0)):
        temperature.logarithm.data.fill_(logarithm)
        temperature.clamp()
        assert temperature.value == pytest.approx(expected)


def test_a_fixed_temperature_has_nothing_to_train() -> None:
    temperature = Temperature(0.07, is_learned=False)

    temperature.clamp()

    assert temperature() == 0.07
    assert not list(temperature.parameters())


def test_anchor_loss_is_the_mean_distance_from_each_anchor_whole_and_as_a_sum_of_shares() -> None:
    embeddings_SD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    anchors_SD = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])

    shares = [float(anchor_loss(embeddings_SD, anchors_SD, slice(a, a + 1))) for a in range(3)]

    # Cosines 1, 0 and .8.
    assert float(anchor_loss(embeddings_SD, anchors_SD)) == pytest.approx((0 + 1 + 0.2) / 3)
    assert sum(shares) == pytest.approx((0 + 1 + 0.2) / 3)
    assert float(anchor_loss(embeddings_SD, anchors_SD, slice(3, 3))) == 0.0
