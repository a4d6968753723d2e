"""What must not be in a table, a request or a file, and what both online stores say to it."""

import os
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from feast import FeatureStore, RepoConfig
from online_store_cases import (
    ITEM,
    SQLITE_TYPE,
    USER,
    Online,
    close,
    code_rows,
    code_view,
    feast_rows,
    make_settings,
    recent_view,
)

from qarm_feast.errors import ConfigError, DataError, ServiceUnavailableError
from qarm_feast.online_stores.sqlite import CodeSqliteOnlineStore
from qarm_feast.reader import CodeReader
from qarm_feast.schema import CODES, TIMESTAMP

ITEM_1 = np.array([1])


def with_column(table: pa.Table, name: str, values: Any, type_: pa.DataType) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, name, pa.array(values, type_))


@pytest.fixture
def feature_store(online: Online) -> FeatureStore:
    made = FeatureStore(config=online.config)
    made.apply([ITEM, USER, code_view(), recent_view()])
    return made


def test_a_view_that_was_never_applied_is_named_with_the_next_command(
    feature_store: FeatureStore,
) -> None:
    with pytest.raises(ConfigError, match=r"no view 'item_codes_v9'.*feast -c .* apply"):
        CodeReader(feature_store, "v9").read_codes(ITEM_1)
    with pytest.raises(ConfigError, match="no view 'user_profile'"):
        CodeReader(feature_store, "v1").read_profiles(ITEM_1)


@pytest.mark.parametrize("codes", [[None], [[]]])
def test_nothing_in_place_of_codes_is_stored_as_stock_feast_stores_it(
    online: Online, codes: list[Any]
) -> None:
    view = code_view()
    rows = with_column(code_rows([(1, 1, "a", [1, 1])]), "rq_code", codes, CODES)
    rows = rows.drop_columns(["created"])

    online.stock.online_write_batch(online.stock_config, view, feast_rows(view, rows), None)
    expected = online.stored_bytes(view)
    online.clear()
    online.write(view, rows)

    assert online.stored_bytes(view) == expected
    batch = online.store.read_columns(online.config, view, ITEM_1, ["rq_code", "vq_code"])
    assert batch.present_N.tolist() == [True]
    assert [batch.columns[name].lengths_N.tolist() for name in ("rq_code", "vq_code")] == [[0], [3]]


@pytest.mark.parametrize("codes", [[None], [[]]])
def test_a_row_without_codes_is_no_row_of_codes_to_the_reader(
    online: Online, feature_store: FeatureStore, codes: list[Any]
) -> None:
    rows = with_column(code_rows([(1, 1, "a", [1, 1])]), "rq_code", codes, CODES)
    online.write(code_view(), rows)

    with pytest.raises(DataError, match="a row of 0 codes, its codebook has 2"):
        CodeReader(feature_store, "v1").read_codes(ITEM_1)


def test_a_missing_code_within_a_list_is_refused(online: Online) -> None:
    rows = with_column(code_rows([(1, 1, "a", [1, 1])]), "rq_code", [[1, None]], CODES)

    with pytest.raises(DataError, match="column 'rq_code'"):
        online.write(code_view(), rows)

    assert online.codes(1) == [None]


@pytest.mark.parametrize(
    ("name", "type_"), [("item_id", pa.int64()), ("event_timestamp", TIMESTAMP)]
)
def test_a_row_without_id_or_time_is_refused(online: Online, name: str, type_: pa.DataType) -> None:
    rows = code_rows([(1, 1, "a", [1, 1]), (2, 1, "a", [2, 2])])
    values = [rows[name][0].as_py(), None]

    with pytest.raises(DataError, match=f"'{name}' is .* with 1 nulls"):
        online.write(code_view(), with_column(rows, name, values, type_))

    assert online.codes(1) == [None]


def test_a_time_in_another_unit_is_refused(online: Online) -> None:
    far = pa.scalar(10_000_000_000_000_000, pa.int64()).cast(TIMESTAMP)
    rows = with_column(code_rows([(1, 1, "a", [1, 1])]), "event_timestamp", [far], TIMESTAMP)

    with pytest.raises(DataError, match="after 2255"):
        online.write(code_view(), rows)


def test_a_clock_in_the_future_wins_until_its_time_and_is_served(online: Online) -> None:
    ahead = datetime.now(UTC) + timedelta(days=1)
    rows = code_rows([(1, 1, "a", [1, 1])])
    online.write(code_view(), with_column(rows, "event_timestamp", [ahead], TIMESTAMP))

    now = with_column(
        code_rows([(1, 1, "b", [2, 2])]), "event_timestamp", [datetime.now(UTC)], TIMESTAMP
    )
    later = with_column(rows, "event_timestamp", [ahead + timedelta(seconds=1)], TIMESTAMP)

    # The guard knows no clock: the worker refuses such events (`stream.max_future_seconds`).
    assert online.write(code_view(), now) == 0
    assert online.codes(1) == [[1, 1]]
    assert online.write(code_view(), later) == 1


def test_ids_of_a_wrong_type_in_feasts_request_find_nothing(
    online: Online, feature_store: FeatureStore
) -> None:
    online.write(code_view(), code_rows([(1, 1, "a", [1, 1])]))
    features = ["item_codes_v1:rq_code"]

    found = feature_store.get_online_features(features, [{"item_id": 1}]).to_dict()
    assert found["rq_code"] == [[1, 1]]
    with pytest.raises((TypeError, ValueError)):
        feature_store.get_online_features(features, [{"item_id": "one"}])


@pytest.mark.parametrize(("name", "values"), [("rq_code", None), ("item_id", ["one"])])
def test_a_push_of_wrong_columns_or_types_changes_nothing(
    online: Online, feature_store: FeatureStore, name: str, values: list[str] | None
) -> None:
    frame = code_rows([(1, 1, "a", [1, 1])]).to_pandas()
    bad = frame.assign(**{name: values}) if values else frame.drop(columns=name)

    with pytest.raises((DataError, TypeError, ValueError, KeyError, pa.ArrowInvalid)):
        feature_store.write_to_online_store("item_codes_v1", df=bad)

    assert online.codes(1) == [None]


def sqlite_in(directory: Path, name: str) -> tuple[CodeSqliteOnlineStore, RepoConfig]:
    settings = make_settings(directory, SQLITE_TYPE, {"path": str(directory / name)})
    return CodeSqliteOnlineStore(), RepoConfig(**settings)


def test_a_sqlite_file_that_is_none_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "online.db").write_bytes(b"not a database" * 100)
    store, config = sqlite_in(tmp_path, "online.db")

    for use in (
        lambda: store.write_table(config, code_view(), code_rows([(1, 1, "a", [1, 1])])),
        lambda: store.read_columns(config, code_view(), ITEM_1, ["rq_code"]),
    ):
        with pytest.raises(ServiceUnavailableError, match=r"online\.db .*feast apply.*materialize"):
            use()

    close(store)


@pytest.mark.parametrize("name", ["taken/online.db", "folder"])
def test_a_place_that_sqlite_cannot_open_is_an_unavailable_service(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    (tmp_path / "folder").mkdir()
    store, config = sqlite_in(tmp_path, name)

    with pytest.raises(ServiceUnavailableError, match=name):
        store.read_columns(config, code_view(), ITEM_1, ["rq_code"])

    close(store)


def test_a_sqlite_file_that_is_damaged_within_is_told_and_not_served(tmp_path: Path) -> None:
    store, config = sqlite_in(tmp_path, "online.db")
    store.update(config, [], [code_view()], [], [], False)
    rows = code_rows([(item, 1, "a", [item, 1]) for item in range(2_000)])
    store.write_table(config, code_view(), rows)
    close(store)
    path = tmp_path / "online.db"
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(os.urandom(path.stat().st_size - 8192))

    store, config = sqlite_in(tmp_path, "online.db")
    with pytest.raises(ServiceUnavailableError, match=r"online\.db"):
        store.read_columns(config, code_view(), np.arange(2_000), ["rq_code"])

    close(store)
