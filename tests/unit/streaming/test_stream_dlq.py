import json
from collections.abc import Iterator, Sequence

import pytest
from kafka.errors import KafkaTimeoutError
from kafka.structs import TopicPartition
from stream_fakes import NOW_MS, FakeRecord

from qarm_feast.errors import DataError, ServiceUnavailableError
from streaming.columns import DeadLetter
from streaming.config import StreamConfig
from streaming.dlq import (
    LetterFilter,
    OffsetRange,
    Offsets,
    list_letters,
    parse_range,
    parse_since,
    refusal_of,
    replay_reasons,
    send_back,
    summarize,
)
from streaming.letters import StoredLetter, letter_message, parse_letter
from streaming.messages import Message, Record

TOPICS = ("items", "interactions")


def _stored(
    offset: int, reason: str = "undecodable", topic: str = "items", replays: int = 0
) -> FakeRecord:
    """A letter at 0:offset, refused ``offset`` milliseconds after the start of the tests."""
    headers: list[tuple[str, bytes | None]] = [("replays", b"%d" % replays)] if replays else []
    record = FakeRecord(b"%d" % offset, b"value", headers, topic, 2, 100 + offset)
    message = letter_message(DeadLetter(record, reason, "detail", record.value))
    return FakeRecord(
        message.key, message.value, message.headers, "letters", 0, offset, NOW_MS + offset
    )


def _letter(offset: int, **changes: object) -> StoredLetter:
    letter = parse_letter(_stored(offset))
    assert letter is not None
    return letter._replace(**changes)


class FakeTopic:
    """Portions of two letters; writes down in which order things happen."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self.calls: list[str] = []
        self.sent: list[tuple[str, Message]] = []

    def portions(self) -> Iterator[tuple[Sequence[Record], Offsets]]:
        for start in range(0, len(self._records), 2):
            portion = self._records[start : start + 2]
            yield portion, {TopicPartition("letters", 0): portion[-1].offset + 1}

    def send(self, messages: Sequence[tuple[str, Message]]) -> list[bool]:
        self.calls.append(f"send {len(messages)}")
        self.sent += messages
        return [message.key != b"9" for _, message in messages]

    def commit(self, offsets: Offsets) -> None:
        self.calls.append(f"commit {next(iter(offsets.values()))}")


def _no_refusal(letter: StoredLetter) -> None:
    return None


def test_filter_takes_what_fits_reason_time_and_place_at_once() -> None:
    wanted = LetterFilter(
        ("undecodable",), NOW_MS + 5, (OffsetRange(0, 4, 7), OffsetRange(1, 0, 9))
    )

    kept = [offset for offset in range(10) if wanted.matches(_letter(offset))]

    assert kept == [5, 6, 7]
    assert not wanted.matches(_letter(6, reason="oversized"))
    assert not wanted.matches(_letter(6, place=(2, 6)))
    assert LetterFilter().matches(_letter(0))


def test_list_counts_all_and_shows_the_newest_first() -> None:
    records = [_stored(0), _stored(3, "oversized"), _stored(1), FakeRecord(b"1", b"no letter")]

    letters = summarize(FakeTopic(records), LetterFilter(), limit=2)

    assert letters.counts == {"undecodable": 2, "oversized": 1}
    assert [row["offset"] for row in letters.rows] == [103, 101]
    assert json.loads(letters.json())["counts"] == {"undecodable": 2, "oversized": 1}
    lines = letters.lines()
    assert lines[:3] == ["       2  undecodable", "       1  oversized", ""]
    assert lines[3].split()[:3] == ["time", "reason", "letter"]
    assert lines[4].split()[1:6] == ["oversized", "0:3", "items", "2", "103"]
    assert "value" not in letters.json().replace("value_bytes", "")


def test_list_of_nothing_says_so() -> None:
    assert summarize(FakeTopic([]), LetterFilter(), 5).lines() == ["no dead letters"]


def test_each_portion_is_sent_before_it_is_committed() -> None:
    topic = FakeTopic([_stored(0), _stored(1, "oversized"), _stored(2)])

    report = send_back(topic, LetterFilter(("undecodable",)), _no_refusal, topic.send)

    assert topic.calls == ["send 1", "commit 2", "send 1", "commit 3"]
    assert topic.sent == [
        ("items", Message(b"0", b"value", [("replays", b"1")])),
        ("items", Message(b"2", b"value", [("replays", b"1")])),
    ]
    assert report.lines(is_dry_run=False) == ["replayed 2 undecodable to items"]


def test_a_replay_that_dies_while_sending_has_not_committed() -> None:
    topic = FakeTopic([_stored(0)])

    def fail(messages: Sequence[tuple[str, Message]]) -> list[bool]:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        send_back(topic, LetterFilter(), _no_refusal, fail)

    assert topic.calls == []


def test_a_letter_that_its_topic_has_no_room_for_is_refused_and_does_not_hold_up_the_others() -> (
    None
):
    topic = FakeTopic([_stored(9), _stored(10), _stored(11)])

    report = send_back(topic, LetterFilter(), _no_refusal, topic.send)

    assert topic.calls == ["send 2", "commit 11", "send 1", "commit 12"]
    assert report.sent == {("undecodable", "items"): 2}
    assert [why for _, why in report.refused] == [
        "its topic has no room for it, see max.message.bytes"
    ]


def test_dry_run_counts_and_touches_nothing() -> None:
    topic = FakeTopic([_stored(0), _stored(1, replays=3)])

    report = send_back(topic, LetterFilter(), lambda letter: refusal_of(letter, TOPICS, 3), None)

    assert topic.calls == []
    assert report.lines(is_dry_run=True) == [
        "would replay 1 undecodable to items",
        "refused 1 undecodable: replayed 3 times, stream.max_replays is 3",
    ]
    with pytest.raises(DataError, match=r"1 dead letters were not replayed; .* --offsets LETTER"):
        report.check()


def test_what_must_not_go_back_is_refused_with_a_reason() -> None:
    assert refusal_of(_letter(0), TOPICS, 3) is None
    assert refusal_of(_letter(0, num_replays=2), TOPICS, 3) is None
    assert "3 times" in str(refusal_of(_letter(0, num_replays=3), TOPICS, 3))
    assert "input topics" in str(refusal_of(_letter(0, source=("salaries", 0, 0)), TOPICS, 3))
    assert "not in the letter" in str(refusal_of(_letter(0, value=b""), TOPICS, 3))


def test_arguments_become_times_and_ranges() -> None:
    assert parse_since("2023-11-14T23:13:20.001+01:00") == NOW_MS + 1
    assert parse_since("2023-11-14T22:13:20Z") == NOW_MS
    assert parse_range("3:10-20") == OffsetRange(3, 10, 20)
    assert parse_range("3:10") == OffsetRange(3, 10, 10)


class SilentConsumer:
    """Knows the topic, but its broker does not answer any more."""

    def __init__(self) -> None:
        self.is_closed = False

    def partitions_for_topic(self, topic: str) -> set[int]:
        return {0}

    def assign(self, partitions: Sequence[TopicPartition]) -> None:
        pass

    def beginning_offsets(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 0)

    def committed(self, partition: TopicPartition, timeout_ms: int | None = None) -> int:
        assert timeout_ms is not None, "it would wait for ever"
        raise KafkaTimeoutError

    def close(self, autocommit: bool) -> None:
        self.is_closed = True


def test_a_replay_does_not_wait_for_ever_for_a_broker_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumer = SilentConsumer()
    monkeypatch.setattr("streaming.dlq.connect_reader", lambda config, group: consumer)

    with pytest.raises(ServiceUnavailableError, match="run `qarm-stream check`"):
        replay_reasons(StreamConfig(), ["undecodable"], is_dry_run=True)

    assert consumer.is_closed


class LeaderlessConsumer(SilentConsumer):
    """As kafka-python answers for a partition that has no leader."""

    def beginning_offsets(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        raise KeyError(partitions[0])


def test_letters_of_a_partition_without_a_leader_are_said_to_be_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumer = LeaderlessConsumer()
    monkeypatch.setattr("streaming.dlq.connect_reader", lambda config, group: consumer)

    with pytest.raises(ServiceUnavailableError, match="run `qarm-stream check`"):
        list_letters(StreamConfig(), LetterFilter(), limit=1)

    assert consumer.is_closed
