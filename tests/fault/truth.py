"""What both stores must hold after given events, and how far they are from it.

Plain Python over single events; of the code under test it uses the published codebook (a code is
what the codebook says) and the stores' own reading functions.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from feast import FeatureStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from qarm_feast.offline_store import CodeLogOfflineStore, open_code_log
from qarm_feast.repo_paths import open_feature_store
from streaming.messages import ItemEvent, UserErasure
from tests.fault.traffic import UserEvent
from tests.stream_repo import HISTORY_LENGTH, StreamRepo

_CODE_VIEW = "item_codes_v1"
_RECENT_VIEW = "user_recent_items"
_CODE_COLUMNS = ["rq_code", "vq_code", "content_hash", "is_deleted"]
_KEYS_PER_READ = 500
_MAX_EXAMPLES = 5
_ERASURE_MARK = -1

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
    erasures: frozenset[UserErasure] = frozenset()

    def newest(self) -> dict[int, EventKey]:
        """Return each item's greatest event."""
        newest: dict[int, EventKey] = {}
        for key in self.codes:
            newest[key.item_id] = max(key, newest.get(key.item_id, key))
        return newest

    def histories(self) -> dict[int, list[tuple[int, int]]]:
        """Return each user's latest positives, (time, item), newest first.

        Those up to the user's last erasure are left out, and it stands after the others.
        """
        erased = self.erased_until()
        pairs = {user: {(time_us, _ERASURE_MARK)} for user, time_us in erased.items()}
        for row in self.interactions:
            if row.labels[0] and row.event_timestamp > erased.get(row.user_id, -1):
                pairs.setdefault(row.user_id, set()).add((row.event_timestamp, row.item_id))
        return {user: sorted(own, reverse=True)[:HISTORY_LENGTH] for user, own in pairs.items()}

    def erased_until(self) -> dict[int, int]:
        """Return the time of each erased user's last erasure."""
        erased: dict[int, int] = {}
        for user, time_us in self.erasures:
            erased[user] = max(time_us, erased.get(user, time_us))
        return erased

    def kept_interactions(self) -> set[InteractionRow]:
        """Return those that no erasure covers; a compaction removes the others sooner or later."""
        erased = self.erased_until()
        return {
            row for row in self.interactions if row.event_timestamp > erased.get(row.user_id, -1)
        }

    def all_pairs(self, user_id: int) -> set[tuple[int, int]]:
        """Return every pair that could ever stand in the user's list."""
        own = [row for row in self.interactions if row.user_id == user_id and row.labels[0]]
        pairs = {(row.event_timestamp, row.item_id) for row in own}
        return pairs | {(at, _ERASURE_MARK) for user, at in self.erasures if user == user_id}


def make_truth(
    repo: StreamRepo, items: Iterable[ItemEvent], interactions: Iterable[UserEvent]
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
    events = set(interactions)
    erasures = frozenset(event for event in events if isinstance(event, UserErasure))
    rows_seen = {
        InteractionRow(event.user_id, event.item_id, event.event_timestamp, event.labels)
        for event in events
        if not isinstance(event, UserErasure)
    }
    return Truth(codes, rows_seen, erasures)


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
    _check_offline_histories(store, truth, verdict)
    _check_offline_codes(store, truth, verdict)
    _check_content_log(store, truth, verdict)
    _check_interaction_log(store, truth, verdict)
    _check_erasure_log(store, truth, verdict)
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
    users, names = sorted(truth.histories()), ["item_timestamps", "item_ids"]
    stored: dict[int, list[tuple[int, int]]] = {}
    for user, (_, values) in _read_online(store, _RECENT_VIEW, "user_id", users, names).items():
        lists = [values[name].int64_list_val.val for name in names]
        stored[user] = list(zip(*lists, strict=True))
    _compare_histories("online", stored, truth, verdict)


def _check_offline_histories(store: FeatureStore, truth: Truth, verdict: Verdict) -> None:
    """Check the lists that a materialization would take online."""
    job = CodeLogOfflineStore.pull_latest_from_table_or_query(
        store.config,
        store.get_feature_view(_RECENT_VIEW).batch_source,
        ["user_id"],
        ["item_ids", "item_timestamps"],
        "event_timestamp",
        None,
        start_date=datetime(1980, 1, 1, tzinfo=UTC),
        end_date=datetime(2200, 1, 1, tzinfo=UTC),
    )
    stored = {
        row["user_id"]: list(zip(row["item_timestamps"], row["item_ids"], strict=True))
        for row in job.to_arrow().to_pylist()
    }
    _compare_histories("offline", stored, truth, verdict)


def _compare_histories(
    place: str, stored: dict[int, list[tuple[int, int]]], truth: Truth, verdict: Verdict
) -> None:
    histories = truth.histories()
    verdict.rows_expected += len(histories)
    for user_id, expected in histories.items():
        found = stored.get(user_id)
        if found is None:
            verdict.add("lost", f"user {user_id} {place}: nothing, expected {expected}")
        elif found != expected:
            # A list that lacks a pair was not brought up to date; any other was made wrong.
            kind = "stale" if set(found) <= truth.all_pairs(user_id) else "wrong"
            verdict.add(kind, f"user {user_id} {place}: {found}, expected {expected}")


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
    kept = truth.kept_interactions()
    _compare_sets("interaction log", kept, stored - (truth.interactions - kept), verdict)


def _check_erasure_log(store: FeatureStore, truth: Truth, verdict: Verdict) -> None:
    verdict.rows_expected += len(truth.erasures)
    log = open_code_log(store.config)
    rows = []
    if log.exists("user_erasure_log"):
        read = log.read("user_erasure_log", ["user_id", "event_timestamp"])
        rows = [UserErasure(**row) for row in _with_micros(read).to_pylist()]
    verdict.repeated += len(rows) - len(set(rows))
    _compare_sets("erasure log", set(truth.erasures), set(rows), verdict)


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
