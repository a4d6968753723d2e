"""The encoder as ONNX graphs: one per backbone, and the fusion.

    <encoder_uri>/<version>.onnx/text.onnx     input_ids, attention_mask -> features [N, T, E]
    <encoder_uri>/<version>.onnx/image.onnx    pixels                    -> features [N, T, E]
    <encoder_uri>/<version>.onnx/audio.onnx    windows                   -> features [windows, E]
    <encoder_uri>/<version>.onnx/fusion.onnx   <modality>_features, <modality>_present -> embeddings

For servers without torch. Token ids, pixels and windows are made by the caller, as the backbones
here make them; of sounds also the means over windows. No version's name holds a dot, so the folder
is none of an encoder.

Shape letters in this file: N items, T feature tokens, E feature width, D embedding width.
May import: torch; onnx and onnxscript are imported on first use.
"""

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from qarm_feast.alignment.backbones.base import TowerInput, TunableBackbone, is_tunable
from qarm_feast.alignment.encoder import ItemEncoder
from qarm_feast.artifact import replace_folder
from qarm_feast.errors import MissingDependencyError

logger = logging.getLogger(__name__)

FUSION = "fusion"
_OPSET = 18
_EXPORTER_LOGGER = "torch.onnx._internal.exporter._registration"


def onnx_folder(encoder_uri: str, encoder_version: str) -> Path:
    """Return where an encoder's ONNX graphs lie."""
    return Path(encoder_uri) / f"{encoder_version}.onnx"


def export_onnx(encoder: ItemEncoder, encoder_uri: str) -> Path:
    """Write the graphs of an encoder, all of them or nothing, in place of earlier ones.

    A kill at any point leaves the earlier ones or all of the new ones.

    Args:
        encoder: A loaded encoder.
        encoder_uri: Folder of encoder artifacts.

    Returns:
        The folder: ``fusion.onnx``, and a graph per modality that has a network.

    Raises:
        MissingDependencyError: If onnx or onnxscript is not installed.
        ConfigError: If earlier ones are there and the file system cannot exchange folders.
    """
    _check_packages()
    final = onnx_folder(encoder_uri, encoder.version)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for modality, backbone in encoder.backbones.items():
        if is_tunable(backbone):
            inputs = backbone.tower_inputs()
            _write(_Tower(backbone), inputs, "features", temporary / f"{modality}.onnx")
    fusion = _Fusion(encoder.head, list(encoder.backbones))
    _write(fusion, _fusion_inputs(encoder), "embeddings", temporary / f"{FUSION}.onnx")
    replace_folder(temporary, final)
    return final


class _Fusion(nn.Module):
    """The fusion with one argument per tensor: features and presence of each modality in turn."""

    def __init__(self, head: nn.Module, modalities: Sequence[str]) -> None:
        super().__init__()
        self.head = head
        self._modalities = tuple(modalities)

    def forward(self, *tensors: Tensor) -> Tensor:
        features = dict(zip(self._modalities, tensors[::2], strict=True))
        present = dict(zip(self._modalities, tensors[1::2], strict=True))
        embeddings_ND: Tensor = self.head(features, present)
        return embeddings_ND


class _Tower(nn.Module):
    """A backbone's network and what follows it in the backbone."""

    def __init__(self, backbone: TunableBackbone) -> None:
        super().__init__()
        self._backbone = backbone
        # Here the exporter finds the weights; the backbone runs the same object.
        self.network = backbone.module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._backbone.tower(*inputs)


def _fusion_inputs(encoder: ItemEncoder) -> list[TowerInput]:
    inputs = []
    for modality, backbone in encoder.backbones.items():
        features_NTE = torch.ones((2, backbone.num_tokens, backbone.width))
        inputs.append(TowerInput(f"{modality}_features", features_NTE))
        inputs.append(TowerInput(f"{modality}_present", torch.ones(2, dtype=torch.bool)))
    return inputs


def _write(module: nn.Module, inputs: Sequence[TowerInput], output: str, path: Path) -> None:
    free = [dict.fromkeys(one.free_dims, torch.export.Dim.DYNAMIC) for one in inputs]
    with _quiet_exporter(), torch.no_grad():
        torch.onnx.export(
            module.eval(),
            tuple(one.example for one in inputs),
            path,
            input_names=[one.name for one in inputs],
            output_names=[output],
            # One positional argument that stands for all.
            dynamic_shapes=(tuple(free),),
            opset_version=_OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    logger.info("onnx_written path=%s", path)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hold back what torch 2.13's exporter says of its own calls and of an absent torchvision."""
    exporter = logging.getLogger(_EXPORTER_LOGGER)
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def _check_packages() -> None:
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(
                package=package,
                needed_for="an export to ONNX",
                command='pip install "qarm-feast[onnx]"',
            )
