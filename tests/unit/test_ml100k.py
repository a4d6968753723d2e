from pathlib import Path

import pyarrow.parquet as pq

from examples.quickstart.ml100k import write_ml100k
from qarm_feast.input_data import DataConfig, load_input_data

NUM_ITEMS = 20
START = 880_000_000


def write_source(folder: Path) -> None:
    """20 items first rated one after the other; user 1 rates all, user 2 the newest ten again."""
    ratings = [(1, item, item % 5 + 1, START + item) for item in range(1, NUM_ITEMS + 1)]
    ratings += [(2, item, 5, START + 100 + item) for item in range(11, NUM_ITEMS + 1)]
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += ["\t".join(map(str, row)) for row in reversed(ratings)]
    (folder / "ml-100k.inter").write_text("\n".join(lines) + "\n")
    movies = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    movies += [f'{item}\tThe "{item}"\t1995\tDrama Film-Noir' for item in range(1, NUM_ITEMS + 1)]
    (folder / "ml-100k.item").write_text("\n".join(movies) + "\n")
    (folder / "ml-100k.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "1\t24\tM\ttechnician\t85711\n2\t53\tF\tother\t94043\n"
    )


def test_the_written_files_keep_the_contract_and_the_newest_items_stay_cold(
    tmp_path: Path,
) -> None:
    write_source(tmp_path)

    counts = write_ml100k(tmp_path, tmp_path / "target")

    checked = load_input_data(DataConfig(input_dir=str(tmp_path / "target")))
    rows = checked.interactions.to_pylist()
    splits = {(row["user_id"], row["item_id"]): row["split"] for row in rows}
    # User 1: items 1-16 train, 17-18 valid, 19-20 test; user 2: 11-18 train, 19 valid, 20 test.
    # Items 19 and 20 (10 %) keep test rows only, 16 to 18 (15 %) valid and test rows only.
    assert {key: split for key, split in splits.items() if key[1] >= 15} == {
        (1, 15): "train",
        (2, 15): "train",
        (1, 17): "valid",
        (1, 18): "valid",
        (1, 19): "test",
        (1, 20): "test",
        (2, 20): "test",
    }
    assert counts == {
        "items": 20,
        "users": 2,
        "interactions": 25,
        "train_rows": 20,
        "valid_rows": 2,
        "test_rows": 3,
        "cold_valid_rows": 2,
        "cold_test_rows": 3,
        "dropped_rows": 5,
    }


def test_tasks_upload_times_and_texts_come_from_the_source(tmp_path: Path) -> None:
    write_source(tmp_path)

    write_ml100k(tmp_path, tmp_path)

    checked = load_input_data(DataConfig(input_dir=str(tmp_path)))
    assert checked.task_names == ("is_like", "is_love")
    of_user = {
        row["item_id"]: row for row in checked.interactions.to_pylist() if row["user_id"] == 1
    }
    assert [of_user[item]["is_like"] for item in (2, 3, 4)] == [False, True, True]
    assert [of_user[item]["is_love"] for item in (2, 3, 4)] == [False, False, True]
    item = checked.items.to_pylist()[11]
    assert item["item_id"] == 12
    assert item["title"] == 'The "12"'
    assert item["description"] == "Drama, Film-Noir"
    assert item["upload_timestamp"].timestamp() == START + 12
    users = pq.read_table(tmp_path / "users.parquet").to_pylist()
    assert users[1] == {"user_id": 2, "age": 53, "gender": "F", "occupation": "other"}
