import numpy as np
import torch

from qarm_feast.alignment.losses import geometry_loss, info_nce, negatives_mask


def test_negatives_mask_leaves_out_own_repeated_same_user_and_known_pairs() -> None:
    triggers_B = torch.tensor([0, 1, 2, 3])
    targets_B = torch.tensor([10, 11, 10, 0])
    users_B = torch.tensor([-1, 5, 5, -1])
    is_pair_BB = torch.zeros(4, 4, dtype=torch.bool)
    is_pair_BB[3, 1] = True

    mask_BB = negatives_mask(triggers_B, targets_B, users_B, is_pair_BB)

    assert mask_BB.int().tolist() == [
        [0, 1, 0, 0],  # row 2 has the same target; row 3's target is this row's trigger
        [1, 0, 0, 1],  # row 2 is of the same user
        [0, 0, 0, 1],  # row 0 has the same target
        [1, 0, 1, 0],  # row 1's target is a known pair; two pairs without user are no neighbours
    ]


def info_nce_reference(
    triggers_BD: np.ndarray, targets_BD: np.ndarray, mask_BB: np.ndarray, weights_B: np.ndarray
) -> float:
    logits_BB = triggers_BD @ targets_BD.T / 0.5
    total = 0.0
    for row, weight in enumerate(weights_B):
        own = np.exp(logits_BB[row, row])
        by_trigger = own / (own + np.exp(logits_BB[row])[mask_BB[row]].sum())
        by_target = own / (own + np.exp(logits_BB[:, row])[mask_BB[:, row]].sum())
        total -= weight * (np.log(by_trigger) + np.log(by_target)) / 2
    return float(total / weights_B.sum())


def test_info_nce_equals_the_plain_formula() -> None:
    generator = np.random.default_rng(0)
    triggers_BD, targets_BD = generator.normal(size=(2, 5, 3)).astype(np.float32)
    mask_BB = generator.random((5, 5)) < 0.6
    np.fill_diagonal(mask_BB, False)
    weights_B = generator.random(5).astype(np.float32) + 0.1

    loss = info_nce(
        *(torch.from_numpy(array) for array in (triggers_BD, targets_BD, mask_BB, weights_B)), 0.5
    )

    expected = info_nce_reference(triggers_BD, targets_BD, mask_BB, weights_B)
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)


def test_info_nce_of_a_pair_without_negatives_is_zero_and_has_a_finite_gradient() -> None:
    embeddings_BD = torch.ones(1, 2, requires_grad=True)
    mask_BB = torch.zeros(1, 1, dtype=torch.bool)

    loss = info_nce(embeddings_BD, embeddings_BD, mask_BB, torch.ones(1), 0.1)
    loss.backward()

    assert loss.item() == 0.0
    assert torch.equal(embeddings_BD.grad, torch.zeros(1, 2))


def test_geometry_loss_is_the_mean_squared_change_of_cosines() -> None:
    embeddings_BD = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    content_BB = torch.tensor([[1.0, 0.5], [0.5, 1.0]])

    assert float(geometry_loss(embeddings_BD, content_BB)) == 0.125
