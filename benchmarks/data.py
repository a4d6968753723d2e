"""The data that a benchmark runs on."""

import sys
from pathlib import Path

from examples.quickstart.layout import MOVIELENS_SOURCE
from examples.quickstart.ml100k import write_ml100k


def data_dir(given: str | None, folder: str) -> Path:
    """Return the data folder asked for; without one, ML-100K written into ``folder``."""
    if given:
        return Path(given)
    print("no --data: the quickstart's ML-100K", file=sys.stderr, flush=True)
    write_ml100k(MOVIELENS_SOURCE, Path(folder) / "ml-100k")
    return Path(folder) / "ml-100k"
