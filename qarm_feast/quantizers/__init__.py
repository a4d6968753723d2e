"""Quantizers: aligned vectors in, integer codes out.

May import: NumPy, scipy, torch. No I/O.
"""

from qarm_feast.quantizers.base import Codes, Embeddings, Quantizer
from qarm_feast.quantizers.rq import ResidualQuantizer, RqConfig
from qarm_feast.quantizers.vq import NeighborQuantizer, VqConfig

__all__ = [
    "Codes",
    "Embeddings",
    "NeighborQuantizer",
    "Quantizer",
    "ResidualQuantizer",
    "RqConfig",
    "VqConfig",
    "build_quantizer",
]


def build_quantizer(config: RqConfig | VqConfig) -> Quantizer:
    """Return the untrained quantizer that ``config`` describes."""
    if isinstance(config, RqConfig):
        return ResidualQuantizer(config)
    return NeighborQuantizer(config)
