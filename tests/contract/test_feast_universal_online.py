"""What Feast promises of any online store, asked of two stock stores and of ours alike.

Through Feast's own interface, on a real sqlite file and a real redis server; what only ours do is
in ``test_online_stores``. See ``feast_repo_configuration`` for upstream's own suite.
"""

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from feast import Entity, FeatureService, FeatureStore
from feast import ValueType as Kind
from feast.data_source import PushMode
from feast.errors import FeatureNameCollisionError, FeatureViewNotFoundException
from feast.types import (
    Array,
    Bool,
    Bytes,
    Float32,
    Float64,
    Int32,
    Int64,
    String,
    UnixTimestamp,
)
from feast_universal import (
    DRIVER,
    NOW,
    OURS,
    file_source,
    hours_ago,
    make_store,
    stats_frame,
    stats_view,
    view,
)
from online_store_cases import REDIS_TYPE, SQLITE_TYPE, close

TYPES = {
    "stock-sqlite": "sqlite",
    "our-sqlite": SQLITE_TYPE,
    "stock-redis": "redis",
    "our-redis": REDIS_TYPE,
}
# Stock Feast warns of times without a zone that it makes itself.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=TYPES.values(), ids=TYPES)
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FeatureStore]:
    # Stock sqlite keeps local times.
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    settings = {"type": request.param, "path": str(tmp_path / "online.db")}
    if "redis" in request.param.lower():
        port = request.getfixturevalue("redis_port")
        settings = {"type": request.param, "connection_string": f"127.0.0.1:{port}"}
    made = make_store(tmp_path, OURS, settings)
    yield made
    made.teardown()
    close(made.provider.online_store)
    monkeypatch.undo()
    time.tzset()


def read(store: FeatureStore, features: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = store.get_online_features(features, rows).to_dict()
    return found


def drivers(*ids: int) -> list[dict[str, Any]]:
    return [{"driver_id": driver} for driver in ids]


def newest() -> pd.DataFrame:
    return stats_frame().iloc[1:]


def test_what_is_written_is_read_and_what_is_not_is_none(
    store: FeatureStore, tmp_path: Path
) -> None:
    store.apply([DRIVER, stats_view(tmp_path)])
    store.write_to_online_store("stats", newest())

    found = read(store, ["stats:trips", "stats:rate"], drivers(2, 9, 1))

    assert found["driver_id"] == [2, 9, 1]
    assert found["trips"] == [30, None, 20]
    assert found["rate"] == [0.75, None, 0.5]


def test_the_order_of_the_request_and_repeats_are_kept(store: FeatureStore, tmp_path: Path) -> None:
    store.apply([DRIVER, stats_view(tmp_path)])
    store.write_to_online_store("stats", newest())

    assert read(store, ["stats:trips"], drivers(1, 2, 1, 1))["trips"] == [20, 30, 20, 20]


def test_times_of_the_values_come_with_them(store: FeatureStore, tmp_path: Path) -> None:
    store.apply([DRIVER, stats_view(tmp_path)])
    store.write_to_online_store("stats", newest())

    response = store.get_online_features(["stats:trips"], drivers(1, 2))

    times = response.to_df(include_event_timestamps=True)["trips__ts"]
    assert times.tolist() == [hours_ago(hour).timestamp() for hour in (4, 6)]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (Int32, -7),
        (Int64, 2**40),
        (Float32, 0.5),
        (Float64, 1e300),
        (Bool, False),
        (String, "Köln"),
        (Bytes, b"\x00\x01"),
        (UnixTimestamp, hours_ago(3)),
        (Array(Int64), [1, -2]),
        (Array(Float32), [0.25]),
        (Array(String), ["a", ""]),
        (Array(Bool), [True, False]),
    ],
    ids=str,
)
def test_a_value_keeps_its_type(
    store: FeatureStore, tmp_path: Path, dtype: Any, value: Any
) -> None:
    frame = newest().iloc[:1].drop(columns=["rate", "trips"])
    frame = frame.assign(value=pd.Series([value], index=frame.index))
    source = file_source(tmp_path / "typed.parquet", frame)
    store.apply([DRIVER, view("typed", [DRIVER], {"value": dtype}, source)])
    store.write_to_online_store("typed", frame)

    (found,) = read(store, ["typed:value"], drivers(1))["value"]

    assert found == (value.astimezone(UTC) if dtype == UnixTimestamp else value)
    assert type(found) is type(value) or dtype == UnixTimestamp


def test_keys_may_be_texts_and_several(store: FeatureStore, tmp_path: Path) -> None:
    city = Entity(name="city", join_keys=["city_id"], value_type=Kind.STRING)
    frame = stats_frame().assign(city_id=["a", "b", "b"], driver_id=[1, 1, 2])
    source = file_source(tmp_path / "pairs.parquet", frame)
    store.apply([DRIVER, city, view("pairs", [DRIVER, city], {"trips": Int64}, source)])
    store.write_to_online_store("pairs", frame)
    pairs = [(1, "a"), (1, "b"), (2, "b"), (2, "a")]

    rows = [{"driver_id": driver, "city_id": name} for driver, name in pairs]

    assert read(store, ["pairs:trips"], rows)["trips"] == [10, 20, 30, None]


def test_views_of_one_entity_and_a_service_answer_together(
    store: FeatureStore, tmp_path: Path
) -> None:
    stats = stats_view(tmp_path)
    source = file_source(tmp_path / "more.parquet", stats_frame())
    more = view("more", [DRIVER], {"trips": Int64}, source)
    service = FeatureService(name="both", features=[stats, more])
    store.apply([DRIVER, stats, more, service])
    store.write_to_online_store("stats", newest())
    store.write_to_online_store("more", newest().assign(trips=[7, 8]))

    asked = ["stats:trips", "more:trips"]
    named = store.get_online_features(asked, drivers(1, 2), full_feature_names=True).to_dict()

    assert (named["stats__trips"], named["more__trips"]) == ([20, 30], [7, 8])
    with pytest.raises(FeatureNameCollisionError):
        store.get_online_features(asked, drivers(1))
    with pytest.raises(FeatureNameCollisionError):
        store.get_online_features(store.get_feature_service("both"), drivers(1))


def test_a_view_that_is_not_there_is_an_error(store: FeatureStore, tmp_path: Path) -> None:
    store.apply([DRIVER, stats_view(tmp_path)])

    with pytest.raises(FeatureViewNotFoundException):
        store.get_online_features(["nothing:trips"], drivers(1))


def test_pushed_rows_are_served_at_once_and_in_the_next_join(
    store: FeatureStore, tmp_path: Path
) -> None:
    store.apply([DRIVER, stats_view(tmp_path)])

    store.push("stats_push", newest().assign(trips=[70, 80]), to=PushMode.ONLINE)

    assert read(store, ["stats:trips"], drivers(1, 2))["trips"] == [70, 80]


def test_a_later_row_replaces_an_earlier_one(store: FeatureStore, tmp_path: Path) -> None:
    store.apply([DRIVER, stats_view(tmp_path)])
    store.write_to_online_store("stats", newest())

    later = newest().assign(trips=[21, 31], event_timestamp=hours_ago(1))
    store.write_to_online_store("stats", later)

    assert read(store, ["stats:trips"], drivers(1, 2))["trips"] == [21, 31]


def test_an_earlier_row_replaces_none_except_in_stock_sqlite(
    store: FeatureStore, tmp_path: Path
) -> None:
    store.apply([DRIVER, stats_view(tmp_path)])
    store.write_to_online_store("stats", newest())

    store.write_to_online_store(
        "stats", newest().assign(trips=[1, 2], event_timestamp=hours_ago(20))
    )

    is_stock_sqlite = store.config.online_store.type == "sqlite"
    found = read(store, ["stats:trips"], drivers(1, 2))["trips"]
    assert found == ([1, 2] if is_stock_sqlite else [20, 30])


def test_online_is_what_a_join_at_the_same_moment_gives(
    store: FeatureStore, tmp_path: Path
) -> None:
    store.apply([DRIVER, stats_view(tmp_path)])
    for end in (hours_ago(5), NOW):
        store.materialize(hours_ago(12), end)
        frame = pd.DataFrame({"driver_id": [1, 2], "event_timestamp": [end] * 2})
        asked = ["stats:trips", "stats:rate"]
        joined = store.get_historical_features(entity_df=frame, features=asked).to_df()
        online = read(store, asked, drivers(1, 2))

        for name in ("trips", "rate"):
            assert online[name] == joined.sort_values("driver_id")[name].tolist()


def test_a_dropped_view_leaves_nothing_to_one_of_its_name(
    store: FeatureStore, tmp_path: Path
) -> None:
    stats = stats_view(tmp_path)
    more = view(
        "more", [DRIVER], {"trips": Int64}, file_source(tmp_path / "more.parquet", newest())
    )
    store.apply([DRIVER, stats, more])
    for name in ("stats", "more"):
        store.write_to_online_store(name, newest())

    store.apply([DRIVER, more], objects_to_delete=[stats], partial=False)
    store.apply([DRIVER, stats, more])

    assert read(store, ["stats:rate"], drivers(1, 2))["rate"] == [None, None]
    assert read(store, ["more:trips"], drivers(1, 2))["trips"] == [20, 30]


def test_reads_off_the_event_loop_give_the_same_where_feast_offers_them(
    store: FeatureStore, tmp_path: Path
) -> None:
    if not store.provider.online_store.async_supported.read:
        assert "sqlite" in store.config.online_store.type
        return
    store.apply([DRIVER, stats_view(tmp_path, ttl=timedelta(0))])
    store.write_to_online_store("stats", newest())

    async def read_twice() -> list[Any]:
        asked = [store.get_online_features_async(["stats:trips"], drivers(1, 9)) for _ in range(2)]
        responses = await asyncio.gather(*asked)
        await store.close()
        client = store.provider.online_store._client_async
        assert (client is None) == ("qarm_feast" in store.config.online_store.type)
        if client is not None:
            # Stock Feast closes nothing.
            await client.aclose()
        return [response.to_dict()["trips"] for response in responses]

    assert asyncio.run(read_twice()) == [[20, None]] * 2
