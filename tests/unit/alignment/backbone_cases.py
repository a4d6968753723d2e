"""What every backbone with a network keeps, whatever it reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qarm_feast.alignment.backbones.base import Backbone, Encoded, TunableBackbone
from qarm_feast.alignment.backbones.opening import open_stored


def encoded_alike(backbone: Backbone, values: Sequence[Any]) -> Encoded:
    """Return the features of all values at once, which are those of one at a time."""
    whole = backbone.encode(values)
    single = [backbone.encode([value]).features_NTE[0] for value in values]

    assert np.array_equal(whole.features_NTE, np.stack(single))
    return whole


def assert_gradients_agree(backbone: TunableBackbone, values: Sequence[Any], atol: float) -> None:
    features, is_present = backbone.forward(values)
    features.sum().backward()

    frozen = backbone.encode(values)
    np.testing.assert_allclose(features.detach().numpy(), frozen.features_NTE, atol=atol)
    assert is_present.tolist() == frozen.is_present_N.tolist()
    assert any(one.grad is not None for one in backbone.module.parameters())


def assert_stored_alike(
    backbone: Backbone, modality: str, values: Sequence[Any], folder: Path
) -> None:
    folder.mkdir()
    for name, payload in backbone.payloads().items():
        (folder / name).write_bytes(payload)

    stored = open_stored(modality, folder, backbone.settings)

    assert stored.hash == backbone.hash
    before, after = (one.encode(values).features_NTE for one in (backbone, stored))
    assert np.array_equal(before, after)
