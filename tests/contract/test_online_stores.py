"""One suite over both online stores, on a real sqlite file and a real redis server."""

import asyncio
import itertools
import multiprocessing
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis
from feast import FeatureStore, RepoConfig
from online_store_cases import (
    REDIS_TYPE,
    Online,
    close,
    code_rows,
    code_view,
    feast_rows,
    item_key,
    make_settings,
    moment,
    profile_rows,
    profile_view,
    recent_rows,
    recent_view,
    running_redis,
    wide_view,
)
from online_store_writer import write_in_chunks
from redis.backoff import NoBackoff
from redis.retry import Retry

import qarm_feast.online_stores.redis
import qarm_feast.online_stores.redis_scripts
from qarm_feast.errors import ConfigError, DataError, ServiceUnavailableError
from qarm_feast.online_stores import code_online_store
from qarm_feast.online_stores.redis import CodeRedisOnlineStore
from qarm_feast.online_stores.rows import EncodedRows, merge_recent
from qarm_feast.schema import ERASURE_MARK, TIMESTAMP

CODES = ["rq_code", "vq_code"]


def test_what_ours_writes_is_byte_for_byte_what_stock_feast_writes(online: Online) -> None:
    tables = {
        code_view: code_rows([(1, 1_500_000, "h1", [3, 4]), (300, 0, "h2", [-1, 2**40])]),
        profile_view: profile_rows(),
    }
    for make_view, table in tables.items():
        view = make_view()
        if view.name == "item_codes_v1":
            # Stock is told of `created` by the batch source; without it the column stays empty.
            table = table.drop_columns(["created"])

        online.clear()
        online.stock.online_write_batch(online.stock_config, view, feast_rows(view, table), None)
        expected = online.stored_bytes(view)
        online.clear()
        online.write(view, table)

        assert expected
        assert online.stored_bytes(view) == expected


def test_rows_through_feasts_interface_are_byte_for_byte_stock(online: Online) -> None:
    view, rows = profile_view(), feast_rows(profile_view(), profile_rows())
    with_created = [(*row[:3], datetime(2024, 1, 1)) for row in rows]

    online.stock.online_write_batch(online.stock_config, view, with_created, None)
    expected = online.stored_bytes(view)
    online.clear()
    online.store.online_write_batch(online.config, view, with_created, None)

    assert online.stored_bytes(view) == expected


def test_stock_feast_reads_what_ours_wrote(online: Online) -> None:
    online.write(profile_view(), profile_rows())

    found = online.stock.online_read(
        online.stock_config, profile_view(), [item_key(1, "user_id"), item_key(9, "user_id")]
    )

    expected = feast_rows(profile_view(), profile_rows())[0][1]
    assert found[0][1] == expected
    assert not any(value.WhichOneof("val") for value in (found[1][1] or {}).values())


def test_ours_reads_what_stock_feast_wrote(online: Online) -> None:
    view, rows = profile_view(), feast_rows(profile_view(), profile_rows())
    online.stock.online_write_batch(online.stock_config, view, rows, None)
    names = [field.name for field in view.features]

    batch = online.store.read_columns(online.config, view, np.array([2, 7, 1]), names)
    feast_read = online.store.online_read(online.config, view, [item_key(2, "user_id")])

    assert batch.present_N.tolist() == [True, False, True]
    assert batch.columns["city"].values.tolist() == ["", "Köln"]
    assert batch.columns["age"].values.tolist() == [-1, 40]
    assert batch.columns["picture"].values.tolist() == [b"", b"\x00\x01\x00"]
    assert batch.columns["taste"].values.tolist() == [2.0, 0.5, -1.0]
    assert batch.columns["taste"].lengths_N.tolist() == [1, 0, 2]
    assert batch.columns["joined"].values.tolist() == [1_700_000_000, 0]
    assert feast_read[0][1] == rows[1][1]


def test_a_view_of_many_features_is_written_under_the_guard(online: Online) -> None:
    names = [f"f{number}" for number in range(120)]
    view = wide_view(names)
    online.stock.update(online.stock_config, [], [view], [], [], False)

    for seconds, value in ((2, 5), (1, 4), (3, 6)):
        columns = {name: [value * at] for at, name in enumerate(names)}
        moments = pa.array([moment(seconds)], pa.timestamp("us", tz="UTC"))
        online.write(view, pa.table({"item_id": [1], **columns, "event_timestamp": moments}))
        batch = online.store.read_columns(online.config, view, np.array([1]), names)

        found = [batch.columns[name].values.item() for name in names]
        assert found == [max(5, value) * at for at in range(len(names))]


def test_an_older_row_never_overwrites_a_newer_one(online: Online) -> None:
    view = code_view()
    newer = code_rows([(1, 2, "a", [2, 2])])
    older = code_rows([(1, 1, "b", [1, 1]), (2, 1, "b", [1, 1])])

    assert online.write(view, newer) == 1
    assert online.write(view, older) == 1
    online.store.online_write_batch(online.config, view, feast_rows(view, older), None)

    assert online.codes(1, 2) == [[2, 2], [1, 1]]


def test_feasts_own_write_goes_through_the_guard_and_reports_its_progress(online: Online) -> None:
    view, seen = code_view(), []
    newest_first = code_rows([(1, 9, "a", [9, 9]), (1, 8, "a", [8, 8]), (2, 1, "a", [1, 1])])

    online.store.online_write_batch(
        online.config, view, feast_rows(view, newest_first), seen.append
    )
    online.store.online_write_batch(
        online.config, view, feast_rows(view, code_rows([(2, 2, "a", [5, 5])])), seen.append
    )

    assert online.codes(1, 2) == [[9, 9], [5, 5]]
    assert sum(seen) == 4


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_edits_within_one_second_and_at_one_instant_converge(
    online: Online, order: tuple[int, ...]
) -> None:
    edits = [(1, 10, "ff", [1, 1]), (1, 20, "aa", [2, 2]), (1, 20, "ab", [3, 3])]

    for place in order:
        online.write(code_view(), code_rows([edits[place]]))

    assert online.codes(1) == [[3, 3]]


def test_the_same_row_again_changes_nothing(online: Online) -> None:
    rows = code_rows([(1, 5, "aa", [1, 1]), (2, 6, "bb", [2, 2])])

    assert online.write(code_view(), rows) == 2
    before = online.stored_bytes(code_view())

    assert online.write(code_view(), rows) == 0
    assert online.stored_bytes(code_view()) == before


def test_rows_of_one_item_in_one_table_collapse_to_the_greatest(online: Online) -> None:
    rows = code_rows(
        [(1, 5, "aa", [1, 1]), (2, 1, "", [7, 7]), (1, 9, "bb", [2, 2]), (1, 9, "ba", [3, 3])]
    )

    assert online.write(code_view(), rows) == 2
    assert online.codes(1, 2) == [[2, 2], [7, 7]]


def test_the_guard_counts_what_stock_feast_wrote_in_between(online: Online) -> None:
    view = code_view()
    online.write(view, code_rows([(1, 10**6, "a", [1, 1])]))
    by_stock = feast_rows(view, code_rows([(1, 5 * 10**6, "a", [5, 5])]))
    online.stock.online_write_batch(online.stock_config, view, by_stock, None)

    assert online.write(view, code_rows([(1, 4 * 10**6, "z", [4, 4])])) == 0
    assert online.write(view, code_rows([(1, 6 * 10**6, "a", [6, 6])])) == 1
    assert online.codes(1) == [[6, 6]]


def test_times_before_1970_are_ordered_as_well(online: Online) -> None:
    before_1970 = -(60 * 365 * 86_400 * 10**6)
    rows = [(1, before_1970 + offset, "a", [offset, 0]) for offset in (1, 700_000, 2)]

    for row in rows:
        online.write(code_view(), code_rows([row]))

    assert online.codes(1) == [[700_000, 0]]


def test_two_writer_processes_leave_the_greatest_row_of_every_item(online: Online) -> None:
    rng = random.Random(0)
    rows = [
        (item, rng.randrange(6), f"{rng.randrange(4):02x}", [0, 0])
        for item in range(40)
        for _ in range(25)
    ]
    rows = [(item, at, text, [at, int(text, 16)]) for item, at, text, _ in rows]
    shuffled = [rng.sample(rows, len(rows)) for _ in range(2)]

    write_by_processes(online, [code_rows(part) for part in shuffled], chunk_rows=20)

    greatest = [max(row[1:3] for row in rows if row[0] == item) for item in range(40)]
    assert online.codes(*range(40)) == [[at, int(text, 16)] for at, text in greatest]


@pytest.mark.parametrize("seed", range(4))
def test_merged_lists_equal_the_sorted_union_in_any_order(online: Online, seed: int) -> None:
    rng = random.Random(seed)
    # Few distinct values, so that equal times, repeated pairs and repeated items all occur.
    items = [-3, -2, 0, 1, 2, 3]
    pairs = [(user, rng.randrange(8), rng.choice(items)) for user in (1, 2) for _ in range(15)]
    arrivals = rng.sample(pairs + pairs[::3], len(pairs) + len(pairs[::3]))

    while arrivals:
        chunk, arrivals = arrivals[:4], arrivals[4:]
        online.write(recent_view(), recent_rows([(user, [(at, item)]) for user, at, item in chunk]))

    for user in (1, 2):
        union = sorted({(at, item) for owner, at, item in pairs if owner == user}, reverse=True)
        assert online.recent(user) == union[:4]


@pytest.mark.parametrize("seed", range(4))
def test_an_erasure_ends_alike_in_any_order(online: Online, seed: int) -> None:
    rng = random.Random(seed)
    pairs = [(1, 10), (4, 40), (5, ERASURE_MARK), (5, 50), (6, 60), (7, 70), (3, ERASURE_MARK)]
    arrivals = rng.sample(pairs + pairs[::2], 11)

    for pair in arrivals:
        online.write(recent_view(), recent_rows([(1, [pair]), (2, [pair][: pair[0] < 5])]))

    assert online.recent(1) == [(7, 70), (6, 60)]
    assert online.recent(2) == [(4, 40)]


def test_an_erased_user_is_absent_and_comes_back_with_newer_items_only(online: Online) -> None:
    view = recent_view(history_length=2)
    online.write(view, recent_rows([(1, [(5, 50), (7, 70)]), (2, [(5, 50)])]))
    erased = recent_rows([(1, [(8, ERASURE_MARK)])])

    assert online.write(view, erased) == 1
    assert online.write(view, erased) == 0
    assert online.write(view, recent_rows([(1, [(6, 60), (8, 80)])])) == 0
    batch = online.store.read_columns(online.config, view, np.array([2, 1]), ["item_timestamps"])
    assert batch.present_N.tolist() == [True, False]
    assert batch.columns["item_timestamps"].lengths_N.tolist() == [1, 0]

    assert online.write(view, recent_rows([(1, [(9, 90)])])) == 1
    assert online.recent(1, view) == [(9, 90)]
    assert online.write(view, recent_rows([(1, [(10, 100)])])) == 1
    assert online.write(view, recent_rows([(1, [(7, 70), (8, 80)])])) == 0
    assert online.recent(1, view) == [(10, 100), (9, 90)]


def test_stock_feast_reads_an_erased_user_as_the_mark_at_its_time(online: Online) -> None:
    view = recent_view()
    online.write(view, recent_rows([(1, [(5_000_000, 50)]), (1, [(8_000_000, ERASURE_MARK)])]))
    names = ["item_ids", "item_timestamps"]

    key = item_key(1, "user_id")
    [(moment_read, values)] = online.stock.online_read(online.stock_config, view, [key], [*names])

    assert values is not None
    assert [values[name].int64_list_val.val for name in names] == [[ERASURE_MARK], [8_000_000]]
    assert moment_read is not None


def test_two_processes_merge_into_one_list_without_loss(online: Online) -> None:
    parts = [
        recent_rows([(user, [(at, at % 7)]) for at in range(side, 60, 2) for user in range(5)])
        for side in (0, 1)
    ]
    view = recent_view(history_length=100)

    write_by_processes(online, parts, chunk_rows=3, history_length=100)

    for user in range(5):
        assert online.recent(user, view) == [(at, at % 7) for at in reversed(range(60))]


def write_by_processes(
    online: Online, tables: list[pa.Table], chunk_rows: int, history_length: int | None = None
) -> None:
    # Importing Feast takes seconds: one server process does it once and forks the writers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["feast.infra.online_stores.redis", "feast.infra.online_stores.sqlite"]
    )
    writers = [
        context.Process(
            target=write_in_chunks, args=(online.settings, table, history_length, chunk_rows)
        )
        for table in tables
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=200)
    assert [writer.exitcode for writer in writers] == [0] * len(tables)


def test_writing_a_list_again_changes_nothing_and_keeps_the_newest_time(online: Online) -> None:
    view = recent_view()
    rows = recent_rows([(1, [(5_000_000, 50), (7_000_001, 70)])])

    assert online.write(view, rows) == 1
    assert online.write(view, rows) == 0
    assert online.write(view, recent_rows([(1, [(1, 10)])])) == 1

    assert online.recent(1) == [(7_000_001, 70), (5_000_000, 50), (1, 10)]
    stored_time = online.store.online_read(online.config, view, [item_key(1, "user_id")])[0][0]
    assert stored_time.timestamp() == pytest.approx(7.000001, abs=1e-6)


def test_feasts_own_write_merges_into_the_list_that_stock_feast_left(online: Online) -> None:
    view = recent_view()
    by_stock = feast_rows(view, recent_rows([(1, [(1, 10), (3, 30)])]))
    online.stock.online_write_batch(online.stock_config, view, by_stock, None)

    late = feast_rows(view, recent_rows([(1, [(2, 20)]), (1, [(3, 30), (2, 21)])]))
    online.store.online_write_batch(online.config, view, late, None)

    assert online.recent(1) == [(3, 30), (2, 21), (2, 20), (1, 10)]


def test_missing_items_and_deleted_items_are_masked(online: Online) -> None:
    online.write(code_view(), code_rows([(1, 1, "a", [1, 1]), (2, 1, "a", [2, 2])]))
    online.write(code_view(), code_rows([(2, 2, "", [-1, -1])], is_deleted=True))
    online.write(code_view(), code_rows([(2, 1, "b", [2, 2])]))

    assert online.codes(3, 2, 1, 1) == [None, None, [1, 1], [1, 1]]


def test_a_row_older_than_its_views_ttl_is_absent_and_a_younger_one_is_not(online: Online) -> None:
    view = code_view()
    view.ttl = timedelta(seconds=10)
    rows = code_rows([(1, 0, "a", [1, 1]), (2, 1, "a", [2, 2])])
    online.write(view, rows)
    ids = np.array([1, 2, 3])

    def present_at(seconds: int) -> list[bool]:
        now = moment(seconds * 10**6)
        batch = online.store.read_columns(online.config, view, ids, ["rq_code"], now)
        assert batch.columns["rq_code"].lengths_N.tolist() == [2 * here for here in batch.present_N]
        found: list[bool] = batch.present_N.tolist()
        return found

    assert present_at(10) == [True, True, False]
    online.write(view, code_rows([(2, 5 * 10**6, "a", [2, 2])]))
    assert present_at(11) == [False, True, False]
    assert present_at(16) == [False, False, False]
    # By the system's clock all of them are years old.
    assert not online.store.read_columns(online.config, view, ids, ["rq_code"]).present_N.any()


def test_no_ids_give_no_rows(online: Online) -> None:
    ids = np.array([], dtype=np.int64)

    batch = online.store.read_columns(online.config, code_view(), ids, CODES)

    assert batch.present_N.tolist() == []
    assert batch.columns["vq_code"].lengths_N.tolist() == []


@pytest.mark.parametrize(
    "ids", [np.array([1.0]), np.array([1], np.int32), np.array(["1"]), np.array([[1]])]
)
def test_ids_of_a_wrong_type_are_refused(online: Online, ids: Any) -> None:
    with pytest.raises(DataError, match="expected a vector of int64"):
        online.store.read_columns(online.config, code_view(), ids, CODES)


def test_an_unknown_feature_is_refused_by_name(online: Online) -> None:
    with pytest.raises(DataError, match="no feature 'rq_codes'"):
        online.store.read_columns(online.config, code_view(), np.array([1]), ["rq_codes"])


def test_a_table_that_does_not_fit_the_view_is_refused(online: Online) -> None:
    rows = code_rows([(1, 1, "a", [1, 1])])
    at = rows.schema.get_field_index("event_timestamp")
    naive = rows.set_column(at, "event_timestamp", rows["event_timestamp"].cast(pa.timestamp("us")))
    narrow_ids = rows.set_column(0, "item_id", rows["item_id"].cast(pa.int32()))

    with pytest.raises(DataError, match=r"lacks the columns \['rq_code'\]"):
        online.write(code_view(), rows.drop_columns(["rq_code"]))
    with pytest.raises(DataError, match="expected a timestamp with a zone"):
        online.write(code_view(), naive)
    with pytest.raises(DataError, match="'item_id' is int32"):
        online.write(code_view(), narrow_ids)
    with pytest.raises(DataError, match="column 'rq_code'"):
        online.write(code_view(), rows.set_column(1, "rq_code", pa.array([["x"]])))


def test_lists_of_different_lengths_are_refused(online: Online) -> None:
    rows = recent_rows([(1, [(1, 1)])]).set_column(1, "item_ids", pa.array([[1, 2]]))

    with pytest.raises(DataError, match="2 item_ids but 1 item_timestamps"):
        online.write(recent_view(), rows)


def test_a_merge_tag_on_a_view_that_cannot_be_merged_is_refused(online: Online) -> None:
    view = recent_view()
    view.tags = {"qarm.merge": "recent_items"}

    with pytest.raises(DataError, match=r"qarm\.history_length"):
        online.write(view, recent_rows([(1, [(1, 1)])]))


def test_threads_share_one_store(online: Online) -> None:
    def write_and_read(part: int) -> list[list[int] | None]:
        online.write(code_view(), code_rows([(item, part, "a", [part, 0]) for item in range(50)]))
        return online.codes(*range(50))

    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(write_and_read, range(8)))

    assert all(None not in rows for rows in seen)
    assert online.codes(*range(50)) == [[7, 0]] * 50


@pytest.mark.parametrize("online", ["redis"], indirect=True)
def test_a_long_write_to_redis_is_checked_in_parts_and_counts_every_row(
    online: Online, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qarm_feast.online_stores.redis, "_ROWS_PER_ENCODING", 50)
    monkeypatch.setattr(qarm_feast.online_stores.redis_scripts, "_ROWS_PER_CALL", 7)
    monkeypatch.setattr(qarm_feast.online_stores.redis_scripts, "_CALLS_PER_CHECK", 3)
    monkeypatch.setattr(qarm_feast.online_stores.redis_scripts, "_CALLS_AHEAD", 2)
    rows = [(item, 1, "a", [item, 2 * item]) for item in range(333)]

    assert online.write(code_view(), code_rows(rows)) == 333
    assert online.write(code_view(), code_rows(rows)) == 0
    assert online.codes(*range(333)) == [codes for *_, codes in rows]


@pytest.mark.parametrize("online", ["redis"], indirect=True)
def test_a_redis_connection_that_was_lost_is_made_again(online: Online) -> None:
    rows = [(item, 1, "a", [item, 0]) for item in range(3)]
    online.write(code_view(), code_rows(rows[:1]))
    client = online.store._get_client(online.config.online_store)

    for work in (
        lambda: online.write(code_view(), code_rows(rows)) == 2,
        lambda: online.codes(0, 1) == [[0, 0], [1, 0]],
    ):
        client.client_kill_filter(_type="normal", skipme=True)
        assert work()


@pytest.mark.parametrize("online", ["redis"], indirect=True)
def test_a_redis_connection_that_is_lost_within_a_write_is_made_again(
    online: Online, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qarm_feast.online_stores.redis_scripts, "_ROWS_PER_CALL", 2)
    monkeypatch.setattr(qarm_feast.online_stores.redis_scripts, "_CALLS_AHEAD", 2)
    rows = [(item, 1, "a", [item, 0]) for item in range(12)]
    online.write(code_view(), code_rows(rows[:1]))
    client = online.store._get_client(online.config.online_store)
    send = redis.connection.AbstractConnection.send_packed_command
    num_sent = 0

    def lose_before_the_third(connection: Any, command: Any, check_health: bool = True) -> None:
        nonlocal num_sent
        num_sent += 1
        if num_sent == 3:
            client.client_kill_filter(_type="normal", skipme=True)
        send(connection, command, check_health)

    with monkeypatch.context() as patch:
        patch.setattr(
            redis.connection.AbstractConnection, "send_packed_command", lose_before_the_third
        )
        # The rows that had arrived are not newer than themselves when they come again.
        assert online.write(code_view(), code_rows(rows)) <= 11

    assert num_sent > 6
    assert online.codes(*range(12)) == [codes for *_, codes in rows]


@pytest.mark.parametrize("online", ["redis"], indirect=True)
def test_redis_forgets_its_scripts_and_the_next_write_loads_them(online: Online) -> None:
    client = online.store._get_client(online.config.online_store)
    for at in (1, 2):
        client.script_flush()
        assert online.write(code_view(), code_rows([(1, at, "a", [at, at])])) == 1
        client.script_flush()
        assert online.write(recent_view(), recent_rows([(1, [(at, at)])])) == 1

    assert online.codes(1) == [[2, 2]]
    assert online.recent(1) == [(2, 2), (1, 1)]


@pytest.mark.parametrize("online", ["redis"], indirect=True)
def test_redis_merges_again_when_another_writer_comes_between_read_and_write(
    online: Online, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrivals = [recent_rows([(1, [(7, 70)])]), recent_rows([(1, [(9, 90)]), (2, [(9, 91)])])]

    def merge_after_another_write(*arguments: Any) -> EncodedRows:
        merged = merge_recent(*arguments)
        if arrivals:
            table = arrivals.pop()
            other_store = CodeRedisOnlineStore()
            other_store.write_table(online.config, recent_view(), table)
            close(other_store)
        return merged

    monkeypatch.setattr(qarm_feast.online_stores.redis, "merge_recent", merge_after_another_write)
    changed = online.write(recent_view(), recent_rows([(1, [(8, 80)]), (3, [(1, 1)])]))

    assert changed == 2
    assert online.recent(1) == [(9, 90), (8, 80), (7, 70)]
    assert [online.recent(user) for user in (2, 3)] == [[(9, 91)], [(1, 1)]]


def test_a_view_that_is_dropped_leaves_the_other_views_of_its_entities(online: Online) -> None:
    online.write(recent_view(), recent_rows([(1, [(8, 80)]), (2, [(9, 90)])]))
    online.write(profile_view(), profile_rows())

    online.store.update(online.config, [recent_view()], [profile_view()], [], [], False)

    found = online.store.read_columns(online.config, profile_view(), np.array([1, 2]), ["age"])
    assert found.present_N.tolist() == [True, True]
    online.store.update(online.config, [], [recent_view(), profile_view()], [], [], False)
    assert [online.recent(user) for user in (1, 2)] == [[], []]


@pytest.mark.parametrize("online", ["redis"], indirect=True)
def test_redis_never_deletes_an_entity_to_which_another_view_may_write(online: Online) -> None:
    online.write(recent_view(), recent_rows([(1, [(8, 80)])]))
    client = online.store._get_client(online.config.online_store)
    client.config_resetstat()

    online.store.update(online.config, [recent_view()], [], [], [], False)

    # An entity goes with its last field.
    assert client.keys("*") == []
    commands = client.info("commandstats")
    assert "cmdstat_hdel" in commands
    assert not {"cmdstat_del", "cmdstat_unlink"} & set(commands)


@pytest.mark.parametrize("online", ["redis"], indirect=True)
def test_a_project_whose_name_ends_alike_keeps_its_rows(online: Online) -> None:
    other = RepoConfig(**online.settings | {"project": f"non{online.config.project}"})
    view = code_view()

    for delete in (
        lambda: online.store.update(online.config, [view], [], [], [], False),
        lambda: online.store.teardown(online.config, [view], []),
    ):
        for config in (online.config, other):
            online.store.write_table(config, view, code_rows([(1, 1, "a", [1, 2])]))
        delete()
        batch = online.store.read_columns(other, view, np.array([1]), ["rq_code"])
        assert online.codes(1) == [None]
        assert batch.columns["rq_code"].values.tolist() == [1, 2]


@pytest.mark.parametrize("online", ["redis"], indirect=True)
def test_redis_keys_expire_when_feast_is_told_so(online: Online) -> None:
    place = online.settings["online_store"] | {"key_ttl_seconds": 500}
    config = RepoConfig(**online.settings | {"online_store": place})

    online.store.write_table(config, code_view(), code_rows([(1, 1, "a", [1, 1])]))
    online.store.write_table(config, recent_view(), recent_rows([(1, [(1, 1)])]))

    client = online.store._get_client(config.online_store)
    assert [0 < client.ttl(key) <= 500 for key in client.keys("*")] == [True, True]


@pytest.mark.parametrize("online", ["redis"], indirect=True)
def test_a_redis_key_lives_as_long_as_the_longest_ttl_of_its_views(online: Online) -> None:
    place = online.settings["online_store"] | {"key_ttl_seconds": 500}
    config = RepoConfig(**online.settings | {"online_store": place})
    long_lived, short_lived = code_view(), wide_view(["f"])
    long_lived.ttl = timedelta(seconds=900)
    other_rows = pa.table(
        {"item_id": [1], "f": [7], "event_timestamp": pa.array([moment(0)], TIMESTAMP)}
    )

    online.store.write_table(config, long_lived, code_rows([(1, 1, "a", [1, 1])]))
    online.store.write_table(config, short_lived, other_rows)

    client = online.store._get_client(config.online_store)
    assert [500 < client.ttl(key) <= 900 for key in client.keys("*")] == [True]


@pytest.mark.parametrize("online", ["redis"], indirect=True)
def test_redis_takes_an_async_write(online: Online) -> None:
    rows = feast_rows(code_view(), code_rows([(1, 1, "a", [4, 2])]))

    asyncio.run(online.store.online_write_batch_async(online.config, code_view(), rows, None))

    assert online.codes(1) == [[4, 2]]


def test_a_redis_that_is_down_is_named_without_its_password(tmp_path: Path) -> None:
    with running_redis(tmp_path) as port:
        pass
    place = {"connection_string": f"127.0.0.1:{port},password=secret"}
    config = RepoConfig(**make_settings(tmp_path, REDIS_TYPE, place))
    store = CodeRedisOnlineStore()
    store._get_client(config.online_store).set_retry(Retry(NoBackoff(), 0))

    for attempt in (
        lambda: store.read_columns(config, code_view(), np.array([1]), CODES),
        lambda: store.write_table(config, code_view(), code_rows([(1, 1, "a", [1, 1])])),
        lambda: store.write_table(config, recent_view(), recent_rows([(1, [(1, 1)])])),
    ):
        with pytest.raises(ServiceUnavailableError, match=f"127.0.0.1:{port}.*redis-server") as hit:
            attempt()
        assert "secret" not in str(hit.value)


def test_a_redis_that_hangs_is_given_up_unless_the_connection_string_says_when() -> None:
    store = CodeRedisOnlineStore()

    _, options = store._parse_connection_string("127.0.0.1:6379")
    _, own_options = store._parse_connection_string("127.0.0.1:6379,socket_timeout=30")

    assert options == {"socket_timeout": 5.0}
    assert own_options == {"socket_timeout": 30}


def test_a_redis_that_takes_a_write_and_never_answers_is_an_unavailable_service(
    tmp_path: Path,
) -> None:
    store = CodeRedisOnlineStore()
    with closing(socket.create_server(("127.0.0.1", 0))) as deaf:
        place = {"connection_string": f"127.0.0.1:{deaf.getsockname()[1]},socket_timeout=0.05"}
        config = RepoConfig(**make_settings(tmp_path, REDIS_TYPE, place))
        store._get_client(config.online_store).set_retry(Retry(NoBackoff(), 0))

        with pytest.raises(ServiceUnavailableError, match="does not answer"):
            store.write_table(config, code_view(), code_rows([(1, 1, "a", [1, 1])]))


@pytest.mark.parametrize(
    "cause",
    [
        ("CONFIG", "SET", "maxmemory", "1"),
        ("CONFIG", "SET", "min-replicas-to-write", "1"),
        ("REPLICAOF", "127.0.0.1", "1"),
    ],
)
def test_a_redis_that_takes_no_writes_is_an_unavailable_service(
    tmp_path: Path, cause: tuple[str, ...]
) -> None:
    with running_redis(tmp_path) as port:
        place = {"connection_string": f"127.0.0.1:{port},password=secret"}
        config = RepoConfig(**make_settings(tmp_path, REDIS_TYPE, place))
        store = CodeRedisOnlineStore()
        with redis.Redis(port=port) as client:
            client.execute_command("ACL", "SETUSER", "default", ">secret")
            client.execute_command(*cause)

        for attempt in (
            lambda: store.write_table(config, code_view(), code_rows([(1, 1, "a", [1, 1])])),
            lambda: store.write_table(config, recent_view(), recent_rows([(1, [(1, 1)])])),
        ):
            with pytest.raises(ServiceUnavailableError, match=f":{port} takes no writes") as hit:
                attempt()
            assert "secret" not in str(hit.value)
        close(store)


def test_a_redis_cluster_takes_every_key_in_its_own_slot(tmp_path: Path) -> None:
    with running_redis(tmp_path, "--cluster-enabled", "yes") as port:
        with redis.Redis(port=port) as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
                time.sleep(0.05)
        place = {"connection_string": f"127.0.0.1:{port}", "redis_type": "redis_cluster"}
        config = RepoConfig(**make_settings(tmp_path, REDIS_TYPE, place))
        store = CodeRedisOnlineStore()

        applied = store.write_table(
            config, code_view(), code_rows([(item, 1, "a", [item, 0]) for item in range(30)])
        )
        store.write_table(config, recent_view(), recent_rows([(u, [(1, u)]) for u in range(30)]))
        codes = store.read_columns(config, code_view(), np.arange(31), ["rq_code"])
        recent = store.read_columns(config, recent_view(), np.arange(30), ["item_ids"])

        assert applied == 30
        assert codes.present_N.tolist() == [True] * 30 + [False]
        assert codes.columns["rq_code"].values[::2].tolist() == list(range(30))
        assert recent.columns["item_ids"].values.tolist() == list(range(30))

        store.update(config, [code_view()], [recent_view()], [], [], True)
        gone = store.read_columns(config, code_view(), np.arange(30), ["rq_code"])
        store.teardown(config, [code_view(), recent_view()], [])
        with redis.Redis(port=port) as client:
            assert client.dbsize() == 0
        assert not gone.present_N.any()
        close(store)


@pytest.mark.parametrize("online", ["sqlite"], indirect=True)
def test_an_empty_sqlite_table_of_stock_feast_becomes_one_tree_and_stays_stocks_table(
    online: Online,
) -> None:
    by_stock = feast_rows(code_view(), code_rows([(1, 1, "a", [1, 1])]))
    by_name = "SELECT count(*) FROM sqlite_master WHERE tbl_name = ? AND type = 'index'"

    online.stock.online_write_batch(online.stock_config, recent_view(), by_user(7), None)
    online.codes(1)
    online.recent(1)
    # Feast applies the views again.
    online.stock.update(online.stock_config, [], [code_view(), recent_view()], [], [], False)
    online.stock.online_write_batch(online.stock_config, code_view(), by_stock, None)

    assert online.codes(1) == [[1, 1]]
    assert online.recent(7) == [(5, 50)]
    with sqlite3.connect(online.config.online_store.path) as conn:
        text = conn.execute("SELECT sql FROM sqlite_master WHERE type = 'table'").fetchall()
        num_indexes = conn.execute(by_name, ("qarm_user_recent_items",)).fetchone()[0]
    conn.close()
    # Codes, profiles that ours never met, and lists that stock had written before.
    assert ["WITHOUT ROWID" in definition for (definition,) in sorted(text)] == [True, False, False]
    assert num_indexes == 2


@pytest.mark.parametrize("online", ["sqlite"], indirect=True)
def test_an_applied_sqlite_table_stays_one_tree_when_it_is_applied_again(online: Online) -> None:
    online.store.update(online.config, [], [code_view()], [], [], True)
    online.write(code_view(), code_rows([(1, 1, "a", [1, 2])]))

    online.store.update(online.config, [], [code_view()], [], [], True)

    assert online.codes(1) == [[1, 2]]
    with sqlite3.connect(online.config.online_store.path) as conn:
        by_name = "SELECT name FROM sqlite_master WHERE tbl_name = ? AND sql IS NOT NULL"
        found = conn.execute(by_name, ("qarm_item_codes_v1",)).fetchall()
    conn.close()
    # No index besides the table.
    assert found == [("qarm_item_codes_v1",)]


def by_user(user_id: int) -> list[Any]:
    return feast_rows(recent_view(), recent_rows([(user_id, [(5, 50)])]))


@pytest.mark.parametrize("online", ["sqlite"], indirect=True)
def test_sqlite_without_the_views_table_names_feast_apply(online: Online) -> None:
    with sqlite3.connect(online.config.online_store.path) as conn:
        conn.execute("DROP TABLE qarm_item_codes_v1")
    conn.close()

    with pytest.raises(ConfigError, match="run `feast apply` first"):
        online.write(code_view(), code_rows([(1, 1, "a", [1, 1])]))
    with pytest.raises(ConfigError, match="run `feast apply` first"):
        online.codes(1)


@pytest.mark.parametrize("online", ["sqlite"], indirect=True)
def test_sqlite_reports_a_file_that_stays_locked_and_leaves_it_unchanged(online: Online) -> None:
    place = online.settings["online_store"] | {"busy_timeout_seconds": 0.05}
    config = RepoConfig(**online.settings | {"online_store": place})
    online.store.write_table(config, code_view(), code_rows([(1, 1, "a", [1, 1])]))
    holder = sqlite3.connect(online.config.online_store.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")

    with pytest.raises(ServiceUnavailableError, match="locked"):
        online.store.write_table(config, code_view(), code_rows([(1, 2, "a", [2, 2])]))
    with pytest.raises(ServiceUnavailableError, match="locked"):
        online.store.update(config, [code_view()], [], [], [], True)
    seen_meanwhile = online.codes(1)
    holder.execute("ROLLBACK")
    holder.close()

    assert seen_meanwhile == [[1, 1]]
    assert online.write(code_view(), code_rows([(1, 2, "a", [2, 2])])) == 1


@pytest.mark.parametrize("online", ["sqlite"], indirect=True)
def test_sqlite_times_do_not_depend_on_the_time_zone(
    online: Online, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "America/Los_Angeles")
    time.tzset()
    online.write(code_view(), code_rows([(1, 1_234_567, "a", [1, 1])]))

    seconds = online.stored_bytes(code_view())[0][4]
    stored_time = online.store.online_read(online.config, code_view(), [item_key(1)])[0][0]

    assert seconds == int(moment(1_234_567).timestamp())
    assert stored_time == moment(1_234_567)


@pytest.mark.parametrize("online", ["sqlite"], indirect=True)
def test_sqlite_keeps_nothing_of_a_write_that_was_killed(online: Online) -> None:
    online.write(code_view(), code_rows([(1, 1, "a", [1, 1])]))
    script = (
        "import os, sqlite3, signal, sys;"
        "conn = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "conn.execute('BEGIN IMMEDIATE');"
        "conn.execute('DELETE FROM qarm_item_codes_v1');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )

    command = [sys.executable, "-c", script, online.config.online_store.path]
    killed = subprocess.run(command, check=False)

    assert killed.returncode == -signal.SIGKILL
    assert online.codes(1) == [[1, 1]]


@pytest.mark.parametrize("online", ["sqlite"], indirect=True)
def test_sqlite_goes_on_after_a_commit_that_failed(online: Online) -> None:
    online.write(code_view(), code_rows([(1, 1, "a", [1, 1])]))
    # A deferred constraint is the one way to make a COMMIT fail without a broken disk.
    conn = online.store._get_conn(online.config)
    conn.execute("PRAGMA foreign_keys = ON")
    conn.execute("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
    conn.execute("CREATE TABLE child (id REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
    conn.execute(
        "CREATE TRIGGER orphan AFTER UPDATE ON qarm_item_codes_v1 "
        "BEGIN INSERT INTO child VALUES (1); END"
    )

    with pytest.raises(sqlite3.IntegrityError):
        online.write(code_view(), code_rows([(1, 2, "b", [2, 2])]))
    conn.execute("DROP TRIGGER orphan")

    assert online.codes(1) == [[1, 1]]
    assert online.write(code_view(), code_rows([(1, 2, "b", [2, 2])])) == 1


@pytest.mark.parametrize("online", ["sqlite"], indirect=True)
def test_sqlite_teardown_removes_the_file(online: Online) -> None:
    online.write(code_view(), code_rows([(1, 1, "a", [1, 1])]))
    online.codes(1)

    online.store.teardown(online.config, [], [])

    assert not [name for name in os.listdir(online.directory) if name.startswith("online.db")]


def test_a_repository_with_a_stock_store_is_refused_with_the_lines_to_write(
    online: Online,
) -> None:
    with pytest.raises(ConfigError, match=r"CodeRedisOnlineStore"):
        code_online_store(FeatureStore(config=online.stock_config))
