"""`qarm init` and `feast init`: repositories that a team starts from, through real commands."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from command_line import FEAST, QARM, CommandLine
from feast.data_source import PushMode
from test_feature_repo import plant_input

from qarm_feast.repo_paths import open_feature_store

# Feast 0.67 makes times without a zone when it materializes.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

STORES = """
online_store:
  type: qarm_feast.online_stores.sqlite.CodeSqliteOnlineStore
  path: data/online_store.db
offline_store:
  type: qarm_feast.offline_store.CodeLogOfflineStore
"""
DEFINITIONS = """
from qarm_feast import item_code_view, item_entity

item = item_entity()
item_codes_v1 = item_code_view("v1", entity=item)
"""
"""What the README tells a team to add to its own repository."""


@pytest.fixture
def command_line(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path)


def test_a_repository_that_init_wrote_is_applied_and_serves_the_first_commands(
    command_line: CommandLine,
) -> None:
    told = command_line.run(QARM, "init", "shop")
    repo_dir, config = command_line.folder / "shop", ("--config", "shop/qarm.yaml")
    plant_input(repo_dir / "data" / "input")

    command_line.run(FEAST, "-c", "shop", "apply")

    assert "feast -c shop apply" in told
    assert "qarm check-data --config shop/qarm.yaml" in told
    assert "keeps the input contract" in command_line.run(QARM, "check-data", *config)
    assert "version" in command_line.run(QARM, "codebook", "list", *config)
    assert "quarantined" in command_line.run(QARM, "offline", "status", *config)
    store = open_feature_store(repo_dir)
    views = {view.name for view in store.list_feature_views()}
    assert store.project == "shop"
    assert {"user_recent_items", "user_train_items", "user_profile"} <= views
    assert type(store.provider.online_store).__name__ == "CodeSqliteOnlineStore"


def test_feast_opens_a_repository_that_init_wrote_for_redis(command_line: CommandLine) -> None:
    command_line.run(QARM, "init", "shop", "--online", "redis")

    store = open_feature_store(command_line.folder / "shop")

    assert type(store.provider.online_store).__name__ == "CodeRedisOnlineStore"


def test_init_refuses_a_folder_that_holds_something_and_changes_nothing(
    command_line: CommandLine,
) -> None:
    (command_line.folder / "shop").mkdir()
    kept = command_line.folder / "shop" / "qarm.yaml"
    kept.write_text("data: {}")

    told = command_line.run(QARM, "init", "shop", status=2)

    assert "error: shop is not empty, it holds qarm.yaml; nothing was written" in told
    assert [path.name for path in kept.parent.iterdir()] == ["qarm.yaml"]
    assert kept.read_text() == "data: {}"


def test_code_views_work_beside_the_views_of_the_repository_that_feast_init_makes(
    command_line: CommandLine,
) -> None:
    command_line.run(FEAST, "init", "team")
    repo_dir = command_line.folder / "team" / "feature_repo"
    _add_plug_in(repo_dir)
    command_line.run(FEAST, "-c", repo_dir, "apply")
    drivers = pq.read_table(repo_dir / "data" / "driver_stats.parquet").to_pandas()
    newest = drivers.sort_values("event_timestamp").groupby("driver_id").tail(1)
    now = pd.Timestamp.now(tz=UTC)

    store = open_feature_store(repo_dir)
    store.push("item_codes_v1_push", _code_rows(now), to=PushMode.ONLINE_AND_OFFLINE)
    store.materialize(now - timedelta(days=30), now)

    features = ["driver_hourly_stats:conv_rate", "driver_hourly_stats:driver_profile"]
    features += ["item_codes_v1:rq_code", "transformed_conv_rate:conv_rate_plus_val1"]
    rows = [
        {"driver_id": driver, "item_id": item, "val_to_add": 1, "val_to_add_2": 2}
        for driver, item in zip(newest["driver_id"].tolist()[:2], [7, 8], strict=True)
    ]
    online = store.get_online_features(features, rows).to_dict()
    frame = pd.DataFrame(rows).assign(event_timestamp=now)
    joined = store.get_historical_features(entity_df=frame, features=features).to_df()

    rates = newest["conv_rate"].tolist()[:2]
    for found in (online, joined.to_dict("list")):
        assert found["conv_rate"] == pytest.approx(rates)
        assert found["conv_rate_plus_val1"] == pytest.approx([rate + 1 for rate in rates])
        assert [_listed(codes) for codes in found["rq_code"]] == [[1, 2], None]


def _add_plug_in(repo_dir: Path) -> None:
    yaml_path = repo_dir / "feature_store.yaml"
    settings = yaml.safe_load(yaml_path.read_text()) | yaml.safe_load(STORES)
    yaml_path.write_text(yaml.safe_dump(settings))
    with (repo_dir / "feature_definitions.py").open("a") as definitions:
        definitions.write(DEFINITIONS)


def _code_rows(now: datetime) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "item_id": [7],
            "rq_code": [[1, 2]],
            "vq_code": [[3, 4, 5]],
            "encoder_version": ["e1"],
            "content_hash": ["a"],
            "is_deleted": [False],
            "event_timestamp": [now - timedelta(days=1)],
            "created": [now],
        }
    )


def _listed(codes: Any) -> list[int] | None:
    return None if codes is None else [int(code) for code in codes]
