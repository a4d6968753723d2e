from datetime import UTC, datetime, timedelta

import pyarrow as pa

from qarm_feast.profiles import date_by_stored, profile_rows

START = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: int) -> datetime:
    return START + timedelta(seconds=seconds)


def users(ages: dict[int, int | None]) -> pa.Table:
    return pa.table({"user_id": list(ages), "age": pa.array(list(ages.values()), pa.int64())})


def test_only_a_changed_profile_gets_the_time_of_its_load() -> None:
    stored = pa.concat_tables(
        [
            profile_rows(users({1: 30, 2: 40, 3: None}), at(0), at(100)),
            profile_rows(users({1: 31}), at(200), at(200)),
        ]
    )
    loaded = profile_rows(users({4: 50, 3: None, 2: 41, 1: 31}), at(0), at(300))

    rows = date_by_stored(loaded, stored)

    assert rows["user_id"].to_pylist() == [4, 3, 2, 1]
    assert rows["event_timestamp"].to_pylist() == [at(0), at(0), at(300), at(200)]
    assert rows["created"].to_pylist() == [at(300), at(100), at(300), at(200)]


def test_a_profile_that_goes_back_to_an_older_value_has_changed() -> None:
    stored = pa.concat_tables(
        [
            profile_rows(users({1: 30}), at(0), at(100)),
            profile_rows(users({1: 31}), at(200), at(200)),
        ]
    )

    rows = date_by_stored(profile_rows(users({1: 30}), at(0), at(300)), stored)

    assert rows["event_timestamp"].to_pylist() == [at(300)]
