"""A real server process over a real redis-server: the scores of training, faults, and the end."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from qarm_feast.codebook import Codebook, EncoderFacts, QuantizerConfig
from qarm_feast.feature_views import declare_views, read_repository_facts
from qarm_feast.item_vectors import encode_vectors
from qarm_feast.online_stores import code_online_store
from qarm_feast.registry import CodebookRegistry
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import (
    CODE_ROWS,
    RECENT_ITEM_ROWS,
    RECENT_ITEMS_VIEW,
    TIMESTAMP,
    VECTOR_ROWS,
    code_view_name,
    vector_view_name,
)
from tests.fault.services import RedisServer
from tests.unit.torchrec_models.synthetic import write_synthetic_rows
from torchrec_models.checkpoint import Checkpoint
from torchrec_models.dataset import row_columns
from torchrec_models.export import Export, export_newest, open_rows
from torchrec_models.inputs import TrainInputs
from torchrec_models.options import load_ranker_config
from torchrec_models.ranker import ranker_logits
from torchrec_models.sharding import process_group
from torchrec_models.training import train

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
MOMENT = datetime(2020, 1, 1, tzinfo=UTC)
QARM_YAML = """
codebook: {uri: data/codebooks}
ranker:
  embedding_dim: 16
  batch_size: 300
  num_epochs: 1
  features: [user_id, item_id, history_item_id, rq_code, vq_code, history_rq_code, cross, vector]
serving: {port: 0, max_candidates: 50}
"""
FEATURE_STORE_YAML = """
project: qarm
provider: local
registry: {{registry_type: sql, path: "sqlite:///data/registry.db"}}
online_store:
  type: qarm_feast.online_stores.redis.CodeRedisOnlineStore
  connection_string: "127.0.0.1:{port}"
offline_store: {{type: qarm_feast.offline_store.CodeLogOfflineStore, uri: data/offline}}
entity_key_serialization_version: 3
"""


@dataclass(frozen=True)
class Served:
    """A repository whose ranker was trained and exported, its store filled."""

    path: Path
    redis: RedisServer
    inputs: TrainInputs
    checkpoint: Checkpoint
    export: Export

    @property
    def config_path(self) -> str:
        return str(self.path / "qarm.yaml")

    def test_rows(self) -> pa.Table:
        """Return one test row of each user, whose history is the one that redis holds."""
        rows = pq.read_table(self.inputs.store.split_path("test"))
        _, firsts = np.unique(rows["user_id"].to_numpy(), return_index=True)
        return rows.take(firsts)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("repo")
    with RedisServer(path / "redis") as redis:
        (path / "qarm.yaml").write_text(QARM_YAML)
        (path / "feature_store.yaml").write_text(FEATURE_STORE_YAML.format(port=redis.port))
        inputs = write_synthetic_rows(path / "data" / "rows")
        config_path = str(path / "qarm.yaml")
        config = load_ranker_config(config_path)
        _publish_codebook(path, inputs)
        with process_group():
            train(config, inputs)
        export = export_newest(config_path, config)
        made = Served(path, redis, inputs, Checkpoint(config.checkpoint_dir, "ranker_v1"), export)
        _fill_store(made)
        yield made


def _publish_codebook(path: Path, inputs: TrainInputs) -> None:
    folder = inputs.store.snapshot_folder
    codebook = Codebook.train(
        "v1",
        np.load(folder / "item_ids.npy"),
        np.load(folder / "vectors_aligned.npy"),
        config=QuantizerConfig.model_validate(
            {"rq": {"num_levels": 2, "codebook_size": 8}, "vq": {"num_neighbors": 4}}
        ),
        encoder=EncoderFacts("e1", "hash", MOMENT),
        created=MOMENT,
    )
    codebook.save(str(path / "data" / "codebooks"))
    CodebookRegistry(str(path / "data" / "codebooks")).publish("v1")


def _fill_store(served: Served) -> None:
    store = open_feature_store(served.path)
    with pytest.warns(RuntimeWarning, match="experimental"):
        store.apply(list(declare_views(read_repository_facts(served.path)).values()))
    folder = served.inputs.store.snapshot_folder
    item_ids, rows = np.load(folder / "item_ids.npy"), served.test_rows()
    all_rows = pa.concat_tables(
        pq.read_table(served.inputs.store.split_path(split)) for split in ("train", "valid", "test")
    ).to_pylist()
    vq = {row["item_id"]: row["vq_code"] for row in all_rows}
    count = len(item_ids)
    vectors = encode_vectors(np.load(folder / "vectors_aligned.npy"))
    same = [["hash"] * count, [False] * count, [MOMENT] * count, [MOMENT] * count]
    codes = [item_ids, list(np.load(folder / "rq.npy")), [vq[item] for item in item_ids.tolist()]]
    has_history = rows.filter(pc.greater(pc.list_value_length(rows["history_item_ids"]), 0))
    times = has_history["event_timestamp"].cast(TIMESTAMP)
    recent = [has_history["user_id"], has_history["history_item_ids"]]
    recent += [_falling_times(has_history), times, times]
    tables = {
        code_view_name("v1"): pa.table([*codes, ["e1"] * count, *same], schema=CODE_ROWS),
        vector_view_name("e1"): pa.table([item_ids, vectors, *same], schema=VECTOR_ROWS),
        RECENT_ITEMS_VIEW: pa.table(recent, schema=RECENT_ITEM_ROWS),
    }
    for name, table in tables.items():
        code_online_store(store).write_table(store.config, store.get_feature_view(name), table)


def _falling_times(rows: pa.Table) -> pa.Array:
    """Times by which the store keeps the order that the rows have."""
    lists = rows["history_item_ids"].to_pylist()
    return pa.array([[1_000_000 - place for place in range(len(items))] for items in lists])


@pytest.fixture(scope="module")
def server(served: Served) -> Iterator["Server"]:
    with Server(served) as running:
        yield running


class Server:
    """A server process of its own session; killed at the end if it still runs."""

    def __init__(self, served: Served) -> None:
        command = [sys.executable, "-m", "torchrec_models.cli", "serve", "--export"]
        self._log = (served.path / "server.log").open("ab")
        self.process = subprocess.Popen(
            [*command, "--config", served.config_path],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> "Server":
        assert self.process.stdout is not None
        self.announced = json.loads(self.process.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()

    def ask(self, path: str, request: Any = None) -> tuple[int, str]:
        """Send one request; GET where there is no body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.announced["port"], timeout=30)
        try:
            body = None if request is None else json.dumps(request)
            connection.request("GET" if request is None else "POST", path, body)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def counts(self) -> dict[str, float]:
        """Return every figure of /metrics."""
        lines = [line for line in self.ask("/metrics")[1].splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def wait_for_health(self, status: int) -> dict[str, Any]:
        """Return what /health says once it has a status."""
        deadline = time.monotonic() + 30
        while True:
            found, text = self.ask("/health")
            if found == status:
                answer: dict[str, Any] = json.loads(text)
                return answer
            assert time.monotonic() < deadline, text
            time.sleep(0.1)


def test_scores_over_http_are_those_of_training_within_the_stated_error(
    served: Served, server: Server
) -> None:
    rows = served.test_rows()
    manifest = served.checkpoint.manifest
    labels = tuple(task.label_name for task in manifest.tasks)
    stored = open_rows(served.checkpoint, served.inputs.store, "test")
    batch = stored.builder.build(row_columns(rows, labels, stored.user_columns))
    with torch.inference_mode():
        trained_BT = ranker_logits(served.checkpoint.load_ranker(), batch).sigmoid().numpy()

    answers = [
        json.loads(server.ask("/rank", {"user_id": user, "item_ids": [item]})[1])
        for user, item in zip(rows["user_id"].to_pylist(), rows["item_id"].to_pylist(), strict=True)
    ]

    served_BT = [[answer["scores"][task.name][0] for task in manifest.tasks] for answer in answers]
    differences = np.abs(np.array(served_BT) - trained_BT)
    # int8 tables as the export says, and vectors rounded to float16.
    assert differences.max() < 2 * served.export.facts.error.max_score_difference + 1e-3
    assert 0 < differences.mean() < 2 * served.export.facts.error.mean_score_difference + 1e-3
    assert [answer["history_length"] for answer in answers] == (
        pc.list_value_length(rows["history_item_ids"]).to_pylist()
    )


def test_a_server_says_what_it_lacks_and_comes_back_with_its_store(
    served: Served, server: Server
) -> None:
    known = {"user_id": 1000, "item_ids": [5000, 99]}

    ready = server.wait_for_health(200)
    before = server.counts()
    first = server.ask("/rank", known)
    too_many = server.ask("/rank", {"user_id": 1, "item_ids": list(range(51))})
    served.redis.kill()
    away = server.ask("/rank", known)
    unready = server.wait_for_health(503)
    served.redis.start()
    server.wait_for_health(200)
    again = server.ask("/rank", known)
    after = server.counts()

    assert server.announced["service"] == ready["service"] == "ranker_v1"
    assert ready["source"] == str(served.export.folder)
    assert first[0] == 200
    assert json.loads(first[1])["num_missing_items"] == 1
    assert (too_many[0], json.loads(too_many[1])["error"]) == (422, "too_many_candidates")
    assert (away[0], json.loads(away[1])["error"]) == (503, "store_unavailable")
    assert "redis" in unready["reason"]
    assert again == first
    assert after['qarm_rank_errors_total{kind="store_unavailable"}'] == 1
    assert after["qarm_rank_missing_items_total"] == before["qarm_rank_missing_items_total"] + 2
    ok = 'qarm_rank_request_seconds_count{outcome="ok"}'
    assert after[ok] == before[ok] + 2


def test_sigterm_ends_a_server_with_status_0(server: Server) -> None:
    server.wait_for_health(200)

    server.process.send_signal(signal.SIGTERM)

    assert server.process.wait(timeout=30) == 0
