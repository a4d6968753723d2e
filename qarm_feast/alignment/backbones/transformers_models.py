"""Models of ``transformers`` in a local folder: how they are read, and those of images and sounds.

Shape letters in this file: R rows of a forward pass, P pixels of a side, E feature width, S samples
of a window.
May import: torch, numpy; transformers is imported on first use.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qarm_feast.alignment.backbones.base import CONFIG_FILE, WEIGHTS_FILE, weights_file
from qarm_feast.alignment.backbones.image import PixelRecipe
from qarm_feast.errors import ConfigError, MissingDependencyError

PREPROCESSOR_FILE = "preprocessor_config.json"
FOLDER_FILES = (CONFIG_FILE, WEIGHTS_FILE, PREPROCESSOR_FILE)
"""What a folder with an image or audio model must hold."""
WINDOW_SECONDS = 4
"""A sound is read in windows of this length, the last one filled up with silence."""


def load_model(folder: Path) -> nn.Module:
    """Return a model in evaluation mode from a folder, never from a network.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.

    Returns:
        The model; of one with a vision tower that tower.

    Raises:
        MissingDependencyError: If transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            package="transformers",
            needed_for=f"the model in {folder}",
            command='pip install "qarm-feast[text]"',
        ) from error
    transformers.utils.logging.disable_progress_bar()
    model: nn.Module = transformers.AutoModel.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    tower: nn.Module = getattr(model, "vision_model", model)
    return tower.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model's ``config.json``; of one with a vision tower that tower's part."""
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_bytes())
    tower: dict[str, Any] = config.get("vision_config", config)
    return tower


def folder_payloads(
    folder: Path, names: Sequence[str], tuned: nn.Module | None
) -> dict[str, bytes]:
    """Return files of a folder by name, the weights of a tuned model in place of its own."""
    payloads = {name: (folder / name).read_bytes() for name in names}
    if tuned is not None:
        payloads[WEIGHTS_FILE] = weights_file(tuned.state_dict())
    return payloads


class TransformersImage:
    """An image model of a folder.

    Args:
        folder: Holds ``FOLDER_FILES``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def width(self) -> int:
        """Width of the last layer: of a hierarchical model that of the last stage."""
        config = read_config(self._folder)
        return int(
            config["hidden_sizes"][-1] if "hidden_sizes" in config else config["hidden_size"]
        )

    @cached_property
    def recipe(self) -> PixelRecipe:
        """How pixels are made, from ``preprocessor_config.json``."""
        return read_recipe(self._folder / PREPROCESSOR_FILE)

    def load(self) -> nn.Module:
        """Read the model, in evaluation mode."""
        return load_model(self._folder)

    def feature_map(self, module: nn.Module, pixels_R3PP: Tensor) -> Tensor:
        """Return the last feature map; patches of a transformer are laid out as they were cut."""
        hidden: Tensor = module(pixel_values=pixels_R3PP).last_hidden_state
        if hidden.ndim == 4:
            return hidden
        side = isqrt(hidden.shape[1])
        # Class and register tokens come first.
        patches = hidden[:, hidden.shape[1] - side**2 :]
        return patches.transpose(1, 2).reshape(len(patches), -1, side, side)

    def payloads(self, tuned: nn.Module | None) -> dict[str, bytes]:
        """Return the folder's files, of a tuned model with its weights."""
        return folder_payloads(self._folder, FOLDER_FILES, tuned)


def read_recipe(path: Path) -> PixelRecipe:
    """Return how an image processor makes pixels.

    Args:
        path: Its ``preprocessor_config.json``.

    Returns:
        The recipe.

    Raises:
        ConfigError: If it makes other than square pictures.
    """
    settings = json.loads(path.read_bytes())
    size = _sides(settings.get("size"))
    crop = _sides(settings.get("crop_size")) if settings.get("do_center_crop") else None
    final = crop or size
    if final is None or final[0] != final[1]:
        raise ConfigError(
            f"{path} makes pictures of size {settings.get('size')} and crop_size "
            f"{settings.get('crop_size')}; square ones are needed: set both to one number"
        )
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    mean, spread = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if settings.get("do_normalize", True):
        mean, spread = settings.get("image_mean", mean), settings.get("image_std", spread)
    return PixelRecipe(
        size=final[0],
        crop_share=None if crop is None or size is None else crop[0] / size[0],
        mean=tuple(value / factor for value in mean),  # type: ignore[arg-type]  # three channels
        spread=tuple(value / factor for value in spread),  # type: ignore[arg-type]
        resample=settings.get("resample", PixelRecipe.resample),
    )


def _sides(size: Any) -> tuple[int, int] | None:
    """Return height and width; of a size that names the shortest edge, that twice."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict):
        if "shortest_edge" in size:
            return size["shortest_edge"], size["shortest_edge"]
        if {"height", "width"} <= size.keys():
            return size["height"], size["width"]
    return None


class TransformersAudio:
    """An audio model of a folder that needs nothing but sound, read on first use.

    Args:
        folder: Holds ``FOLDER_FILES``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _extractor(self) -> Any:
        import transformers

        return transformers.AutoFeatureExtractor.from_pretrained(
            self._folder, local_files_only=True
        )

    @property
    def width(self) -> int:
        """Width of the last layer."""
        return int(read_config(self._folder)["hidden_size"])

    @property
    def sampling_rate(self) -> int:
        """Samples per second that the model was trained on."""
        return int(self._extractor.sampling_rate)

    def windows(self, samples_S: np.ndarray) -> np.ndarray:
        """Return the model's input for each window of a sound, the window first."""
        length = WINDOW_SECONDS * self.sampling_rate
        padded = np.pad(samples_S, (0, -len(samples_S) % length))
        extracted = self._extractor(
            list(padded.reshape(-1, length)), sampling_rate=self.sampling_rate, return_tensors="np"
        )
        inputs: np.ndarray = extracted[self._extractor.model_input_names[0]]
        return inputs.astype(np.float32)

    def load(self) -> nn.Module:
        """Read the model, in evaluation mode."""
        return load_model(self._folder)

    def embed(self, module: nn.Module, windows: Tensor) -> Tensor:
        """Return the mean of the last layer over each window, ``[R, E]``."""
        hidden: Tensor = module(windows).last_hidden_state
        return hidden.mean(dim=1)

    def payloads(self, tuned: nn.Module | None) -> dict[str, bytes]:
        """Return the folder's files, of a tuned model with its weights."""
        return folder_payloads(self._folder, FOLDER_FILES, tuned)
