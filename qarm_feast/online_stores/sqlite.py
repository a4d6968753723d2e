"""Feast's sqlite online store with an ordering guard and columnar entry points.

Rows are byte-compatible with stock Feast both ways. Ours differs in one column that stock
ignores: ``qarm_event_micros``, the event time in microseconds (stock keeps whole seconds).
``event_ts`` is written as true UTC seconds; stock reads it as such where ``TZ=UTC``. A table that
is empty when ours first meets it becomes one tree instead of three, which stock does not notice.

Shape letters in this file: N rows or entities. May import: feast, sqlite3.
"""

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from feast import FeatureView
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import compute_table_id
from feast.infra.online_stores.sqlite import SqliteOnlineStore, SqliteOnlineStoreConfig
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import RepoConfig
from pydantic import Field

from qarm_feast.errors import ConfigError, ServiceUnavailableError
from qarm_feast.online_stores.blobs import Ints, split_blobs
from qarm_feast.online_stores.codec import Bools, decode_values, split_micros
from qarm_feast.online_stores.rows import (
    CONTENT_HASH,
    ITEM_IDS,
    ITEM_TIMESTAMPS,
    ColumnBatch,
    EncodedRows,
    FeastRow,
    RecentItems,
    ViewLayout,
    check_table,
    decode_batch,
    encode_feast_rows,
    encode_ids,
    is_young,
    merge_recent,
    recent_items_of_feast_rows,
    recent_items_of_table,
    stored_features,
    text_of,
    view_layout,
)

_GUARD_COLUMN = "qarm_event_micros"
_OWN_INDEX = " WITHOUT ROWID"
_KEYS_PER_LOOKUP = 10_000
_WAL_SWITCH_ATTEMPTS = 20
_TEXT_TYPES = ("STRING", "INT32", "INT64", "DOUBLE", "FLOAT", "BOOL")
"""Feature types that stock Feast repeats as text in ``value_text``."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class CodeSqliteOnlineStoreConfig(SqliteOnlineStoreConfig):
    """Keys of ``online_store`` in ``feature_store.yaml``, besides stock Feast's."""

    type: Literal["qarm_feast.online_stores.sqlite.CodeSqliteOnlineStore"] = (
        "qarm_feast.online_stores.sqlite.CodeSqliteOnlineStore"
    )
    busy_timeout_seconds: float = Field(
        default=30.0, gt=0, description="How long a writer waits for another one."
    )
    cache_size_mib: int = Field(default=64, gt=0, description="Page cache per connection.")
    enable_openai_compatible_store: Literal[False] = False


class CodeSqliteOnlineStore(SqliteOnlineStore):
    """Online store in one sqlite file, safe under several writer processes."""

    def __init__(self) -> None:
        self._conn: sqlite3.Connection | None = None
        self._read_conn: sqlite3.Connection | None = None
        # A connection takes one transaction at a time; reads have their own, so that they do
        # not wait for a long write.
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._guarded_tables: set[str] = set()

    def write_table(self, config: RepoConfig, view: FeatureView, table: pa.Table) -> int:
        """Write rows unless the store holds newer ones; merge them if the view says so.

        1. Encode, one row per entity. 2. Take the file's write lock. 3. Drop rows that are not
        newer than the stored ones by (event time, content hash). 4. Write and commit.

        Args:
            config: Feast's repository configuration.
            view: An applied feature view with one int64 join key.
            table: The join key, all features, ``event_timestamp`` and optionally ``created``.

        Returns:
            How many entities changed.

        Raises:
            DataError: If the table does not fit the view.
            ConfigError: If the view was not applied.
            ServiceUnavailableError: If the file stays locked.
        """
        layout = view_layout(config, view)
        if layout.history_length is not None:
            return self._merge(config, view, layout, recent_items_of_table(layout, table))
        checked = check_table(layout, table, by_key=True)
        return self._write_rows(config, view, [checked.encode(0, len(checked))])

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[FeastRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Write rows of Feast's materialize and push through the same guard or merge."""
        layout = view_layout(config, table)
        if layout.history_length is not None:
            self._merge(config, table, layout, recent_items_of_feast_rows(config, data))
        else:
            self._write_rows(config, table, encode_feast_rows(config, data))
        if progress:
            progress(len(data))

    def read_columns(
        self,
        config: RepoConfig,
        view: FeatureView,
        entity_ids_N: Ints,
        feature_names: list[str],
        now: datetime | None = None,
    ) -> ColumnBatch:
        """Return features as columns; missing, taken-down and expired entities are absent.

        Args:
            config: Feast's repository configuration.
            view: An applied feature view with one int64 join key.
            entity_ids_N: Ids in any order, repeated as one likes.
            feature_names: Features of the view.
            now: The moment to judge the view's ``ttl`` by; ``None``: the system's clock.

        Returns:
            One entity per id, in the order of the ids.

        Raises:
            DataError: If the ids are not int64, or the view has no such feature.
            ConfigError: If the view was not applied.
        """
        layout = view_layout(config, view)
        names = stored_features(layout, feature_names)
        keys = split_blobs(encode_ids(layout, entity_ids_N))
        with self._reading(config, view) as conn:
            table_id, is_served_N = _table_id(config, view), None
            blobs = _read_features(conn, table_id, keys, names)
            if layout.ttl_micros is not None:
                is_served_N = is_young(layout, _stored_micros(conn, table_id, keys), now)
        return decode_batch(layout, feature_names, blobs, is_served_N)

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """Return Feast's rows, with event times of microseconds and independent of ``TZ``."""
        names = list(requested_features or [field.name for field in table.features])
        version = config.entity_key_serialization_version
        keys = [
            serialize_entity_key(key, entity_key_serialization_version=version)
            for key in entity_keys
        ]
        table_id = _table_id(config, table)
        with self._reading(config, table) as conn:
            times = _stored_micros(conn, table_id, keys)
            blobs = _read_features(conn, table_id, keys, names)
        return [
            _feast_row(time, {name: blobs[name][row] for name in names})
            for row, time in enumerate(times)
        ]

    def delete_rows(self, config: RepoConfig, view: FeatureView, entity_ids_N: Ints) -> int:
        """Delete one view's rows of some entities in one transaction.

        Args:
            config: Feast's repository configuration.
            view: A feature view with one int64 join key; it need not be applied any more.
            entity_ids_N: Distinct ids.

        Returns:
            How many of the entities had a row.

        Raises:
            DataError: If the ids are not int64.
            ServiceUnavailableError: If the file stays locked.
        """
        keys = split_blobs(encode_ids(view_layout(config, view), entity_ids_N))
        table_id = _table_id(config, view)
        with self._writing(config, view) as conn:
            if not _definition(conn, table_id):
                # `feast apply` dropped the table, and the rows with it.
                return 0
            times = _stored_micros(conn, table_id, keys)
            by_key = f"DELETE FROM {_quote(table_id)} WHERE entity_key = ?"
            conn.executemany(by_key, [(key,) for key in keys])
        return sum(time is not None for time in times)

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        *rest: Any,
        **options: Any,
    ) -> None:
        """Create and drop tables as stock Feast does, and add the guard's column."""
        names = ", ".join(view.name for view in [*tables_to_keep, *tables_to_delete])
        with self._write_lock, _readable_errors(self._get_db_path(config), names):
            conn = self._get_conn(config)
            # Stock would give a table that is its own index a second one at every apply.
            others = [view for view in tables_to_keep if not _is_index(conn, config, view)]
            super().update(config, tables_to_delete, others, *rest, **options)
            self._guarded_tables.clear()
            for view in tables_to_keep:
                self._ensure_guard(conn, config, _table_id(config, view))

    def teardown(self, config: RepoConfig, *rest: Any, **options: Any) -> None:
        """Close the connections and delete the file."""
        with self._write_lock, self._read_lock:
            if self._read_conn is not None:
                self._read_conn.close()
                self._read_conn = None
            self._guarded_tables.clear()
            super().teardown(config, *rest, **options)

    def _get_conn(self, config: RepoConfig) -> sqlite3.Connection:
        if self._conn is None:
            self._conn = _connect(config.online_store, self._get_db_path(config))
        return self._conn

    @contextmanager
    def _reading(self, config: RepoConfig, view: FeatureView) -> Iterator[sqlite3.Connection]:
        path = self._get_db_path(config)
        with self._read_lock, _readable_errors(path, view.name):
            if self._read_conn is None:
                self._read_conn = _connect(config.online_store, path)
            self._ensure_guard(self._read_conn, config, _table_id(config, view))
            # One snapshot for all statements of one read.
            with _transaction(self._read_conn, "BEGIN"):
                yield self._read_conn

    @contextmanager
    def _writing(self, config: RepoConfig, view: FeatureView) -> Iterator[sqlite3.Connection]:
        with self._write_lock, _readable_errors(self._get_db_path(config), view.name):
            conn = self._get_conn(config)
            self._ensure_guard(conn, config, _table_id(config, view))
            with _transaction(conn, "BEGIN IMMEDIATE"):
                yield conn

    def _ensure_guard(self, conn: sqlite3.Connection, config: RepoConfig, table_id: str) -> None:
        """Make a table that stock Feast made ours: the guard's column, and one tree if it can be.

        Stock keeps the rows in one tree and finds them by another; a table without row numbers
        is its own index. Only an empty one is made again, as long as nothing needs row numbers.
        """
        if table_id in self._guarded_tables:
            return
        options = config.online_store
        needs_row_numbers = options.vector_enabled or options.text_search_enabled
        with _transaction(conn, "BEGIN IMMEDIATE"):
            columns = [row[1] for row in conn.execute(f"PRAGMA table_info({_quote(table_id)})")]
            if columns and _GUARD_COLUMN not in columns:
                if not needs_row_numbers:
                    _drop_row_numbers_if_empty(conn, table_id)
                conn.execute(f"ALTER TABLE {_quote(table_id)} ADD COLUMN {_GUARD_COLUMN} INTEGER")
        if columns:
            self._guarded_tables.add(table_id)

    def _write_rows(self, config: RepoConfig, view: FeatureView, groups: list[EncodedRows]) -> int:
        layout, table_id = view_layout(config, view), _table_id(config, view)
        num_applied = 0
        with self._writing(config, view) as conn:
            for rows in groups:
                newer = rows.take(np.flatnonzero(_is_newer(conn, table_id, rows)))
                _upsert(conn, table_id, layout, newer)
                num_applied += len(newer.keys)
        return num_applied

    def _merge(
        self, config: RepoConfig, view: FeatureView, layout: ViewLayout, written: RecentItems
    ) -> int:
        table_id = _table_id(config, view)
        with self._writing(config, view) as conn:
            blobs = _read_features(conn, table_id, written.keys, [ITEM_IDS, ITEM_TIMESTAMPS])
            stored = {name: [blob or b"" for blob in column] for name, column in blobs.items()}
            changed = merge_recent(layout, stored, written)
            _upsert(conn, table_id, layout, changed)
        return len(changed.keys)


def _connect(options: CodeSqliteOnlineStoreConfig, path: str) -> sqlite3.Connection:
    """Open the file in write-ahead mode: readers go on while one writer writes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    conn = sqlite3.connect(
        path,
        timeout=options.busy_timeout_seconds,
        isolation_level=None,
        detect_types=sqlite3.PARSE_DECLTYPES | sqlite3.PARSE_COLNAMES,
        check_same_thread=False,
    )
    conn.execute(f"PRAGMA cache_size = {-1024 * options.cache_size_mib}")
    conn.execute("PRAGMA mmap_size = 268435456")
    for attempt in range(_WAL_SWITCH_ATTEMPTS):
        try:
            conn.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError:
            # The switch ignores the busy timeout; it is needed once in a file's life.
            if attempt == _WAL_SWITCH_ATTEMPTS - 1:
                raise
            threading.Event().wait(0.05)
    return conn


def _drop_row_numbers_if_empty(conn: sqlite3.Connection, table_id: str) -> None:
    """Make the table again as its own index, which also covers stock's second one."""
    if conn.execute(f"SELECT 1 FROM {_quote(table_id)} LIMIT 1").fetchone():
        return
    definition = _definition(conn, table_id)
    conn.execute(f"DROP TABLE {_quote(table_id)}")
    conn.execute(f"{definition}{_OWN_INDEX}")


def _is_index(conn: sqlite3.Connection, config: RepoConfig, view: FeatureView) -> bool:
    """Tell whether a view's table is there and is its own index."""
    return _definition(conn, _table_id(config, view)).endswith(_OWN_INDEX)


def _definition(conn: sqlite3.Connection, table_id: str) -> str:
    """Return the statement that made a table, nothing if there is none."""
    by_name = "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = ?"
    found = conn.execute(by_name, (table_id,)).fetchone()
    return str(found[0]) if found else ""


@contextmanager
def _transaction(conn: sqlite3.Connection, begin: str) -> Iterator[None]:
    conn.execute(begin)
    try:
        yield
        conn.execute("COMMIT")
    except BaseException:
        # sqlite itself may have rolled back (a full disk); a COMMIT that failed has not.
        if conn.in_transaction:
            conn.execute("ROLLBACK")
        raise


@contextmanager
def _readable_errors(path: str, view_name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ServiceUnavailableError(
            f"the online store {path} cannot be opened: {error}; mend online_store.path in "
            "feature_store.yaml or the folder, then try again"
        ) from error
    except sqlite3.DatabaseError as error:
        if "no such table" in str(error):
            raise ConfigError(
                f"{path} has no table for view {view_name}: {error}; run `feast apply` first"
            ) from error
        if type(error) is sqlite3.DatabaseError:
            # Its subclasses tell of a statement, the class itself of the file.
            raise ServiceUnavailableError(
                f"the online store {path} is damaged: {error}; move it away, then run `feast "
                "apply` and `feast materialize START END` to fill it again"
            ) from error
        if not isinstance(error, sqlite3.OperationalError):
            raise
        raise ServiceUnavailableError(
            f"the online store {path} cannot be used: {error}; end the process that holds it or "
            "raise online_store.busy_timeout_seconds in feature_store.yaml, then try again"
        ) from error


def _table_id(config: RepoConfig, view: FeatureView) -> str:
    versioning = config.registry.enable_online_feature_view_versioning
    table_id: str = compute_table_id(config.project, view, versioning)
    return table_id


def _quote(identifier: str) -> str:
    escaped = identifier.replace('"', '""')
    return f'"{escaped}"'


def _lookup(
    conn: sqlite3.Connection, keys: list[bytes], columns: str, parameters: Sequence[str] = ()
) -> list[tuple[Any, ...]]:
    """Evaluate ``columns`` once for each key, in the order of the keys.

    ``columns`` may use ``k.entity_key`` and the parameters from ``?4`` on. The keys travel as
    one blob that the statement cuts: binding them one by one costs more than the look-up.
    """
    sql = (
        "WITH RECURSIVE k(at, entity_key) AS (SELECT 0, substr(?1, 1, ?2) UNION ALL "
        "SELECT at + 1, substr(?1, 1 + (at + 1) * ?2, ?2) FROM k WHERE at + 1 < ?3) "
        f"SELECT {columns} FROM k ORDER BY at"
    )
    found: list[tuple[Any, ...]] = []
    start = 0
    while start < len(keys):
        width = len(keys[start])
        end = start + 1
        last = min(len(keys), start + _KEYS_PER_LOOKUP)
        while end < last and len(keys[end]) == width:
            end += 1
        blob = b"".join(keys[start:end])
        found += conn.execute(sql, (blob, width, end - start, *parameters)).fetchall()
        start = end
    return found


def _read_features(
    conn: sqlite3.Connection, table_id: str, keys: list[bytes], names: Sequence[str]
) -> dict[str, list[bytes | None]]:
    columns = ", ".join(
        f"(SELECT value FROM {_quote(table_id)} AS t WHERE t.entity_key = k.entity_key "
        f"AND t.feature_name = ?{number})"
        for number in range(4, 4 + len(names))
    )
    found = _lookup(conn, keys, columns, names)
    return {name: [row[at] for row in found] for at, name in enumerate(names)}


def _stored_micros(conn: sqlite3.Connection, table_id: str, keys: list[bytes]) -> list[int | None]:
    """Return the event time of each stored entity.

    A row whose seconds differ from the guard's was overwritten by stock Feast; its seconds count.
    """
    columns = (
        f"(SELECT max(CASE WHEN {_GUARD_COLUMN} BETWEEN event_ts * 1000000 AND "
        f"event_ts * 1000000 + 999999 THEN {_GUARD_COLUMN} ELSE event_ts * 1000000 END) "
        f"FROM {_quote(table_id)} AS t WHERE t.entity_key = k.entity_key)"
    )
    return [row[0] for row in _lookup(conn, keys, columns)]


def _is_newer(conn: sqlite3.Connection, table_id: str, rows: EncodedRows) -> Bools:
    """Tell which rows come after the stored ones by (event time, content hash)."""
    stored = _stored_micros(conn, table_id, split_blobs(rows.keys))
    # Below every time that a row can have.
    oldest = np.iinfo(np.int64).min
    stored_N = np.array([oldest if micros is None else micros for micros in stored], np.int64)
    is_newer_N: Bools = rows.event_micros_N > stored_N
    ties = np.flatnonzero(rows.event_micros_N == stored_N)
    if len(ties) and CONTENT_HASH in rows.values:
        tied = rows.take(ties)
        keys = split_blobs(tied.keys)
        blobs = _read_features(conn, table_id, keys, [CONTENT_HASH])[CONTENT_HASH]
        is_newer_N[ties] = [
            new > text_of(old) for new, old in zip(tied.hashes(), blobs, strict=True)
        ]
    return is_newer_N


def _upsert(conn: sqlite3.Connection, table_id: str, layout: ViewLayout, rows: EncodedRows) -> None:
    """Write all features of an entity by one statement, entities in key order."""
    seconds = split_micros(rows.event_micros_N)[0].tolist()
    created: list[int | None] = [None] * len(rows.keys)
    if rows.created_micros_N is not None:
        created = split_micros(rows.created_micros_N)[0].tolist()
    micros = rows.event_micros_N.tolist()
    columns: list[Sequence[Any]] = [split_blobs(rows.keys), seconds, created, micros]
    values_sql = []
    for name, column in rows.values.items():
        blobs = split_blobs(column)
        text_sql = "NULL"
        columns.append(blobs)
        value_number = len(columns)
        if layout.value_types.get(name) in _TEXT_TYPES:
            columns.append(_texts(layout.value_types[name], blobs))
            text_sql = f"?{len(columns)}"
        name_sql = "'" + name.replace("'", "''") + "'"
        values_sql.append(f"(?1, {name_sql}, ?{value_number}, {text_sql}, ?2, ?3, ?4)")
    stored = ("value", "value_text", "event_ts", "created_ts", _GUARD_COLUMN)
    sql = (
        f"INSERT INTO {_quote(table_id)} (entity_key, feature_name, {', '.join(stored)}) "
        f"VALUES {', '.join(values_sql)} ON CONFLICT(entity_key, feature_name) DO UPDATE SET "
        + ", ".join(f"{column} = excluded.{column}" for column in stored)
    )
    conn.executemany(sql, zip(*columns, strict=True))


def _texts(value_type: str, blobs: list[bytes]) -> list[str | None]:
    column = decode_values(value_type, blobs)
    texts: list[str | None] = [None] * len(blobs)
    for row, value in zip(np.flatnonzero(column.lengths_N), column.values.tolist(), strict=True):
        texts[row] = str(value)
    return texts


def _feast_row(
    micros: int | None, blobs: dict[str, bytes | None]
) -> tuple[datetime | None, dict[str, Value] | None]:
    values = {name: Value.FromString(blob) for name, blob in blobs.items() if blob is not None}
    if micros is None or not values:
        return None, None
    return _EPOCH + timedelta(microseconds=micros), values
