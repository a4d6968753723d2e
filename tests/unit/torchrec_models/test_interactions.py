"""Interactions against plain NumPy. Shape letters: B rows, F features, E table width."""

import numpy as np
import pytest
import torch
from torch import nn

from qarm_feast.errors import ConfigError
from torchrec_models.config import RankerConfig
from torchrec_models.interactions import (
    DcnInteraction,
    DotInteraction,
    FgcnnInteraction,
    FgcnnSizes,
    build_interaction,
)

CHOICES: list[dict[str, object]] = [
    {"interaction": "dot"},
    {"interaction": "dcn"},
    {"interaction": "dcn", "dcn_rank": 2},
    {"interaction": "fgcnn"},
]


def _interaction(keys: dict[str, object], num_features: int = 5) -> nn.Module:
    torch.manual_seed(0)
    config = RankerConfig.model_validate({"embedding_dim": 4} | keys)
    return build_interaction(config, num_features).double()


def _features() -> torch.Tensor:
    return torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.manual_seed(1))


def _dots(features_BFE: np.ndarray) -> np.ndarray:
    rows = []
    for row_FE in features_BFE:
        pairs = [
            row_FE[i] @ row_FE[j] for i in range(len(row_FE)) for j in range(i + 1, len(row_FE))
        ]
        rows.append(np.concatenate([row_FE.ravel(), pairs]))
    return np.stack(rows)


def test_dot_is_the_embeddings_and_each_pair_once() -> None:
    features_BFE = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])

    arch = DotInteraction(num_features=3, embedding_dim=2)

    assert arch(features_BFE).tolist() == [[1, 2, 3, 4, 5, 6, 11, 17, 39]]
    assert arch.out_features == 9


def test_a_cross_layer_multiplies_its_input_into_the_first_one() -> None:
    arch = DcnInteraction(num_features=2, embedding_dim=1, num_layers=2, rank=None)
    with torch.no_grad():
        for layer in arch.layers:
            layer.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
            layer.bias.copy_(torch.tensor([0.0, 1.0]))

    crossed = arch(torch.tensor([[[2.0], [3.0]]]))

    # x1 = [2*3 + 2, 3*1 + 3] = [8, 6]; x2 = [2*6 + 8, 3*1 + 6].
    assert crossed.tolist() == [[20.0, 9.0]]


@pytest.mark.parametrize("rank", [None, 2])
def test_dcn_equals_its_formula(rank: int | None) -> None:
    arch = _interaction({"interaction": "dcn", "dcn_rank": rank, "dcn_num_layers": 3})
    features_BFE = _features()

    crossed_BX = arch(features_BFE).detach().numpy()

    first_BX = x_BX = features_BFE.numpy().reshape(2, 20)
    for layer in arch.layers:
        parts = [layer] if rank is None else list(layer)
        product = x_BX
        for part in parts:
            product = product @ part.weight.detach().numpy().T
        x_BX = first_BX * (product + parts[-1].bias.detach().numpy()) + x_BX
    np.testing.assert_allclose(crossed_BX, x_BX)
    assert rank is None or arch.layers[0][0].weight.shape == (rank, 20)


def test_fgcnn_convolves_pools_and_recombines_along_the_features() -> None:
    arch = FgcnnInteraction(5, 4, FgcnnSizes((2, 3), (1, 2), kernel_height=3, pooling_height=2))
    arch = arch.double()
    features_BFE = _features()

    found_BX = arch(features_BFE).detach().numpy()

    features = [features_BFE.numpy()]
    maps_BMFE = features_BFE.numpy()[:, None]
    for convolution, recombination in zip(arch.convolutions, arch.recombinations, strict=True):
        maps_BMFE = _convolved(convolution[0], maps_BMFE)
        num_kept = maps_BMFE.shape[2] // 2
        maps_BMFE = np.maximum(maps_BMFE[:, :, 0::2][:, :, :num_kept], maps_BMFE[:, :, 1::2])
        weight, bias = (p.detach().numpy() for p in recombination.parameters())
        features.append(np.tanh(maps_BMFE.reshape(2, -1) @ weight.T + bias).reshape(2, -1, 4))
    # 5 raw ones, 2 of 5 // 2 pooled ones, 2 maps of 2 // 2.
    assert [part.shape[1] for part in features] == [5, 2, 2]
    np.testing.assert_allclose(found_BX, _dots(np.concatenate(features, axis=1)))
    assert arch.out_features == found_BX.shape[1]


def _convolved(layer: nn.Conv2d, maps_BMFE: np.ndarray) -> np.ndarray:
    """Tanh of the sum over input maps and the three neighbours, zeros beyond the ends."""
    weight_OMH, bias_O = layer.weight.detach().numpy()[..., 0], layer.bias.detach().numpy()
    padded = np.pad(maps_BMFE, ((0, 0), (0, 0), (1, 1), (0, 0)))
    columns = []
    for place in range(maps_BMFE.shape[2]):
        window_BMHE = padded[:, :, place : place + 3]
        columns.append(np.einsum("bmhe,omh->boe", window_BMHE, weight_OMH) + bias_O[:, None])
    return np.tanh(np.stack(columns, axis=2))


@pytest.mark.parametrize("keys", CHOICES)
def test_an_interactions_gradient_is_right_and_trains_every_part(keys: dict[str, object]) -> None:
    arch = _interaction(keys)

    features_BFE = _features().requires_grad_()

    assert torch.autograd.gradcheck(arch, features_BFE)
    arch(features_BFE).square().sum().backward()
    assert [n for n, p in arch.named_parameters() if not p.grad.abs().sum() > 0] == []


# Exporting is torch's way now, but what TorchRec quantizes is still scripted.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("keys", CHOICES)
def test_an_interaction_scripts_and_exports(keys: dict[str, object]) -> None:
    arch = _interaction(keys)
    features_BFE = _features()

    scripted = torch.jit.script(arch)
    exported = torch.export.export(arch, (features_BFE,)).module()

    expected_BX = arch(features_BFE)
    assert expected_BX.shape == (2, arch.out_features)
    torch.testing.assert_close(scripted(features_BFE), expected_BX)
    torch.testing.assert_close(exported(features_BFE), expected_BX)


def test_pooling_needs_its_features() -> None:
    assert _interaction({"interaction": "fgcnn"}, num_features=4).out_features > 0
    with pytest.raises(ConfigError, match=r"2 poolings by 2 need 4 features, but .* gives 3"):
        _interaction({"interaction": "fgcnn"}, num_features=3)
