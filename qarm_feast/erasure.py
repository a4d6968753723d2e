"""Erasure of a user: nothing that the user did up to that time is shown or learnt from again.

An erasure is one pair (time T, item ``ERASURE_MARK``) among a user's pairs (time, item). Of a
user's marks the newest counts, it takes every pair of time T or earlier with it, and stays: an
event that comes after it, but happened before, finds it and goes as well. What remains of a set
of pairs depends on the set alone, so late, repeated and reordered events end alike.

    online      Within the batch that brings it. The mark ends the user's ``user_recent_items``;
                our readers hide it, stock Feast reads item -1 at the time of the erasure. Once
                the list is full of newer items it is cut off like one: what it would stop is
                then too old to enter. It expires with its row where the store has a key TTL.
    offline     At the next read after it is in ``user_erasure_log``, beside the interaction log:
                joins, pulls and training rows leave out what it covers, whatever time they ask
                for; ``materialize`` writes the marks into an online store as well.
    raw rows    A compaction writes the parts of ``interaction_log`` anew without what is covered,
                and deletes the old ones after the grace period. ``qarm offline compact`` looks
                through all parts; a later one deletes what it replaced, once that is
                ``compaction.grace_seconds`` (600) old. Workers do both at the first compaction
                after it is due, ``erasure_interval_seconds`` (86,400) after the last search and
                the grace period after the rewrite. Compactions begin up to 1.25 times
                ``interval_seconds`` (60) after the one before has ended: the rows' bytes are
                gone after the two periods, 2.5 intervals, and the time of two compactions, as
                long as a worker runs. A damaged part in quarantine may hold such rows for as
                long as it is kept.
    elsewhere   ``user_profile``, the files of ``data.input_dir``, and what was learnt from them
                before (training rows until they are built again) are left as they are.

Shape letters in this file: M pairs of all users together, N rows.
May import: numpy, pyarrow, the log.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.code_log import CodeLog
from qarm_feast.point_in_time import microseconds
from qarm_feast.schema import ERASURE_MARK, EVENT_TIMESTAMP, USER_ERASURE_LOG, USER_ID

Int64Array = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Marks = tuple[Int64Array, Int64Array, Int64Array]
"""Users, times in microseconds UTC, and ``ERASURE_MARK`` as often."""


def outlives_erasure(owners_M: Int64Array, times_M: Int64Array, item_ids_M: Int64Array) -> Bools:
    """Return which pairs stay: those after their owner's newest mark, and that mark.

    Args:
        owners_M: Whose each pair is; any numbering.
        times_M: Microseconds UTC.
        item_ids_M: Items, or ``ERASURE_MARK``.

    Returns:
        One flag per pair; a mark that is there twice stays twice.
    """
    is_mark_M = item_ids_M == ERASURE_MARK
    if not is_mark_M.any():
        return np.ones(len(owners_M), dtype=np.bool_)
    owners, ranks = np.unique(owners_M[is_mark_M], return_inverse=True)
    newest = np.full(len(owners), np.iinfo(np.int64).min)
    np.maximum.at(newest, ranks, times_M[is_mark_M])
    places_M = np.minimum(np.searchsorted(owners, owners_M), len(owners) - 1)
    is_erased_M = owners[places_M] == owners_M
    after_M = times_M > newest[places_M]
    is_newest_mark_M = is_mark_M & (times_M == newest[places_M])
    outlives_M: Bools = ~is_erased_M | after_M | is_newest_mark_M
    return outlives_M


def read_marks(log: CodeLog) -> Marks:
    """Return every erasure ever logged as pairs.

    Args:
        log: The offline logs.

    Returns:
        Users, times in microseconds UTC, and ``ERASURE_MARK`` as often; repeated as logged.
    """
    if not log.exists(USER_ERASURE_LOG):
        users_M, times_M = np.empty((2, 0), dtype=np.int64)
    else:
        table = log.read(USER_ERASURE_LOG, [USER_ID, EVENT_TIMESTAMP]).drop_null()
        users_M = table[USER_ID].to_numpy()
        times_M = microseconds(table[EVENT_TIMESTAMP]).to_numpy()
    return users_M, times_M, np.full(len(users_M), ERASURE_MARK)


def without_erased(rows: pa.Table, log: CodeLog) -> pa.Table:
    """Return the rows of ``rows`` that no erasure covers, in their order.

    Args:
        rows: Columns ``user_id`` and ``event_timestamp``, and any others.
        log: The offline logs.

    Returns:
        Some of the rows, or all of them.
    """
    return without_marked(rows, read_marks(log))


def without_marked(rows: pa.Table, marks: Marks) -> pa.Table:
    """Return the rows that no erasure among ``marks`` covers; see :func:`without_erased`.

    A row without a user is nobody's: it stays.
    """
    # Whatever the items are, none of these rows is a mark.
    items = np.full(rows.num_rows, ERASURE_MARK + 1)
    # With a null among them the ids would be floats, and neighbours above 2**53 one user.
    users = rows[USER_ID].fill_null(0).to_numpy()
    own = (users, microseconds(rows[EVENT_TIMESTAMP]).to_numpy(), items)
    pairs = [np.concatenate(both) for both in zip(own, marks, strict=True)]
    outlives = pa.array(outlives_erasure(*pairs)[: rows.num_rows])
    return rows.filter(pc.or_(outlives, rows[USER_ID].is_null()))
