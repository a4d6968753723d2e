"""Checks that no training row has seen its future; each raises :class:`LeakError`.

Times are microseconds since the epoch, UTC. Shape letters: N rows, H history events of all rows,
I items. May import: duckdb, numpy, pyarrow.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.errors import LeakError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def check_history_times(rows: pa.Table) -> int:
    """Refuse a history event at or after its row's label time.

    Args:
        rows: Columns ``user_id``, ``event_timestamp`` and ``history_timestamps``.

    Returns:
        The number of events checked.

    Raises:
        LeakError: Naming the first such row and how many there are.
    """
    lengths_N, events_H = _flat_history(rows, "history_timestamps")
    labels_H = np.repeat(_microseconds(rows), lengths_N)
    bad_H = np.flatnonzero(events_H >= labels_H)
    if len(bad_H):
        row = int(np.repeat(np.arange(len(rows)), lengths_N)[bad_H[0]])
        raise LeakError(
            f"{len(bad_H)} history events lie at or after their row's label time; the first is "
            f"of user {rows['user_id'][row]}: event at {_shown(events_H[bad_H[0]])}, label at "
            f"{_shown(labels_H[bad_H[0]])}; join histories at label time - 1 microsecond"
        )
    return len(events_H)


def check_history_split(rows: pa.Table, positives: pa.Table) -> None:
    """Refuse a history event that is no positive of the row's user, or of a split not to be seen.

    The history of a train row holds positives of ``train`` alone: what is held out teaches nothing.
    That of a valid or test row holds what an online list held at its time, positives of any split.

    Args:
        rows: Columns ``user_id``, ``split``, ``history_item_ids`` and ``history_timestamps``.
        positives: Columns ``user_id``, ``item_id``, ``event_timestamp`` and ``split``.

    Raises:
        LeakError: Naming one such event and how many there are.
    """
    lengths_N, items_H = _flat_history(rows, "history_item_ids")
    _, times_H = _flat_history(rows, "history_timestamps")
    history = pa.table(
        {
            "user_id": np.repeat(rows["user_id"].to_numpy(), lengths_N),
            "item_id": items_H,
            "time": times_H,
            "is_of_train": np.repeat(pc.equal(rows["split"], "train").to_numpy(), lengths_N),
        }
    )
    known = pa.table(
        {
            "user_id": positives["user_id"],
            "item_id": positives["item_id"],
            "time": _microseconds(positives),
            "is_train": pc.equal(positives["split"], "train"),
        }
    )
    with duckdb.connect(":memory:") as connection:
        connection.register("history", history)
        connection.register("known", known)
        found = connection.execute(
            "SELECT count(*), any_value(user_id), any_value(item_id), any_value(time) FROM "
            "(SELECT * FROM history h ANTI JOIN known k ON h.user_id = k.user_id AND "
            "h.item_id = k.item_id AND h.time = k.time AND (k.is_train OR NOT h.is_of_train))"
        ).fetchone()
    assert found is not None, "an aggregate always gives one row"
    count, user_id, item_id, time = found
    if count:
        raise LeakError(
            f"{count} history events are no positive interactions that their row may see (a train "
            f"row: of split train; another: of any); one is user {user_id}, item {item_id} at "
            f"{_shown(time)}; histories come from the views user_train_items and "
            "user_recent_items: check the tag qarm.split of the first and the splits that were "
            "streamed"
        )


def check_code_times(rows: pa.Table, first_times_I: Mapping[int, int]) -> None:
    """Refuse a row whose item got its first code after the label: uploaded after it.

    Args:
        rows: Columns ``item_id`` and ``event_timestamp``.
        first_times_I: Item id to the time of its oldest code row; items without codes absent.

    Raises:
        LeakError: Naming the first such row and how many there are.
    """
    ids = np.fromiter(first_times_I.keys(), np.int64, len(first_times_I))
    times = np.fromiter(first_times_I.values(), np.int64, len(first_times_I))
    order = np.argsort(ids)
    ids, times = ids[order], times[order]
    if not len(ids):
        return
    item_ids_N, labels_N = rows["item_id"].to_numpy(), _microseconds(rows)
    places_N = np.minimum(np.searchsorted(ids, item_ids_N), len(ids) - 1)
    bad_N = np.flatnonzero((ids[places_N] == item_ids_N) & (times[places_N] > labels_N))
    if len(bad_N):
        row = int(bad_N[0])
        raise LeakError(
            f"{len(bad_N)} rows are older than the first code of their item; the first is item "
            f"{item_ids_N[row]}: label at {_shown(labels_N[row])}, code of "
            f"{_shown(times[places_N[row]])}; an item cannot be rated before its upload: mend the "
            "item events' event_timestamp"
        )


def check_learnt_rows(rows: pa.Table, *, has_given_split: bool, cutoff: datetime | None) -> None:
    """Refuse valid and test rows that lie in what encoder, codebook and pool learnt from.

    With a given split these learnt from its train rows, whatever their times: a valid or test
    row must not repeat one. Without, they learnt from everything up to ``cutoff``.

    Args:
        rows: Columns ``user_id``, ``item_id``, ``event_timestamp`` and ``split``.
        has_given_split: Whether the data came with a split.
        cutoff: The manifest's ``behaviour_cutoff``; None: no interaction was seen.

    Raises:
        LeakError: Naming the first such row and how many there are.
    """
    is_train_N = pc.equal(rows["split"], "train").to_numpy()
    if has_given_split:
        _check_not_repeated(rows, is_train_N)
        return
    times_N = _microseconds(rows)
    newest = np.iinfo(np.int64).min if cutoff is None else to_microseconds(cutoff)
    bad_N = np.flatnonzero(~is_train_N & (times_N <= newest))
    if len(bad_N):
        raise LeakError(
            f"{len(bad_N)} valid or test rows lie at or before {cutoff}, up to which the codebook "
            f"has seen interactions; the first is at {_shown(times_N[bad_N[0]])}; train the "
            "codebook on older data or move data.cutoff_timestamp"
        )


def _check_not_repeated(rows: pa.Table, is_train_N: npt.NDArray[np.bool_]) -> None:
    keys = ["user_id", "item_id", "event_timestamp"]
    train = rows.filter(pa.array(is_train_N)).select(keys)
    held_out = rows.filter(pa.array(~is_train_N)).select(keys)
    repeated = held_out.join(train, keys=keys, join_type="left semi")
    if len(repeated):
        raise LeakError(
            f"{len(repeated)} valid or test rows are train rows as well; the first is user "
            f"{repeated['user_id'][0]}, item {repeated['item_id'][0]}; give each interaction one "
            "split"
        )


def check_pool(
    pool_item_ids_P: npt.NDArray[np.int64], train_item_ids: npt.NDArray[np.int64]
) -> None:
    """Refuse a codebook whose VQ pool holds items that no train row knows.

    Args:
        pool_item_ids_P: Items of the pool.
        train_item_ids: Items with a train row.

    Raises:
        LeakError: Naming the first such item and how many there are.
    """
    strange = np.setdiff1d(pool_item_ids_P, train_item_ids)
    if len(strange):
        raise LeakError(
            f"the codebook's pool holds {len(strange)} items without a train row, the first is "
            f"{strange[0]}; train the codebook again on this data's train items"
        )


def to_microseconds(time: datetime) -> int:
    """Return an aware time as microseconds since the epoch."""
    return (time - _EPOCH) // timedelta(microseconds=1)


def _flat_history(rows: pa.Table, name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    column = rows[name].combine_chunks()
    return pc.list_value_length(column).to_numpy().astype(np.int64), column.flatten().to_numpy()


def _microseconds(rows: pa.Table) -> npt.NDArray[np.int64]:
    times_N: npt.NDArray[np.int64] = rows["event_timestamp"].cast(pa.int64()).to_numpy()
    return times_N


def _shown(time_us: int) -> str:
    # To the microsecond: an event and a label may differ by one.
    return (_EPOCH + timedelta(microseconds=int(time_us))).isoformat(timespec="microseconds")
