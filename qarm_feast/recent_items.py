"""A user's latest positives as of any time, computed from raw interactions.

The lists are slices of one sorted array and are never exploded through a join. A user's event
at time t is seen by every question asked at t or later. May import: numpy, pyarrow.

Shape letters in this file: E positive events, N questions (a user and a time each).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PositiveEvents:
    """Distinct positives, ascending by (user, time, item); times are microseconds UTC."""

    user_ids_E: Int64Array
    times_E: Int64Array
    item_ids_E: Int64Array

    @classmethod
    def sort(
        cls, user_ids_E: Int64Array, times_E: Int64Array, item_ids_E: Int64Array
    ) -> "PositiveEvents":
        """Return the events sorted, each (user, time, item) once."""
        order_E = np.lexsort((item_ids_E, times_E, user_ids_E))
        columns = [column[order_E] for column in (user_ids_E, times_E, item_ids_E)]
        is_new_E = np.ones(len(order_E), dtype=bool)
        is_new_E[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
        return cls(*(column[is_new_E] for column in columns))

    def take(self, is_kept_E: npt.NDArray[np.bool_]) -> "PositiveEvents":
        """Return the events marked true, in their order."""
        return PositiveEvents(
            self.user_ids_E[is_kept_E], self.times_E[is_kept_E], self.item_ids_E[is_kept_E]
        )


@dataclass(frozen=True)
class HistorySlices:
    """Per question the slice ``[starts, ends)`` of the sorted events, oldest first."""

    starts_N: Int64Array
    ends_N: Int64Array

    def lengths(self) -> Int64Array:
        """Return the list lengths, 0 where the user had no positive yet."""
        return self.ends_N - self.starts_N


def histories_as_of(
    events: PositiveEvents, user_ids_N: Int64Array, times_N: Int64Array, history_length: int
) -> HistorySlices:
    """Return the slice of each user's latest events at or before the time asked for.

    Args:
        events: Sorted events.
        user_ids_N: Users asked for, repeated as one likes; unknown ones get an empty slice.
        times_N: Microseconds UTC.
        history_length: Longest slice.

    Returns:
        One slice per question, in the order asked.
    """
    users = np.unique(events.user_ids_E)
    times = np.unique(events.times_E)
    # One int64 orders (user, time): ranks instead of raw values keep the product in range.
    stride = len(times) + 1
    event_keys_E = np.searchsorted(users, events.user_ids_E) * stride
    event_keys_E += np.searchsorted(times, events.times_E) + 1
    user_ranks_N = np.searchsorted(users, user_ids_N)
    is_known_N = np.isin(user_ids_N, users)
    time_ranks_N = np.searchsorted(times, times_N, side="right")
    ends_N = np.searchsorted(event_keys_E, user_ranks_N * stride + time_ranks_N, side="right")
    firsts_N = np.searchsorted(event_keys_E, user_ranks_N * stride, side="left")
    starts_N = np.maximum(firsts_N, ends_N - history_length)
    return HistorySlices(
        starts_N=np.where(is_known_N, starts_N, 0).astype(np.int64),
        ends_N=np.where(is_known_N, ends_N, 0).astype(np.int64),
    )


def newest_first(values_E: Int64Array, slices: HistorySlices) -> pa.LargeListArray | pa.ListArray:
    """Return each slice of ``values_E`` reversed, as one list per question; null when empty."""
    lengths_N = slices.lengths()
    offsets = np.concatenate([[0], np.cumsum(lengths_N)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths_N)
    picked = values_E[np.repeat(slices.ends_N, lengths_N) - 1 - within]
    if offsets[-1] > np.iinfo(np.int32).max:
        list_type, offset_type = pa.LargeListArray, pa.int64()
    else:
        list_type, offset_type = pa.ListArray, pa.int32()
    return list_type.from_arrays(
        pa.array(offsets, offset_type), pa.array(picked), mask=pa.array(lengths_N == 0)
    )
