"""EfficientNet-Lite0 as an image network: the module of one package with the weights of another.

May import: torch, safetensors; efficientnet_lite_pytorch is imported on first use.
"""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from qarm_feast.alignment.backbones.base import CONFIG_FILE, WEIGHTS_FILE, weights_file
from qarm_feast.alignment.backbones.image import PixelRecipe
from qarm_feast.alignment.backbones.packages import packaged_file
from qarm_feast.errors import MissingDependencyError

EFFICIENTNET_LITE0 = "efficientnet_lite0"
_PACKAGED_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
_CLASSIFIER = "_fc."


class EfficientNetLite:
    """EfficientNet-Lite0 without its classifier (Tan and Le 2019): 1280 channels, 7 x 7 cells.

    Args:
        folder: Folder with the weights as an artifact holds them; None takes the package's.

    Attributes:
        width: Numbers of a cell's vector.
        recipe: How a picture becomes its input.
    """

    width = 1280
    recipe = PixelRecipe(
        size=224,
        # Scaled to 256, then cut to 224, as its authors test it.
        crop_share=224 / 256,
        mean=(127.0, 127.0, 127.0),
        spread=(128.0, 128.0, 128.0),
    )

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def load(self) -> nn.Module:
        """Read the network, in evaluation mode."""
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise MissingDependencyError(
                package="efficientnet-lite-pytorch",
                needed_for=f"alignment.image_backbone: {EFFICIENTNET_LITE0}",
                command='pip install "qarm-feast[image]"',
            ) from error
        module: nn.Module = EfficientNet.from_name("efficientnet-lite0")
        module._fc = nn.Identity()
        module.load_state_dict(self._weights())
        return module.eval()

    def feature_map(self, module: nn.Module, pixels_R3PP: Tensor) -> Tensor:
        """Return the last feature map, ``[R, 1280, 7, 7]``."""
        network: Any = module
        features: Tensor = network.extract_features(pixels_R3PP)
        return features

    def payloads(self, tuned: nn.Module | None) -> dict[str, bytes]:
        """Return the weights, and a file that tells whose they are."""
        weights = self._weights() if tuned is None else tuned.state_dict()
        config = json.dumps({"architecture": EFFICIENTNET_LITE0}).encode()
        return {CONFIG_FILE: config, WEIGHTS_FILE: weights_file(weights)}

    def _weights(self) -> dict[str, Tensor]:
        if self._folder is not None:
            return safetensors.torch.load_file(self._folder / WEIGHTS_FILE)
        path = packaged_file("alignment.image_backbone", EFFICIENTNET_LITE0, _PACKAGED_WEIGHTS)
        weights = torch.load(path, map_location="cpu", weights_only=True)
        return {name: one for name, one in weights.items() if not name.startswith(_CLASSIFIER)}
