from pathlib import Path

import pytest
from codebook_input import write_project


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    """The qarm.yaml of a small project with vectors of one encoder, ``e1``."""
    return write_project(tmp_path)
