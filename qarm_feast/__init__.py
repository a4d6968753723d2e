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
    from qarm_feast.errors import AlreadyRunningError as AlreadyRunningError
    from qarm_feast.errors import CodebookError as CodebookError
    from qarm_feast.errors import CodebookMismatchError as CodebookMismatchError
    from qarm_feast.errors import CodebookNotFoundError as CodebookNotFoundError
    from qarm_feast.errors import ConfigError as ConfigError
    from qarm_feast.errors import ContractError as ContractError
    from qarm_feast.errors import CorruptArtifactError as CorruptArtifactError
    from qarm_feast.errors import DataError as DataError
    from qarm_feast.errors import EventError as EventError
    from qarm_feast.errors import GateRefusedError as GateRefusedError
    from qarm_feast.errors import LeakError as LeakError
    from qarm_feast.errors import MissingDependencyError as MissingDependencyError
    from qarm_feast.errors import QarmError as QarmError
    from qarm_feast.errors import ServiceUnavailableError as ServiceUnavailableError
    from qarm_feast.feature_views import item_code_view as item_code_view
    from qarm_feast.feature_views import item_entity as item_entity
    from qarm_feast.offline_store import CodeLogOfflineStore as CodeLogOfflineStore
    from qarm_feast.offline_store import CodeLogOfflineStoreConfig as CodeLogOfflineStoreConfig
    from qarm_feast.quality import codebook_quality as codebook_quality
    from qarm_feast.quantizers import build_quantizer as build_quantizer
    from qarm_feast.quantizers.base import Quantizer as Quantizer
    from qarm_feast.registry import publish_codebook as publish_codebook

_ERRORS = (
    "AlreadyRunningError",
    "CodebookError",
    "CodebookMismatchError",
    "CodebookNotFoundError",
    "ConfigError",
    "ContractError",
    "CorruptArtifactError",
    "DataError",
    "EventError",
    "GateRefusedError",
    "LeakError",
    "MissingDependencyError",
    "QarmError",
    "ServiceUnavailableError",
)
_HOME_OF = dict.fromkeys(_ERRORS, "errors") | {
    "Codebook": "codebook",
    "CodeLogOfflineStore": "offline_store",
    "CodeLogOfflineStoreConfig": "offline_store",
    "ItemCodes": "codebook",
    "Quantizer": "quantizers.base",
    "build_quantizer": "quantizers",
    "codebook_quality": "quality",
    "encode_items": "encode",
    "item_code_view": "feature_views",
    "item_entity": "feature_views",
    "load_section": "config",
    "publish_codebook": "registry",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Import the module that owns ``name`` on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
