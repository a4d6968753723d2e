"""The one optional package of the ranker. May import: nothing heavy before it is asked for."""

import logging
from importlib import import_module
from importlib.util import find_spec

from qarm_feast.errors import MissingDependencyError

TORCHREC_COMMAND = "pip install --no-deps torchrec==1.8.0"


def require_torchrec() -> None:
    """Import torchrec; call it before Feast is imported.

    Feast has Python show every DeprecationWarning, and torchrec's import gives several that no
    user of a command can do anything about.

    Raises:
        MissingDependencyError: If it cannot; names the command that installs it. TorchRec stands
            in no extra, because it would bring a CUDA build of fbgemm over the CPU one.
    """
    if find_spec("torchrec") is None:
        raise MissingDependencyError(
            package="torchrec", needed_for="the ranker", command=TORCHREC_COMMAND
        )
    import_module("torchrec")


def silence_tracing_notice() -> None:
    """Leave out what torchrec 1.8 makes torch 2.13 say whenever it builds or rewrites a model."""
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
