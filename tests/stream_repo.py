"""A small feature repository that real workers can use: one codebook, applied views, own topics."""

import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from examples.quickstart.kafka_admin import create_topics
from qarm_feast.codebook import Codebook, EncoderFacts, QuantizerConfig
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import load_section
from qarm_feast.feature_views import declare_views, read_repository_facts
from qarm_feast.quantizers import RqConfig, VqConfig
from qarm_feast.registry import CodebookRegistry
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import TIMESTAMP
from streaming.config import StreamConfig

REPO = Path(__file__).resolve().parents[1]
NUM_POOL_ITEMS = 400
EMBEDDING_DIM = 8
ENCODER_VERSION = "e1"
HISTORY_LENGTH = 10
START = 1_700_000_000_000_000
"""Event times of the tests: microseconds, November 2023."""


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
        return CodebookRegistry(codebooks_uri(self.directory))

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


def build_stream_repo(
    directory: Path,
    bootstrap_servers: str,
    stream: dict[str, Any] | None = None,
    stores: dict[str, Any] | None = None,
    publish: Callable[[Path, str], Codebook] | None = None,
) -> StreamRepo:
    """Make a fresh repository whose topics exist and are empty.

    Args:
        directory: A folder that does not exist yet.
        bootstrap_servers: The broker.
        stream: Keys of section ``stream`` besides the test's own.
        stores: Sections of ``feature_store.yaml`` that replace the repository's.
        publish: Publishes the codebook of a folder and version; None: :func:`publish_codebook`.
    """
    suffix = uuid.uuid4().hex[:8]
    sections = {
        "data": {"input_dir": "data/input", "history_length": HISTORY_LENGTH},
        "codebook": {"uri": "data/codebooks"},
        "stream": {
            "bootstrap_servers": bootstrap_servers,
            "item_topic": f"items-{suffix}",
            "interaction_topic": f"interactions-{suffix}",
            "dead_letter_topic": f"dead-letters-{suffix}",
            "consumer_group": f"group-{suffix}",
            "max_batch_size": 64,
            "num_threads": 1,
            "kafka_options": {"session_timeout_ms": 3000, "heartbeat_interval_ms": 500},
            **(stream or {}),
        },
        "ranker": {"name": "ranker"},
    }
    repo = build_repo(directory, sections, stores, publish)
    create_topics(repo.stream_config)
    return repo


def build_repo(
    directory: Path,
    sections: dict[str, Any],
    stores: dict[str, Any] | None = None,
    publish: Callable[[Path, str], Codebook] | None = None,
) -> StreamRepo:
    """Make a fresh repository with codebook v1 and applied views; no broker is needed.

    Args:
        directory: A folder that does not exist yet.
        sections: What ``qarm.yaml`` holds.
        stores: Sections of ``feature_store.yaml`` that replace the repository's.
        publish: Publishes the codebook of a folder and version; None: :func:`publish_codebook`.
    """
    directory.mkdir(parents=True)
    shutil.copyfile(
        REPO / "feature_repo" / "feature_definitions.py", directory / "feature_definitions.py"
    )
    declared = yaml.safe_load((REPO / "feature_repo" / "feature_store.yaml").read_text())
    (directory / "feature_store.yaml").write_text(yaml.safe_dump(declared | (stores or {})))
    (directory / "qarm.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    _write_interactions(directory / "data" / "input")
    repo = StreamRepo(directory, (publish or publish_codebook)(directory, "v1"))
    repo.apply()
    return repo


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


def codebooks_uri(directory: Path) -> str:
    """Return where a repository's codebooks are."""
    return load_section(directory / "qarm.yaml", "codebook", CodebookConfig).uri


def publish_codebook(
    directory: Path, version: str, seed: int = 0, encoder_version: str = ENCODER_VERSION
) -> Codebook:
    """Train and publish a version in a repository's codebook registry."""
    uri = codebooks_uri(directory)
    vectors_ND = np.random.default_rng(seed).standard_normal((NUM_POOL_ITEMS, EMBEDDING_DIM))
    codebook = Codebook.train(
        version,
        np.arange(NUM_POOL_ITEMS, dtype=np.int64),
        vectors_ND.astype(np.float32),
        config=QuantizerConfig(
            rq=RqConfig(num_levels=2, codebook_size=8), vq=VqConfig(num_neighbors=4)
        ),
        encoder=EncoderFacts(encoder_version, "0" * 64, None),
        created=datetime(2024, 1, 1, tzinfo=UTC),
    )
    codebook.save(uri)
    CodebookRegistry(uri).publish(version)
    return codebook
