"""Two processes never train one encoder version at the same time."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qarm_feast.alignment import train
from qarm_feast.alignment.config import AlignmentConfig, PairConfig
from qarm_feast.alignment.encoder import ItemEncoder
from qarm_feast.alignment.gathering import Ranks
from qarm_feast.alignment.pairs import build_pairs
from qarm_feast.alignment.train import train_and_save
from qarm_feast.errors import AlreadyRunningError, ConfigError
from qarm_feast.input_data import InputData
from qarm_feast.shared_state import exclusive

CREATED = datetime(2024, 2, 1, tzinfo=UTC)
HOLDER = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def config(tmp_path: Path) -> AlignmentConfig:
    return AlignmentConfig(
        embedding_dim=16,
        batch_size=64,
        num_epochs=1,
        device="cpu",
        encoder_uri=str(tmp_path / "encoders"),
        features_uri=str(tmp_path / "features"),
    )


def train_version(checked: InputData, config: AlignmentConfig) -> ItemEncoder:
    pairs = build_pairs(checked, PairConfig(num_processes=1), 0)
    return train_and_save(checked, pairs, config, CREATED)


def test_a_version_that_another_process_trains_is_refused_and_another_one_is_not(
    clustered: InputData, config: AlignmentConfig
) -> None:
    with exclusive(Path(config.encoder_uri) / ".e1.lock", wait_seconds=0):
        with pytest.raises(AlreadyRunningError, match=r"trains encoder 'e1' in .*encoders; let it"):
            train_version(clustered, config)
        train_version(clustered, config.model_copy(update={"encoder_version": "e2"}))

    train_version(clustered, config)

    # The lock lies there still, and says nothing.
    with pytest.raises(ConfigError, match="never changed"):
        train_version(clustered, config)


def test_a_training_that_was_killed_blocks_no_other(
    clustered: InputData, config: AlignmentConfig
) -> None:
    lock = Path(config.encoder_uri) / ".e1.lock"
    lock.parent.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            with pytest.raises(AlreadyRunningError, match="trains encoder 'e1'"):
                train_version(clustered, config)
        finally:
            holder.kill()

    assert train_version(clustered, config).version == "e1"


def test_of_many_ranks_only_the_first_holds_the_lock(
    clustered: InputData, config: AlignmentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def second_of_two() -> Iterator[Ranks]:
        yield Ranks(1, 2)

    found = train_version(clustered, config.model_copy(update={"encoder_version": "e2"}))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(train, "joined_ranks", second_of_two)
    # Alone it could not exchange anything.
    monkeypatch.setattr(train, "train_encoder", lambda *_: found)

    with exclusive(Path(config.encoder_uri) / ".e1.lock", wait_seconds=0):
        assert train_version(clustered, config) is found
