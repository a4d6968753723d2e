"""The ranker: content codes trained as sparse features in a multi-task TorchRec model.

Public names are loaded on first use: without torchrec, ``RankerConfig`` and ``TaskConfig`` still
work, and the others say how to install it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrec_models.batch import RankingBatch as RankingBatch
    from torchrec_models.config import RankerConfig as RankerConfig
    from torchrec_models.config import TaskConfig as TaskConfig
    from torchrec_models.ranker import MultiTaskRanker as MultiTaskRanker
    from torchrec_models.ranker import RankerTrainTask as RankerTrainTask
    from torchrec_models.ranker import build_ranker as build_ranker
    from torchrec_models.sharding import shard_ranker as shard_ranker
    from torchrec_models.tables import code_tables as code_tables
    from torchrec_models.training import train as train

_HOME_OF = {
    "MultiTaskRanker": "ranker",
    "RankerConfig": "config",
    "RankerTrainTask": "ranker",
    "RankingBatch": "batch",
    "TaskConfig": "config",
    "build_ranker": "ranker",
    "code_tables": "tables",
    "shard_ranker": "sharding",
    "train": "training",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Import the module that owns ``name`` on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME_OF[name]
    if home != "config":
        from torchrec_models.dependency import require_torchrec

        require_torchrec()
    return getattr(import_module(f"{__name__}.{home}"), name)
