from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from qarm_feast.errors import ConfigError, ContractError
from qarm_feast.input_data import (
    DataConfig,
    InputData,
    check_data,
    load_input_data,
    read_catalogue_times,
)

AMAZON = Path(__file__).resolve().parents[3] / "shared/data/amazon_industrial"
START = datetime(2024, 1, 1, tzinfo=UTC)
TIMESTAMP = pa.timestamp("us", tz="UTC")
Tables = dict[str, pa.Table]
Change = Callable[[Tables], None]


def days(*numbers: float) -> pa.Array:
    return pa.array([START + timedelta(days=number) for number in numbers], TIMESTAMP)


def good_tables() -> Tables:
    return {
        "items": pa.table(
            {
                "item_id": [10, 11, 12],
                "upload_timestamp": days(0, 0, 1),
                "title": ["a", None, "c"],
            }
        ),
        "interactions": pa.table(
            {
                "user_id": [1, 1, 2, 2],
                "item_id": [10, 11, 12, 10],
                "event_timestamp": days(1, 2, 3, 4),
                "split": ["train", "train", "valid", "test"],
                "is_click": [True, False, True, True],
                "is_like": [False, False, True, False],
            }
        ),
        "users": pa.table({"user_id": [1, 2], "age": [30, 40], "gender": ["F", "M"]}),
    }


def write(tables: Tables, folder: Path) -> DataConfig:
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    return DataConfig(input_dir=str(folder))


def replace(file: str, column: str, values: object) -> Change:
    def change(tables: Tables) -> None:
        table = tables[file]
        index = table.column_names.index(column)
        tables[file] = table.set_column(index, column, values)

    return change


def drop(file: str, column: str) -> Change:
    def change(tables: Tables) -> None:
        tables[file] = tables[file].drop_columns([column])

    return change


def add(file: str, column: str, values: object) -> Change:
    def change(tables: Tables) -> None:
        tables[file] = tables[file].append_column(column, values)

    return change


def replace_title_by_vectors(vectors: list[list[float] | None]) -> Change:
    def change(tables: Tables) -> None:
        drop("items", "title")(tables)
        add("items", "embedding", pa.array(vectors, VECTOR))(tables)

    return change


def test_an_item_with_other_content_may_lack_a_ready_vector(tmp_path: Path) -> None:
    tables = good_tables()
    add("items", "embedding", pa.array([[1, 2], None, [1, 1]], VECTOR))(tables)

    assert load_input_data(write(tables, tmp_path)).items["embedding"].null_count == 1


def test_load_input_data_returns_tables_tasks_in_file_order_and_train_rows(tmp_path: Path) -> None:
    checked = load_input_data(write(good_tables(), tmp_path))

    assert checked.task_names == ("is_click", "is_like")
    assert checked.positive_label == "is_click"
    assert checked.has_given_split
    assert checked.train_interactions()["item_id"].to_pylist() == [10, 11]
    assert checked.train_positives()["item_id"].to_pylist() == [10]
    assert checked.train_item_ids().tolist() == [10, 11]
    assert checked.behaviour_cutoff() == START + timedelta(days=2)


VECTOR = pa.list_(pa.float32(), 2)
INTS = pa.array([0, 1, 0, 1])

BREACHES: list[tuple[str, Change, str]] = [
    (
        "missing column",
        drop("items", "upload_timestamp"),
        "items.parquet, column 'upload_timestamp': is missing",
    ),
    (
        "id type",
        replace("items", "item_id", pa.array(["10", "11", "12"])),
        "items.parquet, column 'item_id': has type string, the contract wants int64",
    ),
    (
        "reserved item",
        replace("items", "item_id", pa.array([10, -1, -2])),
        "items.parquet, column 'item_id': is -1, which stands for no item (first at row 1, "
        "counted from 0; 1 row(s))",
    ),
    (
        "reserved item in interactions",
        replace("interactions", "item_id", pa.array([10, 11, -1, -1])),
        "interactions.parquet, column 'item_id': is -1, which stands for no item (first at row 2, "
        "counted from 0; 2 row(s))",
    ),
    (
        "timestamp without zone",
        replace("interactions", "event_timestamp", days(1, 2, 3, 4).cast(pa.timestamp("us"))),
        "interactions.parquet, column 'event_timestamp': has type timestamp[us], the contract "
        "wants timestamp[us, tz=UTC]",
    ),
    (
        "null id",
        replace("interactions", "user_id", pa.array([1, None, 2, None])),
        "interactions.parquet, column 'user_id': is null (first at row 1, counted from 0; 2 row(s)",
    ),
    (
        "duplicate item",
        replace("items", "item_id", pa.array([10, 11, 10])),
        "items.parquet, column 'item_id': repeats an earlier id (first at row 2, counted from 0; 1",
    ),
    (
        "duplicate user",
        replace("users", "user_id", pa.array([1, 1])),
        "users.parquet, column 'user_id': repeats an earlier id (first at row 1",
    ),
    (
        "unknown item",
        replace("interactions", "item_id", pa.array([10, 11, 99, 98])),
        "interactions.parquet, column 'item_id': names an item that items.parquet does not hold "
        "(data.unknown_items: drop leaves it out) (first at row 2, counted from 0; 2 row(s))",
    ),
    (
        "event before upload",
        replace("items", "upload_timestamp", days(0, 2.5, 9)),
        "interactions.parquet, column 'event_timestamp': lies before the item's upload_timestamp "
        "in items.parquet (first at row 1, counted from 0; 2 row(s))",
    ),
    (
        "unknown split",
        replace("interactions", "split", pa.array(["train", "dev", "valid", None])),
        "interactions.parquet, column 'split': is none of train, valid, test (first at row 1, "
        "counted from 0; 2 row(s))",
    ),
    (
        "no train row",
        replace("interactions", "split", pa.array(["valid"] * 4)),
        "interactions.parquet, column 'split': no row says train",
    ),
    (
        "null task",
        replace("interactions", "is_click", pa.array([True, None, True, True])),
        "interactions.parquet, column 'is_click': is null (first at row 1",
    ),
    (
        "task that is no bool",
        replace("interactions", "is_like", INTS),
        "interactions.parquet, column 'is_like': has type int64",
    ),
    (
        "no content",
        drop("items", "title"),
        "items.parquet: has no content column (one of title, description, brand, image, audio, emb",
    ),
    (
        "text type",
        replace("items", "title", pa.array([1, 2, 3])),
        "items.parquet, column 'title': has type int64, the contract wants string",
    ),
    (
        "vector type",
        add("items", "embedding", pa.array([[1.0], [1.0], [1.0]], pa.list_(pa.float32()))),
        "items.parquet, column 'embedding': has type list<",
    ),
    (
        "vector with NaN",
        add("items", "embedding", pa.array([[1, 2], [1, float("nan")], [1, 1]], VECTOR)),
        "items.parquet, column 'embedding': holds NaN or infinity (first at row 1",
    ),
    (
        "vector missing",
        replace_title_by_vectors([[1, 2], [1, 1], None]),
        "items.parquet, column 'embedding': is null, and there is no other content column (first "
        "at row 2, counted from 0; 1 row(s))",
    ),
    (
        "user column type",
        add("users", "tags", pa.array([["a"], ["b"]])),
        "users.parquet, column 'tags': has type list<",
    ),
    (
        "user column that no feature can hold",
        add("users", "shoe_size", pa.array([40, 41], pa.int16())),
        "users.parquet, column 'shoe_size': has type int16, the contract wants one of int64,",
    ),
    (
        "user column named as a stored one",
        add("users", "created", pa.array([1, 2])),
        "users.parquet, column 'created': is a name that the stored rows need",
    ),
    (
        "task named as a stored column",
        add("interactions", "created", pa.array([True] * 4)),
        "interactions.parquet, column 'created': is a name that the stored rows need",
    ),
]


@pytest.mark.parametrize(
    ("change", "line"), [b[1:] for b in BREACHES], ids=[b[0] for b in BREACHES]
)
def test_load_input_data_names_file_column_row_and_count(
    tmp_path: Path, change: Change, line: str
) -> None:
    tables = good_tables()
    change(tables)

    with pytest.raises(ContractError) as caught:
        load_input_data(write(tables, tmp_path))

    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(line)


def test_load_input_data_reports_breaches_of_several_files_at_once(tmp_path: Path) -> None:
    tables = good_tables()
    replace("items", "item_id", pa.array([10, 10, 12]))(tables)
    replace("interactions", "is_click", pa.array([None, True, True, True]))(tables)
    drop("users", "user_id")(tables)

    with pytest.raises(ContractError) as caught:
        load_input_data(write(tables, tmp_path))

    assert [line.split(":")[0] for line in caught.value.problems] == [
        "items.parquet, column 'item_id'",
        "users.parquet, column 'user_id'",
        "interactions.parquet, column 'is_click'",
    ]


def test_load_input_data_reports_missing_empty_and_unreadable_files(tmp_path: Path) -> None:
    pq.write_table(good_tables()["items"].slice(0, 0), tmp_path / "items.parquet")
    (tmp_path / "users.parquet").write_bytes(b"no parquet")

    with pytest.raises(ContractError) as caught:
        load_input_data(DataConfig(input_dir=str(tmp_path)))

    text = "\n".join(caught.value.problems)
    assert "interactions.parquet: no such file in" in text
    assert "users.parquet: cannot be read as parquet" in text
    assert "items.parquet: holds no rows" in text


def test_an_id_above_2_to_53_is_not_mistaken_for_its_neighbour(tmp_path: Path) -> None:
    tables = good_tables()
    big = 2**53
    replace("items", "item_id", pa.array([big, big + 1, 12]))(tables)
    replace("interactions", "item_id", pa.array([big, big + 1, 12, big]))(tables)

    checked = load_input_data(write(tables, tmp_path))

    assert checked.train_item_ids().tolist() == [big, big + 1]


def test_dictionary_and_large_strings_are_read_as_strings(tmp_path: Path) -> None:
    tables = good_tables()
    split = tables["interactions"]["split"].dictionary_encode()
    replace("interactions", "split", split)(tables)
    replace("items", "title", tables["items"]["title"].cast(pa.large_string()))(tables)

    checked = load_input_data(write(tables, tmp_path))

    assert checked.interactions["split"].type == pa.string()
    assert checked.items["title"].type == pa.string()


def load_without_split(folder: Path, **settings: object) -> InputData:
    num_rows = 10
    tables: Tables = good_tables()
    tables["interactions"] = pa.table(
        {
            "user_id": np.arange(num_rows),
            "item_id": [10] * num_rows,
            # Newest first, to show that the order of the file does not matter.
            "event_timestamp": days(*range(num_rows, 0, -1)),
            "is_click": [True] * num_rows,
        }
    )
    config = write(tables, folder)
    return load_input_data(config.model_copy(update=settings))


def test_without_a_split_the_newest_rows_are_valid_and_test(tmp_path: Path) -> None:
    checked = load_without_split(tmp_path)

    assert not checked.has_given_split
    assert checked.interactions["split"].to_pylist() == ["test", "valid"] + ["train"] * 8


def test_without_a_split_the_given_cut_off_and_days_are_kept(tmp_path: Path) -> None:
    cutoff = START + timedelta(days=4)

    checked = load_without_split(tmp_path, cutoff_timestamp=cutoff, valid_days=2.0)

    # Day 4 itself is valid: train lies strictly before the cut-off; day 6 is test.
    expected = ["test"] * 5 + ["valid"] * 2 + ["train"] * 3
    assert checked.interactions["split"].to_pylist() == expected


def test_a_cut_off_before_all_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="no row lies before the cut-off"):
        load_without_split(tmp_path, cutoff_timestamp=START)


@pytest.mark.parametrize("valid_days", [-1.0, float("inf"), float("nan")])
def test_valid_days_that_give_no_end_after_the_cut_off_are_refused(valid_days: float) -> None:
    with pytest.raises(ValidationError, match="valid_days"):
        DataConfig(valid_days=valid_days)


def test_an_unknown_positive_label_is_a_config_error(tmp_path: Path) -> None:
    config = write(good_tables(), tmp_path).model_copy(update={"positive_label": "is_bought"})

    with pytest.raises(ConfigError, match=r"is_bought.*is_click, is_like"):
        load_input_data(config)


def test_check_data_prints_counts(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    write(good_tables(), tmp_path / "input")
    (tmp_path / "qarm.yaml").write_text("data: {input_dir: input}")

    result = CliRunner().invoke(check_data, ["--config", str(tmp_path / "qarm.yaml")])

    assert result.exit_code == 0, result.output
    assert "train 2, valid 1, test 1" in result.output
    assert "task is_click: 75.0% true (positive label)" in result.output


@pytest.mark.skipif(
    not AMAZON.is_dir(), reason="needs shared/data/amazon_industrial beside the repository"
)
def test_amazon_industrial_keeps_the_contract_unchanged() -> None:
    checked = load_input_data(DataConfig(input_dir=str(AMAZON)))

    assert checked.task_names == ("is_click",)
    assert checked.users is None
    assert (checked.items.num_rows, checked.interactions.num_rows) == (3686, 108320)


def test_catalogue_times_are_the_two_columns_in_file_order(tmp_path: Path) -> None:
    config = write({"items": good_tables()["items"]}, tmp_path)

    times = read_catalogue_times(config)

    assert times is not None
    assert times.to_pydict() == good_tables()["items"].drop_columns(["title"]).to_pydict()
    assert read_catalogue_times(DataConfig(input_dir=str(tmp_path / "none"))) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replace("items", "item_id", pa.array([10, 10, None])), "'item_id': is null"),
        (replace("items", "item_id", pa.array([10, 11, 10])), "'item_id': repeats an earlier id"),
        (replace("items", "title", pa.array([1, 2, 3])), "'title': has type int64"),
        (drop("items", "upload_timestamp"), "'upload_timestamp': is missing"),
        (
            add("items", "embedding", pa.array([[1.0]] * 3)),
            "'embedding': has type list<element: double>, the contract wants a fixed-size list",
        ),
    ],
)
def test_catalogue_times_of_a_file_against_the_contract_are_refused(
    tmp_path: Path, change: Change, words: str
) -> None:
    tables = {"items": good_tables()["items"]}
    change(tables)

    with pytest.raises(ContractError, match=words):
        read_catalogue_times(write(tables, tmp_path))


def test_a_catalogue_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "items.parquet").write_bytes(b"x")

    with pytest.raises(ContractError, match=r"items\.parquet: cannot be read as parquet"):
        read_catalogue_times(DataConfig(input_dir=str(tmp_path)))
