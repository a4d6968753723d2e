"""What both online stores share: a view's layout, rows made ready to store, and list merging.

Shape letters in this file: N rows or entities, M values of all rows together.
May import: feast, numpy, pyarrow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from feast import FeatureView
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import compute_versioned_name
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import RepoConfig

from qarm_feast import schema, view_tags
from qarm_feast.erasure import outlives_erasure
from qarm_feast.errors import DataError
from qarm_feast.online_stores.blobs import Blobs, Ints, list_blobs, split_blobs
from qarm_feast.online_stores.codec import (
    Bools,
    Column,
    cast_values,
    decode_values,
    encode_int64_keys,
    encode_values,
)

CONTENT_HASH = "content_hash"
IS_DELETED = "is_deleted"
ITEM_IDS = "item_ids"
ITEM_TIMESTAMPS = "item_timestamps"

FeastRow = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
"""One row as Feast's own writers hand it to a store."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LARGEST_MICROS = 2**53
"""Redis compares times as doubles, which are exact up to here (the year 2255)."""


@dataclass(frozen=True)
class ViewLayout:
    """What the stores need to know of one feature view.

    Attributes:
        name: The name that rows are stored under, with Feast's version suffix if any.
        join_keys: The entity's key columns.
        value_types: Feast's value type name of each feature, in the view's order.
        history_length: Longest list of a view whose lists are merged in the store, else ``None``.
        ttl_micros: How long a row is served after its event time; ``None``: for ever.
    """

    name: str
    join_keys: tuple[str, ...]
    value_types: dict[str, str]
    history_length: int | None
    ttl_micros: int | None = None

    @property
    def has_content_hash(self) -> bool:
        """Whether rows of equal time are ordered by their content hash."""
        return self.value_types.get(CONTENT_HASH) == "STRING"

    @property
    def has_deletion_flag(self) -> bool:
        """Whether a row can say that its entity was taken down."""
        return self.value_types.get(IS_DELETED) == "BOOL"


@dataclass(frozen=True)
class EncodedRows:
    """Rows of distinct entities, ready to store."""

    keys: Blobs
    values: dict[str, Blobs]
    event_micros_N: Ints
    created_micros_N: Ints | None

    def take(self, rows_K: Ints) -> "EncodedRows":
        """Return the rows at these places, in this order."""
        if np.array_equal(rows_K, np.arange(len(self.keys))):
            return self
        rows = pa.array(rows_K)
        created_N = self.created_micros_N
        return EncodedRows(
            keys=self.keys.take(rows),
            values={name: blobs.take(rows) for name, blobs in self.values.items()},
            event_micros_N=self.event_micros_N[rows_K],
            created_micros_N=None if created_N is None else created_N[rows_K],
        )

    def hashes(self) -> list[bytes]:
        """Return the content hash of each row, empty where the view has none."""
        blobs = self.values.get(CONTENT_HASH)
        if blobs is None:
            return [b""] * len(self.keys)
        return [text_of(blob) for blob in split_blobs(blobs)]


def view_layout(config: RepoConfig, view: FeatureView) -> ViewLayout:
    """Return the layout of a view.

    Args:
        config: Feast's repository configuration.
        view: The view.

    Returns:
        What the stores need to know of it.

    Raises:
        DataError: If the view asks for a merge that its features or tags do not allow.
    """
    value_types = {field.name: field.dtype.to_value_type().name for field in view.features}
    history_length = None
    if view.tags.get(view_tags.MERGE) == view_tags.RECENT_ITEMS_KIND:
        expected = {ITEM_IDS: "INT64_LIST", ITEM_TIMESTAMPS: "INT64_LIST"}
        text = view.tags.get(view_tags.HISTORY_LENGTH, "")
        if value_types != expected or not text.isdecimal() or int(text) < 1:
            raise DataError(
                f"view {view.name} is tagged {view_tags.MERGE}={view_tags.RECENT_ITEMS_KIND}; it "
                f"needs the features {expected} (has {value_types}) and a positive tag "
                f"{view_tags.HISTORY_LENGTH} (has {text!r}); mend its definition and run "
                "`feast apply`"
            )
        history_length = int(text)
    name = compute_versioned_name(view, config.registry.enable_online_feature_view_versioning)
    # Feast's zero means for ever as well.
    ttl_micros = view.ttl // _MICROSECOND if view.ttl else None
    return ViewLayout(name, tuple(view.join_keys), value_types, history_length, ttl_micros)


def text_of(blob: bytes | None) -> bytes:
    """Return the UTF-8 bytes of a serialized string value; nothing for a null."""
    if not blob:
        return b""
    body = 2 if blob[1] < 0x80 else 3 if blob[2] < 0x80 else 4
    return blob[body:]


def encode_ids(layout: ViewLayout, ids_N: npt.ArrayLike) -> Blobs:
    """Return the entity keys of ids of a view that has one int64 join key.

    Args:
        layout: The view's layout.
        ids_N: A vector of int64.

    Returns:
        One key per id.

    Raises:
        DataError: If the ids are not integers of 64 bits, or the view is of another shape.
    """
    ids = np.asarray(ids_N)
    if len(layout.join_keys) != 1:
        raise DataError(f"view {layout.name} has the join keys {layout.join_keys}; one is needed")
    if ids.size and (ids.ndim != 1 or ids.dtype != np.int64):
        raise DataError(
            f"ids of {layout.join_keys[0]!r} are {ids.dtype} of shape {ids.shape}, expected a "
            "vector of int64; convert them with `np.asarray(ids, dtype=np.int64)`"
        )
    return encode_int64_keys(layout.join_keys[0], ids.reshape(-1))


@dataclass(frozen=True)
class CheckedRows:
    """Rows of distinct entities whose columns fit the view, not encoded yet."""

    layout: ViewLayout
    entity_ids_N: Ints
    columns: dict[str, pa.Array]
    event_micros_N: Ints
    created_micros_N: Ints | None

    def __len__(self) -> int:
        return len(self.entity_ids_N)

    def encode(self, start: int, stop: int) -> EncodedRows:
        """Return some of the rows, ready to store."""
        part = slice(start, stop)
        created_N = self.created_micros_N
        return EncodedRows(
            keys=encode_ids(self.layout, self.entity_ids_N[part]),
            values={
                name: encode_values(self.layout.value_types[name], column[part])
                for name, column in self.columns.items()
            },
            event_micros_N=self.event_micros_N[part],
            created_micros_N=None if created_N is None else created_N[part],
        )


def check_table(layout: ViewLayout, table: pa.Table, by_key: bool = False) -> CheckedRows:
    """Return a table's rows, the greatest compare key of each entity only.

    Args:
        layout: The view's layout.
        table: The view's join key (int64), all its features, ``event_timestamp`` and, if known,
            ``created``; both times carry a zone.
        by_key: Bring the rows into ascending byte order of their keys; else any order will do.

    Returns:
        One row per entity; everything that can be wrong with them was looked at.

    Raises:
        DataError: If a column is missing, of the wrong type, or null where it must not be.
    """
    ids_N, table = _checked_columns(layout, table)
    micros_N = _micros(table, schema.EVENT_TIMESTAMP)
    key_ranks_N = ids_N.byteswap().view(np.uint64)
    if by_key or _has_repeats(key_ranks_N):
        rows_K = _greatest_rows(key_ranks_N, micros_N, lambda: _hashes(layout, table))
        ids_N, micros_N, table = ids_N[rows_K], micros_N[rows_K], table.take(pa.array(rows_K))
    return CheckedRows(
        layout=layout,
        entity_ids_N=ids_N,
        columns={name: _checked_feature(layout, table, name) for name in layout.value_types},
        event_micros_N=micros_N,
        created_micros_N=_created(table),
    )


def encode_feast_rows(config: RepoConfig, data: Sequence[FeastRow]) -> list[EncodedRows]:
    """Return rows that came through Feast's own interface, one group per set of features."""
    groups: dict[tuple[str, ...], list[FeastRow]] = {}
    for row in data:
        groups.setdefault(tuple(row[1]), []).append(row)
    return [_encode_group(config, names, group) for names, group in groups.items()]


def merge_recent(
    layout: ViewLayout, stored: dict[str, list[bytes]], written: "RecentItems"
) -> EncodedRows:
    """Return the rows whose stored lists change when the written pairs join them.

    Args:
        layout: Layout of the merged view.
        stored: Both lists now stored for ``written.keys``, empty blobs where there are none.
        written: Pairs to add.

    Returns:
        Lists of distinct pairs, newest first by (timestamp, item id), cut to the history length;
        what an erasure among the pairs covers is left out.
    """
    assert layout.history_length is not None
    pairs = _with_stored(written, stored)
    owners_M, timestamps_M, item_ids_M = pairs.newest(layout.history_length)
    lengths_N = np.bincount(owners_M, minlength=len(written.keys))
    merged = EncodedRows(
        keys=list_blobs(written.keys),
        values={
            ITEM_IDS: _encode_lists(item_ids_M, lengths_N),
            ITEM_TIMESTAMPS: _encode_lists(timestamps_M, lengths_N),
        },
        event_micros_N=_first_of_each(timestamps_M, lengths_N),
        created_micros_N=written.created_micros_N,
    )
    is_changed_N = np.array(
        [
            new_row != old_row
            for new_row, old_row in zip(
                zip(*map(split_blobs, merged.values.values()), strict=True),
                zip(*(stored[name] for name in merged.values), strict=True),
                strict=True,
            )
        ],
        dtype=np.bool_,
    )
    return merged.take(np.flatnonzero(is_changed_N & (lengths_N > 0)))


@dataclass(frozen=True)
class RecentItems:
    """Pairs (timestamp, item) of several users; ``owners_M`` points into ``keys``."""

    keys: list[bytes]
    owners_M: Ints
    timestamps_M: Ints
    item_ids_M: Ints
    created_micros_N: Ints | None

    def only(self, keys: set[bytes]) -> "RecentItems":
        """Return the pairs of some of the keys."""
        is_kept_N = np.array([key in keys for key in self.keys], dtype=np.bool_)
        is_kept_M = is_kept_N[self.owners_M]
        created_N = self.created_micros_N
        return RecentItems(
            keys=[key for key in self.keys if key in keys],
            owners_M=(np.cumsum(is_kept_N) - 1)[self.owners_M[is_kept_M]],
            timestamps_M=self.timestamps_M[is_kept_M],
            item_ids_M=self.item_ids_M[is_kept_M],
            created_micros_N=None if created_N is None else created_N[is_kept_N],
        )

    def newest(self, history_length: int) -> tuple[Ints, Ints, Ints]:
        """Return owners, timestamps and items, distinct, newest first within each owner, cut.

        Nothing that an owner's erasure covers is among them; its mark may be, as the last.
        """
        outlives_M = outlives_erasure(self.owners_M, self.timestamps_M, self.item_ids_M)
        order_M = np.lexsort((self.item_ids_M, self.timestamps_M, -self.owners_M))[::-1]
        order_M = order_M[outlives_M[order_M]]
        columns = np.stack([self.owners_M, self.timestamps_M, self.item_ids_M])[:, order_M]
        is_new_M = np.ones(len(order_M), dtype=np.bool_)
        is_new_M[1:] = (columns[:, 1:] != columns[:, :-1]).any(axis=0)
        columns = columns[:, is_new_M]
        starts_N = np.searchsorted(columns[0], np.arange(len(self.keys)))
        ranks_M = np.arange(columns.shape[1]) - starts_N[columns[0]]
        owners_M, timestamps_M, item_ids_M = columns[:, ranks_M < history_length]
        return owners_M, timestamps_M, item_ids_M


def recent_items_of_table(layout: ViewLayout, table: pa.Table) -> RecentItems:
    """Return the pairs of a table of list rows; several rows of one user join.

    Args:
        layout: Layout of a merged view.
        table: As in :func:`encode_table`.

    Returns:
        All pairs, of each user once or more.

    Raises:
        DataError: If a column is missing or of the wrong type, or two lists differ in length.
    """
    ids_N, table = _checked_columns(layout, table)
    _micros(table, schema.EVENT_TIMESTAMP)
    swapped_U, owners_N = np.unique(ids_N.byteswap().view(np.uint64), return_inverse=True)
    values = {
        name: encode_values(layout.value_types[name], _checked_feature(layout, table, name))
        for name in layout.value_types
    }
    return _recent_items(
        split_blobs(encode_ids(layout, swapped_U.view(np.int64).byteswap())),
        owners_N,
        {name: split_blobs(blobs) for name, blobs in values.items()},
        _created(table),
    )


def recent_items_of_feast_rows(config: RepoConfig, data: Sequence[FeastRow]) -> RecentItems:
    """Return the pairs of list rows that came through Feast's own interface."""
    row_keys, created_N = _keys_of(config, data), _created_of(data)
    keys = sorted(set(row_keys))
    ranks = {key: rank for rank, key in enumerate(keys)}
    owners_N = np.array([ranks[key] for key in row_keys], dtype=np.int64)
    empty = Value()
    values = {
        name: [row[1].get(name, empty).SerializeToString() for row in data]
        for name in (ITEM_IDS, ITEM_TIMESTAMPS)
    }
    return _recent_items(keys, owners_N, values, created_N)


@dataclass(frozen=True)
class ColumnBatch:
    """Features of N entities as columns; an absent entity has length 0 in every column."""

    present_N: Bools
    columns: dict[str, Column]


def decode_batch(
    layout: ViewLayout,
    feature_names: Sequence[str],
    blobs: Mapping[str, Sequence[bytes | None]],
    is_served_N: Bools | None = None,
) -> ColumnBatch:
    """Return the columns of the asked features; what was taken down or erased is absent.

    Args:
        layout: The view's layout.
        feature_names: Features asked for; ``blobs`` holds those of :func:`stored_features`.
        blobs: Stored values by feature, one per entity, ``None`` where the store has none. An
            entity without any is absent; an empty value is a null of one that is there.
        is_served_N: Which entities are young enough, see :func:`is_young`; ``None``: all.

    Returns:
        One column per asked feature.
    """
    present_N = _is_stored(list(blobs.values()))
    if is_served_N is not None:
        present_N = present_N & is_served_N
    if layout.has_deletion_flag:
        flag = decode_values("BOOL", blobs[IS_DELETED])
        is_deleted_N = np.zeros(len(present_N), dtype=np.bool_)
        is_deleted_N[flag.lengths_N > 0] = flag.values
        present_N = present_N & ~is_deleted_N
    columns = {}
    for name in feature_names:
        kept = blobs[name]
        if not present_N.all():
            kept = [blob if here else None for blob, here in zip(kept, present_N, strict=True)]
        columns[name] = decode_values(layout.value_types[name], kept)
    batch = ColumnBatch(present_N, columns)
    if layout.history_length is None:
        return batch
    item_ids = columns.get(ITEM_IDS) or decode_values("INT64_LIST", blobs[ITEM_IDS])
    return _without_marks(batch, item_ids)


def is_young(layout: ViewLayout, event_micros: Sequence[int | None], now: datetime | None) -> Bools:
    """Tell which rows of a view with a time to live are within it.

    Args:
        layout: Layout of such a view.
        event_micros: Event time of each row, ``None`` where there is none.
        now: The moment to judge by, with a zone; ``None``: the system's clock.

    Returns:
        One flag per row.
    """
    assert layout.ttl_micros is not None
    oldest = _micros_of(now or datetime.now(UTC)) - layout.ttl_micros
    return np.array([micros is not None and micros >= oldest for micros in event_micros], np.bool_)


def stored_features(layout: ViewLayout, feature_names: Sequence[str]) -> list[str]:
    """Return the features that a read must fetch: the asked ones, and those that hide others.

    Args:
        layout: The view's layout.
        feature_names: Features asked for.

    Returns:
        Distinct names.

    Raises:
        DataError: If the view has no such feature.
    """
    unknown = [name for name in feature_names if name not in layout.value_types]
    if unknown:
        raise DataError(
            f"view {layout.name} has no feature {unknown[0]!r} (it has: "
            f"{', '.join(layout.value_types)}); check the name or run `feast apply`"
        )
    names = list(dict.fromkeys(feature_names))
    if layout.has_deletion_flag and IS_DELETED not in names:
        names.append(IS_DELETED)
    if layout.history_length is not None and ITEM_IDS not in names:
        names.append(ITEM_IDS)
    return names


def _is_stored(columns: list[Sequence[bytes | None]]) -> Bools:
    """Tell which entities have a value, be it a null, in one column at least."""
    is_stored_N = np.ones(len(columns[0]), dtype=np.bool_)
    # Most columns have all: looking for None at once is much faster than value by value.
    if all(None in column for column in columns):
        rows = zip(*columns, strict=True)
        is_stored_N[:] = [any(blob is not None for blob in row) for row in rows]
    return is_stored_N


def _without_marks(batch: ColumnBatch, item_ids: Column) -> ColumnBatch:
    """Return lists without the marks of erasures; a user with nothing else is absent."""
    is_item_M = item_ids.values != schema.ERASURE_MARK
    if is_item_M.all():
        return batch
    owners_M = np.repeat(np.arange(len(batch.present_N)), item_ids.lengths_N)
    lengths_N = np.bincount(owners_M[is_item_M], minlength=len(batch.present_N))
    is_erased_N = (item_ids.lengths_N > 0) & (lengths_N == 0)
    columns = {
        name: Column(column.values[is_item_M], lengths_N) for name, column in batch.columns.items()
    }
    return ColumnBatch(batch.present_N & ~is_erased_N, columns)


def _checked_columns(layout: ViewLayout, table: pa.Table) -> tuple[Ints, pa.Table]:
    wanted = [*layout.join_keys, *layout.value_types, schema.EVENT_TIMESTAMP]
    missing = [name for name in wanted if name not in table.schema.names]
    if missing or len(layout.join_keys) != 1:
        raise DataError(
            f"a table for view {layout.name} lacks the columns {missing}; it needs one join key "
            f"and {wanted}, and has {table.schema.names}"
        )
    ids = table[layout.join_keys[0]]
    if ids.type != pa.int64() or ids.null_count:
        raise DataError(
            f"view {layout.name}: column {layout.join_keys[0]!r} is {ids.type} with "
            f"{ids.null_count} nulls, expected int64 without nulls; ids are int64 everywhere"
        )
    return ids.to_numpy(), table


def _micros(table: pa.Table, name: str) -> Ints:
    column = table[name]
    if not pa.types.is_timestamp(column.type) or column.type.tz is None or column.null_count:
        raise DataError(
            f"column {name!r} is {column.type} with {column.null_count} nulls, expected a "
            "timestamp with a zone and no null; cast it to timestamp[us, UTC]"
        )
    micros_N: Ints = pc.cast(column, schema.TIMESTAMP, safe=False).cast(pa.int64()).to_numpy()
    if len(micros_N) and np.abs(micros_N).max() >= _LARGEST_MICROS:
        raise DataError(f"column {name!r} holds a time after 2255 or before 1684; mend its unit")
    return micros_N


def _created(table: pa.Table) -> Ints | None:
    return _micros(table, schema.CREATED) if schema.CREATED in table.schema.names else None


def _checked_feature(layout: ViewLayout, table: pa.Table, name: str) -> pa.Array:
    try:
        return cast_values(layout.value_types[name], table[name])
    except DataError as error:
        raise DataError(f"view {layout.name}, column {name!r}: {error}") from error


def _hashes(layout: ViewLayout, table: pa.Table) -> list[bytes]:
    texts = table[CONTENT_HASH].to_pylist() if layout.has_content_hash else [""] * len(table)
    return [(text or "").encode() for text in texts]


def _has_repeats(values_N: npt.NDArray[Any]) -> bool:
    sorted_N = np.sort(values_N)
    return bool((sorted_N[1:] == sorted_N[:-1]).any())


def _greatest_rows(
    key_ranks_N: npt.NDArray[Any], micros_N: Ints, hashes: Callable[[], list[bytes]]
) -> Ints:
    """Return one row per key in key order: the greatest (time, hash), the first of equal ones."""
    order_N: Ints = np.argsort(key_ranks_N, kind="stable")
    ranks_N = key_ranks_N[order_N]
    if not (ranks_N[1:] == ranks_N[:-1]).any():
        return order_N
    hash_ranks_N = np.unique(np.array(hashes(), dtype=np.object_), return_inverse=True)[1]
    backwards_N = -np.arange(len(order_N))
    order_N = np.lexsort((backwards_N, hash_ranks_N, micros_N, key_ranks_N))
    ranks_N = key_ranks_N[order_N]
    is_last_N = np.append(ranks_N[1:] != ranks_N[:-1], True)
    last_K: Ints = order_N[is_last_N]
    return last_K


def _encode_group(config: RepoConfig, names: tuple[str, ...], group: list[FeastRow]) -> EncodedRows:
    keys = _keys_of(config, group)
    ranks = {key: rank for rank, key in enumerate(sorted(set(keys)))}
    values = {
        name: list_blobs([row[1][name].SerializeToString() for row in group]) for name in names
    }
    rows = EncodedRows(
        keys=list_blobs(keys),
        values=values,
        event_micros_N=np.array([_micros_of(row[2]) for row in group], dtype=np.int64),
        created_micros_N=_created_of(group),
    )
    key_ranks_N = np.array([ranks[key] for key in keys], dtype=np.int64)
    rows_K = _greatest_rows(key_ranks_N, rows.event_micros_N, rows.hashes)
    return rows.take(rows_K)


def _keys_of(config: RepoConfig, data: Sequence[FeastRow]) -> list[bytes]:
    version = config.entity_key_serialization_version
    return [serialize_entity_key(row[0], entity_key_serialization_version=version) for row in data]


def _micros_of(moment: datetime) -> int:
    """Return microseconds since the epoch; a naive time is UTC, as everywhere in Feast."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (aware - _EPOCH) // _MICROSECOND


def _created_of(data: Sequence[FeastRow]) -> Ints | None:
    created = [row[3] for row in data]
    known = [_micros_of(moment) for moment in created if moment is not None]
    return np.array(known, dtype=np.int64) if len(known) == len(created) else None


def _recent_items(
    keys: list[bytes], owners_N: Ints, values: dict[str, list[bytes]], created_N: Ints | None
) -> RecentItems:
    lengths_N, item_ids_M, timestamps_M = _decode_pairs(values)
    created_U = None
    if created_N is not None:
        created_U = np.full(len(keys), np.iinfo(np.int64).min)
        np.maximum.at(created_U, owners_N, created_N)
    return RecentItems(keys, np.repeat(owners_N, lengths_N), timestamps_M, item_ids_M, created_U)


def _decode_pairs(values: dict[str, list[bytes]]) -> tuple[Ints, Ints, Ints]:
    items = decode_values("INT64_LIST", values[ITEM_IDS])
    timestamps = decode_values("INT64_LIST", values[ITEM_TIMESTAMPS])
    if (items.lengths_N != timestamps.lengths_N).any():
        row = int(np.flatnonzero(items.lengths_N != timestamps.lengths_N)[0])
        raise DataError(
            f"row {row}: {items.lengths_N[row]} item_ids but {timestamps.lengths_N[row]} "
            "item_timestamps; each item needs its time"
        )
    return items.lengths_N, items.values, timestamps.values


def _with_stored(written: RecentItems, stored: dict[str, list[bytes]]) -> RecentItems:
    lengths_N, item_ids_M, timestamps_M = _decode_pairs(stored)
    owners_M = np.repeat(np.arange(len(written.keys)), lengths_N)
    return RecentItems(
        keys=written.keys,
        owners_M=np.concatenate([owners_M, written.owners_M]),
        timestamps_M=np.concatenate([timestamps_M, written.timestamps_M]),
        item_ids_M=np.concatenate([item_ids_M, written.item_ids_M]),
        created_micros_N=written.created_micros_N,
    )


def _encode_lists(values_M: Ints, lengths_N: Ints) -> Blobs:
    offsets = np.concatenate([[0], np.cumsum(lengths_N)])
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values_M))
    return encode_values("INT64_LIST", lists)


def _first_of_each(values_M: Ints, lengths_N: Ints) -> Ints:
    starts_N = np.cumsum(lengths_N) - lengths_N
    first_N: Ints = np.append(values_M, 0)[starts_N]
    return first_N
