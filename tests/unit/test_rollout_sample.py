"""Rows of two versions, held against each other in a real repository with a sqlite store."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qarm_feast.code_log import CodeLog
from qarm_feast.codebook import Codebook
from qarm_feast.encode import encode_items, takedown_rows
from qarm_feast.offline_store import open_code_log
from qarm_feast.online_stores import code_online_store
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.rollout_sample import (
    Comparison,
    Rows,
    StoredRow,
    compare_rows,
    compare_versions,
    sample_items,
)
from qarm_feast.schema import (
    CONTENT_LOG,
    CONTENT_LOG_ROWS,
    EVENT_TIMESTAMP,
    ITEM_ID,
    TIMESTAMP,
    code_view_name,
)
from tests.stream_repo import (
    EMBEDDING_DIM,
    ENCODER_VERSION,
    StreamRepo,
    build_repo,
    publish_codebook,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
NUM_ITEMS = 20


def _vectors(num_items: int = NUM_ITEMS) -> np.ndarray:
    x_ND = np.random.default_rng(1).standard_normal((num_items, EMBEDDING_DIM))
    return x_ND.astype(np.float32)


@pytest.fixture
def repo(tmp_path: Path) -> StreamRepo:
    """v1 and v2 have views; v1 holds twenty items."""
    made = build_repo(tmp_path / "repo", {})
    publish_codebook(made.directory, "v2", seed=1)
    made.apply()
    _write(made, "v1", range(NUM_ITEMS))
    return made


def _code_rows(
    codebook: Codebook, items: Sequence[int], x_ND: np.ndarray, moment: datetime
) -> pa.Table:
    table = pa.table(
        {
            ITEM_ID: pa.array(items, pa.int64()),
            EVENT_TIMESTAMP: pa.array([moment] * len(items), TIMESTAMP),
            "content_hash": [f"{item:032x}" for item in items],
        }
    )
    books = {codebook.version: codebook}
    return encode_items(table, x_ND, books, ENCODER_VERSION, NOON)[codebook.version]


def _write(
    repo: StreamRepo,
    version: str,
    items: Sequence[int],
    moment: datetime = NOON,
    x_ND: np.ndarray | None = None,
) -> None:
    x_ND = _vectors() if x_ND is None else x_ND
    codebook = Codebook.load(repo.registry.uri, version)
    _store(repo, version, _code_rows(codebook, list(items), x_ND[list(items)], moment))


def _take_down(repo: StreamRepo, version: str, item: int) -> None:
    codebook = Codebook.load(repo.registry.uri, version)
    rows = _code_rows(codebook, [item], _vectors()[[item]], NOON + timedelta(hours=1))
    _store(repo, version, takedown_rows(rows, codebook, NOON))


def _store(repo: StreamRepo, version: str, rows: pa.Table) -> None:
    store = open_feature_store(repo.directory)
    name = code_view_name(version)
    open_code_log(store.config).append(name, rows)
    code_online_store(store).write_table(store.config, store.get_feature_view(name), rows)


def _export_vectors(repo: StreamRepo, x_ND: np.ndarray) -> None:
    folder = repo.directory / "data" / "vectors" / ENCODER_VERSION
    folder.mkdir(parents=True)
    table = pa.table(
        {
            ITEM_ID: pa.array(range(len(x_ND)), pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x_ND.ravel()), EMBEDDING_DIM),
            "content_hash": [f"{item:032x}" for item in range(len(x_ND))],
        }
    )
    pq.write_table(table, folder / "part-00000.parquet")


def _compare(repo: StreamRepo) -> Comparison:
    return compare_versions(repo.config_path, "v2", "v1")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qarm_feast.rollout_sample._PAUSE_SECONDS", 0.0)


def test_equal_views_have_no_faults_and_takedowns_need_no_vector(repo: StreamRepo) -> None:
    _write(repo, "v2", range(NUM_ITEMS))
    for version in ("v1", "v2"):
        _take_down(repo, version, 3)
    _export_vectors(repo, _vectors())

    found = _compare(repo)

    assert found == Comparison(NUM_ITEMS, 0, 0, 0, num_coded=NUM_ITEMS - 1, num_other_codes=0)
    assert found.faults() == []


def test_missing_older_and_differently_deleted_rows_are_counted_apart(repo: StreamRepo) -> None:
    _write(repo, "v2", range(2, NUM_ITEMS), NOON - timedelta(hours=1))
    _write(repo, "v2", range(5, NUM_ITEMS))
    _take_down(repo, "v1", 7)
    _take_down(repo, "v2", 8)
    _take_down(repo, "v2", 9)

    found = _compare(repo)

    assert found == Comparison(NUM_ITEMS, 2, 3, 3, 0, 0, examples=(0, 1, 2, 3, 4))
    assert found.faults() == [
        "2 of 20 items have no row in it, limit 0",
        "3 of 20 items have a row of an older event in it, limit 0",
        "3 of 20 items are taken down in one of the two only, limit 0",
        "items among them: 0, 1, 2, 3, 4",
    ]


def test_a_later_event_in_the_new_view_is_no_fault(repo: StreamRepo) -> None:
    _write(repo, "v2", range(NUM_ITEMS), NOON + timedelta(hours=1))

    assert _compare(repo).faults() == []


def test_codes_are_held_against_exported_vectors_of_the_same_content(repo: StreamRepo) -> None:
    _write(repo, "v2", range(NUM_ITEMS), x_ND=-_vectors())
    _export_vectors(repo, _vectors())

    found = _compare(repo)

    assert (found.num_coded, found.num_other_codes) == (NUM_ITEMS, NUM_ITEMS)
    fault = "20 of 20 items (100.00%) have other codes than the codebook gives, limit 0.10%"
    assert found.faults()[0] == fault
    assert re.fullmatch(r"items among them: \d+(, \d+){4}", found.faults()[1])


def test_codes_are_held_against_ready_vectors_in_the_content_log(repo: StreamRepo) -> None:
    _write(repo, "v2", range(NUM_ITEMS))
    _log_content(repo, [(0, ENCODER_VERSION), (1, ENCODER_VERSION), (2, "e2")])

    found = _compare(repo)

    assert (found.num_coded, found.num_other_codes) == (2, 0)


def _log_content(repo: StreamRepo, items: Sequence[tuple[int, str]]) -> None:
    rows = [
        {
            ITEM_ID: item,
            "content": "{}",
            "content_hash": f"{item:032x}",
            "embedding": _vectors()[item].tolist(),
            "encoder_version": encoder_version,
            "is_deleted": False,
            "topic": "items",
            "partition": 0,
            "offset": item,
            EVENT_TIMESTAMP: NOON,
            "created": NOON,
        }
        for item, encoder_version in items
    ]
    log = open_code_log(open_feature_store(repo.directory).config)
    log.append(CONTENT_LOG, pa.Table.from_pylist(rows, CONTENT_LOG_ROWS))


def test_a_sample_has_each_item_once_and_a_seed_means_one_sample(
    repo: StreamRepo, tmp_path: Path
) -> None:
    log = open_code_log(open_feature_store(repo.directory).config)
    _write(repo, "v1", range(NUM_ITEMS // 2))

    first, other = (sample_items(log, "v1", 7, seed).tolist() for seed in (0, 1))

    assert first == sample_items(log, "v1", 7).tolist()
    assert len(set(first)) == 7
    assert first != other
    assert sample_items(log, "v1", 100).tolist() == list(range(NUM_ITEMS))
    assert sample_items(CodeLog(tmp_path / "none"), "v1", 7).tolist() == []


def test_a_sample_of_many_items_takes_after_all_of_them(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    for start in range(0, 10_000, 2500):
        ids = pa.array(range(start, start + 2500), pa.int64())
        log.append(code_view_name("v1"), pa.table({ITEM_ID: ids, **_times(2500)}))

    sample_N = sample_items(log, "v1", 1000)

    # A quarter of the items each, within six standard deviations of 13.
    parts = np.bincount(sample_N // 2500)
    assert parts.sum() == 1000
    assert np.abs(parts - 250).max() < 80


def _times(num_rows: int) -> dict[str, pa.Array]:
    column = pa.array([NOON] * num_rows, TIMESTAMP)
    return {EVENT_TIMESTAMP: column, "created": column}


def _row(hour: int, *, is_deleted: bool = False) -> StoredRow:
    return StoredRow(NOON + timedelta(hours=hour), is_deleted, "aa", (1, 2))


def test_a_row_that_a_worker_was_about_to_write_is_found_at_the_next_look() -> None:
    new: dict[int, StoredRow] = {1: _row(0)}
    pauses: list[float] = []
    asked: list[list[int]] = []

    def read(items: Sequence[int]) -> tuple[Rows, Rows]:
        asked.append(list(items))
        old = {item: _row(0) for item in (1, 2) if item in items}
        return old, {item: row for item, row in new.items() if item in items}

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            new[2] = _row(0)

    rows, faults = compare_rows(read, [1, 2, 3], pause)

    assert faults == {}
    assert rows == {1: _row(0), 2: _row(0)}
    assert asked == [[1, 2, 3], [2], [2]]


def test_a_fault_that_stays_is_looked_at_five_times() -> None:
    pauses: list[float] = []

    _, faults = compare_rows(
        lambda items: ({1: _row(2), 2: _row(0)}, {1: _row(1), 2: _row(3, is_deleted=True)}),
        [1, 2],
        pauses.append,
    )

    assert faults == {1: "older", 2: "flag"}
    assert len(pauses) == 4
