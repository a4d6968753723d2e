"""Ready vectors as a modality: no model, the vector of another one is the feature.

Shape letters in this file: N items, W width of a ready vector, E feature width.
May import: numpy.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qarm_feast.alignment.backbones.base import Encoded, hash_files
from qarm_feast.alignment.modalities import EMPTY
from qarm_feast.errors import DataError

WIDTH_MULTIPLE = 16
"""Ready vectors are filled up with zeros to a multiple of this. In the product of narrow or odd
matrices the last bits of a row depend on its place among the others (seen with MKL below 12
columns), and the encoder promises that they do not."""


class ReadyVectors:
    """Vectors of a model of the user's.

    Args:
        vector_width: Numbers in each vector.
    """

    def __init__(self, vector_width: int) -> None:
        self.vector_width = vector_width
        self.num_tokens = 1

    @property
    def width(self) -> int:
        """The vector's width, rounded up."""
        return _rounded(self.vector_width)

    @property
    def settings(self) -> dict[str, Any]:
        """What a manifest says."""
        return {"vector_width": self.vector_width}

    @property
    def hash(self) -> str:
        """SHA-256 over the settings."""
        return hash_files({}, self.settings)

    def payloads(self) -> dict[str, bytes]:
        """Return no file."""
        return {}

    def encode(self, values: Sequence[np.ndarray]) -> Encoded:
        """Return the vectors, filled up with zeros.

        Args:
            values: Float32 rows of ``vector_width`` numbers; one that holds NaN is absent, and one
                of zeros alone, which has no direction.

        Returns:
            One row per vector.

        Raises:
            DataError: If they have another width.
        """
        vectors_NW: np.ndarray = (
            np.stack(values) if len(values) else np.empty((0, 1), dtype=np.float32)
        )
        is_finite_N = np.isfinite(vectors_NW).all(axis=1)
        is_present_N = np.asarray(is_finite_N & vectors_NW.any(axis=1))
        features_NE = np.zeros((len(values), self.width), dtype=np.float32)
        if is_present_N.any():
            given = vectors_NW.shape[1]
            # Encoders of format 1 stored the width that was rounded up.
            if _rounded(given) != self.width:
                raise DataError(
                    f"ready vectors have {given} numbers, the encoder was trained on "
                    f"{self.vector_width}; give it vectors of the same model, or train another"
                )
            features_NE[is_present_N, :given] = vectors_NW[is_present_N]
        faults = [EMPTY if is_zero else None for is_zero in is_finite_N & ~is_present_N]
        return Encoded(features_NE[:, None], is_present_N, faults)


def _rounded(width: int) -> int:
    return width + -width % WIDTH_MULTIPLE
