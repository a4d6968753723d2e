from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from synthetic import write_synthetic_rows

from torchrec_models.inputs import TrainInputs
from torchrec_models.sharding import Ranks, process_group


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrainInputs:
    """Rows whose first label is told by the item's first code and the user's parity."""
    return write_synthetic_rows(Path(tmp_path_factory.mktemp("rows")))


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """A process group of this process alone."""
    with process_group() as own:
        # Models of a few kilobytes: threads would only wait for each other.
        torch.set_num_threads(1)
        yield own
    assert not dist.is_initialized()
