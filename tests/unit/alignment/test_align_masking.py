from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qarm_feast.alignment.evaluate import measure_vectors
from qarm_feast.alignment.features import ItemFeatures
from qarm_feast.alignment.later_behaviour import read_behaviour
from qarm_feast.alignment.masking import MASKED_SHARES, mask_figures, masked_features
from qarm_feast.input_data import InputData

NUM_ITEMS = 40


def two_modalities(seed: int = 0) -> ItemFeatures:
    """Text tells the cluster of an item, its picture tells less; every fourth has no picture."""
    generator = np.random.default_rng(seed)
    clusters = np.arange(NUM_ITEMS) // 10
    text = np.eye(4)[clusters] + 0.3 * generator.normal(size=(NUM_ITEMS, 4))
    image = np.eye(4)[clusters] + 0.6 * generator.normal(size=(NUM_ITEMS, 4))
    has_image = np.arange(NUM_ITEMS) % 4 != 0
    image[~has_image] = 0.0
    tokens = {"text": text[:, None], "image": np.stack([image, image], axis=1)}
    return ItemFeatures(
        {name: each.astype(np.float32) for name, each in tokens.items()},
        {"text": np.ones(NUM_ITEMS, dtype=bool), "image": has_image},
    )


NOTHING = ItemFeatures(
    {"text": np.full((1, 1, 4), 0.5, np.float32), "image": np.zeros((1, 2, 4), np.float32)},
    {"text": np.array([True]), "image": np.array([False])},
)


class TwoModalityEncoder:
    """Stands for an encoder: the sum of both modalities, of length 1."""

    modalities = ("text", "image")

    def read_features(self, items: pa.Table) -> ItemFeatures:
        assert items.num_rows == 1
        assert all(column.null_count == 1 for column in items.columns)
        return NOTHING

    def project(self, features: ItemFeatures) -> np.ndarray:
        summed = sum(tokens.mean(axis=1) for tokens in features.by_modality.values())
        return summed / np.linalg.norm(summed, axis=1, keepdims=True)


def test_masked_items_lose_one_modality_and_get_nothings_features_with_their_last() -> None:
    features = two_modalities()
    is_masked_N = np.isin(np.arange(NUM_ITEMS), [0, 1])

    masked = masked_features(features, "text", is_masked_N, NOTHING)

    # Item 0 has no picture, item 1 has one.
    np.testing.assert_array_equal(masked.by_modality["text"][0], NOTHING.by_modality["text"][0])
    assert masked.present["text"][:3].tolist() == [True, False, True]
    assert not masked.by_modality["text"][1].any()
    np.testing.assert_array_equal(masked.present["image"], features.present["image"])
    np.testing.assert_array_equal(masked.by_modality["text"][2:], features.by_modality["text"][2:])
    assert masked.by_modality["text"].dtype == np.float32
    assert features.present["text"].all()


def test_figures_with_a_share_masked_are_those_of_the_masked_vectors(
    clustered: InputData,
) -> None:
    features, encoder = two_modalities(), TwoModalityEncoder()
    behaviour = read_behaviour(clustered)

    figures = mask_figures(encoder, features, behaviour)  # type: ignore[arg-type]

    assert list(figures) == ["text", "image"]
    assert list(figures["text"]) == [f"{share:g}" for share in MASKED_SHARES]
    half = np.random.default_rng(0).random(NUM_ITEMS) < 0.5
    by_hand = masked_features(features, "text", half, NOTHING)
    expected: dict[str, Any] = measure_vectors(
        behaviour, {"raw": by_hand.raw_vectors(), "aligned": encoder.project(by_hand)}
    )
    for name in ("raw", "aligned"):
        for measure, each in expected.items():
            values = each.values_by_name[name]
            found = figures["text"]["0.5"][name]
            for key, mask_S in each.slices().items():
                assert found[f"{measure}_{key}"] == pytest.approx(values[mask_S].mean())
    assert "neighbor_auc_cold" in figures["text"]["0.5"]["aligned"]
    aucs = [figures["text"][share]["aligned"]["neighbor_auc_all"] for share in ("0.25", "0.5", "1")]
    assert aucs[0] > aucs[1] > aucs[2]


def test_codes_of_masked_items_are_decoded_beside_their_vectors(clustered: InputData) -> None:
    features, changed = two_modalities(), []

    def decode(aligned_ND: np.ndarray, is_changed_N: np.ndarray) -> dict[str, np.ndarray]:
        changed.append(is_changed_N)
        return {"decoded_rq": 2 * aligned_ND}

    figures = mask_figures(
        TwoModalityEncoder(),  # type: ignore[arg-type]
        features,
        read_behaviour(clustered),
        decode,
    )

    assert figures["image"]["1"]["decoded_rq"] == figures["image"]["1"]["aligned"]
    # Who has no picture loses none, and keeps its codes.
    np.testing.assert_array_equal(changed[-1], features.present["image"])


def test_ready_vectors_and_data_without_later_behaviour_have_nothing_to_mask(
    clustered: InputData,
) -> None:
    encoder, features = TwoModalityEncoder(), two_modalities()
    behaviour = read_behaviour(clustered)
    test_rows = read_behaviour(clustered, "test")
    ready = TwoModalityEncoder()
    ready.modalities = ("embedding",)

    assert mask_figures(ready, features, behaviour) == {}  # type: ignore[arg-type]
    # There are no test rows in this data.
    assert mask_figures(encoder, features, test_rows) == {}  # type: ignore[arg-type]
