from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import write_synthetic_rows

from qarm_feast.errors import DataError
from torchrec_models import row_store
from torchrec_models.row_store import RowStore, publishing, row_schema


def test_without_rows_the_error_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="qarm-rank rows"):
        RowStore(str(tmp_path), "ranker_v1")


def test_a_new_build_replaces_the_old_one_and_keeps_it_for_its_readers(tmp_path: Path) -> None:
    for seed in range(3):
        write_synthetic_rows(tmp_path, num_rows=100, seed=seed)

    store = RowStore(str(tmp_path), "ranker_v1")
    builds = sorted(path.name for path in store.folder.glob("build-*"))

    assert store.manifest.build == "build-0002"
    assert builds == ["build-0001", "build-0002"]
    for split, num_rows in store.manifest.num_rows.items():
        times = pq.read_table(store.split_path(split))["event_timestamp"].to_numpy()
        assert len(times) == num_rows
        assert (np.diff(times) >= np.timedelta64(0)).all()


@pytest.mark.parametrize("name", ["is_like", "split", "rq_code"])
def test_a_user_column_with_a_taken_name_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=rf"users.parquet has the columns \['{name}'\]"):
        row_schema(("is_like",), [pa.field("age", pa.int64()), pa.field(name, pa.bool_())])


def test_a_build_that_dies_before_the_manifest_is_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_synthetic_rows(tmp_path, num_rows=100, seed=0)

    def die(path: Path, text: str) -> None:
        raise OSError("killed between the steps")

    monkeypatch.setattr(row_store, "write_atomically", die)
    with pytest.raises(OSError, match="killed between"):
        write_synthetic_rows(tmp_path, num_rows=100, seed=1)

    assert RowStore(str(tmp_path), "ranker_v1").manifest.build == "build-0000"


def test_what_a_killed_build_left_is_gone_after_the_next_one(tmp_path: Path) -> None:
    leftover = tmp_path / "ranker_v1" / ".4711.tmp"
    (leftover / "snapshot").mkdir(parents=True)

    write_synthetic_rows(tmp_path, num_rows=100, seed=0)

    assert not leftover.exists()
    assert not list((tmp_path / "ranker_v1").glob(".*.tmp"))


def test_two_that_publish_into_one_folder_take_turns(tmp_path: Path) -> None:
    def publish(number: int) -> None:
        with publishing(tmp_path) as temporary:
            (temporary / "a").touch()
            temporary.rename(tmp_path / f"{number}-{len(list(tmp_path.glob('[0-9]*')))}")

    with publishing(tmp_path) as mine:
        other = Thread(target=publish, args=(2,))
        other.start()
        other.join(timeout=0.3)
        assert other.is_alive()
        mine.rename(tmp_path / "1-0")
    other.join()

    assert sorted(path.name for path in tmp_path.glob("[0-9]*")) == ["1-0", "2-1"]
