"""Codebook versions that come and go under a running worker: real broker, worker and stores."""

import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from kafka import KafkaProducer

from examples.quickstart.kafka_admin import wait_until_drained
from qarm_feast.codebook import Codebook
from qarm_feast.errors import ConfigError
from qarm_feast.offline_store import open_code_log
from qarm_feast.online_stores import code_online_store
from qarm_feast.registry import VersionState
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.rollout import Patience, Rollout
from streaming.acknowledgements import read_acknowledgements
from streaming.messages import ItemEvent, encode_item_event
from streaming.rollout_cli import open_parts
from tests.object_store_server import ObjectStoreServer
from tests.stream_repo import EMBEDDING_DIM, ENCODER_VERSION, START, StreamRepo, publish_codebook

pytestmark = pytest.mark.integration

StartWorker = Callable[[str], "subprocess.Popen[bytes]"]
WAIT_SECONDS = 60
NUM_PARTITIONS = 4


@dataclass
class Flow:
    """Events that flow until the block ends: vectors, and where each event lies."""

    vectors_ND: list[np.ndarray] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)


def test_versions_come_go_and_are_refused_while_events_flow(
    stream_repo: StreamRepo, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QARM_STREAM__CODEBOOK_POLL_SECONDS", "0.2")
    worker = start_worker("worker")
    with _events_flow(stream_repo) as flow:
        _wait_for_offsets(stream_repo, lambda told: all("v1" in each for each in told.values()))

        second = publish_codebook(stream_repo.directory, "v2", seed=1)
        stream_repo.registry.set_state("v2", VersionState.LIVE)
        _wait_for_log(stream_repo, "codebook_waits version=v2")
        before_view = _first_offsets(stream_repo)
        stream_repo.apply()
        acknowledged = _wait_for_offsets(
            stream_repo, lambda told: all("v2" in each for each in told.values())
        )

        stream_repo.registry.set_state("v2", VersionState.DEFAULT)
        stream_repo.registry.set_state("v1", VersionState.RETIRED)
        _wait_for_offsets(stream_repo, lambda told: all("v1" not in each for each in told.values()))
        num_old_rows = _num_log_rows(stream_repo, "v1")
        num_stored = _num_log_rows(stream_repo, "v2")
        _wait_until(lambda: _num_log_rows(stream_repo, "v2") > num_stored + 50)

        _publish_damaged(stream_repo, "v3")
        port = _metrics_port(stream_repo)
        _wait_until(lambda: _metric(port, "qarm_codebook_refresh_failed") == 1)
        num_stored = _num_log_rows(stream_repo, "v2")
        _wait_until(lambda: _num_log_rows(stream_repo, "v2") > num_stored + 50)
        ready = _readiness(port)
    wait_until_drained(stream_repo.stream_config, WAIT_SECONDS)
    worker.send_signal(signal.SIGTERM)

    assert worker.wait(40) == 0
    assert all("v2" not in each for each in before_view.values())
    assert sum(each["v2"] for each in acknowledged.values()) > 0
    _assert_codes_after(stream_repo, second, flow, acknowledged)
    assert _num_log_rows(stream_repo, "v1") == num_old_rows
    assert ready == b"ok\n"
    log = (stream_repo.directory / "worker.log").read_text()
    assert log.count("codebook_refused version=v3") == 1


def test_a_new_owner_waits_for_an_acknowledged_version_that_it_cannot_load(
    stream_repo: StreamRepo, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QARM_STREAM__CODEBOOK_POLL_SECONDS", "0.2")
    second = publish_codebook(stream_repo.directory, "v2", seed=1)
    stream_repo.registry.set_state("v2", VersionState.LIVE)
    stream_repo.apply()
    first_owner = start_worker("first")
    with _events_flow(stream_repo) as flow:
        acknowledged = _wait_for_offsets(
            stream_repo, lambda told: all("v2" in each for each in told.values())
        )
        _wait_until(lambda: len(flow.places) > 100)
    wait_until_drained(stream_repo.stream_config, WAIT_SECONDS)
    first_owner.send_signal(signal.SIGTERM)
    assert first_owner.wait(40) == 0

    path = _damage(stream_repo, second)
    with _events_flow(stream_repo, len(flow.places)) as more:
        start_worker("worker")
        _wait_for_log(stream_repo, "metrics_port=")
        port = _metrics_port(stream_repo)
        _wait_until(lambda: b"v2 is acknowledged" in _readiness(port))
    stored = _num_log_rows(stream_repo, "v1")
    _flip_last_byte(path)
    wait_until_drained(stream_repo.stream_config, WAIT_SECONDS)

    assert stored == len(flow.places)
    flow.vectors_ND += more.vectors_ND
    flow.places += more.places
    _assert_codes_after(stream_repo, second, flow, acknowledged)


@pytest.mark.parametrize("stream_repo", ["s3"], indirect=True)
def test_a_worker_outlives_an_object_store_that_is_away_while_it_writes(
    stream_repo: StreamRepo, object_store: ObjectStoreServer, start_worker: StartWorker
) -> None:
    worker = start_worker("worker")
    with _events_flow(stream_repo) as flow:
        _wait_for_offsets(stream_repo, lambda told: all("v1" in each for each in told.values()))
        _wait_until(lambda: len(flow.places) > 50)
        object_store.stop()
        _wait_for_log(stream_repo, "write_failed store=offline")
        num_before = len(flow.places)
        _wait_until(lambda: len(flow.places) > num_before + 100)
        object_store.start()
    wait_until_drained(stream_repo.stream_config, WAIT_SECONDS)
    worker.send_signal(signal.SIGTERM)

    assert worker.wait(40) == 0
    log = open_code_log(open_feature_store(stream_repo.directory).config)
    stored = set(log.read("item_codes_v1", ["item_id"])["item_id"].to_pylist())
    assert stored == set(range(len(flow.places)))
    _assert_codes_after(
        stream_repo, stream_repo.codebook, flow, {n: {"v1": 0} for n in range(NUM_PARTITIONS)}
    )


def test_a_rollout_under_a_running_worker_ends_with_every_item_in_the_new_version(
    stream_repo: StreamRepo, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QARM_STREAM__CODEBOOK_POLL_SECONDS", "0.2")
    worker = start_worker("worker")
    parts = open_parts(str(stream_repo.config_path))
    rollout = Rollout(stream_repo.registry, parts, Patience(WAIT_SECONDS))
    with _events_flow(stream_repo) as flow:
        _wait_for_offsets(stream_repo, lambda told: all("v1" in each for each in told.values()))
        _wait_until(lambda: len(flow.places) > 200)
        second = publish_codebook(stream_repo.directory, "v2", seed=1)
        with pytest.raises(ConfigError, match="run `feast apply`"):
            rollout.start("v2")
        stream_repo.apply()
        rollout.start("v2")
        rollout.undo()
        started = rollout.start("v2")
        num_stored = _num_log_rows(stream_repo, "v2")
        finished = rollout.finish()
        num_old_rows = _num_log_rows(stream_repo, "v1")
        stream_repo.apply()
        _wait_until(lambda: _num_log_rows(stream_repo, "v2") > num_stored + 50)
    wait_until_drained(stream_repo.stream_config, WAIT_SECONDS)
    worker.send_signal(signal.SIGTERM)

    assert worker.wait(40) == 0
    compared = next(step.detail for step in started.steps if step.name == "compare")
    assert re.match(r"\d{3,} items compared: 0 missing, 0 older, 0 with", compared)
    assert re.search(r"of [1-9]\d+ with a vector at hand 0 with other codes", compared)
    assert finished.next_step == "`feast apply`, which drops item_codes_v1"
    assert rollout.status().next_step == "nothing is left to do"
    assert stream_repo.registry.states() == {
        "v1": VersionState.RETIRED,
        "v2": VersionState.DEFAULT,
    }
    assert _num_log_rows(stream_repo, "v1") == num_old_rows
    _assert_codes_after(stream_repo, second, flow, {n: {"v2": 0} for n in range(NUM_PARTITIONS)})


def _assert_codes_after(
    repo: StreamRepo, codebook: Codebook, flow: Flow, acknowledged: dict[int, dict[str, int]]
) -> None:
    x_ND = np.stack(flow.vectors_ND)
    ids_N = np.arange(len(x_ND))
    expected_NL = codebook.encode(ids_N, [""] * len(ids_N), x_ND).rq_NL
    store = open_feature_store(repo.directory)
    view = store.get_feature_view(f"item_codes_{codebook.version}")
    batch = code_online_store(store).read_columns(store.config, view, ids_N, ["rq_code"])
    column = batch.columns["rq_code"]
    codes = np.split(column.values, np.cumsum(column.lengths_N)[:-1])
    after = [
        number
        for number, (partition, offset) in enumerate(flow.places)
        if offset >= acknowledged[partition][codebook.version]
    ]
    assert len(after) > 100
    assert [codes[number].tolist() for number in after] == expected_NL[after].tolist()


@contextmanager
def _events_flow(repo: StreamRepo, first_item: int = 0) -> Iterator[Flow]:
    """Send an item with a ready embedding every few milliseconds."""
    config, flow, done = repo.stream_config, Flow(), threading.Event()
    rng = np.random.default_rng(3)
    with closing(KafkaProducer(bootstrap_servers=config.bootstrap_servers)) as producer:

        def send() -> None:
            while not done.wait(0.005):
                vector_D = rng.standard_normal(EMBEDDING_DIM).astype(np.float32)
                number = first_item + len(flow.vectors_ND)
                event = ItemEvent(number, START + number, {}, vector_D, ENCODER_VERSION)
                message = encode_item_event(event)
                sent = producer.send(
                    config.item_topic, message.value, message.key, message.headers
                ).get(10)
                flow.vectors_ND.append(vector_D)
                flow.places.append((sent.partition, sent.offset))

        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield flow
        finally:
            done.set()
            thread.join()


def _publish_damaged(repo: StreamRepo, version: str) -> None:
    _damage(repo, publish_codebook(repo.directory, version, seed=2))
    repo.registry.set_state(version, VersionState.LIVE)
    # Takes the retired version's view away as well, under the worker's feet.
    repo.apply()


def _damage(repo: StreamRepo, codebook: Codebook) -> Path:
    name = next(name for name in codebook.manifest.files if name.startswith("rq-"))
    path = repo.directory / "data" / "codebooks" / codebook.version / name
    _flip_last_byte(path)
    return path


def _flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _readiness(port: int) -> bytes:
    try:
        return bytes(urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").read())
    except urllib.error.HTTPError as error:
        with error:
            return error.read()


def _first_offsets(repo: StreamRepo) -> dict[int, dict[str, int]]:
    """What each partition's owner has acknowledged: first offset by codebook version."""
    return {
        place.partition: dict(told.first_offsets) if told else {}
        for place, told in read_acknowledgements(repo.stream_config).items()
    }


def _wait_for_offsets(
    repo: StreamRepo, is_right: Callable[[dict[int, dict[str, int]]], bool]
) -> dict[int, dict[str, int]]:
    found: dict[int, dict[str, int]] = {}

    def look() -> bool:
        found.clear()
        found.update(_first_offsets(repo))
        return len(found) == NUM_PARTITIONS and is_right(found)

    _wait_until(look)
    return found


def _wait_until(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_done():
        assert time.monotonic() < deadline, "this did not happen in a minute"
        time.sleep(0.1)


def _wait_for_log(repo: StreamRepo, text: str) -> None:
    _wait_until(lambda: text in (repo.directory / "worker.log").read_text())


def _num_log_rows(repo: StreamRepo, version: str) -> int:
    log = open_code_log(open_feature_store(repo.directory).config)
    return int(log.read(f"item_codes_{version}").num_rows)


def _metrics_port(repo: StreamRepo) -> int:
    found = re.search(r"metrics_port=(\d+)", (repo.directory / "worker.log").read_text())
    assert found is not None
    return int(found[1])


def _metric(port: int, name: str) -> float:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(name + " ")))
