"""A real broker for the whole session, and a small feature repository that workers can use."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.quickstart.broker import KafkaBroker
from tests.object_store_cases import client_of, offline_store_at
from tests.object_store_server import ObjectStoreServer
from tests.stream_repo import StreamRepo, build_stream_repo


@pytest.fixture(scope="session")
def kafka_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """One real Apache Kafka node for all tests that only need topics of their own."""
    with KafkaBroker(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture
def object_store(tmp_path: Path) -> Iterator[ObjectStoreServer]:
    """A real S3 server that this process, and those that it starts, are pointed at."""
    with ObjectStoreServer(tmp_path / "s3") as server, client_of(server, tmp_path / "cache"):
        yield server


@pytest.fixture
def stream_repo(
    request: pytest.FixtureRequest,
    kafka_broker: KafkaBroker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[StreamRepo]:
    """A fresh repository whose topics exist and are empty.

    Parametrized with "s3" its codebooks and its offline log lie in a real object store.
    """
    directory, servers = tmp_path / "feature_repo", kafka_broker.bootstrap_servers
    if getattr(request, "param", "disk") == "disk":
        yield build_stream_repo(directory, servers)
        return
    bucket = request.getfixturevalue("object_store").add_bucket("integration")
    monkeypatch.setenv("QARM_CODEBOOK__URI", f"{bucket}/codebooks")
    yield build_stream_repo(directory, servers, stores=offline_store_at(f"{bucket}/offline"))


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
