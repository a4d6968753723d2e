import logging
import os
from collections.abc import Iterator

import pytest

# As `qarm_feast.ray_tasks` does before it imports Ray; some tests import it before.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

PACKAGES = ("qarm_feast", "streaming", "torchrec_models")


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A command that runs inside a test sets up logging for its process; the next test has none."""
    before = [
        (logger, logger.handlers, logger.level, logger.propagate)
        for logger in map(logging.getLogger, PACKAGES)
    ]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers = handlers
        logger.setLevel(level)
        logger.propagate = propagate
