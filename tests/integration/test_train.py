"""The ranker over a real Feast repository: rows, two gloo processes by torchrun, online scores."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from qarm_feast.audit import audit
from qarm_feast.code_log import CodeLog
from qarm_feast.codebook import Codebook, EncoderFacts, QuantizerConfig
from qarm_feast.encode import content_hashes, encode_items
from qarm_feast.errors import LeakError
from qarm_feast.feature_views import declare_views, read_repository_facts
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.online_stores import code_online_store
from qarm_feast.profiles import write_profiles
from qarm_feast.registry import CodebookRegistry
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import (
    INTERACTION_LOG,
    RECENT_ITEM_ROWS,
    RECENT_ITEMS_VIEW,
    TIMESTAMP,
    USER_ERASURE_LOG,
    USER_ERASURE_ROWS,
    code_view_name,
    interaction_rows,
)
from torchrec_models.checkpoint import Checkpoint
from torchrec_models.cli import qarm_rank
from torchrec_models.options import load_ranker_config
from torchrec_models.row_store import RowStore
from torchrec_models.rows import build_training_rows
from torchrec_models.train import main as train_main

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
START = 1_600_000_000_000_000
STEP = 60_000_000
NUM_USERS, NUM_ITEMS, NUM_ROWS, WIDTH = 30, 60, 3001, 16
CREATED = datetime(2026, 1, 1, tzinfo=UTC)
YAML = """
data: {history_length: 8}
codebook: {uri: data/codebooks}
ranker:
  head: home
  tasks:
    - {name: like, label_name: is_like}
    - {name: love, label_name: is_love, after: like}
  embedding_dim: 8
  batch_size: 128
  num_epochs: 5
  id_dropout: 0.2
  history_length: 8
  features:
    [user_id, item_id, user_columns, item_columns, popularity, history_item_id, rq_code, vq_code,
     history_rq_code, prefix, history_prefix, item_cf, code_cf, cross,
     attention, shared_history]
comparison:
  seeds: [0]
  arms:
    - {name: ids, overrides: {features: [user_id, item_id], num_epochs: 1}}
    - {name: vectors, overrides: {features: [user_id, item_id, vector]}}
"""


@dataclass(frozen=True)
class Repository:
    """A feature repository whose streams have been written."""

    path: Path

    @property
    def config_path(self) -> str:
        return str(self.path / "qarm.yaml")


def _write_input(folder: Path) -> np.ndarray:
    """Items of two clusters; users of even id like one, those of odd id the other."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    cluster = np.arange(NUM_ITEMS) % 2
    vectors = rng.normal(size=(NUM_ITEMS, WIDTH)) * 0.2
    vectors[:, 0] += np.where(cluster == 0, 1, -1)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    split = np.where(np.arange(NUM_ROWS) < NUM_ROWS * 0.8, "train", "valid")
    split[int(NUM_ROWS * 0.9) :] = "test"
    users = rng.integers(0, NUM_USERS, NUM_ROWS)
    items = rng.integers(0, NUM_ITEMS, NUM_ROWS)
    # The last six items have no train row.
    items = np.where((split == "train") & (items >= NUM_ITEMS - 6), items - 6, items)
    like = (users % 2 == cluster[items]) ^ (rng.random(NUM_ROWS) < 0.05)
    pq.write_table(
        pa.table(
            {
                "item_id": np.arange(NUM_ITEMS) + 100,
                "upload_timestamp": pa.array([START] * NUM_ITEMS).cast(TIMESTAMP),
                "title": [f"item {number}" for number in range(NUM_ITEMS)],
                "shelf": np.arange(NUM_ITEMS) % 3 == 0,
            }
        ),
        folder / "items.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "user_id": users + 1,
                "item_id": items + 100,
                "event_timestamp": pa.array(START + STEP * (1 + np.arange(NUM_ROWS))).cast(
                    TIMESTAMP
                ),
                "is_like": like,
                "is_love": like & (rng.random(NUM_ROWS) < 0.5),
                "split": split,
            }
        ),
        folder / "interactions.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "user_id": np.arange(NUM_USERS) + 1,
                "age": np.arange(NUM_USERS) + 20,
                "gender": np.where(np.arange(NUM_USERS) % 3, "F", "M"),
            }
        ),
        folder / "users.parquet",
    )
    return vectors


def _publish_codebook(path: Path, labels: InputData, vectors: np.ndarray) -> Codebook:
    uri = str(path / "data" / "codebooks")
    train_items = labels.train_item_ids()
    codebook = Codebook.train(
        "v1",
        train_items,
        vectors[train_items - 100],
        config=QuantizerConfig.model_validate(
            {"rq": {"num_levels": 2, "codebook_size": 4}, "vq": {"num_neighbors": 3}}
        ),
        encoder=EncoderFacts("e1", "hash", labels.behaviour_cutoff()),
        created=CREATED,
    )
    codebook.save(uri)
    CodebookRegistry(uri).publish("v1")
    return codebook


def _write_streams(path: Path, labels: InputData, codebook: Codebook, vectors: np.ndarray) -> None:
    store = open_feature_store(path)
    # Feast says so of every on-demand view; the ranker's cross features are one.
    with pytest.warns(RuntimeWarning, match="experimental"):
        store.apply(list(declare_views(read_repository_facts(path)).values()))
    online, log = code_online_store(store), CodeLog(path / "data" / "offline")
    items = labels.items.select(["item_id"]).append_column(
        "event_timestamp", labels.items["upload_timestamp"]
    )
    items = items.append_column("content_hash", pa.array(content_hashes(labels.items)))
    codes = encode_items(items, vectors, {"v1": codebook}, "e1", CREATED)["v1"]
    log.append(code_view_name("v1"), codes)
    online.write_table(store.config, store.get_feature_view(code_view_name("v1")), codes)
    created = pa.repeat(pa.scalar(CREATED, TIMESTAMP), len(labels.interactions))
    events = labels.interactions.append_column("created", created)
    log.append(INTERACTION_LOG, events.select(interaction_rows(labels.task_names).names))
    positives = events.filter(events["is_like"])
    times = positives["event_timestamp"].cast(pa.int64())
    recent = pa.table(
        [
            positives["user_id"],
            [[item] for item in positives["item_id"].to_pylist()],
            [[time] for time in times.to_pylist()],
            positives["event_timestamp"],
            positives["created"],
        ],
        schema=RECENT_ITEM_ROWS,
    )
    online.write_table(store.config, store.get_feature_view(RECENT_ITEMS_VIEW), recent)
    write_profiles(store, labels, CREATED)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    path = tmp_path_factory.mktemp("feature_repo")
    for name in ("feature_store.yaml", "feature_definitions.py"):
        shutil.copy(ROOT / "feature_repo" / name, path / name)
    (path / "qarm.yaml").write_text(YAML)
    vectors = _write_input(path / "data" / "input")
    labels = load_input_data(DataConfig(input_dir=str(path / "data" / "input")))
    codebook = _publish_codebook(path, labels, vectors)
    (path / "data" / "vectors" / "e1").mkdir(parents=True)
    pq.write_table(
        pa.table(
            {
                "item_id": labels.items["item_id"],
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), WIDTH),
            }
        ),
        path / "data" / "vectors" / "e1" / "part-00000.parquet",
    )
    _write_streams(path, labels, codebook, vectors)
    build_training_rows(str(path / "qarm.yaml"), load_ranker_config(str(path / "qarm.yaml")))
    return Repository(path)


def _torchrun(module: str, repository: Repository, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", module, "--config", repository.config_path]
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=repository.path.parent,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(repository: Repository) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(_torchrun("torchrec_models.train", repository))
    return result


def _store(repository: Repository) -> RowStore:
    return RowStore(str(repository.path / "data" / "rows"), "ranker_v1")


def test_rows_keep_every_label_with_its_codes_and_profile(repository: Repository) -> None:
    store = _store(repository)
    rows = pa.concat_tables(pq.read_table(store.split_path(s)) for s in ("train", "valid", "test"))
    labels = pq.read_table(repository.path / "data" / "input" / "interactions.parquet")

    assert rows["event_timestamp"].to_pylist() == labels["event_timestamp"].to_pylist()
    assert rows["is_like"].to_pylist() == labels["is_like"].to_pylist()
    assert rows["age"].to_pylist() == [user + 19 for user in rows["user_id"].to_pylist()]
    assert set(pc.list_value_length(rows["rq_code"]).to_pylist()) == {2}
    assert store.manifest.counts["rows_without_codes"] == 0
    assert store.manifest.num_rows == {"train": 2401, "valid": 299, "test": 301}


def test_side_tables_are_counted_from_the_train_rows(repository: Repository) -> None:
    labels = pq.read_table(repository.path / "data" / "input" / "interactions.parquet")
    train = labels.filter(pc.equal(labels["split"], "train"))
    shown = train.group_by("item_id").aggregate([("item_id", "count"), ("is_like", "sum")])
    shown = shown.sort_by("item_id")

    tables = _store(repository).side_tables()

    counts = tables.popularity
    assert counts.labels == ("is_like", "is_love")
    assert counts.item_ids_I.tolist() == shown["item_id"].to_pylist()
    assert counts.totals_IC[:, 0].tolist() == shown["item_id_count"].to_pylist()
    assert counts.totals_IC[:, 1].tolist() == shown["is_like_sum"].to_pylist()
    assert sorted(tables.pairs) == ["c1", "c1_c2", "item"]
    # False and true are rows 1 and 2, for items without a train row too.
    expected = np.where(np.arange(NUM_ITEMS) % 3 == 0, 2, 1)
    assert tables.item_columns.rows("shelf", np.arange(NUM_ITEMS) + 100).tolist() == list(expected)


def test_histories_are_the_users_likes_before_the_label_and_train_rows_see_train_likes_only(
    repository: Repository,
) -> None:
    labels = pq.read_table(repository.path / "data" / "input" / "interactions.parquet")
    likes = labels.filter(labels["is_like"]).to_pylist()
    store = _store(repository)

    for split in ("train", "valid", "test"):
        for row in pq.read_table(store.split_path(split)).slice(0, 200).to_pylist():
            before = [
                like["item_id"]
                for like in likes
                if like["user_id"] == row["user_id"]
                and like["event_timestamp"] < row["event_timestamp"]
                and (split != "train" or like["split"] == "train")
            ]
            assert row["history_item_ids"] == before[::-1][:8]


def test_an_item_uploaded_after_the_label_stops_the_build(
    repository: Repository, tmp_path: Path
) -> None:
    path = tmp_path / "repo"
    shutil.copytree(repository.path, path)
    log = CodeLog(path / "data" / "offline")
    codes = log.read(code_view_name("v1"))
    shutil.rmtree(path / "data" / "offline" / code_view_name("v1"))
    late = pa.array([START + STEP * 50] * len(codes)).cast(TIMESTAMP)
    column = codes.schema.get_field_index("event_timestamp")
    log.append(code_view_name("v1"), codes.set_column(column, "event_timestamp", late))
    config_path = str(path / "qarm.yaml")

    with pytest.raises(LeakError, match="49 rows are older than the first code"):
        build_training_rows(config_path, load_ranker_config(config_path))


def test_a_train_event_streamed_with_another_label_stops_the_build(
    repository: Repository, tmp_path: Path
) -> None:
    path = tmp_path / "repo"
    shutil.copytree(repository.path, path)
    log = CodeLog(path / "data" / "offline")
    events = log.read(INTERACTION_LOG)
    is_train = pc.equal(events["split"], "train")
    disliked = events.filter(pc.and_(pc.invert(events["is_like"]), is_train)).slice(0, 1)
    column = disliked.schema.get_field_index("is_like")
    log.append(INTERACTION_LOG, disliked.set_column(column, "is_like", pa.array([True])))
    config_path = str(path / "qarm.yaml")

    with pytest.raises(
        LeakError, match="history events are no positive interactions that their row may see"
    ):
        build_training_rows(config_path, load_ranker_config(config_path))


def test_labels_and_history_of_an_erased_user_are_not_built_into_rows(
    repository: Repository, tmp_path: Path
) -> None:
    path = tmp_path / "repo"
    shutil.copytree(repository.path, path)
    erased_at = START + STEP * 1000
    columns = [[5], pa.array([erased_at]).cast(TIMESTAMP), [CREATED]]
    erasures = pa.table(columns, schema=USER_ERASURE_ROWS)
    CodeLog(path / "data" / "offline").append(USER_ERASURE_LOG, erasures)
    config_path = str(path / "qarm.yaml")

    manifest = build_training_rows(config_path, load_ranker_config(config_path))

    store, old = _store(Repository(path)), _store(repository)
    names = ("train", "valid", "test")
    rows = pa.concat_tables(pq.read_table(store.split_path(split)) for split in names)
    before = pa.concat_tables(pq.read_table(old.split_path(split)) for split in names)
    times = before["event_timestamp"].cast(pa.int64())
    is_erased = pc.and_(pc.equal(before["user_id"], 5), pc.less_equal(times, erased_at))
    assert manifest.counts["labels_erased"] == pc.sum(is_erased).as_py() > 10
    others = pc.not_equal(rows["user_id"], 5)
    assert rows.filter(others).equals(before.filter(pc.not_equal(before["user_id"], 5)))
    own = rows.filter(pc.invert(others))
    assert own["item_id"].equals(
        before.filter(pc.and_(pc.equal(before["user_id"], 5), pc.invert(is_erased)))["item_id"]
    )
    assert pc.min(pc.list_flatten(own["history_timestamps"])).as_py() > erased_at


def test_two_ranks_learn_the_planted_signal_and_cold_items_by_their_codes(
    trained: dict[str, Any],
) -> None:
    metrics = trained["metrics"]

    assert metrics["rows"] == 301
    assert metrics["cold_rows"] > 15
    assert metrics["auc/like"] > 0.85
    assert metrics["cold_auc/like"] > 0.8
    assert trained["masked_history_share"] == 0.0


def test_the_checkpoint_of_two_ranks_scores_online_in_one_process(
    repository: Repository, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QARM_SERVING_LOG__SAMPLE_RATE", "1")
    checkpoint = Checkpoint(str(repository.path / "data" / "checkpoints"), "ranker_v1")
    items = ",".join(str(item) for item in range(100, 160))

    done = CliRunner().invoke(
        qarm_rank,
        ["score", "--user-id", "2", "--items", items, "--config", repository.config_path],
        catch_exceptions=False,
    )

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    likes = np.array([line["scores"]["like"] for line in lines])

    assert checkpoint.manifest.world_size == 2
    assert str(checkpoint.folder) == trained["checkpoint"]
    # User 2 has index 1: it likes the items of odd number.
    assert likes[1::2].mean() > likes[::2].mean() + 0.5
    now = datetime.now(UTC)
    report = audit(
        open_feature_store(repository.path),
        CodeLog(repository.path / "data" / "offline"),
        now - timedelta(hours=1),
        now,
        timedelta(seconds=60),
    )
    assert report.differences == ()
    # The candidates and the eight items of the history.
    assert report.counts["equal"] == sum(report.counts.values()) == 60 + 8


def test_init_from_starts_where_the_older_ranker_ended(
    repository: Repository, trained: dict[str, Any], tmp_path: Path
) -> None:
    arguments = ["--config", repository.config_path, "--init-from", trained["checkpoint"]]
    arguments += ["--set", "ranker.num_epochs=0", "--set", f"ranker.checkpoint_dir={tmp_path}"]

    done = CliRunner().invoke(train_main, arguments, catch_exceptions=False)

    started = json.loads(done.stdout)
    assert started["num_steps"] == 0
    assert started["metrics"] == pytest.approx(trained["metrics"], abs=1e-4)
    assert Path(started["checkpoint"]).parent.parent == tmp_path


def test_a_comparison_trains_every_arm_in_one_process_group(
    repository: Repository, tmp_path: Path
) -> None:
    output = tmp_path / "figures.json"

    _torchrun("torchrec_models.comparison", repository, "--output", str(output))

    figures = json.loads(output.read_text())
    runs = {run["arm"]: run for run in figures["runs"]}
    assert list(runs) == ["ids", "vectors"]
    assert runs["vectors"]["metrics"]["cold_auc/like"] > 0.8
    assert runs["ids"]["metrics"]["rows"] == 301
