"""Runs Feast's own universal tests against our stores, from a checkout of Feast.

Feast's wheel ships none of its tests, so they are no part of `make test`. In the folder
``sdk/python`` of a Feast checkout whose test requirements are installed beside this project::

    PYTHONPATH=<this folder> QARM_TEST_REDIS=127.0.0.1:6379,db=0 FEAST_IS_LOCAL_TEST=True \\
    FULL_REPO_CONFIGS_MODULE=feast_repo_configuration pytest --integration \\
    tests/integration/offline_store tests/integration/online_store

What came out with Feast 0.67.0 and the universal tests of v0.66.0, where packages of other
vendors' stores were replaced by stand-ins; stock is dask and duckdb, with Feast's sqlite and redis:

    tests                                      ours     stock     why not
    historical retrieval, value types          pass     pass
    offline write, push, persist, feature log  pass     pass
    materialization, end-to-end consistency    pass     pass
    online retrieval, write, push, types, TTL  pass     pass
    non-entity mode (2)                        refused  1 in 4    entity_df=None: a DataError says
                                                                  to pass a frame of keys
    non-entity retrieval, persist twice (2)    not ours pass      select stock dask by name
    entities by a query, filter by created (3) skipped  skipped   for stores that speak SQL
    document search, connection pools, openai  skipped  skipped   ask for other stores by name
    asynchronous dynamodb (2)                  error    error     their fixture needs dynamodb
    data quality, remote and OIDC servers      not run  not run   need packages and servers
"""

import os

from tests.universal.feature_repos.universal.data_sources.file import FileDataSourceCreator

from qarm_feast.offline_store import CodeLogOfflineStoreConfig


class CodeLogDataSourceCreator(FileDataSourceCreator):  # type: ignore[misc]  # Feast has no types
    """Upstream's parquet sources, read by our offline store."""

    def create_offline_store_config(self) -> CodeLogOfflineStoreConfig:
        """Return our store's settings."""
        return CodeLogOfflineStoreConfig()


AVAILABLE_OFFLINE_STORES = [("local", CodeLogDataSourceCreator)]
AVAILABLE_ONLINE_STORES = {
    "sqlite": ({"type": "qarm_feast.online_stores.sqlite.CodeSqliteOnlineStore"}, None),
    "redis": (
        {
            "type": "qarm_feast.online_stores.redis.CodeRedisOnlineStore",
            "connection_string": os.environ["QARM_TEST_REDIS"],
        },
        None,
    ),
}
