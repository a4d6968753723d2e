from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from kafka.errors import (
    CoordinatorNotAvailableError,
    GroupAuthorizationFailedError,
    KafkaTimeoutError,
)
from kafka.structs import OffsetAndMetadata, TopicPartition

from qarm_feast.errors import ConfigError, ServiceUnavailableError
from streaming.acknowledgements import (
    AcknowledgedVersions,
    Acknowledgement,
    decode_acknowledgement,
    read_acknowledgements,
)
from streaming.config import StreamConfig

ITEMS_0, ITEMS_1 = TopicPartition("items", 0), TopicPartition("items", 1)
INTERACTIONS_0 = TopicPartition("interactions", 0)


@dataclass
class FakeConsumer:
    """A group of one whose offsets stay; ``faults`` are raised by the next calls to the broker."""

    positions: dict[TopicPartition, int]
    generation: int = 1
    stored: dict[TopicPartition, OffsetAndMetadata] = field(default_factory=dict)
    faults: list[Exception] = field(default_factory=list)
    num_commits: int = 0

    def assignment(self) -> set[TopicPartition]:
        return set(self.positions)

    def group_metadata(self) -> SimpleNamespace:
        return SimpleNamespace(generation_id=self.generation)

    def position(self, partition: TopicPartition, timeout_ms: int) -> int:
        return self.positions[partition]

    def committed(
        self, partition: TopicPartition, metadata: bool, timeout_ms: int
    ) -> OffsetAndMetadata | None:
        self._fail()
        return self.stored.get(partition)

    def commit(
        self, offsets: Mapping[TopicPartition, OffsetAndMetadata], timeout_ms: int = 0
    ) -> None:
        self._fail()
        self.num_commits += 1
        self.stored |= offsets

    def _fail(self) -> None:
        if self.faults:
            raise self.faults.pop(0)


@dataclass
class FakeMarks:
    is_assigned: bool = True
    assignment_number: int = 1
    first_unstored: dict[TopicPartition, int] = field(default_factory=dict)


def _start(
    positions: Iterable[tuple[TopicPartition, int]],
) -> tuple[FakeConsumer, FakeMarks, AcknowledgedVersions]:
    consumer, marks = FakeConsumer(dict(positions)), FakeMarks()
    return consumer, marks, AcknowledgedVersions(consumer, "items", marks)


def _told(consumer: FakeConsumer, partition: TopicPartition) -> Acknowledgement | None:
    return decode_acknowledgement(consumer.stored[partition].metadata)


def test_an_idle_partition_acknowledges_its_position_at_once() -> None:
    consumer, _, versions = _start([(ITEMS_0, 40), (INTERACTIONS_0, 7)])

    versions.announce([], ["v1"])
    versions.announce([], ["v1"])

    assert consumer.stored[ITEMS_0].offset == 40
    assert _told(consumer, ITEMS_0) == Acknowledgement({"v1": 40}, 1)
    assert INTERACTIONS_0 not in consumer.stored
    assert consumer.num_commits == 1


def test_a_partition_in_hand_acknowledges_its_first_offset_with_the_commit_of_the_batch() -> None:
    consumer, marks, versions = _start([(ITEMS_0, 50), (ITEMS_1, 9)])
    marks.first_unstored = {ITEMS_0: 40}

    versions.announce([ITEMS_0], ["v1"])
    before = dict(consumer.stored)
    consumer.commit(versions.with_metadata({ITEMS_0: 50}))

    assert set(before) == {ITEMS_1}
    assert consumer.stored[ITEMS_0].offset == 50
    assert _told(consumer, ITEMS_0) == Acknowledgement({"v1": 40}, 1)


def test_a_version_that_joins_keeps_the_others_first_offsets_and_one_that_goes_is_withdrawn() -> (
    None
):
    consumer, marks, versions = _start([(ITEMS_0, 40)])
    versions.announce([], ["v1"])
    consumer.positions[ITEMS_0] = marks.first_unstored[ITEMS_0] = 60

    versions.announce([], ["v1", "v2"])
    both = _told(consumer, ITEMS_0)
    versions.announce([], ["v2"])

    assert both == Acknowledgement({"v1": 40, "v2": 60}, 1)
    assert _told(consumer, ITEMS_0) == Acknowledgement({"v2": 60}, 1)


def test_a_new_owner_reads_what_was_acknowledged_and_does_so_again_under_its_own_epoch() -> None:
    consumer, marks, versions = _start([(ITEMS_0, 40)])
    versions.announce([], ["v1", "v2"])
    consumer.positions[ITEMS_0] = 70
    consumer.generation, marks.assignment_number = 2, 2

    earlier = versions.earlier()
    versions.announce([], ["v1"])

    assert earlier == {"v1", "v2"}
    assert versions.earlier() == earlier
    assert _told(consumer, ITEMS_0) == Acknowledgement({"v1": 70}, 2)


def test_an_acknowledgement_that_the_broker_does_not_take_is_sent_again() -> None:
    consumer, _, versions = _start([(ITEMS_0, 40)])
    consumer.faults = [KafkaTimeoutError()]

    versions.announce([], ["v1"])
    lost = dict(consumer.stored)
    versions.announce([], ["v1"])

    assert lost == {}
    assert _told(consumer, ITEMS_0) == Acknowledgement({"v1": 40}, 1)


def test_an_idle_partition_whose_batch_was_not_committed_is_acknowledged_behind_it() -> None:
    consumer, marks, versions = _start([(ITEMS_0, 50), (INTERACTIONS_0, 7)])
    marks.first_unstored = {ITEMS_0: 40}
    versions.announce([ITEMS_0, INTERACTIONS_0], ["v1"])

    versions.forget([ITEMS_0, INTERACTIONS_0])
    marks.first_unstored = {ITEMS_0: 50}
    versions.announce([], ["v1"])

    assert consumer.stored[ITEMS_0].offset == 50
    assert _told(consumer, ITEMS_0) == Acknowledgement({"v1": 50}, 1)


def test_a_broker_that_does_not_tell_the_earlier_ones_is_asked_again() -> None:
    consumer, _, versions = _start([(ITEMS_0, 40)])
    consumer.stored[ITEMS_0] = OffsetAndMetadata(40, Acknowledgement({"v1": 0}, 1).encode(), -1)
    consumer.faults = [KafkaTimeoutError()]

    with pytest.raises(ServiceUnavailableError, match="committed offsets of items"):
        versions.earlier()

    assert versions.earlier() == {"v1"}


def test_without_an_assignment_nothing_is_asked_or_told() -> None:
    consumer, marks, versions = _start([(ITEMS_0, 40)])
    marks.is_assigned = False
    consumer.faults = [AssertionError("the broker was asked")]

    versions.announce([], ["v1"])

    assert versions.earlier() == frozenset()


@pytest.mark.parametrize("metadata", [None, "", "note of a tool", "[1]", '{"codebooks": [1]}'])
def test_metadata_that_is_not_ours_acknowledges_nothing(metadata: str | None) -> None:
    assert decode_acknowledgement(metadata) is None


def test_a_version_left_out_of_a_batch_starts_anew_behind_it() -> None:
    consumer, marks, versions = _start([(ITEMS_0, 50)])
    marks.first_unstored = {ITEMS_0: 40}
    versions.announce([ITEMS_0], ["v1", "v2"])

    versions.announce([ITEMS_0], ["v2"])
    marks.first_unstored = {ITEMS_0: 50}
    consumer.commit(versions.with_metadata({ITEMS_0: 50}))
    without = _told(consumer, ITEMS_0)
    versions.announce([], ["v1", "v2"])

    assert without == Acknowledgement({"v2": 40}, 1)
    assert _told(consumer, ITEMS_0) == Acknowledgement({"v1": 50, "v2": 40}, 1)


@dataclass
class FakeAdmin:
    """A broker that knows topics by their number of partitions, and what groups have committed."""

    topics: dict[str, int]
    stored: Mapping[TopicPartition, OffsetAndMetadata] = field(default_factory=dict)
    fault: Exception | None = None
    is_closed: bool = False

    def describe_topics(self) -> list[dict[str, object]]:
        return [
            {"name": name, "partitions": [{"partition_index": n} for n in reversed(range(number))]}
            for name, number in self.topics.items()
        ]

    def list_group_offsets(self, groups: Mapping[str, None]) -> dict[str, object]:
        if self.fault is not None:
            raise self.fault
        return {group: self.stored for group in groups}

    def close(self) -> None:
        self.is_closed = True


def _read(
    admin: FakeAdmin, monkeypatch: pytest.MonkeyPatch
) -> dict[TopicPartition, Acknowledgement | None]:
    monkeypatch.setattr("streaming.acknowledgements.connect_admin", lambda config: admin)
    return read_acknowledgements(StreamConfig(item_topic="items", consumer_group="group"))


def test_acknowledgements_are_read_for_each_partition_of_the_item_topic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Acknowledgement({"v1": 3, "v2": 40}, 2)
    admin = FakeAdmin(
        {"items": 3, "interactions": 1},
        {
            ITEMS_0: OffsetAndMetadata(50, told.encode(), -1),
            ITEMS_1: OffsetAndMetadata(9, "", -1),
            INTERACTIONS_0: OffsetAndMetadata(5, told.encode(), -1),
        },
    )

    found = _read(admin, monkeypatch)

    assert found == {ITEMS_0: told, ITEMS_1: None, TopicPartition("items", 2): None}
    assert list(found) == [ITEMS_0, ITEMS_1, TopicPartition("items", 2)]
    assert admin.is_closed


def test_nothing_is_acknowledged_before_the_first_group_joins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    admin = FakeAdmin({"items": 1}, fault=CoordinatorNotAvailableError())

    assert _read(admin, monkeypatch) == {ITEMS_0: None}


def test_a_missing_topic_and_a_broker_that_refuses_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match="no topic items; create it"):
        _read(FakeAdmin({}), monkeypatch)
    refused = FakeAdmin({"items": 1}, fault=GroupAuthorizationFailedError())
    with pytest.raises(ServiceUnavailableError, match=r"group group: GroupAuthorizationFailed"):
        _read(refused, monkeypatch)
    assert refused.is_closed
