from typing import Any

import pytest
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError
from stream_fakes import VERSIONED, FakeRecord

from qarm_feast.errors import ServiceUnavailableError
from streaming import sink
from streaming.columns import DeadLetter
from streaming.config import StreamConfig
from streaming.letters import (
    letter_message,
    parse_letter,
    replay_message,
    stub_message,
)
from streaming.messages import Message
from streaming.sink import DeadLetterTopic

OWN: list[tuple[str, bytes | None]] = [("schema_version", b"1"), ("reason", b"mine")]


def _letter(**changes: Any) -> DeadLetter:
    fields = {"key": b"42", "value": b"{", "headers": OWN, "partition": 3, "offset": 17} | changes
    record = FakeRecord(**fields)
    return DeadLetter(record, "undecodable", "x" * 900, record.value, "v1")


def _stored(message: Message, partition: int = 0, offset: int = 0) -> FakeRecord:
    return FakeRecord(message.key, message.value, message.headers, "letters", partition, offset)


def test_letter_is_the_record_with_headers_that_tell_why_and_where() -> None:
    message = letter_message(_letter(headers=[*OWN, ("trace", None)]))

    assert (message.key, message.value) == (b"42", b"{")
    assert message.headers == [
        ("schema_version", b"1"),
        ("reason", b"mine"),
        ("trace", b""),
        ("reason", b"undecodable"),
        ("detail", b"x" * 500),
        ("topic", b"items"),
        ("partition", b"3"),
        ("offset", b"17"),
        ("append_timestamp", b"1700000000000"),
        ("codebook_version", b"v1"),
        ("value_bytes", b"1"),
    ]


def test_stub_is_small_whatever_the_record_holds() -> None:
    huge = _letter(key=b"k" * 9999, value=b"v" * 9999, headers=[("h", b"h" * 9999)])

    message = stub_message(huge)

    assert (message.key, message.value) == (None, b"")
    assert dict(message.headers)["value_bytes"] == b"9999"
    assert sum(len(name) + len(value) for name, value in message.headers) < 1000
    assert stub_message(_letter()).key == b"42"


def test_stored_letter_is_read_back_and_goes_back_as_the_record_that_it_was() -> None:
    letter = parse_letter(_stored(letter_message(_letter()), partition=1, offset=5))

    assert letter is not None
    assert letter.place == (1, 5)
    assert (letter.reason, letter.source) == ("undecodable", ("items", 3, 17))
    assert letter.is_whole
    assert replay_message(letter) == Message(b"42", b"{", [*OWN, ("replays", b"1")])


def test_replays_are_counted_over_every_circle() -> None:
    first = parse_letter(_stored(letter_message(_letter())))
    assert first is not None
    again = _letter(headers=replay_message(first).headers)

    second = parse_letter(_stored(letter_message(again)))

    assert second is not None
    assert second.num_replays == 1
    assert replay_message(second).headers == [*OWN, ("replays", b"2")]


@pytest.mark.parametrize(
    ("value", "key", "is_whole"),
    [(b"", b"1", True), (None, b"1", True), (None, None, False), (b"x", None, True)],
)
def test_null_and_empty_values_are_told_apart(
    value: bytes | None, key: bytes | None, is_whole: bool
) -> None:
    letter = parse_letter(_stored(letter_message(_letter(value=value, key=key))))

    assert letter is not None
    assert letter.is_whole == is_whole
    if is_whole:
        assert replay_message(letter).value == value


def test_stub_is_not_whole() -> None:
    letter = parse_letter(_stored(stub_message(_letter(value=b"large"))))

    assert letter is not None
    assert not letter.is_whole


def test_row_shows_ids_and_sizes_but_no_payload() -> None:
    record = _stored(letter_message(_letter(value=b"secret")), partition=1, offset=5)
    letter = parse_letter(record)
    assert letter is not None

    assert letter.row() == {
        "time": "2023-11-14T22:13:20.000+00:00",
        "reason": "undecodable",
        "letter": "1:5",
        "topic": "items",
        "partition": 3,
        "offset": 17,
        "codebook_version": "v1",
        "key": "42",
        "value_bytes": 6,
        "replays": 0,
    }
    assert letter._replace(key=b"secret").row()["key"] == "(6 bytes)"
    assert letter._replace(key=None).row()["key"] == ""
    assert letter._replace(key=b"-7").row()["key"] == "-7"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        VERSIONED,
        letter_message(_letter()).headers[:-1],
        [*letter_message(_letter()).headers, ("more", b"")],
        [*letter_message(_letter()).headers[:-1], ("value_bytes", b"many")],
    ],
)
def test_record_of_another_form_is_no_letter(headers: list[tuple[str, bytes]]) -> None:
    assert parse_letter(FakeRecord(b"1", b"", headers)) is None


@pytest.mark.parametrize("text", [b"x", b"", None, b"-5", b"9" * 5000, "²".encode()])
def test_a_producers_own_header_of_that_name_does_not_hide_its_letter(text: bytes | None) -> None:
    letter = parse_letter(_stored(letter_message(_letter(headers=[*OWN, ("replays", text)]))))

    assert letter is not None
    assert letter.num_replays == 0
    assert replay_message(letter).headers == [*OWN, ("replays", b"1")]


class FakeAnswer:
    def __init__(self, fault: KafkaError | None) -> None:
        self._fault = fault

    def get(self, timeout: float) -> None:
        if self._fault is not None:
            raise self._fault


class FakeProducer:
    """Takes messages up to a size; the client, or else the broker, refuses larger ones."""

    def __init__(self, max_bytes: int, is_client_strict: bool) -> None:
        self.max_bytes = max_bytes
        self.is_client_strict = is_client_strict
        self.fault: KafkaError | None = None
        self.taken: list[Message] = []

    def send(self, topic: str, **fields: Any) -> FakeAnswer:
        message = Message(**fields)
        size = len(message.key or b"") + len(message.value or b"")
        size += sum(len(name) + len(value) for name, value in message.headers)
        if size > self.max_bytes:
            if self.is_client_strict:
                raise MessageSizeTooLargeError
            return FakeAnswer(MessageSizeTooLargeError())
        if self.fault is None:
            self.taken.append(message)
        return FakeAnswer(self.fault)


def _topic(monkeypatch: pytest.MonkeyPatch, producer: FakeProducer) -> DeadLetterTopic:
    monkeypatch.setattr(sink, "connect_producer", lambda config: producer)
    return DeadLetterTopic(StreamConfig())


@pytest.mark.parametrize("is_client_strict", [True, False])
@pytest.mark.parametrize(
    "large", [{"value": b"v" * 9999}, {"key": b"k" * 9999}, {"headers": [("h", b"h" * 9999)]}]
)
def test_letter_too_large_for_client_or_broker_is_sent_as_a_stub_beside_the_others(
    large: dict[str, Any], is_client_strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = FakeProducer(max_bytes=5000, is_client_strict=is_client_strict)

    _topic(monkeypatch, producer).send([_letter(), _letter(**large), _letter()])

    assert sorted(producer.taken, key=str) == sorted(
        [letter_message(_letter()), stub_message(_letter(**large)), letter_message(_letter())],
        key=str,
    )


def test_topic_that_takes_not_even_stubs_is_a_service_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    topic = _topic(monkeypatch, FakeProducer(max_bytes=10, is_client_strict=False))

    with pytest.raises(ServiceUnavailableError, match=r"max\.message\.bytes"):
        topic.send([_letter()])


def test_broker_that_does_not_answer_is_a_service_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    producer = FakeProducer(max_bytes=5000, is_client_strict=False)
    producer.fault = KafkaTimeoutError()

    with pytest.raises(ServiceUnavailableError, match="KafkaTimeoutError"):
        _topic(monkeypatch, producer).send([_letter()])
