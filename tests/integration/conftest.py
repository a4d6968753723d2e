"""A real broker for the whole session, and a small feature repository that workers can use."""

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from examples.quickstart.broker import KafkaBroker
from examples.quickstart.kafka_admin import create_topics
from qarm_feast.codebook import Codebook, EncoderFacts, QuantizerConfig
from qarm_feast.config import load_section
from qarm_feast.feature_views import declare_views, read_repository_facts
from qarm_feast.quantizers import RqConfig, VqConfig
from qarm_feast.registry import CodebookRegistry
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import TIMESTAMP
from streaming.config import StreamConfig

REPO = Path(__file__).resolve().parents[2]
NUM_POOL_ITEMS = 400
EMBEDDING_DIM = 8
ENCODER_VERSION = "e1"
START = 1_700_000_000_000_000
"""Event times of the tests: microseconds, November 2023."""


@pytest.fixture(scope="session")
def kafka_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """One real Apache Kafka node for all tests that only need topics of their own."""
    with KafkaBroker(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@dataclass(frozen=True)
class StreamRepo:
    """A feature repository with one published codebook, applied views and its own topics."""

    directory: Path
    codebook: Codebook

    @property
    def config_path(self) -> Path:
        """Its ``qarm.yaml``."""
        return self.directory / "qarm.yaml"

    @property
    def stream_config(self) -> StreamConfig:
        """Its section ``stream``."""
        return load_section(self.config_path, "stream", StreamConfig)

    @property
    def registry(self) -> CodebookRegistry:
        """Its codebook registry."""
        return CodebookRegistry(str(self.directory / "data" / "codebooks"))

    def apply(self) -> None:
        """Do what `feast apply` does; views of retired versions go."""
        declared = list(declare_views(read_repository_facts(self.directory)).values())
        store = open_feature_store(self.directory)
        names = {view.name for view in declared}
        gone = [
            found
            for found in (*store.list_feature_services(), *store.list_feature_views())
            if found.name not in names
        ]
        store.apply(declared, objects_to_delete=gone, partial=False)


@pytest.fixture
def stream_repo(kafka_broker: KafkaBroker, tmp_path: Path) -> StreamRepo:
    """A fresh repository whose topics exist and are empty."""
    directory = tmp_path / "feature_repo"
    directory.mkdir()
    for name in ("feature_store.yaml", "feature_definitions.py"):
        shutil.copyfile(REPO / "feature_repo" / name, directory / name)
    suffix = uuid.uuid4().hex[:8]
    sections = {
        "data": {"input_dir": "data/input", "history_length": 10},
        "codebook": {"uri": "data/codebooks"},
        "stream": {
            "bootstrap_servers": kafka_broker.bootstrap_servers,
            "item_topic": f"items-{suffix}",
            "interaction_topic": f"interactions-{suffix}",
            "dead_letter_topic": f"dead-letters-{suffix}",
            "consumer_group": f"group-{suffix}",
            "max_batch_size": 64,
            "num_threads": 1,
            "kafka_options": {"session_timeout_ms": 3000, "heartbeat_interval_ms": 500},
        },
        "ranker": {"name": "ranker"},
    }
    (directory / "qarm.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    _write_interactions(directory / "data" / "input")
    codebook = publish_codebook(directory, "v1")
    repo = StreamRepo(directory, codebook)
    repo.apply()
    create_topics(repo.stream_config)
    return repo


@pytest.fixture
def start_worker(stream_repo: StreamRepo) -> Iterator[Callable[[str], "subprocess.Popen[bytes]"]]:
    """Start real worker processes; what still runs at the end is killed."""
    workers: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> "subprocess.Popen[bytes]":
        log_path = stream_repo.directory / f"{name}.log"
        with log_path.open("wb") as log:
            worker = subprocess.Popen(
                [
                    *(sys.executable, "-m", "streaming.cli", "run"),
                    *("--config", str(stream_repo.config_path), "--metrics-port", "0"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def _write_interactions(input_dir: Path) -> None:
    """The worker reads nothing but the names of the task flags from here."""
    input_dir.mkdir(parents=True)
    schema = pa.schema(
        [
            ("user_id", pa.int64()),
            ("item_id", pa.int64()),
            ("event_timestamp", TIMESTAMP),
            ("is_click", pa.bool_()),
            ("is_like", pa.bool_()),
        ]
    )
    pq.write_table(schema.empty_table(), input_dir / "interactions.parquet")


def publish_codebook(directory: Path, version: str, seed: int = 0) -> Codebook:
    """Train and publish a version in a repository's codebook registry."""
    uri = str(directory / "data" / "codebooks")
    vectors_ND = np.random.default_rng(seed).standard_normal((NUM_POOL_ITEMS, EMBEDDING_DIM))
    codebook = Codebook.train(
        version,
        np.arange(NUM_POOL_ITEMS, dtype=np.int64),
        vectors_ND.astype(np.float32),
        config=QuantizerConfig(
            rq=RqConfig(num_levels=2, codebook_size=8), vq=VqConfig(num_neighbors=4)
        ),
        encoder=EncoderFacts(ENCODER_VERSION, "0" * 64, None),
        created=datetime(2024, 1, 1, tzinfo=UTC),
    )
    codebook.save(uri)
    CodebookRegistry(uri).publish(version)
    return codebook
