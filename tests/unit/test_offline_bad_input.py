"""What must not be in an entity frame, a request or a push, and what the offline store says."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore, FeatureView, Field, FileSource, RepoConfig
from feast.data_source import PushMode
from feast.errors import FeatureViewNotFoundException, PushSourceNotFoundException
from feast.types import Int64

from qarm_feast.code_log import CodeLog
from qarm_feast.errors import DataError
from qarm_feast.feature_views import item_code_view, item_entity
from qarm_feast.offline_store import CodeLogOfflineStore
from qarm_feast.schema import CODE_ROWS, CODES, TIMESTAMP

START = datetime(2026, 1, 1, tzinfo=UTC)
VIEW = "item_codes_v1"
FEATURES = [f"{VIEW}:rq_code", f"{VIEW}:content_hash"]
# Feast 0.67 makes times without a zone when it applies.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def code_rows(**columns: list[Any]) -> pa.Table:
    rows: dict[str, list[Any]] = {
        "item_id": [1],
        "rq_code": [[1, 2]],
        "vq_code": [[3]],
        "encoder_version": ["e1"],
        "content_hash": ["a"],
        "is_deleted": [False],
        "event_timestamp": [START],
        "created": [START],
    }
    return pa.table(rows | columns, schema=CODE_ROWS)


@pytest.fixture
def log(tmp_path: Path) -> CodeLog:
    made = CodeLog(tmp_path / "data" / "offline")
    made.append(VIEW, code_rows())
    return made


@pytest.fixture
def store(tmp_path: Path, log: CodeLog) -> FeatureStore:
    settings = {
        "project": "bad",
        "provider": "local",
        "registry": str(tmp_path / "registry.db"),
        "offline_store": {"type": "qarm_feast.offline_store.CodeLogOfflineStore"},
        "online_store": {"type": "sqlite", "path": str(tmp_path / "online.db")},
        "entity_key_serialization_version": 3,
    }
    made = FeatureStore(config=RepoConfig(**settings, repo_path=tmp_path))
    made.apply([item_entity(), item_code_view("v1")])
    return made


def joined(store: FeatureStore, features: list[str] = FEATURES, **columns: Any) -> pd.DataFrame:
    frame = pd.DataFrame({"item_id": [1], "event_timestamp": [START]} | columns)
    found: pd.DataFrame = store.get_historical_features(entity_df=frame, features=features).to_df()
    return found


def test_an_unknown_view_feature_or_push_source_is_named(store: FeatureStore) -> None:
    with pytest.raises(FeatureViewNotFoundException, match="item_codes_v9"):
        joined(store, ["item_codes_v9:rq_code"])
    with pytest.raises(Exception, match="rq_codes"):
        joined(store, [f"{VIEW}:rq_codes"])
    with pytest.raises(PushSourceNotFoundException, match="item_codes_v9_push"):
        store.push("item_codes_v9_push", code_rows().to_pandas(), to=PushMode.OFFLINE)


@pytest.mark.parametrize("ids", [["one"], ["1"], [1.5], [b"1"], [START]], ids=repr)
def test_ids_of_a_wrong_type_are_refused_with_both_types(
    store: FeatureStore, ids: list[Any]
) -> None:
    with pytest.raises(DataError, match=r"the entity frame: item_id is .* cannot be int64"):
        joined(store, item_id=ids)


def test_great_ids_that_a_gap_made_floats_are_refused_for_they_may_be_another_items(
    store: FeatureStore,
) -> None:
    times = [START, START]

    with pytest.raises(DataError, match=r"item_id is double and holds 9007199254740992.*Int64"):
        joined(store, item_id=[2**53 + 1, None], event_timestamp=times)

    assert len(joined(store, item_id=[2**53 - 1, None], event_timestamp=times)) == 2
    whole = pd.array([2**53 + 1, None], dtype="Int64")
    assert len(joined(store, item_id=whole, event_timestamp=times)) == 2


def test_a_missing_id_joins_to_nothing(store: FeatureStore) -> None:
    found = joined(
        store,
        item_id=pd.array([None, 1], dtype="Int64"),
        event_timestamp=[START, START],
    )

    assert [value is None for value in found["rq_code"]] == [True, False]


def test_naive_times_of_an_entity_frame_are_utc(store: FeatureStore) -> None:
    naive = START.replace(tzinfo=None)

    for time in (naive, naive - timedelta(microseconds=1)):
        is_seen = joined(store, event_timestamp=[time])["rq_code"][0] is not None
        assert is_seen == (time == naive)


def test_naive_times_of_pushed_rows_are_refused(store: FeatureStore, log: CodeLog) -> None:
    frame = code_rows().to_pandas()
    frame["event_timestamp"] = frame["event_timestamp"].dt.tz_localize(None)

    with pytest.raises(DataError, match="event_timestamp has no time zone; pass aware UTC times"):
        store.push(f"{VIEW}_push", frame, to=PushMode.OFFLINE)

    assert log.read(VIEW).num_rows == 1


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("rq_code", pa.array([["x"]]), "rq_code is list<.*string> and cannot be list<.*int64>"),
        ("is_deleted", pa.array(["maybe"]), "is_deleted is string and cannot be bool"),
        ("event_timestamp", pa.array([None], TIMESTAMP), "event_timestamp is null"),
        ("item_id", pa.array([1.5]), "item_id is double and cannot be int64"),
    ],
)  # fmt: skip
def test_rows_of_a_wrong_type_are_refused_whole(
    store: FeatureStore, log: CodeLog, name: str, values: pa.Array, match: str
) -> None:
    at = CODE_ROWS.get_field_index(name)
    view = store.get_feature_view(VIEW)
    rows = code_rows().set_column(at, name, values)

    with pytest.raises(DataError, match=match):
        CodeLogOfflineStore.offline_write_batch(store.config, view, rows, None)

    assert log.read(VIEW).num_rows == 1


@pytest.mark.parametrize("codes", [[None], [[]]], ids=["None", "empty"])
def test_nothing_in_place_of_codes_stays_what_it_is(
    store: FeatureStore, log: CodeLog, codes: list[Any]
) -> None:
    log.append(VIEW, code_rows(item_id=[2], rq_code=codes))

    found = joined(store, item_id=[2])

    assert found["content_hash"].tolist() == ["a"]
    value = found["rq_code"][0]
    assert (None if value is None else np.asarray(value).tolist()) == codes[0]
    assert log.schema(VIEW).field("rq_code").type == CODES


def test_a_row_from_the_future_is_seen_from_its_time_on_and_not_before(
    store: FeatureStore, log: CodeLog
) -> None:
    ahead = datetime.now(UTC) + timedelta(days=365)
    log.append(VIEW, code_rows(content_hash=["z"], event_timestamp=[ahead]))

    today, then = (joined(store, event_timestamp=[time]) for time in (datetime.now(UTC), ahead))
    store.materialize(START - timedelta(days=1), datetime.now(UTC))

    assert (today["content_hash"][0], then["content_hash"][0]) == ("a", "z")
    online = store.get_online_features([f"{VIEW}:content_hash"], [{"item_id": 1}]).to_dict()
    assert online["content_hash"] == ["a"]


def test_a_damaged_part_is_left_out_of_a_join_and_of_materialize(
    store: FeatureStore, log: CodeLog
) -> None:
    part = log.append(VIEW, code_rows(item_id=[2]))
    with part.open("r+b") as file:
        file.seek(part.stat().st_size // 2)
        file.write(os.urandom(64))

    found = joined(store, item_id=[1, 2], event_timestamp=[START, START])
    store.materialize(START - timedelta(days=1), START + timedelta(days=1))

    assert [value is None for value in found["rq_code"]] == [False, True]
    rows = [{"item_id": 1}, {"item_id": 2}]
    online = store.get_online_features([f"{VIEW}:content_hash"], rows).to_dict()
    assert online["content_hash"] == ["a", None]
    assert not part.exists()


def test_a_place_that_is_no_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "offline").write_text("a file where a folder should be")

    with pytest.raises(OSError, match="offline"):
        CodeLog(tmp_path / "offline").append(VIEW, code_rows())


def test_a_parquet_source_that_is_damaged_is_named_and_not_written_over(
    store: FeatureStore, tmp_path: Path
) -> None:
    path = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"item_id": [1], "size": [1], "at": [START]}), path)
    source = FileSource(name="plain", path=str(path), timestamp_field="at")
    plain = FeatureView(
        name="plain",
        entities=[item_entity()],
        schema=[Field(name="size", dtype=Int64)],
        source=source,
    )
    store.apply([item_entity(), plain])
    path.write_bytes(b"no parquet at all")

    with pytest.raises(pa.ArrowInvalid, match="Parquet"):
        joined(store, ["plain:size"])
    with pytest.raises(pa.ArrowInvalid, match="Parquet"):
        CodeLogOfflineStore.offline_write_batch(
            store.config, plain, pa.table({"item_id": [2], "size": [2], "at": [START]}), None
        )

    assert path.read_bytes() == b"no parquet at all"
