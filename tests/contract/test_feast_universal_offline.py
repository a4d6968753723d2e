"""What Feast promises of any offline store, asked of two stock stores and of ours alike.

Feast's wheel ships no tests; these are our own, of the behaviours that upstream's universal tests
look at. ``feast_repo_configuration`` runs upstream's own suite against our stores, and tells what
came out of it.
"""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureService, FeatureStore, Field, RequestSource
from feast import ValueType as Kind
from feast.data_source import PushMode
from feast.errors import RequestDataNotFoundInEntityDfException, SavedDatasetLocationAlreadyExists
from feast.feature_logging import LoggingConfig
from feast.infra.offline_stores.file_source import FileLoggingDestination, SavedDatasetFileStorage
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Bool, Float64, Int64, UnixTimestamp
from feast_universal import (
    DRIVER,
    NOW,
    OFFLINE_TYPES,
    file_source,
    hours_ago,
    labels,
    make_store,
    stats_frame,
    stats_view,
    view,
)

FEATURES = ["stats:rate", "stats:trips"]
# Stock dask warns of columns that it changes in place, and ibis of its own names.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def _ibis_backend() -> Iterator[None]:
    """Let go of the duckdb that ibis holds for all: its binding reports it at exit as a leak."""
    yield
    if (backend := ibis.options.default_backend) is not None:
        backend.disconnect()
        ibis.options.default_backend = None


@pytest.fixture(params=OFFLINE_TYPES.values(), ids=OFFLINE_TYPES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FeatureStore:
    return make_store(tmp_path, request.param)


def join(store: FeatureStore, frame: pd.DataFrame, features: Any, **options: Any) -> pd.DataFrame:
    job = store.get_historical_features(entity_df=frame, features=features, **options)
    found = job.to_df()
    return found.sort_values(["event_timestamp", "driver_id"], ignore_index=True)


def values(column: "pd.Series[Any]") -> list[Any]:
    return [None if value is None or value != value else value for value in column]


def test_each_label_gets_the_newest_row_of_its_time(store: FeatureStore, tmp_path: Path) -> None:
    store.apply([DRIVER, stats_view(tmp_path)])

    found = join(store, labels([1, 1, 2], [5, 1, 3], label=[7, 8, 9]), FEATURES)

    assert values(found["trips"]) == [10, 30, 20]
    assert values(found["rate"]) == [0.25, 0.75, 0.5]
    assert values(found["label"]) == [7, 9, 8]


def test_a_row_older_than_the_time_to_live_is_missing(store: FeatureStore, tmp_path: Path) -> None:
    store.apply([DRIVER, stats_view(tmp_path, ttl=timedelta(hours=2))])

    found = join(store, labels([1, 2], [3, 1]), FEATURES)

    # Stock dask drops the label itself.
    is_dask = store.config.offline_store.type == "dask"
    assert values(found["trips"]) == ([20] if is_dask else [20, None])


def test_without_a_time_to_live_nothing_is_too_old(store: FeatureStore, tmp_path: Path) -> None:
    frame = stats_frame().assign(event_timestamp=[hours_ago(24 * days) for days in (900, 800, 700)])
    store.apply([DRIVER, stats_view(tmp_path, frame, ttl=timedelta(0))])

    found = join(store, labels([1, 2], [1, 1]), FEATURES)

    assert values(found["trips"]) == [20, 30]


def test_names_carry_the_view_when_asked(store: FeatureStore, tmp_path: Path) -> None:
    store.apply([DRIVER, stats_view(tmp_path)])

    found = join(store, labels([1], [1]), FEATURES, full_feature_names=True)

    assert {"stats__rate", "stats__trips"} <= set(found.columns)


def test_of_rows_of_one_time_the_last_written_counts(store: FeatureStore, tmp_path: Path) -> None:
    frame = (
        stats_frame()
        .iloc[:2]
        .assign(event_timestamp=[hours_ago(4)] * 2, created=[hours_ago(1), hours_ago(3)])
    )
    store.apply([DRIVER, stats_view(tmp_path, frame)])

    assert values(join(store, labels([1], [0]), FEATURES)["trips"]) == [10]


def test_columns_are_renamed_by_the_field_mapping_times_among_them(
    store: FeatureStore, tmp_path: Path
) -> None:
    stored = {"driver_id": "driver", "event_timestamp": "at", "trips": "num_trips"}
    frame = stats_frame().rename(columns=stored)
    mapping = {column: name for name, column in stored.items()}
    source = file_source(tmp_path / "stats.parquet", frame, field_mapping=mapping)
    store.apply([DRIVER, view("stats", [DRIVER], {"trips": Int64}, source)])

    found = join(store, labels([1, 2], [1, 1]), ["stats:trips"])

    assert values(found["trips"]) == [20, 30]


def test_a_view_without_entities_has_one_newest_row(store: FeatureStore, tmp_path: Path) -> None:
    frame = stats_frame().drop(columns="driver_id")
    source = file_source(tmp_path / "world.parquet", frame)
    store.apply([DRIVER, stats_view(tmp_path), view("world", [], {"trips": Int64}, source)])

    frame = labels([1, 2], [5, 1])
    found = join(store, frame, ["stats:rate", "world:trips"], full_feature_names=True)
    assert values(found["world__trips"]) == [30, 20]
    if store.config.offline_store.type == "duckdb":
        # Stock duckdb leaves out the placeholder for the key, so that it cannot materialize.
        return
    store.materialize(hours_ago(12), NOW)
    online = store.get_online_features(["stats:rate", "world:trips"], [{"driver_id": 2}])
    assert online.to_dict()["trips"] == [20]


def test_one_view_joins_twice_under_two_keys(store: FeatureStore, tmp_path: Path) -> None:
    stats = stats_view(tmp_path)
    roles = ("first", "second")
    service = FeatureService(
        name="pairs",
        features=[
            stats[["trips"]].with_name(role).with_join_key_map({"driver_id": f"{role}_id"})
            for role in roles
        ],
    )
    store.apply([DRIVER, stats, service])
    frame = pd.DataFrame({"first_id": [1, 2], "second_id": [2, 1], "event_timestamp": [NOW] * 2})

    job = store.get_historical_features(entity_df=frame, features=service, full_feature_names=True)
    found = job.to_df().sort_values("first_id")

    assert values(found["first__trips"]) == [20, 30]
    assert values(found["second__trips"]) == [30, 20]


def test_on_demand_features_need_their_request_data(store: FeatureStore, tmp_path: Path) -> None:
    stats = stats_view(tmp_path)
    request = RequestSource(name="request", schema=[Field(name="bonus", dtype=Int64)])

    @on_demand_feature_view(sources=[stats, request], schema=[Field(name="total", dtype=Float64)])
    def with_bonus(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"total": (inputs["trips"] + inputs["bonus"]).astype("float64")})

    store.apply([DRIVER, stats, with_bonus])
    asked = ["stats:trips", "with_bonus:total"]

    found = join(store, labels([1, 2], [1, 1], bonus=[1, 2]), asked)

    assert values(found["total"]) == [21.0, 32.0]
    with pytest.raises(RequestDataNotFoundInEntityDfException):
        join(store, labels([1], [1]), asked)


def test_a_result_is_kept_and_not_overwritten(store: FeatureStore, tmp_path: Path) -> None:
    store.apply([DRIVER, stats_view(tmp_path)])
    place = str(tmp_path / "kept.parquet")

    def save() -> Any:
        job = store.get_historical_features(entity_df=labels([1], [1]), features=FEATURES)
        return store.create_saved_dataset(job, "kept", SavedDatasetFileStorage(place))

    saved = save()

    assert values(saved.to_df()["trips"]) == [20]
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        save()


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (Int64, [3, 4]),
        (Bool, [True, False]),
        (UnixTimestamp, [hours_ago(7), hours_ago(8)]),
        (Array(Int64), [[1, 2], [3]]),
        (Array(Bool), [[True], [False, True]]),
        (Array(Float64), [[0.5], [1.5, 2.5]]),
    ],
    ids=str,
)
def test_values_keep_their_type(
    store: FeatureStore, tmp_path: Path, dtype: Any, stored: list[Any]
) -> None:
    frame = stats_frame().iloc[1:].assign(value=pd.Series(stored, index=[1, 2]))
    source = file_source(tmp_path / "typed.parquet", frame)
    store.apply([DRIVER, view("typed", [DRIVER], {"value": dtype}, source)])

    found = join(store, labels([1, 2], [0, 0]), ["typed:value"])["value"]

    assert [plain(value) for value in found] == stored


def plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, str | pd.Timestamp):
        # Stock duckdb gives text.
        return pd.to_datetime(value, utc=True).to_pydatetime()
    return value


@pytest.mark.parametrize("entity", [(Kind.STRING, ["a", "b"]), (Kind.INT32, [1, 2])], ids=str)
def test_keys_of_other_types_join(
    store: FeatureStore, tmp_path: Path, entity: tuple[Kind, list[Any]]
) -> None:
    kind, ids = entity
    driver = Entity(name="driver", join_keys=["driver_id"], value_type=kind)
    frame = stats_frame().iloc[1:].assign(driver_id=ids)
    if kind is Kind.INT32:
        frame = frame.astype({"driver_id": "int32"})
    source = file_source(tmp_path / "keyed.parquet", frame)
    store.apply([driver, view("keyed", [driver], {"trips": Int64}, source)])
    asked = labels(ids, [0, 0]).astype({"driver_id": frame["driver_id"].dtype})

    assert values(join(store, asked, ["keyed:trips"])["trips"]) == [20, 30]


def pushed(trips: int, hours: float) -> pd.DataFrame:
    row = stats_frame().iloc[:1].assign(trips=trips)
    return row.assign(event_timestamp=hours_ago(hours), created=hours_ago(hours))


def test_pushed_rows_are_added_to_the_file_one_push_after_the_other(
    store: FeatureStore, tmp_path: Path
) -> None:
    store.apply([DRIVER, stats_view(tmp_path)])

    store.push("stats_push", pushed(40, 3), to=PushMode.OFFLINE)
    store.push("stats_push", pushed(50, 2), to=PushMode.OFFLINE)

    assert values(join(store, labels([1, 1], [2.5, 0]), FEATURES)["trips"]) == [40, 50]
    assert pq.read_table(tmp_path / "stats.parquet").num_rows == 5


def test_a_push_that_does_not_fit_is_refused_whole(store: FeatureStore, tmp_path: Path) -> None:
    store.apply([DRIVER, stats_view(tmp_path)])
    before = (tmp_path / "stats.parquet").read_bytes()

    with pytest.raises(Exception, match=r"trips|match|schema"):
        store.push("stats_push", pushed(1, 1).drop(columns="trips"), to=PushMode.OFFLINE)

    assert (tmp_path / "stats.parquet").read_bytes() == before


def test_what_a_server_served_is_logged_and_read_back(store: FeatureStore, tmp_path: Path) -> None:
    stats, folder = stats_view(tmp_path), tmp_path / "served"
    folder.mkdir()
    logging = LoggingConfig(destination=FileLoggingDestination(path=str(folder)))
    service = FeatureService(name="served", features=[stats[["trips"]]], logging_config=logging)
    store.apply([DRIVER, stats, service])
    rows = pd.DataFrame(
        {
            "driver_id": [1, 2],
            "stats__trips": [20, 30],
            "stats__trips__timestamp": [hours_ago(4), hours_ago(6)],
            "stats__trips__status": [2, 2],
            "__request_id": ["a", "b"],
            "__log_timestamp": [NOW, NOW],
            "__log_date": [NOW.date()] * 2,
        }
    )

    for part in (rows.iloc[:1], rows.iloc[1:]):
        store.write_logged_features(_to_arrow(part), service)

    assert sorted(pq.read_table(folder)["stats__trips"].to_pylist()) == [20, 30]


def _to_arrow(frame: pd.DataFrame) -> Any:
    return pa.Table.from_pandas(frame, preserve_index=False)


def test_materialized_is_what_the_range_holds_newest_first(
    store: FeatureStore, tmp_path: Path
) -> None:
    store.apply([DRIVER, stats_view(tmp_path)])
    rows = [{"driver_id": driver} for driver in (1, 2, 3)]

    def online() -> list[Any]:
        found: list[Any] = store.get_online_features(FEATURES, rows).to_dict()["trips"]
        return found

    store.materialize(hours_ago(12), hours_ago(5))
    first = online()
    store.materialize_incremental(NOW)

    assert first == [10, 30, None]
    assert online() == [20, 30, None]
