"""What both stores must hold after given events, and how far they are from it.

Plain Python over single events; of the code under test it uses the published codebook (a code is
what the codebook says) and the stores' own reading functions.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from feast import FeatureStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from qarm_feast.offline_store import CodeLogOfflineStore, open_code_log
from qarm_feast.repo_paths import open_feature_store
from streaming.messages import InteractionEvent, ItemEvent
from tests.stream_repo import HISTORY_LENGTH, StreamRepo

_CODE_VIEW = "item_codes_v1"
_RECENT_VIEW = "user_recent_items"
_CODE_COLUMNS = ["rq_code", "vq_code", "content_hash", "is_deleted"]
_KEYS_PER_READ = 500
_MAX_EXAMPLES = 5

Codes = tuple[tuple[int, ...], tuple[int, ...]]
"""RQ codes, VQ codes."""


class EventKey(NamedTuple):
    """What tells item events apart; the greatest of an item is its row online."""

    item_id: int
    event_timestamp: int
    content_hash: str


class InteractionRow(NamedTuple):
    """What tells interactions apart."""

    user_id: int
    item_id: int
    event_timestamp: int
    labels: tuple[bool, ...]


@dataclass
class Verdict:
    """How many rows are not as they must be."""

    rows_expected: int = 0
    lost: int = 0
    stale: int = 0
    wrong: int = 0
    duplicated: int = 0
    repeated: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Nothing is lost, stale, wrong or duplicated."""
        return not (self.lost or self.stale or self.wrong or self.duplicated)

    def add(self, kind: str, example: str) -> None:
        """Count one row as ``lost``, ``stale`` or ``wrong``."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(f"{kind}: {example}")


@dataclass(frozen=True)
class Truth:
    """Everything that must be stored."""

    codes: dict[EventKey, Codes | None]
    """Per distinct item event its codes; None for a takedown."""
    interactions: set[InteractionRow]

    def newest(self) -> dict[int, EventKey]:
        """Return each item's greatest event."""
        newest: dict[int, EventKey] = {}
        for key in self.codes:
            newest[key.item_id] = max(key, newest.get(key.item_id, key))
        return newest

    def histories(self) -> dict[int, list[tuple[int, int]]]:
        """Return each user's latest positives, (time, item), newest first."""
        positives: dict[int, set[tuple[int, int]]] = {}
        for row in self.interactions:
            if row.labels[0]:
                positives.setdefault(row.user_id, set()).add((row.event_timestamp, row.item_id))
        return {
            user: sorted(pairs, reverse=True)[:HISTORY_LENGTH] for user, pairs in positives.items()
        }


def make_truth(
    repo: StreamRepo, items: Iterable[ItemEvent], interactions: Iterable[InteractionEvent]
) -> Truth:
    """Return what both stores must hold after these events, in whatever order they came."""
    distinct = {
        EventKey(item.item_id, item.event_timestamp, reference_hash(item)): item for item in items
    }
    uploads = [key for key, item in distinct.items() if not item.is_deleted]
    codes: dict[EventKey, Codes | None] = dict.fromkeys(distinct)
    if uploads:
        encoded = repo.codebook.encode(
            np.array([key.item_id for key in uploads], dtype=np.int64),
            [key.content_hash for key in uploads],
            np.stack([_vector(distinct[key]) for key in uploads]),
        )
        rows = zip(uploads, encoded.rq_NL.tolist(), encoded.vq_NV.tolist(), strict=True)
        codes |= {key: (tuple(rq), tuple(vq)) for key, rq, vq in rows}
    rows_seen = {
        InteractionRow(event.user_id, event.item_id, event.event_timestamp, event.labels)
        for event in interactions
    }
    return Truth(codes, rows_seen)


def reference_hash(item: ItemEvent) -> str:
    """Return the content hash as DESIGN states it, written out once more."""
    if item.is_deleted:
        return "takedown"
    parts: list[tuple[str, bytes]] = []
    for name in ("title", "description", "brand", "image", "audio"):
        value = item.content.get(name)
        if value:
            parts.append((name, value if isinstance(value, bytes) else str(value).encode()))
    if item.embedding is not None:
        parts.append(("embedding", item.embedding.astype("<f4").tobytes()))
        parts.append(("encoder_version", (item.encoder_version or "").encode()))
    digest = hashlib.blake2b(digest_size=16)
    for name, value in parts:
        digest.update(f"{name}:{len(value)}:".encode() + value)
    return digest.hexdigest()


def check_stores(repo: StreamRepo, truth: Truth) -> Verdict:
    """Compare both stores with the truth, row by row."""
    store = open_feature_store(repo.directory)
    verdict = Verdict()
    _check_online_codes(store, truth, verdict)
    _check_online_histories(store, truth, verdict)
    _check_offline_codes(store, truth, verdict)
    _check_content_log(store, truth, verdict)
    _check_interaction_log(store, truth, verdict)
    return verdict


def _vector(item: ItemEvent) -> np.ndarray:
    assert item.embedding is not None, "the run's uploads all bring their vector"
    return item.embedding


def _check_online_codes(store: FeatureStore, truth: Truth, verdict: Verdict) -> None:
    newest = truth.newest()
    verdict.rows_expected += len(newest)
    found = _read_online(store, _CODE_VIEW, "item_id", sorted(newest), _CODE_COLUMNS)
    for item_id, key in newest.items():
        place = f"item {item_id} online"
        if item_id not in found:
            verdict.add("lost", f"{place}: nothing, expected {key}")
            continue
        micros, values = found[item_id]
        stored = EventKey(item_id, micros, values["content_hash"].string_val)
        if stored < key:
            verdict.add("stale", f"{place}: {stored}, expected {key}")
        elif stored > key:
            verdict.add("wrong", f"{place}: {stored}, expected {key}")
        elif _codes_of(values) != truth.codes[key]:
            verdict.add("wrong", f"{place}: {_codes_of(values)}, expected {truth.codes[key]}")


def _check_online_histories(store: FeatureStore, truth: Truth, verdict: Verdict) -> None:
    histories = truth.histories()
    verdict.rows_expected += len(histories)
    names = ["item_ids", "item_timestamps"]
    found = _read_online(store, _RECENT_VIEW, "user_id", sorted(histories), names)
    for user_id, expected in histories.items():
        place = f"user {user_id} online"
        if user_id not in found:
            verdict.add("lost", f"{place}: nothing, expected {expected}")
            continue
        lists = [tuple(found[user_id][1][name].int64_list_val.val) for name in names]
        stored = list(zip(lists[1], lists[0], strict=True))
        if stored != expected:
            # A list that lacks a pair was not brought up to date; any other was made wrong.
            kind = "stale" if set(stored) <= _all_pairs(truth, user_id) else "wrong"
            verdict.add(kind, f"{place}: {stored}, expected {expected}")


def _all_pairs(truth: Truth, user_id: int) -> set[tuple[int, int]]:
    rows = truth.interactions
    return {(r.event_timestamp, r.item_id) for r in rows if r.user_id == user_id and r.labels[0]}


def _check_offline_codes(store: FeatureStore, truth: Truth, verdict: Verdict) -> None:
    verdict.rows_expected += len(truth.codes)
    source = store.get_feature_view(_CODE_VIEW).batch_source
    job = CodeLogOfflineStore.pull_all_from_table_or_query(
        store.config, source, ["item_id"], _CODE_COLUMNS, "event_timestamp", "created"
    )
    rows = _with_micros(job.to_arrow()).to_pylist()
    stored: dict[EventKey, Codes | None] = {}
    for row in rows:
        key = EventKey(row["item_id"], row["event_timestamp"], row["content_hash"])
        stored[key] = None if row["is_deleted"] else (tuple(row["rq_code"]), tuple(row["vq_code"]))
    verdict.duplicated += len(rows) - len(stored)
    verdict.repeated += open_code_log(store.config).read(_CODE_VIEW).num_rows - len(rows)
    _compare_sets("offline codes", set(truth.codes), set(stored), verdict)
    for key in truth.codes.keys() & stored.keys():
        if stored[key] != truth.codes[key]:
            verdict.add("wrong", f"{key} offline: {stored[key]}, expected {truth.codes[key]}")


def _check_content_log(store: FeatureStore, truth: Truth, verdict: Verdict) -> None:
    verdict.rows_expected += len(truth.codes)
    names = ["item_id", "event_timestamp", "content_hash"]
    rows = _with_micros(open_code_log(store.config).read("item_content_log", names))
    stored = {EventKey(**row) for row in rows.to_pylist()}
    # Rows that only the encoder refused stand here as well: a later encoder may read them.
    _compare_sets("content log", set(truth.codes), stored & truth.codes.keys(), verdict)


def _check_interaction_log(store: FeatureStore, truth: Truth, verdict: Verdict) -> None:
    verdict.rows_expected += len(truth.interactions)
    names = ["user_id", "item_id", "event_timestamp", "is_click", "is_like"]
    rows = _with_micros(open_code_log(store.config).read("interaction_log", names)).to_pylist()
    stored = {
        InteractionRow(
            row["user_id"],
            row["item_id"],
            row["event_timestamp"],
            (row["is_click"], row["is_like"]),
        )
        for row in rows
    }
    verdict.repeated += len(rows) - len(stored)
    _compare_sets("interaction log", truth.interactions, stored, verdict)


def _compare_sets(place: str, expected: set[Any], stored: set[Any], verdict: Verdict) -> None:
    for row in sorted(expected - stored):
        verdict.add("lost", f"{row}, {place}")
    for row in sorted(stored - expected):
        verdict.add("wrong", f"{row}, {place}: nobody sent it")


def _read_online(
    store: FeatureStore, view_name: str, join_key: str, ids: Sequence[int], names: list[str]
) -> dict[int, tuple[int, dict[str, Value]]]:
    """Return event time and features as Feast's own reader gives them, takedowns too."""
    view = store.get_feature_view(view_name)
    found: dict[int, tuple[int, dict[str, Value]]] = {}
    for start in range(0, len(ids), _KEYS_PER_READ):
        part = ids[start : start + _KEYS_PER_READ]
        keys = [
            EntityKey(join_keys=[join_key], entity_values=[Value(int64_val=entity)])
            for entity in part
        ]
        # Feast's redis store adds to the list of names that it is given.
        read = store.provider.online_store.online_read(store.config, view, keys, [*names])
        for entity, (moment, values) in zip(part, read, strict=True):
            # Redis reads an absent row as unset values.
            if values and all(value.WhichOneof("val") for value in values.values()):
                micros = round(moment.timestamp() * 1_000_000)
                found[entity] = (micros, values)
    return found


def _codes_of(values: dict[str, Value]) -> Codes | None:
    if values["is_deleted"].bool_val:
        return None
    return (
        tuple(values["rq_code"].int64_list_val.val),
        tuple(values["vq_code"].int64_list_val.val),
    )


def _with_micros(rows: pa.Table) -> pa.Table:
    index = rows.schema.get_field_index("event_timestamp")
    return rows.set_column(index, "event_timestamp", rows["event_timestamp"].cast(pa.int64()))
