"""Real broker, real workers, real stores."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from feast import FeatureStore
from kafka import KafkaConsumer, KafkaProducer
from kafka.errors import MessageSizeTooLargeError

from examples.quickstart.broker import KafkaBroker
from examples.quickstart.kafka_admin import (
    NotDrainedError,
    create_topics,
    produce_interactions,
    produce_items,
    wait_until_drained,
)
from qarm_feast.compaction import Compactor
from qarm_feast.encode import content_hashes
from qarm_feast.erasure import without_erased
from qarm_feast.offline_store import open_code_log
from qarm_feast.online_stores import code_online_store
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import TIMESTAMP
from streaming import clients
from streaming.cli import main
from streaming.columns import DeadLetter
from streaming.config import StreamConfig
from streaming.messages import (
    InteractionEvent,
    ItemEvent,
    Message,
    UserErasure,
    encode_arrow,
    encode_interaction_event,
    encode_item_event,
    encode_user_erasure,
)
from streaming.sink import DeadLetterTopic
from streaming.source import KafkaSource
from tests.stream_repo import EMBEDDING_DIM, ENCODER_VERSION, START, StreamRepo

pytestmark = pytest.mark.integration

StartWorker = Callable[[str], "subprocess.Popen[bytes]"]
NUM_ITEMS = 3000
NUM_USERS = 40
HISTORY_LENGTH = 10
DRAIN_SECONDS = 90


def test_kill_9_in_the_middle_loses_nothing_and_repeats_nothing(
    stream_repo: StreamRepo, start_worker: StartWorker
) -> None:
    items, interactions = _items(), _interactions()
    config = stream_repo.stream_config
    produce_items(config, items)
    produce_interactions(config, interactions)
    killed = start_worker("killed")
    survivor = start_worker("survivor")

    def kill_in_the_middle(stored: int, total: int) -> None:
        if stored > total // 4 and killed.poll() is None:
            os.killpg(killed.pid, signal.SIGKILL)
        assert survivor.poll() is None, (stream_repo.directory / "survivor.log").read_text()

    total = wait_until_drained(config, DRAIN_SECONDS, kill_in_the_middle)
    survivor.send_signal(signal.SIGTERM)

    assert total == NUM_ITEMS + interactions.num_rows
    assert killed.wait(10) == -signal.SIGKILL
    assert survivor.wait(40) == 0
    _assert_codes_are_stored_once(stream_repo, items)
    _assert_interactions_are_stored_once(stream_repo, interactions)
    _assert_recent_items_are_right(stream_repo, interactions)
    assert _dead_letters(stream_repo) == []


def test_edits_takedowns_and_poison_end_where_they_belong(
    stream_repo: StreamRepo, start_worker: StartWorker
) -> None:
    config = stream_repo.stream_config
    first_D = np.ones(EMBEDDING_DIM, dtype=np.float32)
    edited_D = -first_D
    good = [
        encode_item_event(ItemEvent(1, START + 20, {"title": "new"}, edited_D, ENCODER_VERSION)),
        # Late: it must not overwrite the edit.
        encode_item_event(ItemEvent(1, START + 10, {"title": "old"}, first_D, ENCODER_VERSION)),
        encode_item_event(ItemEvent(2, START + 10, {}, first_D, ENCODER_VERSION)),
        encode_item_event(ItemEvent(2, START + 30, {}, is_deleted=True)),
        # Late as well: a takedown stays a takedown.
        encode_item_event(ItemEvent(2, START + 20, {}, edited_D, ENCODER_VERSION)),
        encode_arrow(_arrow_items([3, 4], [[1.0] * EMBEDDING_DIM, [np.nan] * EMBEDDING_DIM])),
    ]
    narrow = encode_item_event(ItemEvent(5, START, {}, first_D[:3], ENCODER_VERSION))
    foreign = encode_item_event(ItemEvent(6, START, {}, first_D, "e9"))
    secret = encode_item_event(ItemEvent(7, START, {"image": "/etc/passwd"}))
    bomb = encode_arrow(pa.table({f"flag{n}": pa.array([False] * 60_000) for n in range(100)}))
    poison = [narrow, foreign, secret, bomb]
    poison += [narrow._replace(value=b"{"), narrow._replace(headers=[])]
    with closing(KafkaProducer(bootstrap_servers=config.bootstrap_servers)) as producer:
        for message in [*good, *poison]:
            producer.send(config.item_topic, message.value, message.key, message.headers)
    worker = start_worker("worker")

    wait_until_drained(config, DRAIN_SECONDS, lambda stored, total: _check_alive(worker))
    worker.send_signal(signal.SIGTERM)

    assert worker.wait(40) == 0
    codes = _online_codes(stream_repo, [1, 2, 3, 4, 5, 6])
    expected = stream_repo.codebook.encode(
        np.array([1, 3]), ["", ""], np.stack([edited_D, first_D])
    )
    assert codes == {1: expected.rq_NL[0].tolist(), 3: expected.rq_NL[1].tolist()}
    letters = _dead_letters(stream_repo)
    assert sorted(letter["reason"] for letter in letters) == [
        "decompression_bomb",
        "embedding_not_finite",
        "embedding_width",
        "encoder_mismatch",
        "undecodable",
        "unknown_schema_version",
        "uri_not_allowed",
    ]
    assert {letter["topic"] for letter in letters} == {config.item_topic}
    log = open_code_log(open_feature_store(stream_repo.directory).config)
    assert log.read("item_codes_v1").num_rows == 6


def test_an_erased_users_list_is_empty_within_seconds_and_stays_so_for_late_events(
    stream_repo: StreamRepo, start_worker: StartWorker, record_property: Callable[..., None]
) -> None:
    config, store = stream_repo.stream_config, open_feature_store(stream_repo.directory)
    users = range(1, 11)
    worker = start_worker("worker")
    with closing(KafkaProducer(bootstrap_servers=config.bootstrap_servers)) as producer:

        def send(message: Message) -> None:
            topic = config.interaction_topic
            producer.send(topic, message.value, message.key, message.headers).get(10)

        def click(user: int, item: int, time_us: int) -> None:
            event = InteractionEvent(user, item, time_us, (True, False))
            send(encode_interaction_event(event, ("is_click", "is_like")))

        for user in users:
            click(user, 11, START + 1)
            click(user, 12, START + 2)
        _wait_until(lambda: _histories(store, users) == {user: [12, 11] for user in users})
        seconds = []
        for user in users:
            start = time.monotonic()
            send(encode_user_erasure(UserErasure(user, START + 5)))
            _wait_until(lambda user=user: not _histories(store, [user]))
            seconds.append(time.monotonic() - start)
        for user in users:
            click(user, 13, START + 4)
            click(user, 14, START + 5)
        click(1, 15, START + 6)
    total = wait_until_drained(config, DRAIN_SECONDS, lambda stored, total: _check_alive(worker))
    worker.send_signal(signal.SIGTERM)

    assert worker.wait(40) == 0
    assert total == 20 + 10 + 21
    assert _histories(store, users) == {1: [15]}
    # A batch waits 0.1 s for company by default; the rest is room for two busy cores.
    assert np.median(seconds) < 2
    record_property("erasure_seconds_median", round(float(np.median(seconds)), 3))
    record_property("erasure_seconds_max", round(max(seconds), 3))
    asked = pd.DataFrame({"user_id": [1, 2, 1], "event_timestamp": [9, 9, 3]})
    asked["event_timestamp"] = pd.to_datetime(asked["event_timestamp"] + START, unit="us", utc=True)
    joined = store.get_historical_features(asked, ["user_recent_items:item_ids"]).to_arrow()
    assert joined["item_ids"].to_pylist() == [[15], None, None]
    log = open_code_log(store.config)
    assert log.read("user_erasure_log").num_rows == 10
    Compactor(log).compact(is_full=True, wait_seconds=30)
    raw = log.read("interaction_log")
    assert raw.num_rows < 41
    assert without_erased(raw, log).num_rows == raw.num_rows


def test_sigterm_in_an_idle_group_ends_both_workers_with_status_0(
    stream_repo: StreamRepo, start_worker: StartWorker
) -> None:
    workers = [start_worker("one"), start_worker("two")]
    for name in ("one", "two"):
        _wait_for_log(stream_repo.directory / f"{name}.log", "worker_started")

    for worker in workers:
        worker.send_signal(signal.SIGTERM)

    assert [worker.wait(40) for worker in workers] == [0, 0]


def test_check_tells_good_from_bad_by_its_exit_status(
    stream_repo: StreamRepo,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run_check() -> tuple[int, str]:
        monkeypatch.setattr(
            sys, "argv", ["qarm-stream", "check", "--config", str(stream_repo.config_path)]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        return int(str(ended.value.code)), capsys.readouterr().out

    good = run_check()
    monkeypatch.setenv("QARM_STREAM__CONSUMER_GROUP", "another")
    monkeypatch.setenv("QARM_STREAM__ITEM_TOPIC", "no-such-topic")
    no_topic = run_check()
    monkeypatch.setenv("QARM_STREAM__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setenv("QARM_STREAM__KAFKA_OPTIONS", "{bootstrap_timeout_ms: 500}")
    no_broker = run_check()

    assert good[0] == 0, good[1]
    assert [line.split()[:2] for line in good[1].splitlines()] == [
        ["ok", name] for name in ("config", "broker", "topics", "codebooks", "stores")
    ]
    assert no_topic[0] == 2
    assert "FAIL topics     no topic no-such-topic" in no_topic[1]
    assert no_broker[0] == 6
    assert "FAIL broker     no Kafka broker answers at 127.0.0.1:1" in no_broker[1]
    assert "topics" not in no_broker[1]


def test_records_that_wait_when_a_worker_joins_are_read_again(stream_repo: StreamRepo) -> None:
    """kafka-python keeps the position of a partition that comes back; the source must rewind."""
    config = stream_repo.stream_config.model_copy(
        update={"max_batch_size": 10_000, "max_batch_wait_seconds": 1.0}
    )
    total = produce_items(config, _items().slice(0, 200))
    seen: list[set[int]] = [set(), set()]
    done = threading.Event()

    def consume(number: int, start: threading.Event) -> None:
        start.wait(30)
        with closing(KafkaSource(config)) as source:
            while not done.is_set():
                batch = source.read()
                source.commit(batch)
                seen[number] |= {int(record.key or b"") for record in batch.records}
                if number == 0 and not batch.records:
                    # The next batch waits a second for company; the other joins meanwhile.
                    starts[1].set()
                if len(seen[0] | seen[1]) == 2 * total:
                    done.set()

    starts = [threading.Event(), threading.Event()]
    threads = [threading.Thread(target=consume, args=(number, starts[number])) for number in (0, 1)]
    for thread in threads:
        thread.start()
    starts[0].set()
    assert starts[1].wait(60)
    more = _items().slice(200, 200)
    for first in range(0, 200, 10):
        produce_items(config, more.slice(first, 10))
    done.wait(30)
    done.set()
    for thread in threads:
        thread.join(30)

    assert sorted(seen[0] | seen[1]) == list(range(2 * total))


def _items() -> pa.Table:
    vectors_ND = np.random.default_rng(1).standard_normal((NUM_ITEMS, EMBEDDING_DIM))
    ids_N = np.arange(NUM_ITEMS)
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(vectors_ND.astype(np.float32).reshape(-1)), EMBEDDING_DIM
    )
    return pa.table(
        {
            "item_id": pa.array(ids_N),
            "upload_timestamp": pa.array(START + ids_N).cast(TIMESTAMP),
            "title": pa.array([f"title {i}" for i in ids_N]),
            "embedding": vectors,
            "encoder_version": pa.array([ENCODER_VERSION] * NUM_ITEMS),
        }
    )


def _interactions() -> pa.Table:
    rng = np.random.default_rng(2)
    num_rows = 2000
    return pa.table(
        {
            "user_id": pa.array(rng.integers(0, NUM_USERS, num_rows)),
            "item_id": pa.array(rng.integers(0, NUM_ITEMS, num_rows)),
            "event_timestamp": pa.array(START + rng.permutation(num_rows)).cast(TIMESTAMP),
            "is_click": pa.array(rng.random(num_rows) < 0.7),
            "is_like": pa.array(rng.random(num_rows) < 0.3),
        }
    )


def _arrow_items(ids: list[int], vectors: list[list[float]]) -> pa.Table:
    return pa.table(
        {
            "item_id": pa.array(ids, pa.int64()),
            "event_timestamp": pa.array([START] * len(ids)).cast(TIMESTAMP),
            "embedding": pa.array(vectors, pa.list_(pa.float32())),
            "encoder_version": pa.array([ENCODER_VERSION] * len(ids)),
        }
    )


def _assert_codes_are_stored_once(repo: StreamRepo, items: pa.Table) -> None:
    ids_N = items["item_id"].to_numpy()
    vectors_ND = np.stack(items["embedding"].to_numpy())
    expected = repo.codebook.encode(ids_N, content_hashes(items), vectors_ND)
    log = open_code_log(open_feature_store(repo.directory).config)
    stored = log.read("item_codes_v1")
    distinct = stored.group_by(["item_id", "event_timestamp", "content_hash"]).aggregate(
        [("rq_code", "count")]
    )
    assert distinct.num_rows == NUM_ITEMS
    assert pc.count_distinct(log.read("item_content_log")["item_id"]).as_py() == NUM_ITEMS
    online = _online_codes(repo, ids_N.tolist())
    assert online == dict(zip(ids_N.tolist(), expected.rq_NL.tolist(), strict=True))


def _assert_interactions_are_stored_once(repo: StreamRepo, interactions: pa.Table) -> None:
    log = open_code_log(open_feature_store(repo.directory).config)
    names = ["user_id", "item_id", "event_timestamp", "is_click", "is_like"]
    stored = log.read("interaction_log").select(names)
    keys = ["user_id", "item_id", "event_timestamp"]
    distinct = stored.group_by(names).aggregate([]).sort_by([(key, "ascending") for key in keys])
    assert distinct.equals(interactions.select(names).sort_by([(k, "ascending") for k in keys]))


def _assert_recent_items_are_right(repo: StreamRepo, interactions: pa.Table) -> None:
    expected: dict[int, list[int]] = {}
    newest_first = interactions.sort_by([("event_timestamp", "descending")])
    for row in newest_first.to_pylist():
        history = expected.setdefault(row["user_id"], [])
        # is_click is the first task, so it is the positive label.
        if row["is_click"] and len(history) < HISTORY_LENGTH:
            history.append(row["item_id"])
    store = open_feature_store(repo.directory)
    view = store.get_feature_view("user_recent_items")
    batch = code_online_store(store).read_columns(
        store.config, view, np.arange(NUM_USERS), ["item_ids"]
    )
    column = batch.columns["item_ids"]
    found = np.split(column.values, np.cumsum(column.lengths_N)[:-1])
    assert [history.tolist() for history in found] == [expected[u] for u in range(NUM_USERS)]


def _online_codes(repo: StreamRepo, ids: list[int]) -> dict[int, list[int]]:
    """RQ codes of the items that are present."""
    store = open_feature_store(repo.directory)
    view = store.get_feature_view("item_codes_v1")
    batch = code_online_store(store).read_columns(
        store.config, view, np.array(ids, dtype=np.int64), ["rq_code"]
    )
    column = batch.columns["rq_code"]
    codes = np.split(column.values, np.cumsum(column.lengths_N)[:-1])
    return {i: code.tolist() for i, code in zip(ids, codes, strict=True) if len(code)}


def _histories(store: FeatureStore, users: Iterable[int]) -> dict[int, list[int]]:
    """Recent items of the users that are present."""
    view = store.get_feature_view("user_recent_items")
    asked = np.array(list(users), dtype=np.int64)
    batch = code_online_store(store).read_columns(store.config, view, asked, ["item_ids"])
    column = batch.columns["item_ids"]
    lists = np.split(column.values, np.cumsum(column.lengths_N)[:-1])
    rows = zip(asked.tolist(), lists, batch.present_N, strict=True)
    return {user: items.tolist() for user, items, is_present in rows if is_present}


def _wait_until(is_so: Callable[[], bool], timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _dead_letters(repo: StreamRepo) -> list[dict[str, str]]:
    """Headers of all dead letters."""
    records = _records_of(repo.stream_config, repo.stream_config.dead_letter_topic)
    return [{name: value.decode() for name, value in record.headers} for record in records]


def _records_of(config: StreamConfig, topic: str) -> list[Any]:
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=config.bootstrap_servers,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        consumer_timeout_ms=1500,
    )
    with closing(consumer):
        return list(consumer)


def _check_alive(worker: "subprocess.Popen[bytes]") -> None:
    assert worker.poll() is None, f"the worker ended with status {worker.returncode}"


def _wait_for_log(path: Path, text: str, timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while text not in path.read_text():
        if time.monotonic() > deadline:
            raise NotDrainedError(f"{path} never said {text!r}:\n{path.read_text()}")
        time.sleep(0.1)


def test_a_killed_broker_comes_back_with_its_data(tmp_path: Path) -> None:
    with KafkaBroker(tmp_path) as broker:
        config = StreamConfig(bootstrap_servers=broker.bootstrap_servers)
        create_topics(config, num_partitions=1)
        with closing(KafkaProducer(bootstrap_servers=broker.bootstrap_servers)) as producer:
            producer.send(config.item_topic, b"value").get(10)
        broker.kill()
        broker.start()
        consumer = KafkaConsumer(
            config.item_topic,
            bootstrap_servers=broker.bootstrap_servers,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            consumer_timeout_ms=10_000,
        )
        with closing(consumer):
            record = next(consumer)

    assert record.value == b"value"
    assert broker.pid is None


def test_dead_letters_are_listed_and_sent_back_once(
    stream_repo: StreamRepo,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = stream_repo.stream_config
    broken = Message(b"1", b"secret", [("schema_version", b"1")])
    takedown = encode_item_event(ItemEvent(2, START, {}, is_deleted=True))
    # The broker refuses the first of these, the client the second.
    large = [broken._replace(value=bytes(size)) for size in (3_000_000, 9_000_000)]
    with closing(DeadLetterTopic(config)) as topic:
        topic.send(
            [_refused(config, 0, message, "undecodable") for message in (broken, takedown)]
            + [_refused(config, 9, message, "oversized") for message in large]
        )

    def run_dlq(*arguments: str) -> tuple[int, str]:
        command = ["qarm-stream", "dlq", *arguments, "--config", str(stream_repo.config_path)]
        monkeypatch.setattr(sys, "argv", command)
        try:
            main()
        except SystemExit as ended:
            return int(str(ended.code)), capsys.readouterr().out
        return 0, capsys.readouterr().out

    listed = run_dlq("list", "--json")
    later = run_dlq("list", "--since", "2999-01-01T00:00:00Z")
    dry = run_dlq("replay", "--reason", "undecodable", "--dry-run")
    assert _records_of(config, config.item_topic) == []
    first = run_dlq("replay", "--reason", "undecodable")
    second = run_dlq("replay", "--reason", "undecodable")
    without_value = run_dlq("replay", "--reason", "oversized")
    letters = json.loads(listed[1])
    places = [row["letter"] for row in letters["letters"] if row["key"] == "2"]
    by_place = run_dlq("replay", "--offsets", places[0])

    monkeypatch.setenv("QARM_STREAM__DEAD_LETTER_TOPIC", "no-such-topic")
    no_topic = run_dlq("list")
    monkeypatch.setenv("QARM_STREAM__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setattr(clients, "_BOOTSTRAP_TIMEOUT_MS", 500)
    no_broker = run_dlq("replay", "--reason", "undecodable")

    assert (no_topic[0], no_broker[0], without_value[0]) == (2, 6, 4)
    assert listed[0] == 0
    assert letters["counts"] == {"undecodable": 2, "oversized": 2}
    assert sorted(row["value_bytes"] for row in letters["letters"]) == [-1, 6, 3000000, 9000000]
    assert "secret" not in listed[1]
    assert later == (0, "no dead letters\n")
    assert dry == (0, f"would replay 2 undecodable to {config.item_topic}\n")
    assert first == (0, f"replayed 2 undecodable to {config.item_topic}\n")
    assert second[1].startswith("replayed nothing")
    assert without_value[1].startswith("refused 2 oversized: its value is not in the letter, ")
    assert by_place[1] == first[1].replace("2", "1", 1)
    count = ("replays", b"1")
    stored = [
        Message(r.key, r.value, list(r.headers)) for r in _records_of(config, config.item_topic)
    ]
    assert sorted(stored, key=str) == sorted(
        [m._replace(headers=[*m.headers, count]) for m in (broken, takedown, takedown)], key=str
    )


class BrokenName(str):
    """A header's name that is no UTF-8 on the wire; the broker does not look."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b"\xff\xfe"


def _send_four_with_a_broken_one(config: StreamConfig) -> None:
    headers = {2: [(BrokenName("name"), b"")]}
    with closing(KafkaProducer(bootstrap_servers=config.bootstrap_servers)) as producer:
        for number in range(4):
            # Each waits, so that each is a batch of its own.
            producer.send(
                config.item_topic, b"%d" % number, headers=headers.get(number), partition=1
            ).get(30)


def test_record_that_the_client_cannot_read_is_stepped_over(stream_repo: StreamRepo) -> None:
    config = stream_repo.stream_config
    _send_four_with_a_broken_one(config)
    seen: list[tuple[int, bytes | None]] = []
    deadline = time.monotonic() + 60

    with closing(KafkaSource(config)) as source:
        while len(seen) < 4 and time.monotonic() < deadline:
            batch = source.read()
            source.commit(batch)
            seen += [(record.offset, record.value) for record in batch.records]

    assert seen == [(0, b"0"), (1, b"1"), (2, None), (3, b"3")]


def test_record_that_cannot_be_read_does_not_hang_a_worker_that_waits_for_a_store_before_it(
    stream_repo: StreamRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A batch that closes by its bytes, so right where the client has met the broken record.
    config = stream_repo.stream_config.model_copy(update={"max_batch_bytes": 1})
    _send_four_with_a_broken_one(config)
    offsets: list[int] = []

    def read_all() -> None:
        with closing(KafkaSource(config)) as source:
            monkeypatch.setattr(source, "_keep_alive_seconds", 0.0)
            while len(offsets) < 4:
                batch = source.read()
                if batch.records:
                    source.keep_alive(batch)
                source.commit(batch)
                offsets.extend(record.offset for record in batch.records)

    reader = threading.Thread(target=read_all, daemon=True)
    reader.start()
    reader.join(60)

    assert offsets == [0, 1, 2, 3]


def _refused(config: StreamConfig, offset: int, message: Message, reason: str) -> DeadLetter:
    record = FetchedRecord(config.item_topic, 0, offset, START // 1000, *message)
    return DeadLetter(record, reason, "detail", message.value)


class FetchedRecord(NamedTuple):
    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


def test_broker_unpacks_gzip_and_refuses_a_bomb_before_a_worker_can_meet_it(
    stream_repo: StreamRepo,
) -> None:
    config = stream_repo.stream_config
    producer = KafkaProducer(
        bootstrap_servers=config.bootstrap_servers,
        compression_type="gzip",
        max_request_size=100_000_000,
    )
    with closing(producer):
        producer.send(config.item_topic, b"small", b"1").get(30)
        with pytest.raises(MessageSizeTooLargeError):
            producer.send(config.item_topic, bytes(50_000_000), b"2").get(30)

    assert [record.value for record in _records_of(config, config.item_topic)] == [b"small"]
