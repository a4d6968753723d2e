"""Shape letters: B rows, H items, L levels, E table width."""

import numpy as np
import pytest
import torch
from test_dataset import make_dataset
from test_sharding import whole_weights
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_models.config import RankerConfig, resolve_tasks
from torchrec_models.inputs import TrainInputs
from torchrec_models.ranker import RankerTrainTask, build_ranker
from torchrec_models.row_store import code_sizes
from torchrec_models.sequences import SequenceAttention, TargetAttention, segment_softmax
from torchrec_models.sharding import Ranks, shard_ranker

NUM_LEVELS, WIDTH, MAX_LENGTH = 3, 4, 6


def _attention() -> TargetAttention:
    torch.manual_seed(0)
    attention = TargetAttention(NUM_LEVELS, WIDTH, MAX_LENGTH)
    torch.nn.init.normal_(attention.level_weights)
    torch.nn.init.normal_(attention.place_biases)
    return attention


def _reference(
    attention: TargetAttention, target_BLE: np.ndarray, items: list[np.ndarray]
) -> np.ndarray:
    """Attend row by row; ``items`` holds ``[n, L, E]`` per row."""
    weights_L, biases, match_EL = (
        parameter.detach().numpy()
        for parameter in (attention.level_weights, attention.place_biases, attention.match.weight)
    )
    rows = []
    for target_LE, items_nLE in zip(target_BLE, items, strict=True):
        dots_nL = np.array(
            [
                [item_LE[level] @ target_LE[level] for level in range(NUM_LEVELS)]
                for item_LE in items_nLE
            ]
        ).reshape(-1, NUM_LEVELS)
        weights_n = np.exp(dots_nL @ weights_L + biases[: len(items_nLE)])
        shares_n = weights_n / weights_n.sum()
        rows.append([shares_n @ items_nLE.sum(axis=1), match_EL @ (shares_n @ dots_nL)])
    return np.array(rows)


def test_attention_equals_a_softmax_row_by_row_and_is_zero_without_items() -> None:
    rng = np.random.default_rng(0)
    lengths = [2, 0, MAX_LENGTH, 1]
    target_BLE = rng.normal(size=(4, NUM_LEVELS, WIDTH)).astype(np.float32)
    items = [rng.normal(size=(n, NUM_LEVELS, WIDTH)).astype(np.float32) for n in lengths]
    attention = _attention()

    found_B2E = attention(
        torch.from_numpy(target_BLE), torch.from_numpy(np.concatenate(items)), torch.tensor(lengths)
    )

    expected = _reference(attention, target_BLE, items)
    np.testing.assert_allclose(found_B2E.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert found_B2E[1].abs().max() == 0


def test_attention_over_no_items_at_all_is_zero() -> None:
    empty_HLE = torch.zeros(0, NUM_LEVELS, WIDTH)

    found_B2E = _attention()(torch.ones(2, NUM_LEVELS, WIDTH), empty_HLE, torch.tensor([0, 0]))

    assert found_B2E.tolist() == torch.zeros(2, 2, WIDTH).tolist()


def test_a_softmax_of_huge_scores_stays_finite() -> None:
    scores_H = torch.tensor([1000.0, 1000.0, -1000.0], requires_grad=True)

    shares_H = segment_softmax(scores_H, torch.tensor([0, 0, 2]), 3)
    shares_H[0].backward()

    assert shares_H.tolist() == [0.5, 0.5, 1.0]
    assert scores_H.grad is not None
    assert scores_H.grad.tolist() == [0.25, -0.25, 0.0]


def test_a_target_without_codes_gets_zeros_and_the_others_keep_their_place() -> None:
    torch.manual_seed(0)
    arch = SequenceAttention(["history"], 2, 1, 5, is_frozen=False)
    targets = JaggedTensor(
        torch.tensor([[1.0], [2.0], [3.0], [4.0]]), lengths=torch.tensor([2, 0, 2])
    )
    items = JaggedTensor(torch.tensor([[5.0], [6.0]]), lengths=torch.tensor([0, 0, 2]))

    vectors_BVE = arch({"target_sequence": targets, "history": items})

    # The target decoded, the attended item (a row's only one is attended wholly), the match.
    assert vectors_BVE[:, 0, 0].tolist() == [3.0, 0.0, 7.0]
    assert vectors_BVE[:, 1, 0].tolist() == [0.0, 0.0, 11.0]
    match = arch.attentions[0].match(torch.tensor([5.0 * 3, 6.0 * 4]))
    assert vectors_BVE[:, 2, 0].tolist() == pytest.approx([0.0, 0.0, match.item()])


def test_a_ranker_with_sequences_scores_alike_sharded_and_unsharded(
    inputs: TrainInputs, ranks: Ranks
) -> None:
    config = RankerConfig(
        embedding_dim=8,
        num_searched=2,
        features=("item_id", "attention", "shared_history", "long_history"),
    )
    tasks = resolve_tasks(config, inputs.store.manifest.label_names)
    vocabularies, sizes = inputs.store.vocabularies(), code_sizes(inputs.store.manifest)
    unsharded = RankerTrainTask(
        build_ranker(config, tasks, vocabularies, sizes, torch.device("cpu")), [1.0, 1.0]
    )
    on_meta = build_ranker(config, tasks, vocabularies, sizes, torch.device("meta"))
    sharded = shard_ranker(RankerTrainTask(on_meta, [1.0, 1.0]), config)
    batch = next(make_dataset(inputs, "test", config, ranks).eval_batches())

    unsharded.load_state_dict(whole_weights(sharded.model))

    _, (expected_BT, _) = unsharded(batch)
    _, (found_BT, _) = sharded.model(batch)
    assert expected_BT.std() > 0
    torch.testing.assert_close(found_BT, expected_BT)
