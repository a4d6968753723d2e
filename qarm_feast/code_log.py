"""The append-only log below every view: parts in folders named by the day of writing.

    <root>/<log>/written_date=1970-01-01/part-seed.parquet         no rows, the log's schema
    <root>/<log>/written_date=2026-01-31/part-<uuid>-<crc>.arrow   one per append

A part is complete or absent, and never changes; a compaction puts one in the place of many (see
``log_parts`` and ``compaction``). So readers need no lock. Duplicates (a replayed batch) are told
apart by whoever reads; see ``offline_store``. ``<root>`` is a folder or ``s3://BUCKET/PREFIX``.
May import: pyarrow.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from qarm_feast.artifact import replace_file, sync_folder
from qarm_feast.errors import DataError
from qarm_feast.log_parts import (
    DAY_PREFIX,
    DamagedPartError,
    find_damage,
    is_damage,
    is_gone,
    list_parts,
    read_parts,
    read_schema,
    set_aside_damaged,
    write_part,
)
from qarm_feast.object_store import Place, is_remote, names_in, place
from qarm_feast.schema import CREATED, EVENT_TIMESTAMP

logger = logging.getLogger(__name__)

SEED_PART = Path("written_date=1970-01-01") / "part-seed.parquet"
_REQUIRED_TIMES = (EVENT_TIMESTAMP, CREATED)
_PARTS_PER_TABLE = 16
_MAX_LISTINGS = 20
"""A read lists again when a part is gone; grace periods let that happen once in a long read."""


class CodeLog:
    """Named logs under one root folder; any number of processes may append and read at once."""

    def __init__(self, root: str | Place) -> None:
        self.root = place(root)
        self._durable_days: set[Place] = set()
        self._remote_schemas: dict[str, pa.Schema] = {}

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
            _write_seed(seed, schema)
            self._sync_parents(seed.parent)
        stored = self.schema(name)
        if not stored.equals(schema):
            raise DataError(
                f"log {self.root / name} has the columns {_describe(stored)}, this process "
                f"writes {_describe(schema)}; move the folder away or restore the old columns"
            )

    def append(self, name: str, table: pa.Table, written_at: datetime | None = None) -> Place:
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
        schema = self._schema_to_write(name, table.schema)
        day = (written_at or datetime.now(UTC)).astimezone(UTC).date().isoformat()
        folder = self.root / name / f"{DAY_PREFIX}{day}"
        part = write_part(folder, conform(table, schema, str(self.root / name)))
        self._sync_parents(folder)
        return part

    def _schema_to_write(self, name: str, given: pa.Schema) -> pa.Schema:
        """Return the log's schema, of an object store's once per writer: each look is a request."""
        schema = self._remote_schemas.get(name)
        if schema is None:
            if not self.exists(name):
                self.create(name, _log_schema(given))
            schema = self.schema(name)
        if is_remote(self.root):
            self._remote_schemas[name] = schema
        return schema

    def exists(self, name: str) -> bool:
        """Return whether the log was created."""
        return (self.root / name / SEED_PART).is_file()

    def names(self) -> list[str]:
        """Return the names of all logs below the root, sorted."""
        # Hidden names are locks, progress and the like.
        named = (name for name in names_in(self.root) if name[0] != ".")
        return sorted(name for name in named if self.exists(name))

    def schema(self, name: str) -> pa.Schema:
        """Return the log's schema; a DataError says that the log was never created."""
        seed = self.root / name / SEED_PART
        try:
            schema: pa.Schema = pq.read_schema(pa.BufferReader(seed.read_bytes()))
        except FileNotFoundError as error:
            raise DataError(f"no log at {self.root / name}; nothing was written yet") from error
        except (pa.ArrowInvalid, OSError) as error:
            if not is_damage(error):
                raise
            schema = self._schema_of_parts(name, str(error))
        return schema.remove_metadata()

    def parts(self, name: str) -> list[str]:
        """Return the paths of the parts that count, oldest day first, the seed among them."""
        return list_parts(self.root / name)

    def row_parts(self, name: str) -> list[str]:
        """Return :meth:`parts` without the seed, which has no rows."""
        seed = str(self.root / name / SEED_PART)
        return [path for path in self.parts(name) if path != seed]

    def read(
        self,
        name: str,
        columns: Sequence[str] | None = None,
        where: pads.Expression | None = None,
    ) -> pa.Table:
        """Return all rows of the log in no particular order, some more than once.

        A damaged part is put into quarantine with a warning, or left out with one where this
        process may not write; the rest is returned.

        Args:
            name: Folder name below the root.
            columns: Columns to read; None: all, in the schema's order.
            where: Filter on the log's columns.

        Returns:
            The rows.

        Raises:
            DataError: If the log was never created.
            OSError: If the system cannot read a part.
        """
        schema = self.schema(name)
        left_out: set[str] = set()
        for _ in range(_MAX_LISTINGS):
            parts = [path for path in self.row_parts(name) if path not in left_out]
            try:
                return read_parts(parts, schema, columns, where)
            except (DamagedPartError, pa.ArrowInvalid, OSError) as error:
                left_out |= left_out_after(error, parts)
        raise DataError(self._vanished(name))

    def tables(self, name: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield all rows of the log, those of some parts at a time, in no particular order.

        Rows that a compaction merges meanwhile may come twice; damaged parts are treated as in
        :meth:`read`.

        Args:
            name: Folder name below the root.
            columns: Columns to read.

        Yields:
            Rows of at most ``_PARTS_PER_TABLE`` parts.

        Raises:
            DataError: If the log was never created, or its parts vanish all the time.
            OSError: If the system cannot read a part.
        """
        schema = self.schema(name)
        known: set[str] = set()
        for _ in range(_MAX_LISTINGS):
            listed = [path for path in self.row_parts(name) if path not in known]
            num_cut = 0
            for first in range(0, len(listed), _PARTS_PER_TABLE):
                parts = listed[first : first + _PARTS_PER_TABLE]
                try:
                    yield read_parts(parts, schema, columns)
                except (DamagedPartError, pa.ArrowInvalid, OSError) as error:
                    known |= left_out_after(error, parts)
                    num_cut += 1
                    continue
                known.update(parts)
            if not num_cut:
                return
        raise DataError(self._vanished(name))

    def _vanished(self, name: str) -> str:
        return (
            f"parts of {self.root / name} vanished, or read differently each time, "
            f"{_MAX_LISTINGS} times; see that compaction.grace_seconds is longer than a read "
            "takes, check the disk and the memory of this machine, then read again"
        )

    def _schema_of_parts(self, name: str, reason: str) -> pa.Schema:
        """Make good a damaged seed: every part has the log's schema."""
        seed = self.root / name / SEED_PART
        sound = (path for path in self.row_parts(name) if find_damage(path) is None)
        part = next(sound, None)
        if part is None:
            raise DataError(
                f"{seed} is damaged ({reason}) and no part tells the columns; put back a copy of it"
            )
        schema = read_schema(part)
        logger.warning("offline_seed_damaged path=%s reason=%r schema_of=%s", seed, reason, part)
        # A reader on a read-only mount, or a full disk: the read goes on without it.
        with contextlib.suppress(OSError):
            _write_seed(seed, schema)
        return schema

    def _sync_parents(self, folder: Place) -> None:
        if folder not in self._durable_days:
            # The day folder may be new, by whichever process: its own entry must last as well.
            sync_folder(folder.parent)
            sync_folder(self.root)
            self._durable_days.add(folder)


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


def left_out_after(error: Exception, parts: Sequence[str]) -> set[str]:
    """Return what to leave out when a read of ``parts`` failed; raise what no part is to blame for.

    Args:
        error: Why it failed.
        parts: What was read.

    Returns:
        Damaged parts, and parts that are gone; empty if the next listing lacks them anyway.
    """
    if is_gone(error):
        # Merged with others and deleted since; its rows stand elsewhere.
        return set()
    damaged = set_aside_damaged(parts) if is_damage(error) else set()
    if not damaged and not isinstance(error, DamagedPartError):
        # The system's fault, or that of a filter that does not fit the columns.
        raise error
    return damaged


def _log_schema(schema: pa.Schema) -> pa.Schema:
    """Replace every zoned time type by microseconds UTC, so that pandas' unit does not stick."""
    fields = [
        field.with_type(pa.timestamp("us", tz="UTC"))
        if pa.types.is_timestamp(field.type) and field.type.tz is not None
        else field
        for field in schema
    ]
    return pa.schema(fields)


def _write_seed(seed: Place, schema: pa.Schema) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    replace_file(seed, sink.getvalue().to_pybytes())


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
