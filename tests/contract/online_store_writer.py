"""What a second writer process of the online store tests does."""

from typing import Any

import pyarrow as pa
from feast import RepoConfig
from online_store_cases import code_view, recent_view

from qarm_feast.online_stores.redis import CodeRedisOnlineStore
from qarm_feast.online_stores.sqlite import CodeSqliteOnlineStore


def write_in_chunks(
    settings: dict[str, Any], table: pa.Table, history_length: int | None, chunk_rows: int
) -> None:
    """Write code rows, or lists when a history length is given, a few rows per call."""
    is_redis = settings["online_store"]["type"].endswith("CodeRedisOnlineStore")
    store = CodeRedisOnlineStore() if is_redis else CodeSqliteOnlineStore()
    view = code_view() if history_length is None else recent_view(history_length)
    config = RepoConfig(**settings)
    for start in range(0, table.num_rows, chunk_rows):
        store.write_table(config, view, table.slice(start, chunk_rows))
