"""A worker that was stopped between its look at the registry and its write, and wakes too late."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from feast import FeatureStore
from online_store_cases import ITEM, USER, Online, code_rows, code_view, moment, profile_view

from qarm_feast.errors import ConfigError, ServiceUnavailableError
from qarm_feast.feature_views import item_vector_view
from qarm_feast.online_tables import FeastOnlineTables
from qarm_feast.schema import VECTOR_ROWS
from streaming.sink import FeastSink


class NoLog:
    """An offline log that nobody may write."""

    def append(self, name: str, table: pa.Table) -> Path:
        raise AssertionError(name)


def _applied(online: Online) -> FeatureStore:
    store = FeatureStore(config=online.config)
    store.apply([ITEM, USER, code_view(), profile_view()])
    return store


def test_rows_that_a_late_writer_brings_back_after_the_view_is_dropped_are_removed(
    online: Online,
) -> None:
    tables = FeastOnlineTables(_applied(online))
    sink = FeastSink(NoLog(), tables, history_length=4)
    assert tables.write("item_codes_v1", code_rows([(1, 1, "a", [1, 2])])) == 1

    FeatureStore(config=online.config).apply(
        [ITEM, USER, profile_view()], objects_to_delete=[code_view()], partial=False
    )
    try:
        tables.write("item_codes_v1", code_rows([(1, 2, "b", [3, 4]), (2, 2, "b", [5, 6])]))
        assert online.codes(1, 2) == [[3, 4], [5, 6]]
    except ConfigError:
        # sqlite dropped the table itself; redis takes any field.
        assert "sqlite" in type(online.store).__name__.lower()
    sink.take_back(["v1"])

    online.store.update(online.config, [], [code_view()], [], [], True)
    assert online.codes(1, 2) == [None, None]
    # Looked for afresh: it is not written again.
    with pytest.raises(ConfigError, match="has no view 'item_codes_v1'"):
        tables.write("item_codes_v1", code_rows([(1, 3, "c", [1, 2])]))


@pytest.mark.parametrize("online", ["redis"], indirect=True)
def test_rows_of_a_late_writer_are_removed_although_the_store_was_away_at_the_first_try(
    online: Online, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = FeastOnlineTables(_applied(online))
    sink = FeastSink(NoLog(), tables, history_length=4)
    tables.check_views(["item_codes_v1"])
    FeatureStore(config=online.config).apply(
        [ITEM, USER, profile_view()], objects_to_delete=[code_view()], partial=False
    )
    tables.write("item_codes_v1", code_rows([(1, 2, "b", [3, 4])]))

    def be_away(*_: object, **__: object) -> None:
        raise ServiceUnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(type(online.store), "update", be_away)
        with pytest.raises(ServiceUnavailableError):
            sink.take_back(["v1"])
    sink.take_back(["v1"])

    assert online.codes(1) == [None]


def test_rows_of_a_version_whose_view_is_still_there_stay(online: Online) -> None:
    tables = FeastOnlineTables(_applied(online))
    tables.write("item_codes_v1", code_rows([(1, 1, "a", [1, 2])]))

    FeastSink(NoLog(), tables, history_length=4).take_back(["v1", "v9"])

    assert online.codes(1) == [[1, 2]]


@pytest.mark.parametrize("is_dropped", [True, False])
def test_vectors_of_a_late_writer_go_with_their_view_and_stay_while_another_version_has_it(
    online: Online, is_dropped: bool
) -> None:
    tables = FeastOnlineTables(_applied(online))
    view = item_vector_view("e1", 2, entity=ITEM)
    FeatureStore(config=online.config).apply([ITEM, view])
    same = [["hash"], [False], [moment(1)], [moment(1)]]
    vectors = pa.table([[1], [b"abcd"], *same], schema=VECTOR_ROWS)
    tables.write("item_vectors_e1", vectors)

    if is_dropped:
        FeatureStore(config=online.config).apply([], objects_to_delete=[view], partial=False)
        with suppress(ConfigError):  # Only sqlite tells that the table is gone.
            tables.write("item_vectors_e1", vectors)
    FeastSink(NoLog(), tables, history_length=4).take_back(["v1"], ["e1"])

    online.store.update(online.config, [], [view], [], [], True)
    found = online.store.read_columns(online.config, view, np.array([1]), ["embedding"])
    assert found.present_N.tolist() == [not is_dropped]
