"""The append-only log below every view: parquet parts in folders named by the day of writing.

    <root>/<log>/written_date=1970-01-01/part-seed.parquet     no rows, the log's schema
    <root>/<log>/written_date=2026-01-31/part-<uuid>.parquet   one per append

A part is complete or absent: it is written under a hidden name, fsynced and renamed. Nothing is
ever rewritten, so readers need no lock. Duplicates (a replayed batch) are told apart by whoever
reads; see ``offline_store``. May import: pyarrow.
"""

import os
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from qarm_feast.artifact import sync_folder
from qarm_feast.errors import ConfigError, DataError
from qarm_feast.schema import CREATED, EVENT_TIMESTAMP

SEED_PART = Path("written_date=1970-01-01") / "part-seed.parquet"
_REQUIRED_TIMES = (EVENT_TIMESTAMP, CREATED)


class CodeLog:
    """Named logs under one root folder; any number of processes may append and read at once."""

    def __init__(self, root: str | Path) -> None:
        if "://" in str(root):
            raise ConfigError(
                f"the offline log is kept on a local or mounted folder, found {str(root)!r}; "
                "set offline_store.uri in feature_store.yaml to a path"
            )
        self.root = Path(root)
        self._durable_days: set[Path] = set()

    def create(self, name: str, schema: pa.Schema) -> None:
        """Make an empty log, or check that the one that exists has this schema.

        Args:
            name: Folder name below the root.
            schema: Columns of every part; metadata is dropped.

        Raises:
            DataError: If the log exists with other columns or types.
        """
        seed = self.root / name / SEED_PART
        schema = schema.remove_metadata()
        if not seed.is_file():
            self._write_part(seed, schema.empty_table())
        stored = self.schema(name)
        if not stored.equals(schema):
            raise DataError(
                f"log {seed.parent.parent} has the columns {_describe(stored)}, this process "
                f"writes {_describe(schema)}; move the folder away or restore the old columns"
            )

    def append(self, name: str, table: pa.Table, written_at: datetime | None = None) -> Path:
        """Write ``table`` as one new part; when this returns, the rows survive a power cut.

        A log that does not exist is created with the table's schema.

        Args:
            name: Folder name below the root.
            table: The log's columns in any order; cast to its types when no value changes.
            written_at: Aware time of writing, names the day folder; None: the wall clock.

        Returns:
            Path of the part.

        Raises:
            DataError: If columns are missing or unknown, a value does not fit its type, or a
                time is null or naive.
        """
        if not self.exists(name):
            self.create(name, _log_schema(table.schema))
        day = (written_at or datetime.now(UTC)).astimezone(UTC).date().isoformat()
        part = self.root / name / f"written_date={day}" / f"part-{uuid.uuid4().hex}.parquet"
        self._write_part(part, conform(table, self.schema(name), str(self.root / name)))
        return part

    def exists(self, name: str) -> bool:
        """Return whether the log was created."""
        return (self.root / name / SEED_PART).is_file()

    def schema(self, name: str) -> pa.Schema:
        """Return the log's schema; a DataError says that the log was never created."""
        try:
            schema: pa.Schema = pq.read_schema(self.root / name / SEED_PART)
        except FileNotFoundError as error:
            raise DataError(f"no log at {self.root / name}; nothing was written yet") from error
        return schema.remove_metadata()

    def parts(self, name: str) -> list[str]:
        """Return the paths of all complete parts, oldest day first, the seed among them."""
        return sorted(_scan_parts(self.root / name))

    def read(
        self,
        name: str,
        columns: Sequence[str] | None = None,
        where: pads.Expression | None = None,
    ) -> pa.Table:
        """Return all rows ever appended, duplicates included, in no particular order.

        Args:
            name: Folder name below the root.
            columns: Columns to read; None: all, in the schema's order.
            where: Filter on the log's columns.

        Returns:
            The rows.

        Raises:
            DataError: If the log was never created.
        """
        dataset = pads.dataset(self.parts(name), schema=self.schema(name), format="parquet")
        return dataset.to_table(columns=columns, filter=where)

    def _write_part(self, part: Path, table: pa.Table) -> None:
        part.parent.mkdir(parents=True, exist_ok=True)
        # Dataset readers, Feast's own too, skip names that begin with a dot.
        temporary = part.with_name(f".{part.stem}-{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "wb") as sink:
                # Codes hardly repeat within a part: a dictionary makes it larger and slower.
                pq.write_table(table, sink, compression="zstd", use_dictionary=False)
                sink.flush()
                os.fsync(sink.fileno())
        except BaseException:
            # A writer tries again for as long as a disk is full: it must not litter it.
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, part)
        sync_folder(part.parent)
        if part.parent not in self._durable_days:
            # The day folder may be new, by whichever process: its own entry must last as well.
            sync_folder(part.parent.parent)
            sync_folder(self.root)
            self._durable_days.add(part.parent)


def conform(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """Return ``table`` with exactly the columns and types of ``schema``, no value changed.

    Args:
        table: Any table.
        schema: What is wanted.
        where: Place to name in an error.

    Returns:
        The columns in the order of ``schema``.

    Raises:
        DataError: If that is not possible, or a time is null or naive.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    unknown = [name for name in table.column_names if name not in schema.names]
    if missing or unknown:
        raise DataError(f"rows for {where} lack the columns {missing} and bring unknown {unknown}")
    columns = [_conform_column(table[field.name], field, where) for field in schema]
    return pa.table(columns, schema=schema)


def _conform_column(column: pa.ChunkedArray, field: pa.Field, where: str) -> pa.ChunkedArray:
    is_naive = pa.types.is_timestamp(column.type) and column.type.tz is None
    if is_naive and pa.types.is_timestamp(field.type) and field.type.tz is not None:
        raise DataError(f"{where}: {field.name} has no time zone; pass aware UTC times")
    if field.name in _REQUIRED_TIMES and column.null_count:
        raise DataError(f"{where}: {field.name} is null in {column.null_count} of {len(column)}")
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"{where}: {field.name} is {column.type} and cannot be {field.type}: {error}"
        ) from error


def _log_schema(schema: pa.Schema) -> pa.Schema:
    """Replace every zoned time type by microseconds UTC, so that pandas' unit does not stick."""
    fields = [
        field.with_type(pa.timestamp("us", tz="UTC"))
        if pa.types.is_timestamp(field.type) and field.type.tz is not None
        else field
        for field in schema
    ]
    return pa.schema(fields)


def _scan_parts(log_dir: Path) -> Iterator[str]:
    try:
        days = [entry.path for entry in os.scandir(log_dir) if entry.name.startswith("written_")]
    except FileNotFoundError:
        return
    for day in days:
        for entry in os.scandir(day):
            if entry.name.startswith("part-") and entry.name.endswith(".parquet"):
                yield entry.path


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
