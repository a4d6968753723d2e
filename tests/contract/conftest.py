"""Fixtures of the online stores: a real sqlite file and a real redis server."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from feast import RepoConfig
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.infra.online_stores.sqlite import SqliteOnlineStore
from online_store_cases import (
    REDIS_TYPE,
    SQLITE_TYPE,
    Online,
    close,
    code_view,
    make_settings,
    profile_view,
    recent_view,
    running_redis,
)

from qarm_feast.online_stores.redis import CodeRedisOnlineStore
from qarm_feast.online_stores.sqlite import CodeSqliteOnlineStore


@pytest.fixture(scope="session")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with running_redis(tmp_path_factory.mktemp("redis")) as port:
        yield port


@pytest.fixture(params=["sqlite", "redis"])
def online(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Online]:
    # Stock Feast writes sqlite times in local time; the comparison with it needs UTC.
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    if request.param == "sqlite":
        place = {"path": str(tmp_path / "online.db")}
        names, stores = (SQLITE_TYPE, "sqlite"), (CodeSqliteOnlineStore(), SqliteOnlineStore())
    else:
        port = request.getfixturevalue("redis_port")
        place = {"connection_string": f"127.0.0.1:{port}"}
        names, stores = (REDIS_TYPE, "redis"), (CodeRedisOnlineStore(), RedisOnlineStore())
    settings = [make_settings(tmp_path, name, place) for name in names]
    made = Online(
        stores[0],
        RepoConfig(**settings[0]),
        stores[1],
        RepoConfig(**settings[1]),
        settings[0],
        tmp_path,
    )
    views = [code_view(), recent_view(), profile_view()]
    made.stock.update(made.stock_config, [], views, [], [], False)
    yield made
    made.clear()
    close(made.store)
    close(made.stock)
    monkeypatch.undo()
    time.tzset()
