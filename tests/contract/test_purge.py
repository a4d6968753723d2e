"""The rows of a purged version leave a real store slowly, and nothing else does."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import redis
from feast import FeatureStore, RepoConfig
from online_store_cases import Online, close, code_rows, make_settings, profile_rows

from qarm_feast.code_log import CodeLog
from qarm_feast.errors import CodebookError, ConfigError, ServiceUnavailableError
from qarm_feast.feature_views import item_code_view, item_entity, user_entity, user_profile_view
from qarm_feast.online_stores import code_online_store
from qarm_feast.purge import PurgeMark, mark_path, purge_online_rows

OFFLINE_TYPE = "qarm_feast.offline_store.CodeLogOfflineStore"
NUM_ITEMS = 1_200
V1, V2 = item_code_view("v1"), item_code_view("v2")
PROFILE = user_profile_view(profile_rows().select(["user_id", "age"]).schema)


class Clock:
    """Counts the seconds that were slept."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


@pytest.fixture
def shop(online: Online) -> FeatureStore:
    """Return a repository whose two versions have a row per item; users share the store."""
    offline = {"type": OFFLINE_TYPE, "uri": str(online.directory / "offline")}
    config = RepoConfig(**online.settings, offline_store=offline, repo_path=online.directory)
    store = FeatureStore(config=config)
    store.apply([item_entity(), user_entity(), V1, V2, PROFILE])
    tables = code_online_store(store)
    codes = code_rows([(item, 1, "a", [item, 1]) for item in range(NUM_ITEMS)])
    for view in (V1, V2):
        CodeLog(online.directory / "offline").append(view.name, codes)
        tables.write_table(config, view, codes)
    # Users whose ids are those of items: another entity, another key.
    tables.write_table(
        config, PROFILE, profile_rows().select(["user_id", "age", "event_timestamp"])
    )
    return store


def num_present(store: FeatureStore, view: object, feature: str = "rq_code") -> int:
    ids_N = np.arange(NUM_ITEMS)
    read = code_online_store(store).read_columns(store.config, view, ids_N, [feature])  # type: ignore[arg-type]
    return int(read.present_N.sum())


def test_the_rows_of_one_version_go_and_all_others_stay(shop: FeatureStore, tmp_path: Path) -> None:
    clock = Clock()

    mark = purge_online_rows(shop, str(tmp_path / "codebooks"), "v1", 2_000, clock.sleep)

    assert (mark.num_items, mark.num_rows) == (NUM_ITEMS, NUM_ITEMS)
    assert [num_present(shop, view) for view in (V1, V2)] == [0, NUM_ITEMS]
    assert num_present(shop, PROFILE, "age") == 2
    # 500, 500 and 200 rows with a quarter of a second between them.
    assert clock.pauses == [0.25, 0.25]
    assert not mark_path(str(tmp_path / "codebooks"), "v1").exists()


@pytest.mark.parametrize("online", ["redis"], indirect=True)
def test_redis_is_never_searched_for_keys(
    online: Online, shop: FeatureStore, redis_port: int, tmp_path: Path
) -> None:
    with redis.Redis(port=redis_port) as server:
        num_keys = server.dbsize()
        server.config_resetstat()
        purge_online_rows(shop, str(tmp_path / "codebooks"), "v1", 1e9)
        counts = {
            name.removeprefix("cmdstat_"): stats["calls"]
            for name, stats in server.info("commandstats").items()
        }

        assert server.dbsize() == num_keys
        purge_online_rows(shop, str(tmp_path / "codebooks"), "v2", 1e9)
        # An entity goes with its last field; the three users stay.
        assert server.dbsize() == 3
    assert counts["hdel"] == NUM_ITEMS
    assert not {"keys", "scan", "del", "flushdb"} & set(counts)


def test_a_purge_goes_on_where_it_was_interrupted(shop: FeatureStore, tmp_path: Path) -> None:
    uri = str(tmp_path / "codebooks")

    def be_killed(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        purge_online_rows(shop, uri, "v1", 400, be_killed)
    left, clock = num_present(shop, V1), Clock()
    mark = purge_online_rows(shop, uri, "v1", 400, clock.sleep)

    assert left == NUM_ITEMS - 400
    # 800 ids are left: two batches, one pause.
    assert clock.pauses == [1.0]
    assert mark == PurgeMark(mark.started_us, NUM_ITEMS - 1, NUM_ITEMS, NUM_ITEMS)
    assert num_present(shop, V1) == 0
    again = purge_online_rows(shop, uri, "v1", 1e9)
    assert (again.num_items, again.num_rows) == (NUM_ITEMS, 0)


def test_rows_that_a_worker_still_wrote_during_a_purge_go_as_well(
    shop: FeatureStore, online: Online, tmp_path: Path
) -> None:
    """Behind the mark: an id that is new, -1, and one whose row was deleted before, 5."""
    uri = str(tmp_path / "codebooks")
    late_ids_N = np.array([-1, 5])

    def write_and_be_killed(_: float) -> None:
        late = code_rows([(item, 2, "b", [item, 2]) for item in late_ids_N.tolist()])
        at = late.schema.get_field_index("created")
        now = pa.array([datetime.now(UTC)] * 2, late.schema.field(at).type)
        late = late.set_column(at, "created", now)
        CodeLog(online.directory / "offline").append(V1.name, late)
        code_online_store(shop).write_table(shop.config, V1, late)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        purge_online_rows(shop, uri, "v1", 400, write_and_be_killed)
    mark = purge_online_rows(shop, uri, "v1", 1e9)

    read = code_online_store(shop).read_columns(shop.config, V1, late_ids_N, ["rq_code"])
    assert read.present_N.tolist() == [False, False]
    assert num_present(shop, V1) == 0
    assert (mark.num_items, mark.num_rows) == (NUM_ITEMS, NUM_ITEMS + 2)
    assert not mark_path(uri, "v1").exists()


@pytest.mark.parametrize("online", ["redis"], indirect=True)
def test_a_store_that_goes_away_in_between_is_told_and_the_next_try_ends_it(
    shop: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, store = str(tmp_path / "codebooks"), code_online_store(shop)
    delete, calls = type(store).delete_rows, []

    def fail_at_second(*arguments: object) -> int:
        calls.append(arguments)
        if len(calls) == 2:
            raise ServiceUnavailableError("away")
        return int(delete(*arguments))  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "delete_rows", fail_at_second)
        with pytest.raises(ServiceUnavailableError):
            purge_online_rows(shop, uri, "v1", 1e9)
    mark = purge_online_rows(shop, uri, "v1", 1e9)

    assert mark.num_rows == NUM_ITEMS
    assert num_present(shop, V1) == 0


def test_rows_of_a_view_that_apply_has_dropped_are_gone_already(
    shop: FeatureStore, tmp_path: Path
) -> None:
    shop.apply([], objects_to_delete=[V1], partial=False)

    mark = purge_online_rows(shop, str(tmp_path / "codebooks"), "v1", 1e9)

    assert (mark.num_items, mark.num_rows) == (NUM_ITEMS, 0)
    assert num_present(shop, V2) == NUM_ITEMS


def test_a_version_without_a_log_has_no_known_rows(shop: FeatureStore, tmp_path: Path) -> None:
    mark = purge_online_rows(shop, str(tmp_path / "codebooks"), "v7", 1e9)

    assert mark == PurgeMark(mark.started_us)


@pytest.mark.parametrize("content", ["", "[]", '{"last": 1}'])
def test_a_damaged_mark_is_named(shop: FeatureStore, tmp_path: Path, content: str) -> None:
    path = mark_path(str(tmp_path / "codebooks"), "v1")
    path.parent.mkdir(parents=True)
    path.write_text(content)

    with pytest.raises(CodebookError, match=r"v1\.json cannot be read.*delete it"):
        purge_online_rows(shop, str(tmp_path / "codebooks"), "v1", 1e9)

    assert num_present(shop, V1) == NUM_ITEMS


def test_a_stock_store_is_refused_before_anything_is_deleted(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, "sqlite", {"path": str(tmp_path / "online.db")})
    offline = {"type": OFFLINE_TYPE, "uri": str(tmp_path / "offline")}
    store = FeatureStore(config=RepoConfig(**settings, offline_store=offline))

    with pytest.raises(ConfigError, match="no columnar entry points"):
        purge_online_rows(store, str(tmp_path / "codebooks"), "v1", 1e9)

    close(store.provider.online_store)
