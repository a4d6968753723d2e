"""``CodeLogOfflineStore``: Feast's offline store over append-only logs of Arrow and parquet parts.

Named in ``feature_store.yaml`` as ``type: qarm_feast.offline_store.CodeLogOfflineStore``. It keeps
every row of the entity frame and its order, compares times to the microsecond, keeps lists as
lists, and computes views of kind ``recent_items`` from raw interactions. Ordinary parquet sources
(a file or a folder) work as well. May import: feast, pyarrow, pandas.
"""

import io
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from feast import FeatureView, OnDemandFeatureView
from feast.data_source import DataSource, PushSource
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.infra.offline_stores.file_source import FileLoggingDestination, FileSource
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.infra.registry.base_registry import BaseRegistry
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.saved_dataset import SavedDatasetStorage
from feast.type_map import feast_value_type_to_pa
from filelock import FileLock
from pydantic import StrictStr

from qarm_feast import view_tags
from qarm_feast.code_log import CodeLog, conform
from qarm_feast.errors import ConfigError, DataError
from qarm_feast.object_store import Place, StorePath, dataset_files, place
from qarm_feast.point_in_time import TIME, microseconds
from qarm_feast.repo_paths import resolve_registry_path_against_repo
from qarm_feast.schema import CODE_ROWS, VECTOR_ROWS
from qarm_feast.source_rows import (
    FeatureRows,
    RecentItemLists,
    SourceRows,
    TimeRange,
    parquet_dataset,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_KNOWN_ROWS = {
    view_tags.ITEM_CODES_KIND: CODE_ROWS,
    view_tags.ITEM_VECTORS_KIND: VECTOR_ROWS,
}
"""Columns of views that nothing was written to yet."""
_FIRST_SHARED_FLOAT = 2**53
"""From here on several integers are one float64."""
_NUMBER_TYPES = (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)

# Feast imports this module before it opens the registry of a repository that names our store.
resolve_registry_path_against_repo()


class CodeLogOfflineStoreConfig(FeastConfigBaseModel):
    """Section ``offline_store`` of ``feature_store.yaml``."""

    type: StrictStr = "qarm_feast.offline_store.CodeLogOfflineStore"
    uri: StrictStr = "data/offline"
    """Folder of the logs, or ``s3://BUCKET/PREFIX``; a relative one starts at the repository."""


def open_code_log(config: RepoConfig) -> CodeLog:
    """Return the log that the repository's offline store reads, for those who write to it.

    Args:
        config: The repository's configuration.

    Returns:
        The logs.

    Raises:
        ConfigError: If the offline store is another one.
    """
    if not isinstance(config.offline_store, CodeLogOfflineStoreConfig):
        raise ConfigError(
            f"{config.repo_path}/feature_store.yaml has offline_store.type "
            f"{config.offline_store.type!r}, which keeps no code log; set it to "
            f"{CodeLogOfflineStoreConfig().type}"
        )
    return CodeLog(FileSource.get_uri_for_file_path(config.repo_path, config.offline_store.uri))


class CodeLogRetrievalJob(RetrievalJob):
    """A query that runs when its result is asked for."""

    def __init__(
        self,
        query: Callable[[], pa.Table],
        repo_path: Path | None,
        full_feature_names: bool = False,
        on_demand_feature_views: Sequence[OnDemandFeatureView] = (),
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        self._query = query
        self._repo_path = repo_path
        self._full_feature_names = full_feature_names
        self._on_demand_feature_views = list(on_demand_feature_views)
        self._metadata = metadata

    @property
    def full_feature_names(self) -> bool:
        """Whether feature columns carry their view's name."""
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        """On-demand views that Feast applies to the result."""
        return self._on_demand_feature_views

    @property
    def metadata(self) -> RetrievalMetadata | None:
        """Features, keys and time range of a historical query."""
        return self._metadata

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._query()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        frame: pd.DataFrame = self._query().to_pandas()
        return frame

    def persist(
        self,
        storage: SavedDatasetStorage,
        allow_overwrite: bool = False,
        timeout: int | None = None,
    ) -> None:
        """Write the result, on-demand features included, to a parquet file or folder.

        Args:
            storage: File storage; a path that does not end in ``.parquet`` is a folder.
            allow_overwrite: Replace what lies there.
            timeout: Ignored; the query runs in this process.

        Raises:
            SavedDatasetLocationAlreadyExists: If something lies there and may not be replaced.
        """
        source = storage.to_data_source()
        target = _place(self._repo_path, source)
        if target.exists() and not allow_overwrite:
            raise SavedDatasetLocationAlreadyExists(location=source.path)
        _replace_parquet(target, self.to_arrow())


class CodeLogOfflineStore(OfflineStore):
    """Point-in-time joins and pulls over append-only logs."""

    @staticmethod
    def get_historical_features(  # noqa: PLR0913 -- Feast's signature
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """Return the job that joins features to the rows of ``entity_df`` as of their times.

        Every row of the frame and its order are kept, repeated ones too; columns that are no
        key pass through. A feature row is seen from its own time on, within the view's ttl.

        Args:
            config: The repository's configuration.
            feature_views: Views to join.
            feature_refs: ``view:feature`` names.
            entity_df: Keys, the time column, anything else.
            registry: Source of the on-demand views.
            project: Feast project.
            full_feature_names: Name columns ``view__feature``.
            start_date: Feast's range for queries without a frame; not supported.
            end_date: As ``start_date``.

        Returns:
            A job; the query runs when its result is asked for.

        Raises:
            DataError: If ``entity_df`` is not a frame.
        """
        if not isinstance(entity_df, pd.DataFrame):
            raise DataError(
                f"the code log joins to a pandas frame of keys and times, found "
                f"{type(entity_df).__name__}; pass entity_df as a DataFrame"
            )
        frame = _EntityFrame.from_pandas(entity_df)
        joins = [
            _ViewJoin(config, view, feature_refs, full_feature_names) for view in feature_views
        ]
        return CodeLogRetrievalJob(
            query=lambda: _join_views(frame, joins),
            repo_path=config.repo_path,
            full_feature_names=full_feature_names,
            on_demand_feature_views=OnDemandFeatureView.get_requested_odfvs(
                feature_refs, project, registry
            ),
            metadata=frame.metadata(feature_refs),
        )

    @staticmethod
    def pull_latest_from_table_or_query(  # noqa: PLR0913 -- Feast's signature
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """Return the job that gives each key's newest row within the times, both inclusive.

        Args:
            config: The repository's configuration.
            data_source: Source of the rows.
            join_key_columns: Keys.
            feature_name_columns: Features.
            timestamp_field: Time column.
            created_timestamp_column: Breaks ties of equal times, after the source's own key.
            start_date: First time; a naive one is UTC.
            end_date: Last time.

        Returns:
            A job; the query runs when its result is asked for.
        """
        rows = _open_rows(config, data_source, timestamp_field, created_timestamp_column)
        times = _time_range(start_date, end_date)
        columns = [*join_key_columns, *feature_name_columns]
        return CodeLogRetrievalJob(
            query=lambda: _keyed(
                rows, rows.latest(join_key_columns, columns, times), join_key_columns
            ),
            repo_path=config.repo_path,
        )

    @staticmethod
    def pull_all_from_table_or_query(  # noqa: PLR0913 -- Feast's signature
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """Return the job that gives all rows within the times, each event once.

        Args:
            config: The repository's configuration.
            data_source: Source of the rows.
            join_key_columns: Keys.
            feature_name_columns: Features.
            timestamp_field: Time column.
            created_timestamp_column: When a row was written.
            start_date: First time; None: no bound.
            end_date: Last time; None: no bound.

        Returns:
            A job; the query runs when its result is asked for.
        """
        rows = _open_rows(config, data_source, timestamp_field, created_timestamp_column)
        times = _time_range(start_date, end_date)
        columns = [*join_key_columns, *feature_name_columns]
        return CodeLogRetrievalJob(
            query=lambda: _keyed(rows, rows.all(columns, times), join_key_columns),
            repo_path=config.repo_path,
        )

    @staticmethod
    def offline_write_batch(
        config: RepoConfig,
        feature_view: FeatureView,
        table: pa.Table,
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Append ``table`` to the log of the view's source as one part.

        Where the source is a parquet file or a folder of such files, they get the rows: a file is
        written anew, under a lock, a folder gets one file more.

        Args:
            config: The repository's configuration.
            feature_view: The view.
            table: The log's columns in any order; :meth:`CodeLog.append` says what is refused.
            progress: Called with the number of rows written.
        """
        source = _batch_source(feature_view.batch_source)
        path = _place(config.repo_path, source)
        log = CodeLog(path.parent)
        if _holds_plain_files(log, path):
            _add_to_parquet(path, table)
        else:
            if _kind(source) in _KNOWN_ROWS and not log.exists(path.name):
                log.create(path.name, _KNOWN_ROWS[_kind(source)])
            log.append(path.name, table)
        if progress is not None:
            progress(table.num_rows)

    @staticmethod
    def write_logged_features(
        config: RepoConfig,
        data: pa.Table | Path,
        source: LoggingSource,
        logging_config: LoggingConfig,
        registry: BaseRegistry,
    ) -> None:
        """Add a feature server's log of what it served to the parquet files of its destination.

        Args:
            config: The repository's configuration.
            data: The rows, or a folder of parquet files that holds them.
            source: Where the rows come from; its schema is the rows' own.
            logging_config: Holds the destination, files.
            registry: Feast's registry.

        Raises:
            ConfigError: If the destination is no files.
        """
        destination = logging_config.destination
        if not isinstance(destination, FileLoggingDestination):
            raise ConfigError(
                f"the code log writes served features to FileLoggingDestination, found "
                f"{type(destination).__name__}; change the service's logging_config"
            )
        folder = FileSource.get_uri_for_file_path(config.repo_path, destination.path)
        (path,), file_system = dataset_files([folder])
        pads.write_dataset(
            pq.read_table(data) if isinstance(data, Path) else data,
            path,
            filesystem=file_system,
            format="parquet",
            basename_template=f"{uuid.uuid4().hex}-{{i}}.parquet",
            partitioning=destination.partition_by,
            existing_data_behavior="overwrite_or_ignore",
        )

    def validate_data_source(self, config: RepoConfig, data_source: DataSource) -> None:
        """Check that a source with rows has its time columns; an unwritten log is fine.

        Args:
            config: The repository's configuration.
            data_source: The source.

        Raises:
            ConfigError: If a time column is missing.
        """
        source = _batch_source(data_source)
        schema = _open_rows(config, source, source.timestamp_field, None).schema()
        if schema is None:
            return
        names = schema.names
        column_of = {feature: column for column, feature in source.field_mapping.items()}
        times = [source.timestamp_field, source.created_timestamp_column]
        wanted = [column_of.get(name, name) for name in times]
        missing = [name for name in wanted if name and name not in names]
        if missing:
            raise ConfigError(f"source {source.name} lacks the columns {missing}; it has {names}")

    def get_table_column_names_and_types_from_data_source(
        self, config: RepoConfig, data_source: DataSource
    ) -> Iterable[tuple[str, str]]:
        """Return names and types of the source's columns, without the day of writing.

        Args:
            config: The repository's configuration.
            data_source: The source.

        Returns:
            Pairs of name and Arrow type name.

        Raises:
            DataError: If nothing was written yet and the columns depend on what will be.
        """
        source = _batch_source(data_source)
        rows = _open_rows(config, source, source.timestamp_field, None)
        schema = rows.schema()
        if schema is None:
            schema = _KNOWN_ROWS.get(_kind(source))
        if schema is None:
            raise DataError(f"nothing is stored at {rows.path} yet, so its columns are not known")
        return [(column.name, str(column.type)) for column in schema]


@dataclass(frozen=True)
class _EntityFrame:
    """The rows to join to: as given, and their times as int64 microseconds."""

    table: pa.Table
    time_column: str
    times: pa.ChunkedArray

    @classmethod
    def from_pandas(cls, frame: pd.DataFrame) -> "_EntityFrame":
        time_column = infer_event_timestamp_from_entity_df(dict(frame.dtypes))
        if not pd.api.types.is_datetime64_any_dtype(frame[time_column]):
            frame = frame.assign(**{time_column: pd.to_datetime(frame[time_column], utc=True)})
        table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
        return cls(table, time_column, microseconds(table[time_column]))

    def metadata(self, feature_refs: list[str]) -> RetrievalMetadata:
        bounds = pc.min_max(self.table[self.time_column]).as_py()
        return RetrievalMetadata(
            features=feature_refs,
            keys=[name for name in self.table.column_names if name != self.time_column],
            min_event_timestamp=bounds["min"],
            max_event_timestamp=bounds["max"],
        )

    def labels(self, frame_keys: dict[str, str], key_schema: pa.Schema) -> pa.Table:
        """Return the join keys under the source's names and types, and the times."""
        missing = [name for name in frame_keys.values() if name not in self.table.column_names]
        if missing:
            found = self.table.column_names
            raise DataError(f"the entity frame lacks the join keys {missing}; it has {found}")
        keys = self.table.select(list(frame_keys.values())).rename_columns(list(frame_keys))
        _check_ids(keys, key_schema)
        fitting = conform(keys, key_schema, "the entity frame")
        # By column: a view without entities has no key, and a table without columns no rows.
        return pa.table({name: fitting[name] for name in key_schema.names} | {TIME: self.times})


class _ViewJoin:
    """The join of one view: which features, by which keys, under which names."""

    def __init__(
        self, config: RepoConfig, view: FeatureView, feature_refs: list[str], is_full: bool
    ) -> None:
        reference, base = view.projection.name_to_use(), view.projection.name_alias or view.name
        source = _batch_source(view.batch_source)
        features = [
            ref.partition(":")[2] for ref in feature_refs if ref.startswith(f"{reference}:")
        ]
        column_of = {feature: column for column, feature in source.field_mapping.items()}
        self._columns = [column_of.get(name, name) for name in features]
        self.names = [f"{base}__{name}" if is_full else name for name in features]
        self._types = {
            column_of.get(field.name, field.name): _arrow_type(field) for field in view.schema
        }
        self._frame_keys = {
            column_of.get(field.name, field.name): _frame_key(view, field.name)
            for field in view.entity_columns
        }
        self._ttl_us = (view.ttl or timedelta()) // _MICROSECOND
        times = (source.timestamp_field, source.created_timestamp_column)
        self._rows = _open_rows(config, source, *(column_of.get(name, name) for name in times))

    def join(self, frame: _EntityFrame) -> list[pa.ChunkedArray]:
        """Return one column per feature, aligned with the frame's rows; null where missing."""
        keys = list(self._frame_keys)
        key_schema = pa.schema([(key, self._types[key]) for key in keys])
        labels = frame.labels(self._frame_keys, key_schema)
        found = self._rows.as_of(keys, self._columns, labels, self._ttl_us)
        if found is None:
            return [pa.nulls(labels.num_rows, self._types[name]) for name in self._columns]
        return [found[name] for name in self._columns]


def _check_ids(keys: pa.Table, key_schema: pa.Schema) -> None:
    """Refuse what Arrow would read a number from: a text "1" or a time is no id 1."""
    for field in key_schema:
        found = keys.schema.field(field.name).type
        # A column of ids with gaps comes from pandas as floats.
        is_number = any(is_of(found) for is_of in _NUMBER_TYPES)
        if pa.types.is_integer(field.type) and not is_number:
            raise DataError(
                f"the entity frame: {field.name} is {found} and cannot be {field.type}; convert "
                f"it with `frame.astype({{{field.name!r}: 'int64'}})`"
            )
        if pa.types.is_integer(field.type) and pa.types.is_floating(found):
            _check_is_exact(keys[field.name], field)


def _check_is_exact(ids: pa.ChunkedArray, field: pa.Field) -> None:
    """Refuse floats so great that the next id has the same one, so that it would get its row."""
    greatest = pc.max(pc.abs(ids)).as_py()
    if greatest is not None and greatest >= _FIRST_SHARED_FLOAT:
        raise DataError(
            f"the entity frame: {field.name} is {ids.type} and holds {greatest:.0f}, which may "
            f"stand for several {field.type} ids; build the column with "
            "`pd.array(ids, dtype='Int64')`, which keeps gaps and every digit"
        )


def _join_views(frame: _EntityFrame, joins: Sequence[_ViewJoin]) -> pa.Table:
    table = frame.table
    for join in joins:
        for name, column in zip(join.names, join.join(frame), strict=True):
            if name in table.column_names:
                raise DataError(
                    f"the column {name!r} stands in the entity frame and is asked for as a "
                    "feature; rename it or pass full_feature_names=True"
                )
            table = table.append_column(name, column)
    return table


def _frame_key(view: FeatureView, key: str) -> str:
    name: str = view.projection.join_key_map.get(key, key)
    return name


def _arrow_type(field: Any) -> pa.DataType:
    return feast_value_type_to_pa(field.dtype.to_value_type(), timestamp_unit="us")


def _batch_source(source: DataSource) -> FileSource:
    """Return the file source below a push source, or the source itself."""
    found = source.batch_source if isinstance(source, PushSource) else source
    if not isinstance(found, FileSource):
        raise ConfigError(
            f"the code log reads FileSource, found {type(found).__name__} {found.name!r}"
        )
    return found


def _open_rows(
    config: RepoConfig, data_source: DataSource, time_column: str, created_column: str | None
) -> SourceRows:
    source = _batch_source(data_source)
    tags = dict(source.tags or {})
    is_lists = _kind(source) == view_tags.RECENT_ITEMS_KIND
    rows_class = RecentItemLists if is_lists else FeatureRows
    path = _place(config.repo_path, source)
    return rows_class(path, time_column, created_column or None, tags)


def _kind(source: FileSource) -> str:
    kind: str = (source.tags or {}).get(view_tags.KIND, "")
    return kind


def _time_range(start: datetime | None, end: datetime | None) -> TimeRange:
    return TimeRange(_to_microseconds(start), _to_microseconds(end))


def _to_microseconds(time: datetime | None) -> int | None:
    if time is None:
        return None
    aware = time if time.tzinfo else time.replace(tzinfo=UTC)
    return (aware - _EPOCH) // _MICROSECOND


def _keyed(rows: SourceRows, table: pa.Table, join_keys: Sequence[str]) -> pa.Table:
    """Return pulled rows with Feast's placeholder for a key where a view has no entities.

    Feast does not look for the newest of such rows, and a stock online store keeps the last one.
    """
    if join_keys:
        return table
    table = table.sort_by(rows.time_column)
    values = pa.repeat(pa.scalar(DUMMY_ENTITY_VAL), table.num_rows)
    return table.append_column(DUMMY_ENTITY_ID, values)


def _place(repo_path: Path | None, source: DataSource) -> Place:
    return place(FileSource.get_uri_for_file_path(repo_path, source.path))


def _holds_plain_files(log: CodeLog, path: Place) -> bool:
    """Tell whether a source is a file, or a folder with files at any depth but without a log."""
    if path.is_file():
        return True
    if log.exists(path.name):
        return False
    holds_files = any(each.is_file() and each.name[0] not in "._" for each in path.rglob("*"))
    # Looked for again: another process may have made the log, and the files in it, meanwhile.
    return holds_files and not log.exists(path.name)


def _add_to_parquet(path: Place, table: pa.Table) -> None:
    if path.is_dir():
        rows = conform(table, parquet_dataset(path).schema, str(path))
        _replace_file(path / f"part-{uuid.uuid4().hex}.parquet", rows)
        return
    if isinstance(path, StorePath):
        raise ConfigError(
            f"{path} is one parquet object, to which two writers could not add rows without losing "
            f"some; make it a folder of such files, {path.with_suffix('')}/part-0.parquet"
        )
    # A link stays one, and its file gets the rows.
    path = path.resolve()
    with FileLock(path.with_name(f".{path.name}.lock")):
        stored = pq.read_table(path)
        rows = conform(table, stored.schema.remove_metadata(), str(path))
        _replace_file(path, pa.concat_tables([stored.replace_schema_metadata(None), rows]))


def _replace_parquet(target: Place, table: pa.Table) -> None:
    """Write a file, or a folder of one file; what lay there goes only when the new is complete."""
    if isinstance(target, StorePath):
        _replace_objects(target, table)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".parquet":
        _replace_file(target, table)
        return
    temporary = _temporary_name(target)
    temporary.mkdir()
    pq.write_table(table, temporary / "part-0.parquet")
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)


def _replace_objects(target: StorePath, table: pa.Table) -> None:
    if target.suffix == ".parquet":
        _replace_file(target, table)
        return
    part = target / "part-0.parquet"
    others = [path for path in target.rglob("*") if path != part]
    _replace_file(part, table)
    for path in others:
        path.unlink(missing_ok=True)


def _replace_file(target: Place, table: pa.Table) -> None:
    if isinstance(target, StorePath):
        sink = io.BytesIO()
        pq.write_table(table, sink)
        target.put(sink.getvalue())
        return
    temporary = _temporary_name(target)
    pq.write_table(table, temporary)
    os.replace(temporary, target)


def _temporary_name(target: Path) -> Path:
    # Readers of a folder pass over hidden names.
    return target.with_name(f".{target.name}-{uuid.uuid4().hex}.tmp")
