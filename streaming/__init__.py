"""The streaming daemon: Kafka events in, codes and recent items in Feast out.

Public names are loaded on first use, so that a producer does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streaming.config import StreamConfig as StreamConfig
    from streaming.daemon import run_worker as run_worker
    from streaming.messages import ItemEvent as ItemEvent
    from streaming.messages import decode_item_event as decode_item_event
    from streaming.sink import FeastSink as FeastSink
    from streaming.source import KafkaSource as KafkaSource
    from streaming.worker import Source as Source

_HOME_OF = {
    "FeastSink": "sink",
    "ItemEvent": "messages",
    "KafkaSource": "source",
    "Source": "worker",
    "StreamConfig": "config",
    "decode_item_event": "messages",
    "run_worker": "daemon",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Import the module that owns ``name`` on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
