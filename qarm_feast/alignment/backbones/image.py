"""Image backbones: pictures to feature tokens, one per cell of a square grid.

Each picture is decoded by itself and every forward pass has one shape, so a picture's features do
not depend on which others came with it.

Shape letters in this file: N pictures, R rows of a forward pass, P pixels of a side, E feature
width, T feature tokens (cells of the grid).
May import: torch, numpy; Pillow is imported on first use.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from qarm_feast.alignment.backbones.base import (
    Encoded,
    NetworkBackbone,
    TowerInput,
    Weights,
    device_of,
)
from qarm_feast.alignment.modalities import TOO_LARGE, UNDECODABLE
from qarm_feast.errors import MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_FORMS = ("PNG", "JPEG", "GIF", "WEBP")
"""What is decoded: the forms that a streaming worker lets pass."""
ROWS_PER_FORWARD = {"cpu": 1, "cuda": 64}
"""Pictures of a forward pass by kind of device; on a CPU more of them are slower per picture."""
_TURNS: dict[Any, Any] = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""Exif's orientation to Pillow's number of the turn or mirroring that undoes it."""
_DECODER_FAULTS = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
    *(ArithmeticError, AssertionError, AttributeError, LookupError, TypeError),
)
"""What Pillow raises on damaged bytes; where it stumbles instead of saying so, the second line."""


@dataclass(frozen=True)
class PixelRecipe:
    """How a picture becomes the pixels that a network was trained on.

    Attributes:
        size: Pixels of a side, P.
        crop_share: Side of the square that is cut out of the middle, as a share of the shorter
            side; None: the whole picture, squeezed.
        mean: Subtracted per channel from values of 0 … 255.
        spread: Divides what is left.
        resample: Pillow's number of the filter.
    """

    size: int
    crop_share: float | None
    mean: tuple[float, float, float]
    spread: tuple[float, float, float]
    resample: int = 3


class ImageNetwork(Protocol):
    """An architecture and the pixels that it reads."""

    @property
    def width(self) -> int:
        """Channels of the feature map, E."""
        ...

    @property
    def recipe(self) -> PixelRecipe:
        """How its pixels are made."""
        ...

    def load(self) -> nn.Module:
        """Read the network, in evaluation mode."""
        ...

    def feature_map(self, module: nn.Module, pixels_R3PP: Tensor) -> Tensor:
        """Return the last feature map, ``[R, E, height, width]``."""
        ...

    def payloads(self, tuned: nn.Module | None) -> dict[str, bytes]:
        """Return the files from which it can be opened again, by name."""
        ...


class ImageBackbone(NetworkBackbone):
    """Means of an image network's feature map over the cells of a grid.

    Args:
        network: The network.
        max_pixels: A picture of more counts as absent.
        grid: Cells per side; 1: the mean of the whole picture.
    """

    def __init__(self, network: ImageNetwork, max_pixels: int, grid: int = 1) -> None:
        self._network = network
        self.max_pixels = max_pixels
        self.grid = grid
        super().__init__(Weights(network.load, network.payloads))

    @property
    def num_tokens(self) -> int:
        """Cells of the grid."""
        return self.grid**2

    @property
    def width(self) -> int:
        """Channels of the feature map."""
        return self._network.width

    @property
    def settings(self) -> dict[str, Any]:
        """What a manifest says beside the files."""
        return {"max_pixels": self.max_pixels, "grid": self.grid}

    def encode(self, values: Sequence[bytes | None]) -> Encoded:
        """Return the features of the pictures, not normalised.

        Args:
            values: Bytes of PNG, JPEG, GIF (its first picture) or WebP files; transparent parts
                count as white.

        Returns:
            One row per picture; zeros where there is none or it cannot be read.
        """
        features_NTE = np.zeros((len(values), self.num_tokens, self.width), dtype=np.float32)
        faults: list[str | None] = [None] * len(values)
        num_rows = ROWS_PER_FORWARD[device_of(self.module).type]
        is_present_N = np.zeros(len(values), dtype=bool)
        for rows, pixels_R3PP in _passes(self._decoded(values, faults), num_rows):
            with torch.inference_mode():
                tokens_RTE = self.tower(pixels_R3PP)
            features_NTE[rows] = tokens_RTE[: len(rows)].cpu().numpy()
            is_present_N[rows] = True
        return Encoded(features_NTE, is_present_N, faults)

    def forward(self, values: Sequence[bytes | None]) -> tuple[Tensor, Tensor]:
        """Return the features with gradients, all pictures in one pass, and which could be read."""
        decoded = dict(self._decoded(values, [None] * len(values)))
        size = self._network.recipe.size
        blank = np.zeros((3, size, size), dtype=np.float32)
        pixels_N3PP = np.stack([decoded.get(row, blank) for row in range(len(values))])
        is_present_N = torch.tensor(
            [row in decoded for row in range(len(values))], device=device_of(self.module)
        )
        tokens_NTE = self.tower(torch.from_numpy(pixels_N3PP))
        return tokens_NTE * is_present_N[:, None, None], is_present_N

    def tower(self, *inputs: Tensor) -> Tensor:
        """Return the feature tokens ``[R, T, E]`` of pixels ``[R, 3, P, P]``."""
        pixels_R3PP = inputs[0].to(device_of(self.module))
        feature_map = self._network.feature_map(self.module, pixels_R3PP)
        cells = functional.adaptive_avg_pool2d(feature_map, self.grid)
        return cells.flatten(2).transpose(1, 2)

    def tower_inputs(self) -> list[TowerInput]:
        """Return the pixels of two pictures."""
        size = self._network.recipe.size
        return [TowerInput("pixels", torch.zeros((2, 3, size, size)))]

    def _decoded(
        self, values: Sequence[bytes | None], faults: list[str | None]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield position and pixels of each picture that can be read; note the other's faults."""
        for row, value in enumerate(values):
            if value is not None:
                pixels_3PP = read_pixels(value, self._network.recipe, self.max_pixels)
                if isinstance(pixels_3PP, str):
                    faults[row] = pixels_3PP
                else:
                    yield row, pixels_3PP


def read_pixels(payload: bytes, recipe: PixelRecipe, max_pixels: int) -> np.ndarray | str:
    """Return a picture's pixels as a network reads them.

    Args:
        payload: Bytes of a file.
        recipe: What the network wants.
        max_pixels: Most pixels that are decoded.

    Returns:
        Float32 ``[3, P, P]``; or the reason why there are none.

    Raises:
        MissingDependencyError: If Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            package="pillow",
            needed_for="an image encoder",
            command='pip install "qarm-feast[image]"',
        ) from error
    try:
        with warnings.catch_warnings():
            # Of damaged notes beside the pixels, and of a limit on these that is not ours.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(payload), formats=PICTURE_FORMS)
            if image.width * image.height > max_pixels:
                return TOO_LARGE
            return _recipe_pixels(_opaque(image), recipe)
    except Image.DecompressionBombError:
        return TOO_LARGE
    except _DECODER_FAULTS:
        return UNDECODABLE


def _opaque(image: "Image") -> "Image":
    """Return the picture as it would be seen on white, the right way up."""
    from PIL import Image

    image = _upright(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")


def _upright(image: "Image") -> "Image":
    """Return the picture turned as its Exif notes say.

    Pillow's own ``exif_transpose`` writes the notes anew, and stumbles over damaged ones.
    """
    from PIL.ExifTags import Base

    # The pixels first: a PNG file may have its notes behind them.
    image.load()
    turn = _TURNS.get(image.getexif().get(Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _recipe_pixels(image: "Image", recipe: PixelRecipe) -> np.ndarray:
    box = (0.0, 0.0, float(image.width), float(image.height))
    if recipe.crop_share is not None:
        # Cut and scaled in one step: scaling first would make a picture of 1 x 10^6 huge.
        side = min(image.size) * recipe.crop_share
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
    scaled = image.resize((recipe.size, recipe.size), recipe.resample, box=box)
    pixels_PP3 = (np.asarray(scaled, dtype=np.float32) - recipe.mean) / recipe.spread
    return np.ascontiguousarray(pixels_PP3.transpose(2, 0, 1), dtype=np.float32)


def _passes(
    decoded: Iterator[tuple[int, np.ndarray]], num_rows: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield positions and pixels of each forward pass; rows that are left over are black."""
    rows: list[int] = []
    pixels: list[np.ndarray] = []
    for row, pixels_3PP in decoded:
        rows.append(row)
        pixels.append(pixels_3PP)
        if len(rows) == num_rows:
            yield rows, torch.from_numpy(np.stack(pixels))
            rows, pixels = [], []
    if rows:
        dummies = [np.zeros_like(pixels[0])] * (num_rows - len(rows))
        yield rows, torch.from_numpy(np.stack(pixels + dummies))
