import numpy as np
import pytest
import torch

from qarm_feast.alignment.config import AlignmentConfig, QFormerConfig
from qarm_feast.alignment.encoder import project_features
from qarm_feast.alignment.features import ItemFeatures
from qarm_feast.alignment.fusion import (
    AlignmentHead,
    ContentFusion,
    FusionQFormer,
    FusionSizes,
    build_fusion,
    principal_map,
)

SHAPES = {"text": (1, 24), "image": (3, 16)}
SMALL = QFormerConfig(num_queries=2, num_layers=2, num_heads=2, width=16)
KINDS = pytest.mark.parametrize("kind", ["concat", "q_former"])


def random_features(num_items: int, seed: int = 0) -> ItemFeatures:
    generator = np.random.default_rng(seed)
    tokens = {
        name: generator.normal(size=(num_items, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    has_image_N = generator.random(num_items) < 0.6
    tokens["image"][~has_image_N] = 0
    return ItemFeatures(tokens, {"text": np.ones(num_items, dtype=bool), "image": has_image_N})


def trained_fusion(kind: str) -> ContentFusion:
    """A fusion whose every parameter is random, as training leaves it."""
    torch.manual_seed(1)
    sizes = FusionSizes(kind=kind, hidden_dim=16, q_former=SMALL)  # type: ignore[arg-type]
    fusion = build_fusion(SHAPES, 16, sizes)
    fusion.start_from_content(*random_features(80, seed=1).tensors())
    torch.nn.init.normal_(fusion.correction.weight, std=0.1)  # type: ignore[union-attr]
    return fusion.eval()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def centred(features: ItemFeatures, fusion: ContentFusion) -> np.ndarray:
    """Plain reference of the concatenated content."""
    mean = fusion.mean_E.numpy()
    rows = []
    for item in range(len(features)):
        blocks, begin = [], 0
        for name, (_, width) in SHAPES.items():
            block = unit(features.by_modality[name][item].mean(axis=0)) - mean[begin:][:width]
            blocks.append(block * features.present[name][item])
            begin += width
        rows.append(np.concatenate(blocks) / sum(f[item] for f in features.present.values()) ** 0.5)
    return np.array(rows)


def gelu(x: np.ndarray) -> np.ndarray:
    return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()


@KINDS
def test_an_untrained_fusion_keeps_the_cosines_of_centred_content(kind: str) -> None:
    features = random_features(60)
    sizes = FusionSizes(kind=kind, q_former=SMALL)  # type: ignore[arg-type]
    fusion = build_fusion(SHAPES, 40, sizes)

    fusion.start_from_content(*features.tensors())

    with torch.no_grad():
        embeddings_ND = fusion(*features.tensors()).numpy()
    content_NC = unit(centred(features, fusion))
    np.testing.assert_allclose(
        embeddings_ND @ embeddings_ND.T, content_NC @ content_NC.T, atol=1e-5
    )


def test_the_mean_of_a_modality_is_that_of_the_items_that_have_it() -> None:
    tokens = np.array([[[3.0, 0.0]], [[0.0, 2.0]], [[9.0, 9.0]]], dtype=np.float32)
    is_present = np.array([True, True, False])

    mean_C, _ = principal_map(
        *ItemFeatures({"image": tokens}, {"image": is_present}).tensors(), 1, is_centred=True
    )

    assert mean_C.tolist() == [0.5, 0.5]


def test_the_head_equals_its_formula() -> None:
    features, head = random_features(9), trained_fusion("concat")
    assert isinstance(head, AlignmentHead)
    weights = {name: value.detach().numpy() for name, value in head.named_parameters()}

    content_NC = centred(features, head)
    hidden_NH = gelu(content_NC * 40**0.5 @ weights["hidden.weight"].T + weights["hidden.bias"])
    expected_ND = (
        content_NC @ weights["linear.weight"].T + hidden_NH @ weights["correction.weight"].T
    )

    np.testing.assert_allclose(project_features(head, features, 16), unit(expected_ND), atol=1e-5)


def test_the_q_former_equals_its_formula() -> None:
    features, fusion = random_features(9), trained_fusion("q_former")
    assert isinstance(fusion, FusionQFormer)
    weights = {name: value.detach().numpy() for name, value in fusion.named_parameters()}

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        spread = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(
            x.var(axis=-1, keepdims=True) + 1e-5
        )
        return spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    expected = []
    for item in range(len(features)):
        rows = [weights["queries"]]
        for name, (_, width) in SHAPES.items():
            if features.present[name][item]:
                tokens_TE = unit(features.by_modality[name][item]) * width**0.5
                rows.append(linear(tokens_TE, f"projections.{name}") + weights[f"places.{name}"])
        x_LW = np.concatenate(rows)
        for n in range(2):
            parts = linear(
                norm(x_LW, f"layers.{n}.attention_norm"), f"layers.{n}.queries_keys_values"
            )
            heads = []
            for head in range(2):
                q, k, v = (parts[:, p * 16 + head * 8 :][:, :8] for p in range(3))
                scores = np.exp(q @ k.T / 8**0.5)
                heads.append(scores / scores.sum(axis=1, keepdims=True) @ v)
            x_LW = x_LW + linear(np.concatenate(heads, axis=1), f"layers.{n}.output")
            hidden = gelu(linear(norm(x_LW, f"layers.{n}.hidden_norm"), f"layers.{n}.hidden"))
            x_LW = x_LW + linear(hidden, f"layers.{n}.hidden_output")
        expected.append(norm(x_LW[:2], "norm").reshape(-1) @ weights["correction.weight"].T)
    expected_ND = centred(features, fusion) @ weights["linear.weight"].T + np.array(expected)

    np.testing.assert_allclose(project_features(fusion, features, 16), unit(expected_ND), atol=1e-4)


@KINDS
def test_the_tokens_of_an_absent_modality_change_nothing(kind: str) -> None:
    features, fusion = random_features(30), trained_fusion(kind)
    other = random_features(30)
    other.by_modality["image"][~features.present["image"]] = 7.0

    before_ND, after_ND = (project_features(fusion, part, 16) for part in (features, other))

    assert np.array_equal(before_ND, after_ND)
    masked = ItemFeatures(
        features.by_modality,
        {"text": features.present["text"], "image": np.zeros(30, dtype=bool)},
    )
    assert not np.allclose(project_features(fusion, masked, 16), before_ND)


@KINDS
def test_an_item_whose_content_is_nothing_has_a_direction_and_a_gradient_of_usual_size(
    kind: str,
) -> None:
    features = random_features(30)
    for tokens in features.by_modality.values():
        tokens[7] = 0
    fusion = trained_fusion(kind)
    torch.nn.init.zeros_(fusion.correction.weight)  # type: ignore[union-attr]

    embeddings_ND = fusion(*features.tensors())
    (embeddings_ND @ embeddings_ND.T).square().sum().backward()

    norms = embeddings_ND.detach().norm(dim=1).numpy()
    np.testing.assert_allclose(norms, 1.0, atol=1e-6)
    assert fusion.correction.weight.grad.abs().max() < 1e3  # type: ignore[union-attr]


@KINDS
def test_items_are_fused_alike_one_by_one_and_all_at_once(kind: str) -> None:
    features, fusion = random_features(150), trained_fusion(kind)

    whole_ND = project_features(fusion, features, 16)
    single_ND = [project_features(fusion, features.take(slice(n, n + 1)), 16) for n in range(150)]

    assert np.array_equal(whole_ND, np.concatenate(single_ND))


def test_heads_that_do_not_divide_the_width_are_a_config_error() -> None:
    with pytest.raises(ValueError, match="num_heads is 3, which does not divide the width 128"):
        AlignmentConfig(q_former={"num_heads": 3})  # type: ignore[arg-type]
