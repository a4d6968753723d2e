from kafka.structs import TopicPartition
from stream_fakes import FakeRecord

from streaming.source import WaitingRecords

P0, P1 = TopicPartition("items", 0), TopicPartition("items", 1)


def _records(partition: int, *offsets: int) -> list[FakeRecord]:
    return [FakeRecord(b"1", b"ab", partition=partition, offset=offset) for offset in offsets]


def test_batch_holds_what_waited_and_the_offsets_behind_it() -> None:
    waiting = WaitingRecords()
    waiting.add({P0: _records(0, 5, 6), P1: _records(1, 9)}, now=1.0)
    waiting.add({P0: _records(0, 8)}, now=2.0)

    batch = waiting.take()

    assert [record.offset for record in batch.records] == [5, 6, 9, 8]
    assert batch.offsets == {P0: 9, P1: 10}
    assert waiting.num_records == 0
    assert waiting.take().records == []


def test_age_and_bytes_are_those_of_the_waiting_records() -> None:
    waiting = WaitingRecords()
    waiting.add({}, now=1.0)
    waiting.add({P0: _records(0, 5)}, now=2.0)
    waiting.add({P0: _records(0, 6)}, now=3.0)

    assert (waiting.oldest, waiting.num_bytes) == (2.0, 6)

    waiting.take()

    assert (waiting.oldest, waiting.num_bytes) == (None, 0)


def test_partition_that_comes_back_goes_on_behind_what_is_stored() -> None:
    waiting = WaitingRecords()
    waiting.add({P0: _records(0, 5, 6), P1: _records(1, 9)}, now=1.0)
    stored = waiting.take()
    waiting.mark_stored({P0: stored.offsets[P0]})
    waiting.add({P0: _records(0, 7)}, now=2.0)

    waiting.revoke()
    resumed = waiting.assign([P0, P1])

    # P0: 5 and 6 are stored, 7 was dropped. P1: 9 is in a batch that is not stored yet.
    assert resumed == {P0: 7, P1: 9}
    assert waiting.num_records == 0


def test_partition_that_went_away_starts_from_the_committed_offset_later() -> None:
    waiting = WaitingRecords()
    waiting.add({P0: _records(0, 5)}, now=1.0)

    waiting.revoke()
    assert waiting.assign([P1]) == {}
    waiting.revoke()

    assert waiting.assign([P0]) == {}


def test_lost_partition_forgets_where_it_was() -> None:
    waiting = WaitingRecords()
    waiting.add({P0: _records(0, 5)}, now=1.0)

    waiting.lose()

    assert waiting.assign([P0]) == {}


def test_each_revocation_makes_older_batches_foreign() -> None:
    waiting = WaitingRecords()
    before = waiting.take()

    waiting.revoke()
    waiting.assign([P0])

    assert waiting.take().assignment_number != before.assignment_number
