"""The offline store through Feast's own API, on hand-made rows.

Times are given in seconds after an arbitrary start, fractions included.
"""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, PushSource, ValueType
from feast.data_source import RequestSource
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import RetrievalJob
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64

from qarm_feast import schema
from qarm_feast.code_log import CodeLog
from qarm_feast.errors import ConfigError, DataError
from qarm_feast.feature_views import (
    HistorySettings,
    item_code_view,
    recent_items_view,
    train_items_view,
    user_entity,
)
from qarm_feast.offline_store import CodeLogOfflineStore, open_code_log
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.source_rows import RecentItemLists

START = datetime(2026, 1, 1, tzinfo=UTC)
INTERACTIONS = schema.interaction_rows(("is_like", "is_love"))


def at(seconds: float) -> datetime:
    return START + timedelta(microseconds=round(seconds * 1e6))


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Return a store over an empty repository with a code view and both history views."""
    (tmp_path / "feature_store.yaml").write_text(
        "project: test\n"
        "provider: local\n"
        "registry: {registry_type: sql, path: 'sqlite:///data/registry.db'}\n"
        "online_store: {type: sqlite, path: data/online.db}\n"
        "offline_store: {type: qarm_feast.offline_store.CodeLogOfflineStore}\n"
    )
    opened = open_feature_store(tmp_path)
    settings = HistorySettings(history_length=2, positive_label="auto")
    views = [item_code_view("v1"), recent_items_view(settings), train_items_view(settings)]
    opened.apply(views)
    return opened


def code_rows(rows: Sequence[tuple[int, float, list[int], str, float]]) -> pa.Table:
    """Build code rows from (item, event seconds, rq code, content hash, created seconds)."""
    columns = {
        "item_id": [row[0] for row in rows],
        "rq_code": [row[2] for row in rows],
        "vq_code": [[code + 100 for code in row[2]] for row in rows],
        "encoder_version": ["e1"] * len(rows),
        "content_hash": [row[3] for row in rows],
        "is_deleted": [False] * len(rows),
        "event_timestamp": [at(row[1]) for row in rows],
        "created": [at(row[4]) for row in rows],
    }
    return pa.table(columns, schema=schema.CODE_ROWS)


def interactions(rows: Sequence[tuple[int, int, float, bool, str]]) -> pa.Table:
    """Build interactions from (user, item, event seconds, is_like, split)."""
    columns = {
        "user_id": [row[0] for row in rows],
        "item_id": [row[1] for row in rows],
        "is_like": [row[3] for row in rows],
        "is_love": [False] * len(rows),
        "split": [row[4] for row in rows],
        "event_timestamp": [at(row[2]) for row in rows],
        "created": [at(1000)] * len(rows),
    }
    return pa.table(columns, schema=INTERACTIONS)


def write(store: FeatureStore, log: str, table: pa.Table) -> None:
    open_code_log(store.config).append(log, table)


def labels(key: str, rows: Sequence[tuple[int, float]], **extra: object) -> pd.DataFrame:
    times = pd.to_datetime([at(row[1]) for row in rows], utc=True)
    return pd.DataFrame({key: [row[0] for row in rows], "event_timestamp": times, **extra})


def join(store: FeatureStore, frame: pd.DataFrame, *features: str) -> pa.Table:
    return store.get_historical_features(entity_df=frame, features=list(features)).to_arrow()


def pull_latest(store: FeatureStore, view_name: str, start: datetime, end: datetime) -> pa.Table:
    view = store.get_feature_view(view_name)
    source = view.batch_source
    job: RetrievalJob = CodeLogOfflineStore.pull_latest_from_table_or_query(
        config=store.config,
        data_source=source,
        join_key_columns=view.join_keys,
        feature_name_columns=[feature.name for feature in view.features],
        timestamp_field=source.timestamp_field,
        created_timestamp_column=source.created_timestamp_column,
        start_date=start,
        end_date=end,
    )
    return job.to_arrow()


def test_each_label_sees_the_newest_row_at_or_before_it(store: FeatureStore) -> None:
    write(store, "item_codes_v1", code_rows([(1, 10, [1], "a", 10), (1, 20, [2], "b", 20)]))

    table = join(
        store,
        labels("item_id", [(1, 9), (1, 10), (1, 19), (1, 20), (2, 99)]),
        "item_codes_v1:rq_code",
    )

    assert table["rq_code"].to_pylist() == [None, [1], [1], [2], None]
    assert table["rq_code"].type == schema.CODES


def test_a_label_one_microsecond_before_a_row_does_not_see_it(store: FeatureStore) -> None:
    write(store, "item_codes_v1", code_rows([(1, 10.000002, [1], "a", 11)]))

    frame = labels("item_id", [(1, 10.000001), (1, 10.000002)])

    assert join(store, frame, "item_codes_v1:rq_code")["rq_code"].to_pylist() == [None, [1]]


def test_rows_of_the_frame_keep_their_order_repeats_and_other_columns(store: FeatureStore) -> None:
    write(store, "item_codes_v1", code_rows([(1, 10, [1], "a", 10), (2, 10, [2], "b", 10)]))
    frame = labels("item_id", [(2, 30), (1, 20), (2, 30), (3, 5)], note=["w", "x", "y", "z"])

    table = join(store, frame, "item_codes_v1:rq_code")

    assert table.column_names == ["item_id", "event_timestamp", "note", "rq_code"]
    assert table["item_id"].to_pylist() == [2, 1, 2, 3]
    assert table["note"].to_pylist() == ["w", "x", "y", "z"]
    assert table["rq_code"].to_pylist() == [[2], [1], [2], None]
    assert table["item_id"].type == pa.int64()


def test_the_time_column_may_have_any_name_if_it_is_the_only_time(store: FeatureStore) -> None:
    write(store, "item_codes_v1", code_rows([(1, 10, [1], "a", 10)]))
    frame = labels("item_id", [(1, 20)]).rename(columns={"event_timestamp": "shown_at"})

    assert join(store, frame, "item_codes_v1:rq_code")["rq_code"].to_pylist() == [[1]]


def test_a_replayed_batch_changes_nothing(store: FeatureStore) -> None:
    batch = code_rows([(1, 10, [1], "a", 10), (1, 20, [2], "b", 20)])
    write(store, "item_codes_v1", batch)
    write(store, "item_codes_v1", batch)

    view = store.get_feature_view("item_codes_v1")
    everything = CodeLogOfflineStore.pull_all_from_table_or_query(
        store.config, view.batch_source, ["item_id"], ["rq_code"], "event_timestamp", "created"
    ).to_arrow()

    assert sorted(everything["rq_code"].to_pylist()) == [[1], [2]]
    assert pull_latest(store, "item_codes_v1", at(0), at(99))["rq_code"].to_pylist() == [[2]]


def test_equal_times_are_settled_as_the_online_store_settles_them(store: FeatureStore) -> None:
    """The greater content hash wins, whichever was written later; then the later written."""
    edits = [(1, 10, [1], "b", 11), (1, 10, [2], "a", 12)]
    rewrites = [(2, 10, [3], "c", 12), (2, 10, [4], "c", 11)]
    write(store, "item_codes_v1", code_rows(edits + rewrites))

    joined = join(store, labels("item_id", [(1, 10), (2, 10)]), "item_codes_v1:rq_code")
    pulled = pull_latest(store, "item_codes_v1", at(0), at(99)).sort_by("item_id")

    assert joined["rq_code"].to_pylist() == [[1], [3]]
    assert pulled["rq_code"].to_pylist() == [[1], [3]]


def test_pull_latest_takes_both_ends_of_the_range_and_nothing_outside(store: FeatureStore) -> None:
    rows = [
        (1, 10, [1], "a", 1),
        (2, 20, [2], "b", 1),
        (3, 9.999999, [3], "c", 1),
        (4, 20.000001, [4], "d", 1),
    ]
    write(store, "item_codes_v1", code_rows(rows))

    pulled = pull_latest(store, "item_codes_v1", at(10), at(20))

    assert sorted(pulled["item_id"].to_pylist()) == [1, 2]
    assert pulled.schema.field("event_timestamp").type == schema.TIMESTAMP


def test_views_that_were_never_written_join_as_nulls_of_the_right_type(
    store: FeatureStore,
) -> None:
    codes = join(store, labels("item_id", [(1, 10)]), "item_codes_v1:rq_code")
    lists = join(store, labels("user_id", [(1, 10)]), "user_recent_items:item_ids")

    assert codes["rq_code"].to_pylist() == [None]
    assert codes["rq_code"].type == schema.CODES
    assert lists["item_ids"].to_pylist() == [None]
    assert pull_latest(store, "item_codes_v1", at(0), at(99)).num_rows == 0
    assert pull_latest(store, "user_recent_items", at(0), at(99)).num_rows == 0


def test_a_history_older_than_its_ttl_is_not_seen(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    log.create(schema.INTERACTION_LOG, INTERACTIONS)
    path = tmp_path / schema.INTERACTION_LOG
    lists = RecentItemLists(path, "event_timestamp", None, {"qarm.history_length": "2"})
    start = round(START.timestamp()) * 1_000_000
    asked = pa.table({"user_id": [1, 1, 2], "time_us": [start + 20, start + 21, start + 20]})

    before = lists.as_of(["user_id"], ["item_ids"], asked, ttl_us=10)
    log.append(schema.INTERACTION_LOG, interactions([(1, 5, 10e-6, True, "")]))
    after = lists.as_of(["user_id"], ["item_ids"], asked, ttl_us=10)

    assert before is not None
    assert before["item_ids"].to_pylist() == [None, None, None]
    assert after is not None
    assert after["item_ids"].to_pylist() == [[5], None, None]


def test_several_views_join_in_one_call_under_full_names(store: FeatureStore) -> None:
    write(store, "item_codes_v1", code_rows([(1, 10, [1], "a", 10)]))
    write(store, "interaction_log", interactions([(7, 5, 10, True, "train")]))
    frame = labels("item_id", [(1, 20), (2, 20)], user_id=[7, 7])

    table = store.get_historical_features(
        entity_df=frame,
        features=["item_codes_v1:rq_code", "user_recent_items:item_ids"],
        full_feature_names=True,
    ).to_arrow()

    assert table["item_codes_v1__rq_code"].to_pylist() == [[1], None]
    assert table["user_recent_items__item_ids"].to_pylist() == [[5], [5]]


def test_a_users_list_is_that_of_the_label_time_and_positives_only(store: FeatureStore) -> None:
    log = [(7, 1, 10, True, ""), (7, 2, 20, False, ""), (7, 3, 30, True, ""), (7, 4, 40, True, "")]
    write(store, "interaction_log", interactions(log))
    frame = labels("user_id", [(7, 9.999999), (7, 10), (7, 35), (7, 99), (8, 99)])

    table = join(store, frame, "user_recent_items:item_ids", "user_recent_items:item_timestamps")

    assert table["item_ids"].to_pylist() == [None, [1], [3, 1], [4, 3], None]
    microseconds = [[int(at(s).timestamp() * 1_000_000) for s in row] for row in ([10], [40, 30])]
    assert table["item_timestamps"].to_pylist()[1:4:2] == microseconds
    assert table["item_ids"].type == schema.CODES


def test_histories_for_training_hold_no_event_of_another_split(store: FeatureStore) -> None:
    log = [(7, 1, 10, True, "train"), (7, 2, 20, True, "valid"), (7, 3, 30, True, "test")]
    write(store, "interaction_log", interactions(log))
    frame = labels("user_id", [(7, 99)])

    assert join(store, frame, "user_train_items:item_ids")["item_ids"].to_pylist() == [[1]]
    assert join(store, frame, "user_recent_items:item_ids")["item_ids"].to_pylist() == [[3, 2]]


def erasures(*rows: tuple[int, float]) -> pa.Table:
    """Build erasures from (user, event seconds)."""
    columns = [[user for user, _ in rows], [at(time) for _, time in rows], [at(1000)] * len(rows)]
    return pa.table(columns, schema=schema.USER_ERASURE_ROWS)


def test_what_a_user_did_up_to_an_erasure_is_in_no_list_whenever_it_is_asked_for(
    store: FeatureStore,
) -> None:
    log = [(7, 1, 10, True, "train"), (7, 2, 20, True, "train"), (7, 3, 30, True, "train")]
    write(store, "interaction_log", interactions([*log, (8, 4, 10, True, "train")]))
    frame = labels("user_id", [(7, 15), (7, 25), (7, 30), (8, 15)])
    write(store, "user_erasure_log", erasures((7, 20), (7, 5), (9, 20)))

    for view in ("user_recent_items", "user_train_items"):
        table = join(store, frame, f"{view}:item_ids")
        assert table["item_ids"].to_pylist() == [None, None, [3], [4]]


def test_materialize_takes_an_erasure_to_the_online_store_at_its_time(store: FeatureStore) -> None:
    write(store, "interaction_log", interactions([(7, 1, 10, True, ""), (8, 2, 10, True, "")]))
    write(store, "user_erasure_log", erasures((7, 20)))

    before = pull_latest(store, "user_recent_items", at(0), at(15)).to_pylist()
    later = pull_latest(store, "user_recent_items", at(21), at(30))
    store.apply(user_entity())
    store.materialize(at(0), at(20), feature_views=["user_recent_items"])

    assert [(row["user_id"], row["item_ids"]) for row in before] == [(8, [2])]
    assert later.num_rows == 0
    online = store.get_online_features(
        ["user_recent_items:item_ids", "user_recent_items:item_timestamps"],
        [{"user_id": user} for user in (7, 8)],
    ).to_dict()
    assert online["item_ids"] == [[-1], [2]]
    assert online["item_timestamps"][0] == [int(at(20).timestamp() * 1_000_000)]


def test_erasures_without_any_interaction_are_pulled_and_join_as_nulls(
    store: FeatureStore,
) -> None:
    write(store, "user_erasure_log", erasures((7, 20)))

    pulled = pull_latest(store, "user_recent_items", at(0), at(99))
    joined = join(store, labels("user_id", [(7, 99)]), "user_recent_items:item_ids")

    assert [(row["user_id"], row["item_ids"]) for row in pulled.to_pylist()] == [(7, [-1])]
    assert joined["item_ids"].to_pylist() == [None]


def test_pulled_lists_are_of_users_with_a_positive_in_the_range_and_reach_back_before_it(
    store: FeatureStore,
) -> None:
    log = [(7, 1, 10, True, ""), (7, 2, 25, True, ""), (7, 3, 35, True, ""), (8, 4, 10, True, "")]
    write(store, "interaction_log", interactions(log))

    pulled = pull_latest(store, "user_recent_items", at(20), at(30))

    assert pulled.to_pylist() == [
        {
            "user_id": 7,
            "item_ids": [2, 1],
            "item_timestamps": [int(at(s).timestamp() * 1_000_000) for s in (25, 10)],
            "event_timestamp": at(25),
        }
    ]


def test_a_positive_label_that_the_log_lacks_is_an_error_with_its_tasks(
    store: FeatureStore,
) -> None:
    store.apply(recent_items_view(HistorySettings(positive_label="is_click")))
    write(store, "interaction_log", interactions([(7, 1, 10, True, "")]))

    with pytest.raises(DataError, match=r"tasks \['is_like', 'is_love'\].*'is_click'"):
        join(store, labels("user_id", [(7, 20)]), "user_recent_items:item_ids")


def test_joins_equal_a_search_through_all_rows_on_random_data(store: FeatureStore) -> None:
    generator = np.random.default_rng(5)
    rows = [
        (int(item), float(time), [number], str(content), float(created))
        for number, (item, time, content, created) in enumerate(
            generator.integers(0, 12, size=(400, 4))
        )
    ]
    for part in range(4):
        write(store, "item_codes_v1", code_rows(rows[part::4]))
    asked = [(int(item), float(time)) for item, time in generator.integers(-2, 14, size=(300, 2))]

    found = join(store, labels("item_id", asked), "item_codes_v1:rq_code")["rq_code"].to_pylist()

    for (item, time), codes in zip(asked, found, strict=True):
        seen = [row for row in rows if row[0] == item and row[1] <= time]
        best = max((row[1], row[3], row[4]) for row in seen) if seen else None
        assert codes in ([row[2] for row in seen if (row[1], row[3], row[4]) == best] or [None])


@pytest.fixture
def plain_source(store: FeatureStore) -> FileSource:
    """Plant an ordinary parquet file with a view that expires after ten seconds."""
    table = pa.table(
        {
            "driver": ["a", "a", "b"],
            "speed": [1.0, 2.0, 3.0],
            "seen_at": pa.array([at(10), at(20), at(10)], pa.timestamp("ns", "UTC")),
        }
    )
    pq.write_table(table, Path(store.config.repo_path) / "data" / "drivers.parquet")
    source = FileSource(
        name="drivers",
        path="data/drivers.parquet",
        timestamp_field="seen_at",
        field_mapping={"speed": "kmh"},
    )
    driver = Entity(name="driver", join_keys=["driver"], value_type=ValueType.STRING)
    schema_fields = [Field(name="kmh", dtype=Float64)]
    view = FeatureView(
        name="drivers",
        entities=[driver],
        ttl=timedelta(seconds=10),
        schema=schema_fields,
        source=source,
    )
    store.apply([driver, view])
    return source


def test_an_ordinary_parquet_source_joins_with_its_ttl_and_field_mapping(
    store: FeatureStore, plain_source: FileSource
) -> None:
    times = pd.to_datetime([at(20), at(30), at(30.000001), at(15)], utc=True)
    frame = pd.DataFrame({"driver": ["b", "a", "a", "c"], "event_timestamp": times})

    assert join(store, frame, "drivers:kmh")["kmh"].to_pylist() == [3.0, 2.0, None, None]


def test_on_demand_features_are_computed_from_the_joined_ones(
    store: FeatureStore, plain_source: FileSource
) -> None:
    request = RequestSource(name="limit_source", schema=[Field(name="limit", dtype=Float64)])

    @on_demand_feature_view(
        sources=[store.get_feature_view("drivers"), request],
        schema=[Field(name="over", dtype=Float64)],
        mode="pandas",
    )
    def speeding(frame: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"over": frame["kmh"] - frame["limit"]})

    with pytest.warns(RuntimeWarning, match="experimental"):
        store.apply(speeding)
    frame = pd.DataFrame(
        {"driver": ["a"], "limit": [0.5], "event_timestamp": pd.to_datetime([at(25)], utc=True)}
    )

    assert join(store, frame, "drivers:kmh", "speeding:over")["over"].to_pylist() == [1.5]


def test_pushed_rows_land_in_the_log_and_in_the_next_join(store: FeatureStore) -> None:
    pushed = code_rows([(1, 10, [1, 2], "a", 10)])

    store.write_to_offline_store("item_codes_v1", pushed.to_pandas())

    frame = labels("item_id", [(1, 20)])
    assert join(store, frame, "item_codes_v1:rq_code")["rq_code"].to_pylist() == [[1, 2]]
    assert open_code_log(store.config).read("item_codes_v1").schema == schema.CODE_ROWS


@pytest.mark.parametrize("part", [None, "part-0.parquet", "day=1/part-0.parquet", "part-0.pq"])
def test_rows_pushed_by_many_at_once_are_added_to_a_parquet_source(
    store: FeatureStore, plain_source: FileSource, part: str | None
) -> None:
    path = Path(store.config.repo_path) / "data" / "drivers.parquet"
    if part:
        moved = path.rename(path.with_name("moved.parquet"))
        (path / part).parent.mkdir(parents=True)
        moved.rename(path / part)
    view = store.get_feature_view("drivers")
    stored = pq.read_table(path, partitioning=None)
    row = stored.slice(0, 1)

    def push(number: int) -> None:
        name = row.schema.get_field_index("driver")
        pushed = row.set_column(name, "driver", pa.array([f"pushed-{number}"]))
        CodeLogOfflineStore.offline_write_batch(store.config, view, pushed, None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(push, range(20)))

    found = pq.read_table(path, partitioning=None)
    assert found.schema.equals(stored.schema)
    names = set(found["driver"].to_pylist())
    assert names == {*stored["driver"].to_pylist(), *(f"pushed-{number}" for number in range(20))}
    assert found.num_rows == stored.num_rows + 20
    with pytest.raises(DataError, match=r"lack the columns \['speed'\]"):
        CodeLogOfflineStore.offline_write_batch(store.config, view, row.drop_columns("speed"), None)


def test_codes_that_lie_in_plain_parquet_files_are_still_read_after_a_push(
    store: FeatureStore,
) -> None:
    path = Path(store.config.repo_path) / "data" / "offline" / "item_codes_v1"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    pq.write_table(code_rows([(1, 10, [1], "a", 10)]), path / "copied.parquet")
    view = store.get_feature_view("item_codes_v1")

    pushed = code_rows([(2, 10, [2], "b", 10)])
    CodeLogOfflineStore.offline_write_batch(store.config, view, pushed, None)

    frame = pd.DataFrame({"item_id": [1, 2], "event_timestamp": pd.to_datetime([at(20)] * 2)})
    found = join(store, frame, "item_codes_v1:content_hash")
    assert found["content_hash"].to_pylist() == ["a", "b"]


def test_a_push_keeps_a_file_of_any_name_and_the_link_to_it(
    store: FeatureStore, plain_source: FileSource
) -> None:
    path = Path(store.config.repo_path) / "data" / "drivers.parquet"
    target = path.rename(path.with_name("drivers.pq"))
    path.symlink_to(target.name)
    rows = pq.read_table(target).slice(0, 1)

    CodeLogOfflineStore.offline_write_batch(
        store.config, store.get_feature_view("drivers"), rows, None
    )

    assert path.is_symlink()
    assert pq.read_table(target).num_rows == 4
    assert not list(path.parent.glob(".*.tmp"))


def test_a_saved_result_is_read_back_and_not_overwritten_by_accident(store: FeatureStore) -> None:
    write(store, "item_codes_v1", code_rows([(1, 10, [1], "a", 10)]))
    job = store.get_historical_features(
        entity_df=labels("item_id", [(1, 20)]), features=["item_codes_v1:rq_code"]
    )
    storage = SavedDatasetFileStorage(path="data/saved.parquet")

    with pytest.warns(RuntimeWarning, match="experimental"):
        dataset = store.create_saved_dataset(from_=job, name="saved", storage=storage)

    assert dataset.to_arrow()["rq_code"].to_pylist() == [[1]]
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        job.persist(storage)
    job.persist(SavedDatasetFileStorage(path="data/saved_dir"))
    job.persist(SavedDatasetFileStorage(path="data/saved_dir"), allow_overwrite=True)
    saved_dir = Path(store.config.repo_path) / "data" / "saved_dir"
    assert pq.read_table(saved_dir)["rq_code"].to_pylist() == [[1]]


def test_a_frame_without_the_key_or_with_a_wrong_key_type_is_refused(store: FeatureStore) -> None:
    write(store, "item_codes_v1", code_rows([(1, 10, [1], "a", 10)]))

    with pytest.raises(DataError, match=r"lacks the join keys \['item_id'\]"):
        join(store, labels("other", [(1, 20)]), "item_codes_v1:rq_code")
    frame = labels("item_id", [(1, 20)]).assign(item_id=["one"])
    with pytest.raises(DataError, match="item_id is"):
        join(store, frame, "item_codes_v1:rq_code")


def test_a_feature_named_as_a_column_of_the_frame_is_refused(store: FeatureStore) -> None:
    write(store, "item_codes_v1", code_rows([(1, 10, [1], "a", 10)]))

    with pytest.raises(DataError, match="full_feature_names=True"):
        join(store, labels("item_id", [(1, 20)], rq_code=[0]), "item_codes_v1:rq_code")


def test_validation_accepts_an_unwritten_log_and_names_a_missing_time_column(
    store: FeatureStore, plain_source: FileSource
) -> None:
    offline_store = CodeLogOfflineStore()
    unwritten = item_code_view("v2").batch_source
    wrong = FileSource(name="wrong", path="data/drivers.parquet", timestamp_field="no_such_column")

    offline_store.validate_data_source(store.config, unwritten)
    offline_store.validate_data_source(store.config, plain_source)

    with pytest.raises(ConfigError, match=r"lacks the columns \['no_such_column'\]"):
        offline_store.validate_data_source(store.config, wrong)


def test_the_store_reads_the_log_below_a_push_source(store: FeatureStore) -> None:
    write(store, "item_codes_v1", code_rows([(1, 10, [1], "a", 10)]))
    push = PushSource(name="push", batch_source=item_code_view("v1").batch_source)

    pulled = CodeLogOfflineStore.pull_latest_from_table_or_query(
        store.config, push, ["item_id"], ["rq_code"], "event_timestamp", "created", at(0), at(99)
    ).to_arrow()

    assert pulled["rq_code"].to_pylist() == [[1]]


def test_the_log_holds_what_the_repository_names_relative_to_itself(store: FeatureStore) -> None:
    assert isinstance(open_code_log(store.config), CodeLog)
    assert open_code_log(store.config).root == Path(store.config.repo_path) / "data" / "offline"


def test_the_log_of_a_repository_with_another_offline_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "feature_store.yaml").write_text(
        "project: test\n"
        "provider: local\n"
        "registry: data/registry.db\n"
        "offline_store: {type: duckdb}\n"
        "entity_key_serialization_version: 3\n"
    )
    config = open_feature_store(tmp_path).config

    with pytest.raises(
        ConfigError, match="'duckdb', which keeps no code log; set it to qarm_feast"
    ):
        open_code_log(config)
