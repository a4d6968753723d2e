"""The seeded data and the reference reading of the fault run, without any process."""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest

from qarm_feast.encode import content_hash
from streaming.messages import ItemEvent, UserErasure
from tests.fault.mutations import make_mutants, plain_interactions, plain_items
from tests.fault.traffic import SeededEvents
from tests.fault.truth import EventKey, InteractionRow, Truth, reference_hash


@dataclass
class ReadRecord:
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


def test_equal_seeds_make_equal_streams_and_others_do_not() -> None:
    streams = [[p.message for p in islice(SeededEvents(seed), 200)] for seed in (1, 1, 2)]

    assert streams[0] == streams[1]
    assert streams[0] != streams[2]


def test_the_stream_has_late_equal_and_repeated_times_and_takedowns() -> None:
    parcels = list(islice(SeededEvents(0), 4000))
    items = [item for parcel in parcels for item in parcel.items]
    keys = [(item.item_id, item.event_timestamp, reference_hash(item)) for item in items]
    times = {key[:2] for key in keys}
    per_item: dict[int, list[int]] = {}
    for item in items:
        per_item.setdefault(item.item_id, []).append(item.event_timestamp)

    assert len(set(keys)) < len(keys)
    assert len(times) < len(set(keys))
    assert any(own != sorted(own) for own in per_item.values())
    assert any(item.is_deleted for item in items)
    assert any(len(parcel.items) > 1 for parcel in parcels)
    user_events = [event for parcel in parcels for event in parcel.interactions]
    assert any(isinstance(event, UserErasure) for event in user_events)


def test_the_reference_hash_is_the_published_one() -> None:
    vector_D = np.array([1.0, -2.0], dtype=np.float32)
    item = ItemEvent(1, 2, {"title": "Mug", "price": 3.0}, vector_D, "e1")

    assert reference_hash(item) == content_hash({"title": "Mug"}, vector_D.tobytes(), "e1")


def test_the_greatest_event_of_an_item_wins_and_a_takedown_wins_a_tie() -> None:
    keys = [EventKey(1, 5, "ff"), EventKey(1, 5, "takedown"), EventKey(1, 4, "zz")]
    truth = Truth(dict.fromkeys(keys), set())

    assert truth.newest() == {1: EventKey(1, 5, "takedown")}


def test_a_history_holds_distinct_positives_newest_first() -> None:
    rows = {
        InteractionRow(1, 10, 5, (True, False)),
        InteractionRow(1, 10, 5, (True, True)),
        InteractionRow(1, 11, 6, (False, True)),
        InteractionRow(1, 12, 7, (True, False)),
    }

    assert Truth({}, rows).histories() == {1: [(7, 12), (5, 10)]}


def test_a_history_begins_after_the_last_erasure_and_ends_in_it() -> None:
    rows = {InteractionRow(1, 9 + time_us, time_us, (True, False)) for time_us in (1, 2, 3)}
    rows.add(InteractionRow(2, 10, 1, (True, False)))
    erasures = frozenset({UserErasure(1, 2), UserErasure(1, 1), UserErasure(3, 5)})

    histories = Truth({}, rows, erasures).histories()

    assert histories == {1: [(3, 12), (2, -1)], 2: [(1, 10)], 3: [(5, -1)]}


def test_interactions_up_to_an_erasure_of_their_user_need_not_be_kept() -> None:
    rows = {InteractionRow(user, 9, time_us, (True,)) for user in (1, 2) for time_us in (1, 2, 3)}
    erasures = frozenset({UserErasure(1, 2), UserErasure(1, 1)})

    kept = Truth({}, rows, erasures).kept_interactions()

    assert {(row.user_id, row.event_timestamp) for row in rows - kept} == {(1, 1), (1, 2)}


def test_records_left_alone_read_back_as_the_events_that_they_were_made_of() -> None:
    mutants = [m for m in make_mutants(np.random.default_rng(0), 200) if not m.mutation]

    for mutant in mutants:
        record = ReadRecord(*mutant.parcel.message)
        if mutant.parcel.interactions:
            assert plain_interactions(record) == list(mutant.parcel.interactions)
        else:
            found = plain_items(record)
            assert found is not None
            assert [reference_hash(item) for item in found] == [
                reference_hash(item) for item in mutant.parcel.items
            ]
    assert len(mutants) > 50


@pytest.mark.parametrize(
    "mutation", ["no id", "vector spoilt", "tombstone without time", "schema version 2"]
)
def test_a_plain_reading_sees_the_damage(mutation: str) -> None:
    mutants = make_mutants(np.random.default_rng(0), 2000)
    damaged = [
        m.parcel.message for m in mutants if m.mutation == mutation and not m.parcel.interactions
    ]

    assert damaged
    assert all(plain_items(ReadRecord(*message)) is None for message in damaged)
