"""Input data: the parquet directory that every job starts from, checked before anything starts.

A directory holds ``items.parquet``, ``interactions.parquet`` and optionally ``users.parquet``.
:func:`load_input_data` checks the whole contract and reports every breach at once, each with
file, column, first row (counted from 0) and number of rows. May import: pyarrow, numpy, click.

Shape letters in this file: N rows, W width of a ready vector.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AwareDatetime, Field

from qarm_feast.command import config_option
from qarm_feast.config import ConfigPath, Section, load_section
from qarm_feast.errors import ConfigError, ContractError
from qarm_feast.schema import (
    CONTENT_BINARY_COLUMNS,
    CONTENT_TEXT_COLUMNS,
    CREATED,
    ERASURE_MARK,
    EVENT_TIMESTAMP,
    ITEM_ID,
    SPLITS,
    TIMESTAMP,
    USER_ID,
)

UPLOAD_TIMESTAMP = "upload_timestamp"
SPLIT = "split"
EMBEDDING = "embedding"
CONTENT_COLUMNS = (*CONTENT_TEXT_COLUMNS, *CONTENT_BINARY_COLUMNS, EMBEDDING)
ITEMS_FILE = "items.parquet"
INTERACTIONS_FILE = "interactions.parquet"
TRAIN_QUANTILE = 0.8
"""Share of event times before the automatic cut-off."""

_FILE_COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "items.parquet": {ITEM_ID: pa.int64(), UPLOAD_TIMESTAMP: TIMESTAMP},
    "interactions.parquet": {
        USER_ID: pa.int64(),
        ITEM_ID: pa.int64(),
        EVENT_TIMESTAMP: TIMESTAMP,
    },
    "users.parquet": {USER_ID: pa.int64()},
}
USER_COLUMN_TYPES = (
    pa.int64(),
    pa.int32(),
    pa.float64(),
    pa.float32(),
    pa.bool_(),
    pa.string(),
)
"""Types of columns of ``users.parquet``: those that the view ``user_profile`` can hold."""
_UNIQUE_KEYS = {"items.parquet": ITEM_ID, "users.parquet": USER_ID}


class DataConfig(Section):
    """Section ``data``: where the input data lies and how it is cut by time."""

    input_dir: ConfigPath = Field(
        default="data/input", description="Folder with items, interactions and users parquet files."
    )
    positive_label: str = Field(
        default="auto", description="Task that makes an interaction positive; auto = the first."
    )
    cutoff_timestamp: Literal["auto"] | AwareDatetime = Field(
        default="auto",
        description="Without a split column, train rows lie before this; auto = 80 % quantile.",
    )
    valid_days: Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default="auto",
        description="Days of validation rows after the cut-off; auto = half of the rest.",
    )
    history_length: int = Field(
        default=50, gt=0, description="Latest positives that a user's history holds."
    )
    unknown_items: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="Interactions that name no item of items.parquet: refuse all, or drop these.",
    )


@dataclass(frozen=True)
class InputData:
    """Checked input data.

    ``interactions`` always carries ``split``: the given one, or one made from the cut-off
    (``has_given_split`` tells). ``task_names`` are the bool columns in file order.
    ``num_unknown_interactions`` named no item of the catalogue and were dropped as told to.
    """

    directory: Path
    items: pa.Table
    interactions: pa.Table
    users: pa.Table | None
    task_names: tuple[str, ...]
    positive_label: str
    has_given_split: bool
    num_unknown_interactions: int = 0

    def train_interactions(self) -> pa.Table:
        """Return the interactions from which anything may learn, in file order."""
        return self.interactions.filter(pc.equal(self.interactions[SPLIT], "train"))

    def positives(self) -> pa.Table:
        """Return the interactions of every split whose positive label is true, in file order."""
        return self.interactions.filter(self.interactions[self.positive_label])

    def train_positives(self) -> pa.Table:
        """Return the train interactions whose positive label is true, in file order."""
        train = self.train_interactions()
        return train.filter(train[self.positive_label])

    def train_item_ids(self) -> np.ndarray:
        """Return the ids of items with a train row: int64, ascending, unique."""
        ids = self.train_interactions()[ITEM_ID].to_numpy()
        return np.unique(ids)

    def behaviour_cutoff(self) -> datetime:
        """Return the time of the newest train interaction, aware UTC."""
        newest: datetime = pc.max(self.train_interactions()[EVENT_TIMESTAMP]).as_py()
        return newest.astimezone(UTC)


def load_input_data(config: DataConfig) -> InputData:
    """Return the data of ``config.input_dir`` after every contract check has passed.

    Args:
        config: Section ``data``.

    Returns:
        The tables; string columns are plain strings, row order is the files'.

    Raises:
        ContractError: Listing every breach with file, column, first row and count.
        ConfigError: If ``positive_label`` is no task of the data.
    """
    problems = _Problems(Path(config.input_dir))
    tables = _read_tables(problems)
    items, interactions = tables["items.parquet"], tables["interactions.parquet"]
    _check_content(items, problems)
    task_names = _check_tasks(interactions, problems)
    problems.raise_if_any()
    num_rows = interactions.num_rows
    if config.unknown_items == "drop":
        interactions = _of_known_items(items, interactions, problems)
    _check_references(items, interactions, problems)
    problems.raise_if_any()
    has_given_split = SPLIT in interactions.column_names
    if not has_given_split:
        interactions = interactions.append_column(SPLIT, _split_by_time(interactions, config))
    _check_train_rows(interactions, has_given_split, problems)
    problems.raise_if_any()
    return InputData(
        directory=problems.directory,
        items=items,
        interactions=interactions,
        users=tables.get("users.parquet"),
        task_names=task_names,
        positive_label=_positive_label(config, task_names),
        has_given_split=has_given_split,
        num_unknown_interactions=num_rows - interactions.num_rows,
    )


@click.command("check-data", epilog="Example: qarm check-data --config feature_repo/qarm.yaml")
@config_option
def check_data(config_path: str) -> None:
    """Check the input directory against the contract and print what it holds."""
    checked = load_input_data(load_section(config_path, "data", DataConfig))
    for line in describe(checked):
        click.echo(line)


def describe(checked: InputData) -> list[str]:
    """Return the lines that ``qarm check-data`` prints: counts per file, split and task."""
    splits = pc.value_counts(checked.interactions[SPLIT]).to_pylist()
    counts = {entry["values"]: entry["counts"] for entry in splits}
    kind = "given" if checked.has_given_split else "made from the cut-off"
    content = [name for name in CONTENT_COLUMNS if name in checked.items.column_names]
    lines = [
        f"{checked.directory} keeps the input contract",
        f"  items         {checked.items.num_rows:>10,}  content: {', '.join(content)}",
        f"  interactions  {checked.interactions.num_rows:>10,}  split ({kind}): "
        + ", ".join(f"{name} {counts.get(name, 0):,}" for name in SPLITS),
    ]
    if checked.num_unknown_interactions:
        lines.append(
            f"  {checked.num_unknown_interactions:,} interactions of unknown items dropped"
        )
    if checked.users is None:
        lines.append("  users               none")
    else:
        columns = ", ".join(n for n in checked.users.column_names if n != USER_ID)
        lines.append(f"  users         {checked.users.num_rows:>10,}  columns: {columns}")
    for name in checked.task_names:
        share = pc.mean(checked.interactions[name].cast(pa.int8())).as_py()
        mark = " (positive label)" if name == checked.positive_label else ""
        lines.append(f"  task {name}: {share:.1%} true{mark}")
    return lines


class _Problems:
    """Collects breaches so that all are reported at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines: list[str] = []

    def add(self, file: str, column: str | None, text: str) -> None:
        """Note a breach of a whole file or column."""
        place = file if column is None else f"{file}, column {column!r}"
        self.lines.append(f"{place}: {text}")

    def add_rows(
        self, file: str, column: str, text: str, is_bad: pa.ChunkedArray | pa.Array
    ) -> None:
        """Note a breach of single rows, if there is any; a null in the mask counts as good."""
        bad_N = np.asarray(pc.fill_null(is_bad, False)).astype(bool)
        count = int(bad_N.sum())
        if count:
            first = int(bad_N.argmax())
            self.add(file, column, f"{text} (first at row {first}, counted from 0; {count} row(s))")

    def raise_if_any(self) -> None:
        """Raise all breaches noted so far."""
        if self.lines:
            raise ContractError(str(self.directory), self.lines)


def _read_tables(problems: _Problems) -> dict[str, pa.Table]:
    """Return the tables by file name, each checked by itself; users only where present."""
    tables = {}
    for name in _FILE_COLUMNS:
        path = problems.directory / name
        if path.is_file():
            table = _read_parquet(path, problems)
            if table is not None:
                tables[name] = table
        elif name != "users.parquet":
            problems.add(name, None, f"no such file in {problems.directory}")
    for name, table in tables.items():
        _check_table(name, table, problems)
    if not {"items.parquet", "interactions.parquet"} <= tables.keys():
        problems.raise_if_any()
    return tables


def _read_parquet(path: Path, problems: _Problems) -> pa.Table | None:
    try:
        return plain_strings(pq.read_table(path))
    except (pa.ArrowException, OSError) as error:
        problems.add(path.name, None, f"cannot be read as parquet: {error}")
        return None


def read_catalogue_times(config: DataConfig) -> pa.Table | None:
    """Return id and upload time of every item of ``items.parquet``, for readers by the piece.

    Args:
        config: Section ``data``.

    Returns:
        Both columns in file order, checked; None if there is no such file.

    Raises:
        ContractError: Listing every breach in these columns, and in the types of the others.
    """
    problems = _Problems(Path(config.input_dir))
    path = problems.directory / ITEMS_FILE
    if not path.is_file():
        return None
    try:
        schema = pq.read_schema(path)
        wanted = [name for name in _FILE_COLUMNS[ITEMS_FILE] if name in schema.names]
        times = pq.read_table(path, columns=wanted)
    except (pa.ArrowException, OSError) as error:
        problems.add(path.name, None, f"cannot be read as parquet: {error}")
        raise ContractError(str(problems.directory), problems.lines) from error
    _check_table(ITEMS_FILE, times, problems)
    _check_content(plain_strings(schema.remove_metadata().empty_table()), problems)
    problems.raise_if_any()
    return times


def plain_strings(table: pa.Table) -> pa.Table:
    """Turn dictionary and large strings into plain ones: writers differ, readers need not."""
    for index, field in enumerate(table.schema):
        kind = field.type
        if pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type):
            kind = pa.large_string()
        if pa.types.is_large_string(kind):
            table = table.set_column(index, field.name, table[field.name].cast(pa.string()))
    return table


def _check_table(name: str, table: pa.Table, problems: _Problems) -> None:
    if table.num_rows == 0:
        problems.add(name, None, "holds no rows")
    for column, wanted in _FILE_COLUMNS[name].items():
        if column not in table.column_names:
            problems.add(name, column, f"is missing (type {wanted})")
        elif table.schema.field(column).type != wanted:
            found = table.schema.field(column).type
            problems.add(name, column, f"has type {found}, the contract wants {wanted}")
        else:
            problems.add_rows(name, column, "is null", pc.is_null(table[column]))
            if column == ITEM_ID:
                text = f"is {ERASURE_MARK}, which stands for no item"
                problems.add_rows(name, column, text, pc.equal(table[column], ERASURE_MARK))
    key = _UNIQUE_KEYS.get(name)
    if key in table.column_names and not table[key].null_count:
        problems.add_rows(name, str(key), "repeats an earlier id", _is_repeat(table[key]))
    if name == "users.parquet":
        _check_user_columns(table, problems)


def _is_repeat(ids: pa.ChunkedArray) -> pa.Array:
    """Mark every row whose value stands in an earlier row."""
    values_N = ids.to_numpy()
    is_repeat_N = np.ones(len(values_N), dtype=bool)
    is_repeat_N[np.unique(values_N, return_index=True)[1]] = False
    return pa.array(is_repeat_N)


def _check_user_columns(users: pa.Table, problems: _Problems) -> None:
    wanted = ", ".join(map(str, USER_COLUMN_TYPES))
    for field in users.schema:
        if field.name in (EVENT_TIMESTAMP, CREATED):
            problems.add("users.parquet", field.name, "is a name that the stored rows need")
        elif field.name != USER_ID and field.type not in USER_COLUMN_TYPES:
            text = f"has type {field.type}, the contract wants one of {wanted}"
            problems.add("users.parquet", field.name, text)


def _check_content(items: pa.Table, problems: _Problems) -> None:
    present = [name for name in CONTENT_COLUMNS if name in items.column_names]
    if not present:
        problems.add(
            "items.parquet", None, f"has no content column (one of {', '.join(CONTENT_COLUMNS)})"
        )
    for name in present:
        kind = items.schema.field(name).type
        if name == EMBEDDING:
            _check_embedding(items[name], problems, may_lack=len(present) > 1)
        elif pa.types.is_string(kind):
            continue
        elif name in CONTENT_TEXT_COLUMNS:
            problems.add("items.parquet", name, f"has type {kind}, the contract wants string")
        elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            problems.add(
                "items.parquet", name, f"has type {kind}, the contract wants bytes or a path"
            )


def _check_embedding(column: pa.ChunkedArray, problems: _Problems, *, may_lack: bool) -> None:
    kind = column.type
    if not (pa.types.is_fixed_size_list(kind) and pa.types.is_float32(kind.value_type)):
        wanted = "a fixed-size list of float32"
        problems.add("items.parquet", EMBEDDING, f"has type {kind}, the contract wants {wanted}")
        return
    if not may_lack:
        text = "is null, and there is no other content column"
        problems.add_rows("items.parquet", EMBEDDING, text, pc.is_null(column))
    # Filling the nulls keeps the rows aligned.
    is_bad_N = ~np.isfinite(embedding_matrix(column)).all(axis=1)
    is_bad = pc.and_(pa.array(is_bad_N), pc.is_valid(column))
    problems.add_rows("items.parquet", EMBEDDING, "holds NaN or infinity", is_bad)


def embedding_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Return fixed-size lists of float32 as a matrix ``[N, W]``; a null becomes a row of NaN."""
    width = column.type.list_size
    matrix_NW = np.full((len(column), width), np.nan, dtype=np.float32)
    is_valid_N = np.asarray(pc.is_valid(column))
    flat = pc.list_flatten(column.drop_null())
    matrix_NW[is_valid_N] = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
    return matrix_NW


def _check_tasks(interactions: pa.Table, problems: _Problems) -> tuple[str, ...]:
    file = "interactions.parquet"
    known = (*_FILE_COLUMNS[file], SPLIT)
    task_names = []
    for field in interactions.schema:
        if field.name in known:
            continue
        if field.name == CREATED:
            problems.add(file, field.name, "is a name that the stored rows need")
        elif pa.types.is_boolean(field.type):
            task_names.append(field.name)
            is_null = pc.is_null(interactions[field.name])
            problems.add_rows(file, field.name, "is null", is_null)
        else:
            text = f"has type {field.type}; beside {', '.join(known)} only bool tasks may stand"
            problems.add(file, field.name, text)
    if not task_names:
        problems.add(file, None, "has no bool task column (is_click, is_like …)")
    if SPLIT in interactions.column_names:
        _check_split(interactions[SPLIT], problems)
    return tuple(task_names)


def _check_split(split: pa.ChunkedArray, problems: _Problems) -> None:
    file = "interactions.parquet"
    if not pa.types.is_string(split.type):
        problems.add(file, SPLIT, f"has type {split.type}, the contract wants string")
        return
    is_unknown = pc.invert(pc.is_in(split, pa.array(SPLITS)))
    problems.add_rows(file, SPLIT, f"is none of {', '.join(SPLITS)}", is_unknown)


def _of_known_items(items: pa.Table, interactions: pa.Table, problems: _Problems) -> pa.Table:
    is_known = pc.is_in(interactions[ITEM_ID], items[ITEM_ID].combine_chunks())
    if not pc.any(is_known).as_py():
        problems.add("interactions.parquet", ITEM_ID, "names no item that items.parquet holds")
    return interactions.filter(is_known)


def _check_references(items: pa.Table, interactions: pa.Table, problems: _Problems) -> None:
    file = "interactions.parquet"
    rows = pc.index_in(interactions[ITEM_ID], items[ITEM_ID].combine_chunks())
    text = "names an item that items.parquet does not hold (data.unknown_items: drop leaves it out)"
    problems.add_rows(file, ITEM_ID, text, pc.is_null(rows))
    uploads = pc.take(items[UPLOAD_TIMESTAMP], rows)
    is_early = pc.less(interactions[EVENT_TIMESTAMP], uploads)
    text = "lies before the item's upload_timestamp in items.parquet"
    problems.add_rows(file, EVENT_TIMESTAMP, text, is_early)


def _split_by_time(interactions: pa.Table, config: DataConfig) -> pa.Array:
    """Return train < cut-off <= valid < cut-off + valid days <= test."""
    times_N = interactions[EVENT_TIMESTAMP].cast(pa.int64()).to_numpy()
    if config.cutoff_timestamp == "auto":
        cutoff = int(np.quantile(times_N, TRAIN_QUANTILE, method="higher"))
    else:
        cutoff = pa.scalar(config.cutoff_timestamp, TIMESTAMP).value
    if config.valid_days == "auto":
        later_N = times_N[times_N >= cutoff]
        end = int(np.quantile(later_N, 0.5, method="higher")) if len(later_N) else cutoff
    else:
        end = cutoff + round(config.valid_days * 86_400_000_000)
    indices_N = (times_N >= cutoff).astype(np.int8) + (times_N >= end).astype(np.int8)
    return pa.DictionaryArray.from_arrays(indices_N, pa.array(SPLITS)).cast(pa.string())


def _check_train_rows(interactions: pa.Table, has_given_split: bool, problems: _Problems) -> None:
    if not pc.any(pc.equal(interactions[SPLIT], "train")).as_py():
        reason = "no row says train" if has_given_split else "no row lies before the cut-off"
        problems.add("interactions.parquet", SPLIT, f"{reason}, so nothing can be learnt")


def _positive_label(config: DataConfig, task_names: tuple[str, ...]) -> str:
    if config.positive_label == "auto":
        return task_names[0]
    if config.positive_label not in task_names:
        raise ConfigError(
            f"data.positive_label is {config.positive_label!r}, "
            f"but {config.input_dir} has the tasks {', '.join(task_names)}"
        )
    return config.positive_label
