"""What the tests of object stores share: the environment of a server, artifacts, rows of codes."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from qarm_feast import object_store, schema
from qarm_feast.artifact import sha256
from qarm_feast.offline_store import CodeLogOfflineStoreConfig
from qarm_feast.registry import Manifest, drafts_uri, write_artifact, write_report
from tests.object_store_server import ObjectStoreServer

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
CODES = "item_codes_v1"
GOOD = {
    "collision_rate": 0.25,
    "hr10": 0.9,
    "levels": [{"codebook_coverage": 0.75, "relative_residual_norm": 0.5}],
}


@contextmanager
def client_of(server: ObjectStoreServer, cache_dir: Path) -> Iterator[pytest.MonkeyPatch]:
    """Point this process, and those that it starts, at a server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        # Without it a client without credentials asks the network for those of a machine.
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("QARM_CACHE_DIR", str(cache_dir))
        forget_clients()
        yield patch
    forget_clients()


def offline_store_at(uri: str) -> dict[str, Any]:
    """Return the section of ``feature_store.yaml`` that puts the offline log there."""
    return {"offline_store": {"type": CodeLogOfflineStoreConfig().type, "uri": uri}}


def forget_clients() -> None:
    """Let the next request make a client anew, by the environment as it is then."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    object_store.check_conditional_put.cache_clear()


def count_requests() -> list[str]:
    """Return a list that fills with the name of each request that this process sends."""
    files = object_store.file_system("s3")
    files.connect()
    requests: list[str] = []
    files.s3.meta.events.register(
        "before-send.s3.*",
        lambda event_name, **_: requests.append(event_name.rpartition(".")[2]),
    )
    return requests


def artifact(version: str, content: bytes = b"arrays") -> tuple[Manifest, dict[str, bytes]]:
    """Return the manifest and the one file of a version."""
    payloads = {f"rq-{sha256(content)[:16]}.safetensors": content}
    manifest = Manifest(
        version=version,
        encoder_version="e1",
        encoder_hash="0" * 64,
        behaviour_cutoff=datetime(2024, 1, 1, tzinfo=UTC),
        embedding_dim=8,
        level_sizes=(4, 4),
        num_neighbors=2,
        pool_size=10,
        seed=0,
        num_training_items=10,
        files={name: sha256(payload) for name, payload in payloads.items()},
        created=datetime(2024, 1, 2, tzinfo=UTC),
    )
    return manifest, payloads


def draft(uri: str, version: str = "v1", content: bytes = b"arrays") -> Manifest:
    """Store an evaluated draft."""
    manifest, payloads = artifact(version, content)
    write_artifact(drafts_uri(uri), manifest, payloads, replace=True)
    write_report(uri, manifest, GOOD)
    return manifest


def code_rows(*keys: tuple[int, int, str]) -> pa.Table:
    """Return code rows of (item, seconds, content hash)."""
    times = [NOON + timedelta(seconds=seconds) for _, seconds, _ in keys]
    columns = [
        [item for item, _, _ in keys],
        [[item, item + 1] for item, _, _ in keys],
        [[0] for _ in keys],
        ["e1"] * len(keys),
        [text for _, _, text in keys],
        [False] * len(keys),
        times,
        [NOON] * len(keys),
    ]
    return pa.table(columns, schema=schema.CODE_ROWS)
