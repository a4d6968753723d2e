"""The made-up interactions of ``benchmarks/pairs.py``, and how it measures.

Shape letters in this file: M items, U users.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.pairs import (
    Shape,
    growth,
    make_interactions,
    resident_bytes_of_tree,
    suffix_of,
    write_input,
)
from qarm_feast.input_data import DataConfig, load_input_data

SHAPE = Shape(rows_per_user=50, rows_per_item=100, most_of_one_user=500)


def test_made_up_interactions_follow_the_shape_that_is_printed() -> None:
    parts = list(make_interactions(200_000, SHAPE, seed=0))

    users, items = (np.concatenate([part[n] for part in parts]) for n in ("user_id", "item_id"))
    per_user_U, per_item_M = np.bincount(users), np.sort(np.bincount(items))[::-1]
    assert len(users) == per_user_U.sum() == 200_000
    assert (len(per_user_U), len(per_item_M)) == (4001, 2000)
    # The last user has his 500 items one after the other.
    assert per_user_U[-1] == 500
    assert items[:500].tolist() == list(range(500))
    # Zipf: the first item twice as often as the second, ten times as often as the tenth.
    np.testing.assert_allclose(per_item_M[0] / per_item_M[[1, 9]], [2, 10], rtol=0.1)
    # Log-normal: half the activity of a typical user lies one sigma off.
    spread = np.log(per_user_U[:-1][per_user_U[:-1] > 20]).std()
    assert 0.5 < spread < 1.0
    again = next(iter(make_interactions(200_000, SHAPE, seed=0)))
    assert np.array_equal(again["event_timestamp"], parts[0]["event_timestamp"])


def test_made_up_data_keeps_the_input_contract(tmp_path: Path) -> None:
    write_input(tmp_path, 5_000, replace(SHAPE, days=1), seed=1)

    checked = load_input_data(DataConfig(input_dir=str(tmp_path)))

    assert checked.train_positives().num_rows == 5_000
    assert checked.items.num_rows == 50


def test_growth_compares_the_largest_size_with_the_smallest() -> None:
    figures = {"cpu_seconds_1m": 10.0, "peak_gib_1m": 1.0, "cpu_seconds_5m": 75.0}

    found = growth({**figures, "peak_gib_5m": 2.0}, [1_000_000, 5_000_000])

    assert found == {"cpu_seconds_growth": 1.5, "peak_gib": 2.0}
    assert [suffix_of(rows) for rows in (20_000_000, 100_000)] == ["20m", "100k"]


def test_resident_memory_counts_children_and_forgets_the_dead() -> None:
    command = [sys.executable, "-c", "print(flush=True); input()"]

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child_bytes = resident_bytes_of_tree(child.pid)
        own_bytes = os.sysconf("SC_PAGE_SIZE") * int(
            Path("/proc/self/statm").read_text().split()[1]
        )
        both_bytes = resident_bytes_of_tree(os.getpid())
        child.communicate(b"\n")

    assert child_bytes > 2**20
    # This process may have grown or shrunk by a little in between.
    assert both_bytes > own_bytes + child_bytes // 2
    assert resident_bytes_of_tree(child.pid) == 0
