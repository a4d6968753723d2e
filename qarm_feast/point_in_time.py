"""Which feature row a label row may see: joins on row numbers, in DuckDB, over narrow columns.

Only keys, times and tie-breakers go through DuckDB; the caller takes the wide columns by the row
numbers that come back. Times are int64 microseconds UTC, so no zone or unit can blur them.
May import: duckdb, pyarrow, numpy.

Shape letters in this file: F feature rows, N label rows.
"""

from collections.abc import Sequence

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int64Array = npt.NDArray[np.int64]

TIME = "time_us"
_ROW = "row_number"


def microseconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a timestamp column as int64 microseconds since the epoch; naive times are UTC.

    Nanoseconds are floored: a row of microsecond times is at or before the exact time if and
    only if it is at or before the floored one.
    """
    if column.type.unit == "ns":
        nanoseconds = column.cast(pa.int64()).combine_chunks()
        floored = np.floor_divide(nanoseconds.fill_null(0).to_numpy(), 1000)
        return pa.chunked_array([pa.array(floored, mask=nanoseconds.is_null().to_numpy(False))])
    return column.cast(pa.timestamp("us", tz=column.type.tz)).cast(pa.int64())


def rows_as_of(
    features: pa.Table, labels: pa.Table, keys: Sequence[str], ties: Sequence[str]
) -> Int64Array:
    """Return, per label row, the number of the newest feature row at or before its time.

    Args:
        features: Columns ``keys``, ``time_us`` and ``ties``.
        labels: Columns ``keys`` and ``time_us``; any rows, repeated as one likes.
        keys: Columns that must be equal; null equals nothing.
        ties: Columns that decide between rows of one key and time; the greatest wins, the
            first column decides first, null is least.

    Returns:
        int64 of shape ``[N]``; -1 where there is no such row.
    """
    matches = [f'labels."{key}" = winners."{key}"' for key in keys]
    matches.append(f"labels.{TIME} >= winners.{TIME}")
    # An ASOF join sees one row per key and time, so ties are settled before it.
    query = f"""
        SELECT labels.{_ROW} AS label_row, coalesce(winners.{_ROW}, -1) AS feature_row
        FROM labels ASOF LEFT JOIN ({_winners("features", [*keys, TIME], ties)}) AS winners
        ON {" AND ".join(matches)}
    """
    found = _run(query, features=_numbered(features), labels=_numbered(labels))
    rows_N = np.full(labels.num_rows, -1, dtype=np.int64)
    rows_N[found["label_row"]] = found["feature_row"]
    return rows_N


def latest_rows(features: pa.Table, keys: Sequence[str], ties: Sequence[str]) -> Int64Array:
    """Return the numbers of the rows that win among those of equal ``keys``, ascending.

    Args:
        features: Columns ``keys`` and ``ties``.
        keys: Columns that name one thing; null equals null.
        ties: As in :func:`rows_as_of`.

    Returns:
        int64 row numbers.
    """
    query = f"SELECT {_ROW} FROM ({_winners('features', keys, ties)}) ORDER BY {_ROW}"
    rows: Int64Array = _run(query, features=_numbered(features))[_ROW]
    return rows


def _winners(table: str, keys: Sequence[str], ties: Sequence[str]) -> str:
    columns = [f'"{key}"' for key in keys]
    # Without a key, of a view without entities, all rows are those of one thing.
    partition = f"PARTITION BY {', '.join(columns)}" if columns else ""
    order = ", ".join([*(f'"{tie}" DESC NULLS LAST' for tie in ties), f"{_ROW} DESC"])
    return (
        f"SELECT {', '.join([*columns, _ROW])} FROM {table} "
        f"QUALIFY row_number() OVER ({partition} ORDER BY {order}) = 1"
    )


def _numbered(table: pa.Table) -> pa.Table:
    return table.append_column(_ROW, pa.array(np.arange(table.num_rows)))


def _run(query: str, **tables: pa.Table) -> dict[str, npt.NDArray[np.int64]]:
    with duckdb.connect(":memory:") as connection:
        # A query of some seconds would draw a bar into the output of whoever runs it.
        connection.execute("SET enable_progress_bar = false")
        for name, table in tables.items():
            connection.register(name, table)
        columns: dict[str, npt.NDArray[np.int64]] = connection.execute(query).fetchnumpy()
    return columns
