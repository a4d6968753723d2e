"""Feast online stores that take and give columns, with an ordering guard inside the store.

Both are subclasses of Feast's own stores and stay byte-compatible with them; they are named in
``feature_store.yaml`` by their dotted path. May import: feast (on first use).
"""

from typing import TYPE_CHECKING, Protocol

from qarm_feast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    import pyarrow as pa
    from feast import Entity, FeatureStore, FeatureView
    from feast.repo_config import RepoConfig

    from qarm_feast.online_stores.blobs import Ints
    from qarm_feast.online_stores.rows import ColumnBatch


class CodeOnlineStore(Protocol):
    """The columnar entry points that both stores have besides Feast's interface."""

    def write_table(self, config: "RepoConfig", view: "FeatureView", table: "pa.Table") -> int:
        """Write or merge rows under the ordering guard; return how many entities changed."""
        ...

    def read_columns(
        self,
        config: "RepoConfig",
        view: "FeatureView",
        entity_ids_N: "Ints",
        feature_names: list[str],
        now: "datetime | None" = None,
    ) -> "ColumnBatch":
        """Return features as columns; missing, taken-down and expired entities are absent."""
        ...

    def delete_rows(self, config: "RepoConfig", view: "FeatureView", entity_ids_N: "Ints") -> int:
        """Delete one view's rows of these entities; return how many entities had one."""
        ...

    def update(
        self,
        config: "RepoConfig",
        tables_to_delete: "Sequence[FeatureView]",
        tables_to_keep: "Sequence[FeatureView]",
        entities_to_delete: "Sequence[Entity]",
        entities_to_keep: "Sequence[Entity]",
        partial: bool,
    ) -> None:
        """Remove the rows of views that go, as `feast apply` does."""
        ...


def code_online_store(feature_store: "FeatureStore") -> CodeOnlineStore:
    """Return the repository's online store, the one that Feast itself uses.

    Args:
        feature_store: The repository.

    Returns:
        A store with columnar entry points.

    Raises:
        ConfigError: If ``feature_store.yaml`` names a store without columnar entry points.
    """
    store = feature_store.provider.online_store
    if not (hasattr(store, "write_table") and hasattr(store, "read_columns")):
        raise ConfigError(
            f"feature_store.yaml names the online store {type(store).__name__}, which has no "
            "columnar entry points; set online_store.type to "
            "qarm_feast.online_stores.sqlite.CodeSqliteOnlineStore or "
            "qarm_feast.online_stores.redis.CodeRedisOnlineStore"
        )
    found: CodeOnlineStore = store
    return found
