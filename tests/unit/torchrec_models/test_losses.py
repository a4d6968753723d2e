"""Losses, chains and their settings. Shape letters: B rows, T tasks, E table width."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn

from torchrec_models.config import CodeSizes, RankerConfig, TaskConfig, parents_first
from torchrec_models.experts import ExpertNorm
from torchrec_models.losses import ContentIdLoss, TaskLosses, build_content_id_loss
from torchrec_models.towers import TaskChain, TaskLabels, TaskTowers

NAN = float("nan")


def _tasks(**after: str | None) -> tuple[TaskConfig, ...]:
    return tuple(
        TaskConfig(name=name, label_name=f"is_{name}", after=parent)
        for name, parent in after.items()
    )


def _log_loss(probability: float, label: float) -> float:
    return -np.log(probability if label else 1 - probability)


def _logit(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))


def test_a_tasks_loss_is_the_mean_over_its_labelled_rows() -> None:
    logits_BT = torch.tensor([[_logit(0.5), _logit(0.2)], [_logit(0.9), _logit(0.7)]])
    labels_BT = torch.tensor([[1.0, NAN], [0.0, 1.0]])

    loss = TaskLosses([2.0, 3.0])(logits_BT, labels_BT)

    first = (_log_loss(0.5, 1) + _log_loss(0.9, 0)) / 2
    assert loss.item() == pytest.approx(2 * first + 3 * _log_loss(0.7, 1), rel=1e-5)


def test_an_unlabelled_row_has_no_gradient_and_a_task_without_rows_no_loss() -> None:
    logits_BT = torch.zeros(2, 2, requires_grad=True)

    loss = TaskLosses([1.0, 1.0])(logits_BT, torch.tensor([[1.0, NAN], [NAN, NAN]]))
    loss.backward()

    assert loss.item() == pytest.approx(np.log(2))
    assert logits_BT.grad.tolist() == [[-0.5, 0.0], [0.0, 0.0]]


def test_a_masked_task_has_labels_only_where_the_one_before_it_happened() -> None:
    labels = TaskLabels(TaskChain(_tasks(buy="love", like=None, love="like"), enable_esmm=False))

    found_BT = labels(torch.tensor([[1.0, 1, 1], [0, 1, 0], [1, 0, 1], [1, NAN, 1]]))

    np.testing.assert_array_equal(
        found_BT.numpy(), [[1, 1, 1], [NAN, 1, 0], [NAN, 0, NAN], [NAN, NAN, NAN]]
    )


def test_esmm_labels_a_row_that_the_task_before_did_not_reach_as_not_happened() -> None:
    labels = TaskLabels(TaskChain(_tasks(like=None, love="like"), enable_esmm=True))

    found_BT = labels(torch.tensor([[1.0, 1], [1, 0], [0, 1], [0, NAN], [NAN, 1]]))

    np.testing.assert_array_equal(found_BT.numpy(), [[1, 1], [1, 0], [0, 0], [0, 0], [NAN, NAN]])


def test_esmm_scores_the_product_of_all_that_has_to_happen() -> None:
    chain = TaskChain(_tasks(buy="love", like=None, love="like"), enable_esmm=True)
    towers_BT = torch.tensor([[_logit(0.5), _logit(0.8), _logit(0.25)]], dtype=torch.float64)

    probabilities = torch.sigmoid(chain(towers_BT))[0].tolist()

    assert probabilities == pytest.approx([0.5 * 0.25 * 0.8, 0.8, 0.25 * 0.8])


def test_esmms_logits_are_exact_where_probabilities_round_to_zero_or_one() -> None:
    chain = TaskChain(_tasks(like=None, love="like"), enable_esmm=True)
    towers_BT = torch.tensor([[-200.0, -300.0], [200.0, -300.0], [90.0, 90.0]])

    logits_BT = chain(towers_BT)

    assert logits_BT[:, 0].tolist() == [-200.0, 200.0, 90.0]
    assert logits_BT[:, 1].tolist() == pytest.approx([-500.0, -300.0, 90 - np.log(2)])


def test_esmm_trains_the_later_tower_on_rows_that_the_task_before_did_not_reach() -> None:
    tasks = _tasks(like=None, love="like")
    batch_BT = torch.tensor([[0.0, 0.0]])
    gradients = {}
    for enable_esmm in (False, True):
        chain = TaskChain(tasks, enable_esmm)
        towers_BT = torch.zeros(1, 2, requires_grad=True)
        TaskLosses([1.0, 1.0])(chain(towers_BT), TaskLabels(chain)(batch_BT)).backward()
        gradients[enable_esmm] = towers_BT.grad[0, 1].item()

    assert gradients[False] == 0.0
    # d/db of -log(1 - s(a) s(b)) at 0: s'(b) s(a) / (1 - s(a) s(b)) = (1/4 * 1/2) / (3/4).
    assert gradients[True] == pytest.approx(1 / 6)


def test_the_gradient_of_a_chain_is_right() -> None:
    chain = TaskChain(_tasks(like=None, love="like", buy="love"), enable_esmm=True)
    towers_BT = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(chain, towers_BT)


# Exporting is torch's way now, but what TorchRec quantizes is still scripted.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("enable_esmm", [False, True])
def test_towers_script_and_export(enable_esmm: bool) -> None:
    chain = TaskChain(_tasks(like=None, love="like"), enable_esmm)
    towers = TaskTowers(4, (3, 1), chain)
    mixtures_BTY = torch.randn(5, 2, 4)

    scripted = torch.jit.script(towers)
    exported = torch.export.export(towers, (mixtures_BTY,)).module()

    assert towers(mixtures_BTY).shape == (5, 2)
    torch.testing.assert_close(scripted(mixtures_BTY), towers(mixtures_BTY))
    torch.testing.assert_close(exported(mixtures_BTY), towers(mixtures_BTY))


def test_under_autocast_the_chain_and_the_content_id_term_stay_in_float32() -> None:
    torch.manual_seed(0)
    towers = TaskTowers(4, (1,), TaskChain(_tasks(like=None, love="like"), enable_esmm=True))
    content_BE, id_BE = torch.randn(2, 6, 4).unbind()
    rows_B = torch.arange(1, 7)
    expected = ContentIdLoss(1.0, 0.1, 4, 4)(content_BE, id_BE, rows_B)

    with torch.autocast("cpu", torch.bfloat16):
        logits_BT = towers(torch.randn(3, 2, 4))
        found = ContentIdLoss(1.0, 0.1, 4, 4)(content_BE, id_BE, rows_B)

    assert logits_BT.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def _content_id_reference(
    content_BE: np.ndarray, id_BE: np.ndarray, rows_B: Sequence[int], num_negatives: int
) -> float:
    num_rows, losses = len(rows_B), []
    for row in range(num_rows):
        if rows_B[row] == 0:
            continue
        following = [
            (row + step) % num_rows for step in range(1, min(num_negatives, num_rows - 1) + 1)
        ]
        others = [other for other in following if rows_B[other] not in (0, rows_B[row])]
        scores = [
            content_BE[row]
            @ id_BE[other]
            / np.linalg.norm(content_BE[row])
            / np.linalg.norm(id_BE[other])
            / 0.5
            for other in (row, *others)
        ]
        losses.append(np.log(np.exp(scores).sum()) - scores[0])
    return float(np.mean(losses)) if losses else 0.0


@pytest.mark.parametrize("rows_B", [[3, 0, 3, 5, 2], [0, 0], [4]])
@pytest.mark.parametrize("num_negatives", [2, 16])
def test_the_content_id_term_equals_its_formula(rows_B: list[int], num_negatives: int) -> None:
    rng = np.random.default_rng(0)
    content_BE, id_BE = rng.normal(size=(2, len(rows_B), 4))

    found = ContentIdLoss(0.25, 0.5, num_negatives, 4)(
        torch.from_numpy(content_BE), torch.from_numpy(id_BE), torch.tensor(rows_B)
    )

    expected = 0.25 * _content_id_reference(content_BE, id_BE, rows_B, num_negatives)
    assert found.item() == pytest.approx(expected)


def test_the_content_id_terms_gradient_reaches_content_and_ids() -> None:
    loss = ContentIdLoss(1.0, 0.5, 2, 3)
    content_BE, id_BE = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    rows_B = torch.tensor([1, 2, 1, 0])

    assert torch.autograd.gradcheck(
        lambda content, ids: loss(content, ids, rows_B),
        (content_BE.requires_grad_(), id_BE.requires_grad_()),
    )


class _TwoRanks:
    """Two threads that take part in ``all_reduce`` as two ranks."""

    def __init__(self) -> None:
        self.own = threading.local()
        self.barrier = threading.Barrier(2, timeout=30)
        self.parts: list[torch.Tensor] = [torch.empty(0)] * 2

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.parts[self.own.rank] = tensor.clone()
        self.barrier.wait()
        tensor.copy_(self.parts[0] + self.parts[1])
        self.barrier.wait()

    def run(self, work: Callable[[int], object]) -> list[object]:
        def start(rank: int) -> object:
            self.own.rank = rank
            return work(rank)

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(start, range(2)))


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> _TwoRanks:
    ranks = _TwoRanks()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", ranks.all_reduce)
    return ranks


def test_the_averaged_gradients_are_those_of_the_mean_over_all_ranks(two_ranks: _TwoRanks) -> None:
    labels_BT = torch.tensor([[1.0, NAN], [0, 1], [1, NAN], [1, NAN]])
    logits_BT = torch.arange(8.0).view(4, 2)

    def gradient(rank: int) -> torch.Tensor:
        own_BT = logits_BT.chunk(2)[rank].clone().requires_grad_()
        TaskLosses([1.0, 1.0])(own_BT, labels_BT.chunk(2)[rank]).backward()
        return own_BT.grad

    averaged_BT = torch.cat(two_ranks.run(gradient)) / 2

    probabilities_BT = torch.sigmoid(logits_BT)
    expected_BT = (probabilities_BT - labels_BT).nan_to_num() / torch.tensor([4.0, 1.0])
    torch.testing.assert_close(averaged_BT, expected_BT)


def test_running_statistics_are_of_the_rows_of_all_ranks(two_ranks: _TwoRanks) -> None:
    batches = [torch.tensor([1.0, 3.0]), torch.tensor([5.0, 11.0])]
    norms = [ExpertNorm(1, 1), ExpertNorm(1, 1)]

    two_ranks.run(lambda rank: norms[rank](batches[rank].view(2, 1, 1)))

    for norm in norms:
        assert norm.running_mean_MY.item() == 5.0
        assert norm.running_variance_MY.item() == pytest.approx(np.var([1, 3, 5, 11]))


def _raise_message(**keys: object) -> str:
    with pytest.raises(ValidationError) as caught:
        RankerConfig.model_validate(keys)
    return str(caught.value)


LIKE = {"name": "like", "label_name": "is_like"}
LOVE = {"name": "love", "label_name": "is_love", "after": "like"}


def test_tasks_are_ordered_behind_what_they_come_after() -> None:
    assert parents_first(_tasks(buy="love", love="like", like=None)) == [2, 1, 0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tasks": [LOVE]}, r"come after ['like'], but the tasks are ['love']"),
        ({"tasks": [LIKE | {"after": "love"}, LOVE]}, "in a circle: ['like', 'love']"),
        ({"tasks": [LIKE | {"after": "like"}]}, "in a circle: ['like']"),
        ({"enable_esmm": True}, "enable_esmm needs a task that comes after another"),
        ({"enable_esmm": True, "tasks": [LIKE]}, "enable_esmm needs a task"),
        ({"content_id_weight": 0.1}, "needs the features `item_id` and `vector`"),
        ({"features": ["item_id", "vector", "aligned_cosine"]}, "`aligned_cosine` is part of"),
        ({"fgcnn_kernel_height": 2}, "fgcnn_kernel_height is 2, but must be odd"),
        ({"fgcnn_num_maps": [2]}, "fgcnn_num_maps has 1 layers, fgcnn_num_new_maps 2"),
        ({"dcn_rank": 0}, "dcn_rank"),
        ({"head": "moe"}, "head"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    keys: dict[str, object], message: str
) -> None:
    assert message in _raise_message(**keys)


def test_a_chain_and_its_options_are_read() -> None:
    config = RankerConfig.model_validate(
        {
            "tasks": [LIKE, LOVE],
            "enable_esmm": True,
            "features": ["item_id", "vector"],
            "content_id_weight": 1e-3,
        }
    )

    sizes = CodeSizes(level_sizes=(4,), pool_size=9, vector_dim=5)
    loss = build_content_id_loss(config, sizes)

    assert isinstance(loss, nn.Module)
    assert (loss.weight, loss.temperature, loss.num_negatives, loss.vector_dim) == (
        1e-3,
        0.1,
        16,
        5,
    )
    assert build_content_id_loss(RankerConfig(), sizes) is None
