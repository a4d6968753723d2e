"""The feature repository through Feast's own command line, called from another directory."""

import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from qarm_feast import schema
from qarm_feast.code_log import CodeLog
from qarm_feast.input_data import DataConfig, load_input_data
from qarm_feast.profiles import load_users, write_profiles
from qarm_feast.registry import CodebookRegistry, Manifest
from qarm_feast.repo_paths import open_feature_store

pytestmark = pytest.mark.integration

DECLARATIONS = Path(__file__).parents[2] / "feature_repo"
FILES = ("feature_store.yaml", "qarm.yaml", "feature_definitions.py")
START = datetime(2026, 1, 1, tzinfo=UTC)
CODES = ["item_codes_v1:rq_code", "item_codes_v1:content_hash"]
HISTORY = ["user_recent_items:item_ids", "user_recent_items:item_timestamps"]


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


@dataclass(frozen=True)
class Repository:
    """A copy of the repository, and the directory from which it is used."""

    repo_dir: Path
    elsewhere: Path

    def feast(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "feast.cli.cli", "-c", str(self.repo_dir), *arguments]
        ran = subprocess.run(
            command, cwd=self.elsewhere, capture_output=True, text=True, timeout=240, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def online(self, features: list[str], key: str, ids: list[int]) -> dict[str, list[object]]:
        store = open_feature_store(self.repo_dir)
        rows = [{key: one} for one in ids]
        found: dict[str, list[object]] = store.get_online_features(features, rows).to_dict()
        return found


def plant_input(input_dir: Path) -> None:
    """Write two users' interactions with one item each."""
    input_dir.mkdir(parents=True)
    times = pa.array([at(10), at(20)], schema.TIMESTAMP)
    items = {"item_id": [1, 2], "upload_timestamp": times, "title": ["one", "two"]}
    interactions = {
        "user_id": [7, 8],
        "item_id": [1, 2],
        "event_timestamp": times,
        "is_like": [True, True],
        "split": ["train", "train"],
    }
    users = {"user_id": [7, 8], "age": [30, 40]}
    for name, columns in (("items", items), ("interactions", interactions), ("users", users)):
        pq.write_table(pa.table(columns), input_dir / f"{name}.parquet")


def plant_codebook(uri: Path) -> None:
    """Publish a manifest; no declaration reads the arrays."""
    manifest = Manifest(
        version="v1",
        encoder_version="e1",
        encoder_hash="00",
        behaviour_cutoff=None,
        embedding_dim=8,
        level_sizes=(4, 4),
        num_neighbors=2,
        pool_size=10,
        seed=0,
        num_training_items=10,
        files={},
        created=START,
    )
    (uri / "v1").mkdir(parents=True)
    (uri / "v1" / "manifest.json").write_text(manifest.model_dump_json())
    CodebookRegistry(str(uri)).publish("v1")


def plant_log(log: CodeLog) -> None:
    """Write item 1 twice (edited at 20 s), item 2 at 30 s, and the positives of two users."""
    items, seconds = [1, 1, 2], [10, 20, 30]
    codes = {
        "item_id": items,
        "rq_code": [[0, 1], [2, 3], [1, 1]],
        "vq_code": [[5, 6], [7, 8], [9, 1]],
        "encoder_version": ["e1"] * 3,
        "content_hash": ["a", "b", "c"],
        "is_deleted": [False] * 3,
        "event_timestamp": [at(second) for second in seconds],
        "created": [at(100)] * 3,
    }
    events = {
        "user_id": [7, 7, 8],
        "item_id": [1, 2, 2],
        "is_like": [True] * 3,
        "split": ["train"] * 3,
        "event_timestamp": [at(10), at(40), at(20)],
        "created": [at(100)] * 3,
    }
    log.append("item_codes_v1", pa.table(codes, schema=schema.CODE_ROWS))
    interactions = pa.table(events, schema=schema.interaction_rows(("is_like",)))
    log.append(schema.INTERACTION_LOG, interactions)


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Return a repository with data, a codebook and rows, on which ``feast apply`` ran."""
    root = tmp_path_factory.mktemp("feature_repo")
    repository = Repository(root / "repo", root / "elsewhere")
    for folder in (repository.repo_dir, repository.elsewhere):
        folder.mkdir()
    for name in FILES:
        shutil.copyfile(DECLARATIONS / name, repository.repo_dir / name)
    data_dir = repository.repo_dir / "data"
    plant_input(data_dir / "input")
    plant_codebook(data_dir / "codebooks")
    plant_log(CodeLog(data_dir / "offline"))
    assert "Created feature view item_codes_v1" in repository.feast("plan")
    repository.feast("apply")
    return repository


@pytest.fixture(scope="module")
def materialized(applied: Repository) -> Repository:
    """Return the repository after materializing the first 25 seconds."""
    applied.feast("materialize", START.isoformat(), at(25).isoformat())
    return applied


def test_the_command_line_lists_every_view_from_another_directory(applied: Repository) -> None:
    listed = applied.feast("feature-views", "list")

    for view in ("item_codes_v1", "user_recent_items", "user_train_items", "user_profile"):
        assert view in listed
    assert list(applied.elsewhere.iterdir()) == []


def test_materialize_brings_the_rows_of_its_range_online(materialized: Repository) -> None:
    codes = materialized.online(CODES, "item_id", [1, 2])
    histories = materialized.online(HISTORY, "user_id", [7, 8])

    assert codes["rq_code"] == [[2, 3], None]
    assert codes["content_hash"] == ["b", None]
    assert histories["item_ids"] == [[1], [2]]


def test_materialize_incremental_adds_what_came_after(materialized: Repository) -> None:
    materialized.feast("materialize-incremental", at(60).isoformat())

    codes = materialized.online(CODES, "item_id", [1, 2])
    histories = materialized.online(HISTORY, "user_id", [7, 8])
    assert codes["rq_code"] == [[2, 3], [1, 1]]
    assert histories["item_ids"] == [[2, 1], [2]]
    newest = [round(at(second).timestamp()) * 1_000_000 for second in (40, 10)]
    assert histories["item_timestamps"] == [newest, [newest[0] - 20_000_000]]


def test_user_profiles_are_loaded_offline_and_online(applied: Repository) -> None:
    config_path = str(applied.repo_dir / "qarm.yaml")

    ran = CliRunner().invoke(load_users, ["--config", config_path], catch_exceptions=False)

    assert ran.output == "users written: 2 (unchanged: 0)\n"
    assert applied.online(["user_profile:age"], "user_id", [7, 8, 9])["age"] == [30, 40, None]
    log = CodeLog(applied.repo_dir / "data" / "offline").read(schema.USER_PROFILE_VIEW)
    assert log["event_timestamp"].to_pylist() == [at(10), at(10)]


def test_a_changed_profile_is_served_and_holds_from_its_load_on(applied: Repository) -> None:
    store = open_feature_store(applied.repo_dir)
    loaded = load_input_data(DataConfig(input_dir=str(applied.repo_dir / "data" / "input")))
    write_profiles(store, loaded, at(100))
    users = pa.table({"user_id": [7, 8], "age": [31, 40]})

    num_written = write_profiles(store, replace(loaded, users=users), at(200))

    assert num_written == 1
    assert applied.online(["user_profile:age"], "user_id", [7, 8])["age"] == [31, 40]
    frame = pd.DataFrame({"user_id": [7, 7], "event_timestamp": [at(199), at(200)]})
    ages = store.get_historical_features(entity_df=frame, features=["user_profile:age"])
    assert ages.to_df()["age"].tolist() == [30, 31]


def test_cross_features_come_with_the_rankers_switch_and_go_with_it(
    materialized: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QARM_RANKER__FEATURES", '["item_id", "cross"]')
    materialized.feast("apply")
    rows = [{"item_id": 1, "user_id": 7, "history_rq_codes": [2, 0, 0, 0, 2, 3]}]
    store = open_feature_store(materialized.repo_dir)

    found = store.get_online_features(store.get_feature_service("ranker_v1"), rows).to_dict()

    assert (found["c1_count"], found["c1_position"]) == ([2], [0])
    assert (found["c1_c2_count"], found["c1_c2_position"]) == ([1], [2])
    assert "cross_features_v1" not in materialized.feast("plan")
    monkeypatch.delenv("QARM_RANKER__FEATURES")
    materialized.feast("apply")
    left = open_feature_store(materialized.repo_dir)
    assert left.list_on_demand_feature_views() == []
    assert left.get_online_features(left.get_feature_service("ranker_v1"), rows)


def test_the_definitions_need_no_data_and_load_neither_faiss_nor_torchrec(tmp_path: Path) -> None:
    for name in FILES:
        shutil.copyfile(DECLARATIONS / name, tmp_path / name)
    script = (
        "import runpy, sys\n"
        f"names = runpy.run_path({str(tmp_path / 'feature_definitions.py')!r})\n"
        "assert {'item', 'user', 'user_recent_items', 'user_train_items'} <= set(names)\n"
        "assert 'faiss' not in sys.modules and 'torchrec' not in sys.modules\n"
    )

    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )

    assert ran.returncode == 0, ran.stderr
