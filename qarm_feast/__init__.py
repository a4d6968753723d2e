"""Trainable content codes for ranking, as a Feast plug-in.

Public names are loaded on first use, so that ``import qarm_feast`` stays fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qarm_feast.codebook import Codebook as Codebook
    from qarm_feast.codebook import ItemCodes as ItemCodes
    from qarm_feast.config import load_section as load_section
    from qarm_feast.encode import encode_items as encode_items
    from qarm_feast.errors import QarmError as QarmError
    from qarm_feast.feature_views import item_code_view as item_code_view
    from qarm_feast.offline_store import CodeLogOfflineStore as CodeLogOfflineStore
    from qarm_feast.offline_store import CodeLogOfflineStoreConfig as CodeLogOfflineStoreConfig
    from qarm_feast.quality import codebook_quality as codebook_quality
    from qarm_feast.quantizers import build_quantizer as build_quantizer
    from qarm_feast.quantizers.base import Quantizer as Quantizer
    from qarm_feast.registry import publish_codebook as publish_codebook

_HOME_OF = {
    "Codebook": "codebook",
    "CodeLogOfflineStore": "offline_store",
    "CodeLogOfflineStoreConfig": "offline_store",
    "ItemCodes": "codebook",
    "QarmError": "errors",
    "Quantizer": "quantizers.base",
    "build_quantizer": "quantizers",
    "codebook_quality": "quality",
    "encode_items": "encode",
    "item_code_view": "feature_views",
    "load_section": "config",
    "publish_codebook": "registry",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Import the module that owns ``name`` on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
