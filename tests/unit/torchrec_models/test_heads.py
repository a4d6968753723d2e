"""Heads against plain NumPy, row by row and expert by expert.

Shape letters: B rows, X input width, T tasks, M experts, Y expert width.
"""

import numpy as np
import pytest
import torch
from torch import nn

from qarm_feast.errors import ConfigError
from torchrec_models.config import RankerConfig, TaskConfig
from torchrec_models.experts import (
    ExpertBanks,
    ExpertGates,
    ExpertNorm,
    ExpertSizes,
    FeatureGate,
    StackedLinear,
)
from torchrec_models.heads import Head, Home, Mmoe, Ple, SharedBottom, build_head

HEADS = ("shared_bottom", "mmoe", "ple", "home")


def _tasks(num_tasks: int) -> tuple[TaskConfig, ...]:
    return tuple(TaskConfig(name=f"t{n}", label_name=f"is_t{n}") for n in range(num_tasks))


def _head(name: str, num_tasks: int, in_features: int = 5, **keys: object) -> Head:
    torch.manual_seed(num_tasks)
    config = RankerConfig.model_validate({"head": name, "expert_layer_sizes": (6, 4)} | keys)
    return build_head(config, in_features, _tasks(num_tasks)).double()


def _parts(rows_BX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take rows apart into interactions and dense features."""
    return rows_BX[:, :3], rows_BX[:, 3:]


def _rows(num_rows: int = 3, width: int = 5) -> torch.Tensor:
    return torch.randn(num_rows, width, dtype=torch.float64, generator=torch.manual_seed(7))


def _softmax(x: np.ndarray) -> np.ndarray:
    exps = np.exp(x - x.max())
    return exps / exps.sum()


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _affine(layer: nn.Module, place: int, x: np.ndarray) -> np.ndarray:
    assert isinstance(layer, StackedLinear)
    weights = layer.weight_IXH.detach().numpy()
    biases = layer.bias_I1H.detach().numpy()
    return x @ weights[place] + biases[place, 0]


def _expert(banks: ExpertBanks, expert: int, x: np.ndarray) -> np.ndarray:
    """One expert's output for the one vector that it reads; scoring statistics if normalised."""
    place, number = divmod(expert, banks.experts_per_input)
    hidden = np.split(_affine(banks.first_layer, place, x), banks.experts_per_input)[number]
    for layer in banks.later_layers:
        hidden = _affine(layer, expert, np.maximum(hidden, 0))
    if isinstance(banks.activation, nn.ReLU):
        return np.maximum(hidden, 0)
    assert isinstance(banks.activation, nn.Sequential)
    norm = {name: value.numpy() for name, value in banks.activation[0].state_dict().items()}
    scale = norm["gain_MY"] / np.sqrt(norm["running_variance_MY"] + 1e-5)
    hidden = (hidden - norm["running_mean_MY"][expert]) * scale[expert] + norm["bias_MY"][expert]
    return hidden * _sigmoid(hidden)


def _gate_logits(gates: ExpertGates, place: int, x: np.ndarray) -> np.ndarray:
    """Logits of all experts for one mixture."""
    if gates.num_inputs > 1:
        return _affine(gates.layer, place, x)
    return np.split(_affine(gates.layer, 0, x), gates.num_mixtures)[place]


def _gated(gate: FeatureGate, bank: int, x: np.ndarray) -> np.ndarray:
    place, number = divmod(bank, gate.banks_per_input)
    low = np.split(_affine(gate.down, place, x), gate.banks_per_input)[number]
    return x * 2 * _sigmoid(_affine(gate.up, bank, low))


@pytest.mark.parametrize("num_tasks", [1, 2, 3])
def test_a_shared_bottom_gives_each_task_the_same_vector(num_tasks: int) -> None:
    head = _head("shared_bottom", num_tasks)
    assert isinstance(head, SharedBottom)
    rows_BX = _rows()

    mixtures_BTY = head(*_parts(rows_BX)).detach().numpy()

    first, second = head.bottom[0], head.bottom[2]
    hidden_BH = np.maximum(
        rows_BX.numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0
    )
    bottom_BY = np.maximum(
        hidden_BH @ second.weight.detach().numpy().T + second.bias.detach().numpy(), 0
    )
    assert mixtures_BTY.shape == (3, num_tasks, 4)
    for task in range(num_tasks):
        np.testing.assert_allclose(mixtures_BTY[:, task], bottom_BY)


@pytest.mark.parametrize("layer_sizes", [(4,), (6, 4)])
@pytest.mark.parametrize("num_tasks", [1, 2, 3])
def test_mmoe_mixes_shared_experts_by_each_tasks_gate(
    num_tasks: int, layer_sizes: tuple[int, ...]
) -> None:
    head = _head("mmoe", num_tasks, num_experts=3, expert_layer_sizes=layer_sizes)
    assert isinstance(head, Mmoe)
    rows_BX = _rows()

    mixtures_BTY = head(*_parts(rows_BX)).detach().numpy()

    level = head.level
    for row, x in enumerate(rows_BX.numpy()):
        experts = [_expert(level.experts, expert, x) for expert in range(3)]
        for task in range(num_tasks):
            weights = _softmax(_gate_logits(level.gates, task, x))
            expected = sum(w * y for w, y in zip(weights, experts, strict=True))
            np.testing.assert_allclose(mixtures_BTY[row, task], expected)


@pytest.mark.parametrize("num_levels", [1, 2, 3])
@pytest.mark.parametrize("num_tasks", [1, 2, 3])
def test_ple_lets_a_task_see_its_own_and_the_shared_experts(
    num_tasks: int, num_levels: int
) -> None:
    head = _head("ple", num_tasks, num_levels=num_levels)
    assert isinstance(head, Ple)
    rows_BX = _rows()

    mixtures_BTY = head(*_parts(rows_BX)).detach().numpy()

    for row, x in enumerate(rows_BX.numpy()):
        inputs = [x] * (num_tasks + 1)
        for level in head.levels:
            outputs = [
                _expert(level.experts, 2 * n + k, z) for n, z in enumerate(inputs) for k in (0, 1)
            ]
            mixtures = []
            for mixture, z in enumerate(inputs[: level.gates.num_mixtures]):
                own = [mixture, num_tasks] if mixture < num_tasks else range(num_tasks + 1)
                seen = [2 * n + k for n in own for k in (0, 1)]
                weights = _softmax(_gate_logits(level.gates, mixture, z)[seen])
                mixtures.append(sum(w * outputs[m] for w, m in zip(weights, seen, strict=True)))
            inputs = mixtures
        np.testing.assert_allclose(mixtures_BTY[row], np.stack(inputs))


@pytest.mark.parametrize("experts_per_bank", [1, 2])
@pytest.mark.parametrize(
    "groups", [(("t0",),), (("t0", "t1"),), (("t1",), ("t0",)), (("t0", "t2"), ("t1",))]
)
def test_home_mixes_two_levels_of_its_hierarchy(
    groups: tuple[tuple[str, ...], ...], experts_per_bank: int
) -> None:
    num_tasks = sum(len(group) for group in groups)
    head = _head("home", num_tasks, task_groups=groups, experts_per_bank=experts_per_bank)
    assert isinstance(head, Home)
    head(*_parts(_rows(50)))  # One step of training: statistics to score by.
    head.eval()
    rows_BX = _rows()

    mixtures_BTY = head(*_parts(rows_BX)).detach().numpy()

    for row, x in enumerate(rows_BX.numpy()):
        expected = _home_of_one_row(head, x, groups, experts_per_bank)
        np.testing.assert_allclose(mixtures_BTY[row], expected)


def _home_of_one_row(
    head: Home, x: np.ndarray, groups: tuple[tuple[str, ...], ...], per_bank: int
) -> np.ndarray:
    num_meta = 1 + len(groups)
    num_tasks = sum(len(group) for group in groups)
    group_of = [
        next(g for g, names in enumerate(groups) if f"t{t}" in names) for t in range(num_tasks)
    ]

    def bank(level: nn.Module, gate: FeatureGate, number: int, z: np.ndarray) -> list[np.ndarray]:
        gated = _gated(gate, number, z)
        return [_expert(level.experts, number * per_bank + k, gated) for k in range(per_bank)]

    def mixture(
        level: nn.Module, place: int, u: np.ndarray, outputs: dict[int, list[np.ndarray]], own: int
    ) -> np.ndarray:
        seen = [(n, k) for n in outputs for k in range(per_bank)]
        logits = _gate_logits(level.gates, place, u)
        weights = _softmax(np.array([logits[n * per_bank + k] for n, k in seen]))
        mixed = sum(w * outputs[n][k] for w, (n, k) in zip(weights, seen, strict=True))
        own_logits = _gate_logits(level.self_gates, place, u)[own * per_bank :][:per_bank]
        own_weights = _sigmoid(own_logits) if per_bank == 1 else _softmax(own_logits)
        return mixed + sum(w * y for w, y in zip(own_weights, outputs[own], strict=True))

    meta = {n: bank(head.meta_level, head.meta_feature_gate, n, x) for n in range(num_meta)}
    z = [mixture(head.meta_level, 0, x, meta, 0)]
    for group in range(1, num_meta):
        seen = {0: meta[0], group: meta[group]}
        z.append(mixture(head.meta_level, group, x, seen, group))
    mixtures = []
    for task, group in enumerate(group_of):
        own = num_meta + task
        reads = {0: z[0], 1 + group: z[1 + group], own: z[1 + group]}
        outputs = {
            n: bank(head.task_level, head.task_feature_gate, n, read) for n, read in reads.items()
        }
        u = np.concatenate([z[1 + group], z[0]])
        mixtures.append(mixture(head.task_level, task, u, outputs, own))
    return np.stack(mixtures)


def test_expert_norm_trains_on_the_batch_and_scores_by_all_batches() -> None:
    norm = ExpertNorm(num_experts=1, width=1)
    batches = [torch.tensor([1.0, 3.0]), torch.tensor([5.0, 11.0])]

    trained = [norm(batch.reshape(2, 1, 1)).flatten() for batch in batches]

    for output in trained:
        torch.testing.assert_close(output, torch.tensor([-1.0, 1.0]), atol=1e-5, rtol=0)
    # Plain means over the first steps: means 2 and 8, variances 1 and 9.
    assert norm.running_mean_MY.item() == pytest.approx(5.0)
    assert norm.running_variance_MY.item() == pytest.approx(5.0)
    scored = norm.eval()(torch.tensor([[[5.0]]]))
    assert scored.item() == pytest.approx(0.0)


def test_expert_norm_takes_one_row() -> None:
    norm = ExpertNorm(num_experts=2, width=3)

    trained = norm(torch.ones(1, 2, 3))

    assert trained.tolist() == torch.zeros(1, 2, 3).tolist()
    assert norm.eval()(torch.ones(1, 2, 3)).isfinite().all()


def test_expert_norm_equals_torchs_batch_norm_in_training() -> None:
    x_BMY = torch.randn(7, 2, 3, dtype=torch.float64)

    ours = ExpertNorm(2, 3).double()(x_BMY)

    theirs = nn.BatchNorm1d(6).double()(x_BMY.flatten(1)).view(7, 2, 3)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("num_tasks", [1, 2, 3])
def test_every_part_of_a_head_is_trained(name: str, num_tasks: int) -> None:
    head = _head(name, num_tasks)

    (head(*_parts(_rows(20))) ** 2).sum().backward()

    assert [n for n, p in head.named_parameters() if not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", HEADS)
def test_a_head_may_have_no_dense_features(name: str) -> None:
    head, rows_BX = _head(name, 2).eval(), _rows()

    alone_BTY = head(rows_BX, rows_BX[:, :0])

    torch.testing.assert_close(alone_BTY, head(*_parts(rows_BX)))


@pytest.mark.parametrize("name", HEADS)
def test_a_heads_gradient_is_right(name: str) -> None:
    # In scoring mode: statistics of the batch are no input, and running ones would move.
    head = _head(name, 2, expert_layer_sizes=(3,)).eval()

    assert torch.autograd.gradcheck(head, _parts(_rows(2).requires_grad_()))


# Exporting is torch's way now, but what TorchRec quantizes is still scripted.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", HEADS)
def test_a_head_scripts_and_exports(name: str) -> None:
    head = _head(name, 2).eval()
    parts = _parts(_rows())

    scripted = torch.jit.script(head)
    exported = torch.export.export(head, parts).module()

    torch.testing.assert_close(scripted(*parts), head(*parts))
    torch.testing.assert_close(exported(*parts), head(*parts))


def test_a_group_that_leaves_a_task_out_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"holds \['t0', 't9'\], but the tasks are \['t0', 't1'\]"
    ):
        _head("home", 2, task_groups=(("t0", "t9"),))


def test_an_expert_reads_the_input_of_its_bank() -> None:
    banks = ExpertBanks(2, 1, 4, (1,))
    with torch.no_grad():
        banks.first_layer.weight_IXH.copy_(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
        banks.first_layer.bias_I1H.zero_()

    outputs_BMY = banks(torch.tensor([[[1.0]], [[10.0]]]))

    assert outputs_BMY.tolist() == [[[1.0], [2.0], [30.0], [40.0]]]
    assert ExpertSizes((8, 4), 2).out_features == 4
