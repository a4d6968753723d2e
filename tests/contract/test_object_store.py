"""Codebook registry and offline log: one suite over a local folder and a real S3 server."""

import errno
import itertools
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from feast.data_source import PushMode
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

from qarm_feast import artifact as artifact_module
from qarm_feast import compaction, log_parts, object_store, registry, rollout, shared_state
from qarm_feast.artifact import read_verified
from qarm_feast.code_log import CodeLog
from qarm_feast.codebook import Codebook
from qarm_feast.codebook_cli import codebook_group
from qarm_feast.codebook_config import GateConfig
from qarm_feast.compaction import CompactionRules, Compactor, log_states
from qarm_feast.erasure import without_erased
from qarm_feast.errors import (
    CodebookError,
    CodebookNotFoundError,
    ConfigError,
    CorruptArtifactError,
    MissingDependencyError,
    ServiceUnavailableError,
)
from qarm_feast.object_store import Place, StorePath, names_in, place
from qarm_feast.offline_cli import offline_group
from qarm_feast.point_in_time import TIME
from qarm_feast.registry import (
    CodebookRegistry,
    VersionState,
    drafts_uri,
    publish_codebook,
    read_manifest,
    stored_versions,
    write_artifact,
)
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.rollout_status import Phase
from qarm_feast.schema import (
    INTERACTION_LOG,
    TIMESTAMP,
    USER_ERASURE_LOG,
    USER_ERASURE_ROWS,
    interaction_rows,
)
from qarm_feast.shared_state import LockTakenError, SharedDocument, exclusive
from qarm_feast.source_rows import FeatureRows, TimeRange, parquet_dataset
from tests.object_store_cases import (
    CODES,
    NOON,
    artifact,
    client_of,
    code_rows,
    count_requests,
    draft,
    forget_clients,
    offline_store_at,
)
from tests.object_store_server import ObjectStoreServer
from tests.stream_repo import build_repo, codebooks_uri
from tests.unit.codebook_input import NUM_COLD, NUM_ITEMS, write_project
from tests.unit.test_rollout import World
from torchrec_models.inputs import load_train_inputs
from torchrec_models.options import load_ranker_config
from torchrec_models.rows import build_training_rows

pytestmark = pytest.mark.integration

LATER = 10_000.0
DAY = "written_date=2026-01-31"
INTERACTIONS = interaction_rows(("is_like",))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStoreServer]:
    with ObjectStoreServer(tmp_path_factory.mktemp("s3")) as running:
        running.add_bucket("contract")
        yield running


@pytest.fixture
def bucket(server: ObjectStoreServer, tmp_path: Path) -> Iterator[str]:
    """A prefix of its own in a bucket that is there."""
    with client_of(server, tmp_path / "cache"):
        yield f"s3://contract/{uuid.uuid4().hex}"


@pytest.fixture(params=["disk", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "store")
    return str(request.getfixturevalue("bucket"))


class _KilledError(BaseException):
    """Stands for a kill: no handler of errors sees it, and nothing is tidied up."""


def _kill_at(number: int, patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Die before the put, create or delete of that number; return how many were asked for."""
    asked = 0

    def dying(change: Callable[..., object]) -> Callable[..., object]:
        def changed(*given: object, **options: object) -> object:
            nonlocal asked
            asked += 1
            if asked - 1 == number:
                raise _KilledError
            return change(*given, **options)

        return changed

    for name in ("put", "create", "unlink", "move"):
        patch.setattr(StorePath, name, dying(getattr(StorePath, name)))
    patch.setattr(compaction, "remove_many", dying(compaction.remove_many))
    # Locks have tests of their own.
    for module in (registry, rollout, compaction):
        patch.setattr(module, "exclusive", lambda *_, **__: nullcontext(lambda: None))
    return lambda: asked


# Objects


def test_of_many_who_create_one_object_at_once_one_wins(bucket: str) -> None:
    def create(number: int, key: int) -> bool:
        return (place(bucket) / f"{key}").create(b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        wins = [sum(pool.map(create, range(8), [key] * 8)) for key in range(6)]

    assert wins == [1] * 6


def test_a_create_whose_answer_was_lost_counts_as_done(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place(bucket) / "x"
    assert isinstance(path, StorePath)
    path.put(b"mine")

    assert path.create(b"mine")
    assert not path.create(b"other")
    assert path.read_bytes() == b"mine"


def test_a_store_that_overwrites_instead_of_creating_is_refused(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft(bucket)
    monkeypatch.setattr(StorePath, "_create_once", lambda path, payload: path.put(payload) or True)

    with pytest.raises(ConfigError, match=r"If-None-Match.*use a store that does"):
        publish_codebook(bucket, "v1", GateConfig())
    assert stored_versions(drafts_uri(bucket)) == ["v1"]
    assert names_in(place(bucket) / "registry.json") == []


# The registry


def test_versions_walk_through_their_states_and_are_purged(uri: str) -> None:
    for version in ("v1", "v2", "v3"):
        draft(uri, version, version.encode())
        publish_codebook(uri, version, GateConfig())
    codebooks = CodebookRegistry(uri)
    codebooks.set_state("v2", VersionState.DEFAULT)
    codebooks.set_state("v1", VersionState.RETIRED)

    removed = codebooks.purge("v1")

    assert {name: state.value for name, state in codebooks.states().items()} == {
        "v1": "purged",
        "v2": "default",
        "v3": "staged",
    }
    assert [str(folder) for folder in removed] == [f"{uri}/v1", f"{uri}/.reports/v1"]
    assert stored_versions(uri) == ["v2", "v3"]
    assert stored_versions(drafts_uri(uri)) == []
    with pytest.raises(CodebookError, match="'v1' was purged"):
        publish_codebook(uri, "v1", GateConfig())
    with pytest.raises(CodebookNotFoundError):
        read_manifest(uri, "v1")


def test_a_stored_version_never_changes(uri: str) -> None:
    write_artifact(uri, *artifact("v1"))
    write_artifact(uri, *artifact("v1"))

    with pytest.raises(CodebookError, match="already stored"):
        write_artifact(uri, *artifact("v1", b"other"))
    assert read_manifest(uri, "v1") == artifact("v1")[0]


def test_publishers_at_the_same_time_lose_no_state(uri: str) -> None:
    versions = [f"v{number}" for number in range(1, 6)]
    for version in versions:
        write_artifact(uri, *artifact(version, version.encode()))

    with ThreadPoolExecutor(5) as pool:
        states = list(pool.map(lambda version: CodebookRegistry(uri).publish(version), versions))

    assert sorted(state.value for state in states) == ["default"] + ["staged"] * 4
    assert sorted(CodebookRegistry(uri).states()) == versions


def test_of_two_who_publish_one_name_with_other_content_the_second_is_told(uri: str) -> None:
    outcomes = []
    for content in (b"mine", b"theirs"):
        draft(uri, "v1", content)
        try:
            outcomes.append(publish_codebook(uri, "v1", GateConfig()).value)
        except CodebookError as error:
            outcomes.append(str(error))

    assert outcomes[0] == "default"
    assert "a stored version never changes" in outcomes[1] or outcomes[1] == "default"
    assert read_manifest(uri, "v1").files == artifact("v1", b"mine")[0].files


def test_a_change_that_another_one_overtook_is_refused_and_changes_nothing(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("v1", "v2"):
        write_artifact(bucket, *artifact(version, version.encode()))
        CodebookRegistry(bucket).publish(version)
    check = CodebookRegistry.check_published

    def overtaken(codebooks: CodebookRegistry, version: str) -> None:
        # As if this process had slept for longer than its lease.
        monkeypatch.setattr(CodebookRegistry, "check_published", check)
        document = SharedDocument(place(bucket) / "registry.json")
        content = b'{"versions": {"v1": "retired", "v2": "default"}}'
        assert document.replace(document.read(), content)

    monkeypatch.setattr(CodebookRegistry, "check_published", overtaken)

    with pytest.raises(CodebookError, match=r"another process changed .*registry\.json.*again"):
        CodebookRegistry(bucket).set_state("v2", VersionState.LIVE)
    assert CodebookRegistry(bucket).states() == {
        "v1": VersionState.RETIRED,
        "v2": VersionState.DEFAULT,
    }


def test_a_publication_that_is_killed_anywhere_leaves_old_or_new_and_ends_the_same(
    bucket: str,
) -> None:
    num_changes = None
    for number in range(40):
        uri = f"{bucket}/{number}"
        draft(uri)
        with pytest.MonkeyPatch.context() as patch:
            asked = _kill_at(number, patch)
            try:
                publish_codebook(uri, "v1", GateConfig())
                num_changes = asked()
            except _KilledError:
                pass
            states = CodebookRegistry(uri).states()

            assert states in ({}, {"v1": VersionState.DEFAULT})
            assert not states or read_manifest(uri, "v1").quality
        assert publish_codebook(uri, "v1", GateConfig()) is VersionState.DEFAULT
        assert stored_versions(drafts_uri(uri)) == []
        if num_changes is not None:
            break

    assert num_changes is not None
    assert num_changes >= 5


def _world_of_two_versions(uri: str) -> World:
    for version in ("v1", "v2"):
        write_artifact(uri, *artifact(version))
        CodebookRegistry(uri).publish(version)
    return World(uri, told={"v1": 0}, rows={"v1": set(range(5))}, num_events=5)


def test_a_rollout_that_is_killed_again_and_again_ends_the_same(bucket: str) -> None:
    world = _world_of_two_versions(bucket)
    num_kills = 0
    for number in range(40):
        with pytest.MonkeyPatch.context() as patch:
            _kill_at(number, patch)
            try:
                world.rollout().start("v2")
                world.rollout().finish()
                break
            except _KilledError:
                num_kills += 1
    documents = [name for name in names_in(place(bucket)) if name.endswith(".json")]

    assert num_kills >= 3
    assert world.states() == {"v1": "retired", "v2": "default"}
    assert world.rollout().status().record.phase is Phase.FINISHED
    assert sorted(documents) == ["registry.json", "rollout.json"]


def test_of_two_rollouts_at_once_the_second_is_told_who_holds_the_lock(bucket: str) -> None:
    world = _world_of_two_versions(bucket)

    with (
        exclusive(place(bucket) / ".rollout.lock", 0),
        pytest.raises(CodebookError, match=r"another `qarm rollout` is at work .*, process \d+"),
    ):
        world.rollout().start("v2")
    assert world.rollout().start("v2").record is not None


def test_a_damaged_file_is_told_and_a_sound_one_is_fetched_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, payloads = artifact("v1")
    write_artifact(bucket, manifest, payloads)
    folder = place(bucket) / "v1"
    ((name, payload),) = payloads.items()
    assert isinstance(folder, StorePath)
    (folder / name).put(b"damaged")
    with pytest.raises(CorruptArtifactError, match="has SHA-256"):
        read_verified(folder, name, manifest.files)
    (folder / name).put(payload)

    first = read_verified(folder, name, manifest.files)
    (folder / name).put(b"damaged")
    cached = read_verified(folder, name, manifest.files)
    (tmp_path / "cache" / manifest.files[name]).write_bytes(b"a bad disk")
    with pytest.raises(CorruptArtifactError):
        read_verified(folder, name, manifest.files)

    assert first == cached == payload


def test_a_cached_file_that_nobody_reads_is_let_go(bucket: str, tmp_path: Path) -> None:
    digest = "0" * 64
    names = ("thesis.txt", digest, f".{digest}.killed")
    (tmp_path / "cache").mkdir()
    month_ago = time.time() - 31 * 86_400
    for name in names:
        (tmp_path / "cache" / name).write_bytes(b"")
        os.utime(tmp_path / "cache" / name, (month_ago, month_ago))
    manifest, payloads = artifact("v1")
    write_artifact(bucket, manifest, payloads)

    read_verified(place(bucket) / "v1", next(iter(payloads)), manifest.files)

    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {"thesis.txt", *manifest.files.values()}


def test_a_user_without_a_home_and_one_who_may_only_read_the_cache_get_the_file(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, payloads = artifact("v1")
    write_artifact(bucket, manifest, payloads)
    ((name, payload),) = payloads.items()
    folder = place(bucket) / "v1"
    read_verified(folder, name, manifest.files)

    def refuse(*_: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(artifact_module.os, "utime", refuse)
        patch.setattr(StorePath, "read_bytes", refuse)
        from_cache = read_verified(folder, name, manifest.files)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("QARM_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(artifact_module.Path, "home", no_home)

    assert from_cache == payload
    assert read_verified(folder, name, manifest.files) == payload


def test_a_disk_that_is_full_keeps_no_half_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact_module.os, "fsync", full)

    with pytest.raises(OSError, match="No space left"):
        artifact_module.replace_file(tmp_path / "x", b"payload")
    assert list(tmp_path.iterdir()) == []


# Locks


def test_a_lock_is_held_by_one_at_a_time(uri: str) -> None:
    lock = place(uri) / ".lock"
    with exclusive(lock, 0), pytest.raises(LockTakenError, match=r"fuser|holds .* UTC"):
        exclusive(lock, 0).__enter__()
    with exclusive(lock, 0):
        pass


def test_a_lease_is_renewed_while_it_is_held_and_runs_out_after_a_kill(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_state, "LEASE_SECONDS", 0.6)
    lock = place(bucket) / ".lock"
    held = exclusive(lock, 0)
    held.__enter__()
    with pytest.raises(LockTakenError):
        exclusive(lock, 1.2).__enter__()
    monkeypatch.setattr(shared_state._Lease, "_release", lambda _: None)
    held.__exit__(None, None, None)

    started = time.monotonic()
    with exclusive(lock, 5):
        waited = time.monotonic() - started

    assert waited < 1.5


def test_a_lease_whose_renewal_was_done_but_never_answered_goes_on(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = shared_state._Lease(StorePath("s3", f"{bucket.removeprefix('s3://')}/.lock"))
    lease._acquire(0)
    create = StorePath.create

    def unanswered(path: StorePath, payload: bytes) -> bool:
        create(path, payload)
        raise ServiceUnavailableError("the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(StorePath, "create", unanswered)
        with pytest.raises(ServiceUnavailableError):
            lease._put(lease._number, 30.0)

    assert lease._put(lease._number, 30.0)
    lease._release()
    with exclusive(place(bucket) / ".lock", 0):
        pass


def test_a_holder_that_slept_through_its_lease_publishes_deletes_merges_and_rolls_out_nothing(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CodeLog(f"{bucket}/log")
    _append(log, 1, 2)
    draft(bucket)
    world = _world_of_two_versions(f"{bucket}/rollout")

    def asleep(lease: shared_state._Lease, wait_seconds: float) -> None:
        lease._expires = time.time() - 1

    monkeypatch.setattr(shared_state._Lease, "_acquire", asleep)
    monkeypatch.setattr(shared_state._Lease, "_release", lambda _: None)

    write_artifact(bucket, *artifact("v2"))
    with pytest.raises(ServiceUnavailableError, match="could not renew"):
        CodebookRegistry(bucket).publish("v2")
    with pytest.raises(ServiceUnavailableError, match="could not renew"):
        CodebookRegistry(bucket).purge("v1")
    with pytest.raises(ServiceUnavailableError, match="could not renew"):
        _compact(log)
    with pytest.raises(ServiceUnavailableError, match="could not renew"):
        world.rollout().start("v2")
    assert world.states() == {"v1": "default", "v2": "staged"}
    assert names_in(place(bucket) / "registry.json") == []
    assert stored_versions(drafts_uri(bucket)) == ["v1"]
    assert len(log.row_parts(CODES)) == 2


def test_a_writer_that_slept_through_many_changes_changes_nothing(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_state, "_NUM_KEPT", 3)
    document = SharedDocument(place(bucket) / "doc")
    read = document.read()
    slept = document.replace(read, b"1")
    assert slept is not None
    newest = slept
    for number in range(2, 9):
        replaced = document.replace(newest, b"%d" % number)
        assert replaced is not None
        newest = replaced

    assert document.replace(slept, b"late") is None
    assert document.read().payload == b"8"
    # What the late one left behind is deleted with the next change.
    assert len(names_in(place(bucket) / "doc")) <= 4


# The offline log


def _append(log: CodeLog, *items: int) -> None:
    for item in items:
        log.append(CODES, code_rows((item, item, "a")), written_at=NOON)


def _items(log: CodeLog) -> list[int]:
    return sorted(log.read(CODES, ["item_id"])["item_id"].to_pylist())


def _compact(log: CodeLog, after_seconds: float = 0.0) -> object:
    rules = CompactionRules(grace_seconds=600.0)
    return Compactor(log, rules, clock=lambda: time.time() + after_seconds).compact(is_full=True)


def test_appended_rows_are_joined_as_of_their_time_and_pulled(uri: str) -> None:
    log = CodeLog(uri)
    log.append(CODES, code_rows((1, 10, "a"), (2, 10, "a")), written_at=NOON)
    log.append(CODES, code_rows((1, 20, "b"), (1, 20, "b")), written_at=NOON)
    rows = FeatureRows(
        log.root / CODES, "event_timestamp", "created", {"qarm_dedup_key": "item_id,content_hash"}
    )
    noon_us = int(NOON.timestamp() * 1e6)
    labels = pa.table(
        {
            "item_id": pa.array([1, 1, 1, 2, 3], pa.int64()),
            TIME: [noon_us + seconds * 1_000_000 for seconds in (9, 15, 20, 30, 30)],
        }
    )

    joined = rows.as_of(["item_id"], ["content_hash"], labels, 0)
    latest = rows.latest(["item_id"], ["content_hash"], TimeRange())

    assert joined is not None
    assert joined["content_hash"].to_pylist() == [None, "a", "b", "a", None]
    assert sorted(latest["content_hash"].to_pylist()) == ["a", "b"]
    assert CodeLog(uri).names() == [CODES]


def test_small_and_large_parts_are_read_back_with_filters(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CodeLog(uri)
    _append(log, 1, 2)
    monkeypatch.setattr("qarm_feast.log_parts.LARGE_TABLE_BYTES", 0)
    _append(log, 3, 4)

    found = log.read(CODES, ["item_id"], pa.compute.field("item_id") > 2)

    assert {path.rpartition(".")[2] for path in log.row_parts(CODES)} == {"arrow", "parquet"}
    assert _items(log) == [1, 2, 3, 4]
    assert sorted(found["item_id"].to_pylist()) == [3, 4]
    assert sum(table.num_rows for table in log.tables(CODES, ["item_id"])) == 4


def test_a_compaction_makes_one_part_and_deletes_the_old_ones_after_the_grace_period(
    uri: str,
) -> None:
    log = CodeLog(uri)
    _append(log, 3, 1, 2, 2)
    _compact(log)
    (merged,) = log_states(log)
    _compact(log, LATER)
    (swept,) = log_states(log)

    assert (merged.num_parts, merged.num_replaced_parts) == (1, 4)
    assert (swept.num_parts, swept.num_replaced_parts) == (1, 0)
    assert _items(log) == [1, 2, 3]
    assert len(names_in(log.root / CODES / DAY)) == 1


def test_parts_of_unequal_sizes_are_read_and_merged_in_whatever_order(uri: str) -> None:
    log = CodeLog(uri)
    sizes = {log.append(CODES, rows, NOON).stat().st_size for rows in _rows_of_unequal_sizes()}

    _compact(log)

    assert len(sizes) == 8
    assert _items(log) == list(range(36))
    assert len(log.row_parts(CODES)) == 1


def _rows_of_unequal_sizes() -> list[pa.Table]:
    starts = [0, 8, 15, 21, 26, 30, 33, 35, 36]
    return [
        code_rows(*((item, item, "a") for item in range(first, end)))
        for first, end in itertools.pairwise(starts)
    ]


def test_a_store_that_keeps_what_a_compaction_deletes_brings_no_row_back(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CodeLog(bucket)
    _append(log, 1, 1)
    _compact(log)
    client = object_store.file_system("s3")

    with monkeypatch.context() as patch:
        # As it is with credentials that may not delete: the answer lists errors, s3fs raises none.
        patch.setattr(client, "rm", lambda _: None)
        with pytest.raises(ServiceUnavailableError, match=r"kept 2 of 2 .*s3:DeleteObject"):
            _compact(log, LATER)
        kept = log.read(CODES).num_rows
    _compact(log, LATER)

    assert kept == 1
    assert log.read(CODES).num_rows == 1
    assert len(names_in(log.root / CODES / DAY)) == 1


def test_a_compaction_that_is_killed_anywhere_loses_no_row_and_shows_none_twice(
    bucket: str,
) -> None:
    for number in range(40):
        log = CodeLog(f"{bucket}/{number}")
        _append(log, 1, 2)
        is_killed = False
        with pytest.MonkeyPatch.context() as patch:
            _kill_at(number, patch)
            try:
                _compact(log, LATER)
            except _KilledError:
                is_killed = True
        after_kill = _items(log)
        _compact(log, LATER)

        assert after_kill == [1, 2]
        assert _items(log) == [1, 2]
        assert [name[:7] for name in names_in(log.root / CODES / DAY)] == ["merged-"]
        if not is_killed:
            break

    assert number >= 5


def test_a_damaged_part_is_set_aside_and_the_rest_is_read(uri: str) -> None:
    log = CodeLog(uri)
    _append(log, 1, 2)
    first = place(log.row_parts(CODES)[0])
    content = bytearray(first.read_bytes())
    content[-20] ^= 1
    _replace(first, bytes(content))

    read = _items(log)
    (state,) = log_states(log)

    assert len(read) == 1
    assert [reason[:6] for reason in state.quarantined.values()] == ["CRC-32"]
    assert state.num_parts == 1


def test_a_store_that_fails_in_the_middle_of_a_part_is_no_damage_of_the_part(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qarm_feast.log_parts.LARGE_TABLE_BYTES", 0)
    log = CodeLog(bucket)
    _append(log, 1)
    client = object_store.file_system("s3")
    cat_file = client.cat_file

    def fail(path: str, start: int | None = None, **options: object) -> bytes:
        if start is not None:
            raise OSError("the connection broke")
        content: bytes = cat_file(path, **options)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(client, "cat_file", fail)
        with pytest.raises(ServiceUnavailableError, match="the connection broke"):
            log.read(CODES)
        with pytest.raises(ServiceUnavailableError, match="the connection broke"):
            _compact(log)

    assert _items(log) == [1]


def _replace(path: Place, content: bytes) -> None:
    artifact_module.replace_file(path, content)


def test_raw_rows_of_an_erased_user_are_gone_after_a_compaction(uri: str) -> None:
    log = CodeLog(uri)
    columns = [[7, 8], [1, 2], [True, True], ["", ""], [NOON, NOON], [NOON, NOON]]
    log.append(INTERACTION_LOG, pa.table(columns, schema=INTERACTIONS), written_at=NOON)
    erased = pa.table([[7], [NOON], [NOON]], schema=USER_ERASURE_ROWS)
    log.append(USER_ERASURE_LOG, erased, written_at=NOON)

    hidden = without_erased(log.read(INTERACTION_LOG), log)
    _compact(log)

    assert hidden["user_id"].to_pylist() == [8]
    assert log.read(INTERACTION_LOG)["user_id"].to_pylist() == [8]


def test_an_append_is_one_request(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = CodeLog(bucket)
    _append(log, 1)
    requests = count_requests()

    _append(log, 2, 3)

    assert requests == ["PutObject", "PutObject"]


def test_days_that_are_done_with_cost_neither_readers_nor_compactions_a_request(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CodeLog(bucket)
    for day in range(5):
        for item in range(2):
            log.append(CODES, code_rows((item + 10 * day, 1, "a")), NOON + timedelta(days=day))
    _compact(log)
    _compact(log, LATER)
    # As if these parts had been put long ago.
    monkeypatch.setattr(log_parts, "_LONGEST_LISTING_SECONDS", -60.0)
    requests = count_requests()

    parts = log.row_parts(CODES)
    num_listing = len(requests)
    counts = _compact(log)

    assert len(parts) == 5
    assert requests[:num_listing] == ["ListObjectsV2"]
    assert str(counts).count("=0") == 7
    # The lock, the logs' names and schema, one listing.
    assert len(requests) - num_listing <= 20
    assert requests.count("ListObjectsV2") <= 8


# Doors: the command line and Feast


def test_every_codebook_command_works_on_an_object_store(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QARM_CODEBOOK__URI", bucket)
    config_path = write_project(tmp_path / "project")

    def run(verb: str, *arguments: str) -> str:
        command = [verb, "--config", str(config_path), *arguments]
        result = CliRunner().invoke(codebook_group, command, catch_exceptions=False)
        return result.stdout

    for version, parent in (("v1", ()), ("v2", ("--parent", "v1"))):
        run("train", "--codebook-version", version, *parent)
        evaluated = run("evaluate", "--codebook-version", version)
        published = run("publish", "--codebook-version", version)
    changed = run("diff", "--codebook-version", "v2", "--against", "v1")
    run("default", "--codebook-version", "v2")
    run("retire", "--codebook-version", "v1")
    run("purge", "--codebook-version", "v1", "--yes")
    listed = run("list").splitlines()

    assert evaluated.splitlines()[-1] == f"written to {bucket}/.reports/v2/quality.json"
    assert published.splitlines()[0] == f"published v2 as staged in {bucket}"
    assert "v1" in changed
    assert [line.split()[:2] for line in listed[1:]] == [["v2", "default"], ["v1", "purged"]]
    assert json.loads(run("show", "--codebook-version", "v2"))["parent"] == "v1"
    assert Codebook.load(bucket, "v2").manifest.num_training_items == NUM_ITEMS - NUM_COLD


def test_feast_joins_pushes_persists_and_materializes_over_an_object_store(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QARM_CODEBOOK__URI", f"{bucket}/codebooks")
    stores = offline_store_at(f"{bucket}/offline")
    repo = build_repo(tmp_path / "repo", {"data": {"input_dir": "data/input"}}, stores)
    store = open_feature_store(repo.directory)
    rows = code_rows((1, 10, "a"), (1, 20, "b"), (2, 5, "c")).to_pandas()
    store.push("item_codes_v1_push", rows, to=PushMode.OFFLINE)
    frame = pd.DataFrame(
        {
            "item_id": [1, 1, 2, 3],
            "event_timestamp": [NOON + timedelta(seconds=n) for n in (9, 15, 9, 9)],
        }
    )
    features = ["item_codes_v1:content_hash", "item_codes_v1:rq_code"]

    job = store.get_historical_features(frame, features)
    saved = {}
    for target in (f"{bucket}/saved.parquet", f"{bucket}/saved"):
        job.persist(SavedDatasetFileStorage(target), allow_overwrite=True)
        _leave_older_rows_below(f"{bucket}/saved")
        job.persist(SavedDatasetFileStorage(target), allow_overwrite=True)
        saved[target] = parquet_dataset(place(target)).to_table()
    store.materialize(NOON - timedelta(hours=1), NOON + timedelta(hours=1), ["item_codes_v1"])
    online = store.get_online_features(features[:1], [{"item_id": n} for n in (1, 2, 3)]).to_dict()
    _offline(repo.config_path, "compact")
    status = _offline(repo.config_path, "status")

    assert job.to_df()["content_hash"].fillna("").tolist() == ["", "a", "c", ""]
    assert [table["item_id"].to_pylist() for table in saved.values()] == [[1, 1, 2, 3]] * 2
    assert online["content_hash"] == ["b", "c", None]
    assert status.splitlines()[1].split()[:2] == ["item_codes_v1", "1"]
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        job.persist(SavedDatasetFileStorage(f"{bucket}/saved"))


def _leave_older_rows_below(folder: str) -> None:
    written, _ = object_store.dataset_files([folder])
    client = object_store.file_system("s3")
    table = pa.table({"item_id": pa.array([99], pa.int64())})
    pq.write_table(table, f"{written[0]}/day=1/old.parquet", filesystem=client)


def test_training_rows_and_code_vectors_come_from_an_object_store(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_project(tmp_path / "project").parent / "data"
    monkeypatch.setenv("QARM_CODEBOOK__URI", f"{bucket}/codebooks")
    sections = {
        "data": {"input_dir": str(data / "input"), "history_length": 3},
        "alignment": {
            "encoder_uri": str(data / "encoders"),
            "vectors_uri": str(data / "vectors"),
        },
        "quantizer": {"rq": {"num_levels": 2}, "vq": {"num_neighbors": 4}},
        "ranker": {"name": "ranker", "history_length": 3, "features": ["rq_code", "vq_code"]},
    }
    stores = offline_store_at(f"{bucket}/offline")
    repo = build_repo(tmp_path / "repo", sections, stores, _publish_trained)
    CodeLog(f"{bucket}/offline").append(CODES, _code_rows_of_every_item())
    config_path = str(repo.config_path)
    config = load_ranker_config(config_path)

    manifest = build_training_rows(config_path, config)
    inputs = load_train_inputs(config_path, config)

    assert manifest.num_rows["test"] == NUM_COLD
    assert sum(manifest.num_rows.values()) == NUM_ITEMS
    assert inputs.codebook is not None
    np.testing.assert_array_equal(inputs.codebook.pool_vectors_PD, repo.codebook.vq.pool_vectors_PD)


def _publish_trained(directory: Path, version: str) -> Codebook:
    for verb in ("train", "evaluate", "publish"):
        command = [verb, "--config", str(directory / "qarm.yaml"), "--codebook-version", version]
        CliRunner().invoke(codebook_group, command, catch_exceptions=False)
    return Codebook.load(codebooks_uri(directory), version)


def _code_rows_of_every_item() -> pa.Table:
    rows = code_rows(*((item, 0, "a") for item in range(NUM_ITEMS)))
    long_ago = pa.array([datetime(2023, 1, 1, tzinfo=UTC)] * NUM_ITEMS, TIMESTAMP)
    codes = {"rq_code": [[1, 2]] * NUM_ITEMS, "vq_code": [[1, 2, 3, 4]] * NUM_ITEMS}
    for name, column in (codes | {"event_timestamp": long_ago}).items():
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, rows.schema.field(place), pa.array(column))
    return rows


def _offline(config_path: Path, verb: str) -> str:
    command = [verb, "--config", str(config_path)]
    return CliRunner().invoke(offline_group, command, catch_exceptions=False).stdout


# Faults and bad input


def test_a_store_that_is_away_for_some_seconds_is_told_and_the_next_try_goes_on(
    server: ObjectStoreServer, bucket: str
) -> None:
    log = CodeLog(bucket)
    _append(log, 1)
    server.stop()
    started = time.monotonic()
    with pytest.raises(ServiceUnavailableError, match=rf"{bucket}.*does not answer"):
        _append(log, 2)
    waited = time.monotonic() - started
    server.start()
    _append(log, 2)

    assert _items(log) == [1, 2]
    assert waited < 30


def test_a_name_that_no_bucket_can_have_is_told(bucket: str) -> None:
    with pytest.raises(ConfigError, match=r"s3://a,b/log.* cannot be the name of an object"):
        CodeLog("s3://a,b/log").append(CODES, code_rows((1, 1, "a")))


def test_a_prefix_that_would_be_a_pattern_is_refused() -> None:
    with pytest.raises(ConfigError, match="stand for patterns; rename the prefix"):
        place("s3://bucket/log[1]")


def test_a_lost_and_a_damaged_registry_are_told_with_the_object_to_put_back(bucket: str) -> None:
    draft(bucket)
    publish_codebook(bucket, "v1", GateConfig())
    document = place(bucket) / "registry.json"
    (number,) = names_in(document)
    copy = (document / number).read_bytes()
    _replace(document / number, b"{")
    with pytest.raises(CodebookError, match=rf"{bucket}/registry.json/{number} is no registry"):
        CodebookRegistry(bucket).states()
    (document / number).unlink()
    with pytest.raises(CodebookError) as lost:
        CodebookRegistry(bucket).states()
    _replace(place(str(lost.value).partition(" ")[0]), copy)

    assert CodebookRegistry(bucket).states() == {"v1": VersionState.DEFAULT}


def test_a_bucket_that_is_missing_is_told_with_how_to_make_it(bucket: str) -> None:
    remedy = "no bucket s3://nowhere; make it, for example with `aws s3 mb s3://nowhere`"

    with pytest.raises(ConfigError, match=remedy):
        CodebookRegistry("s3://nowhere/codebooks").states()
    with pytest.raises(ConfigError, match=remedy):
        CodeLog("s3://nowhere/log").append(CODES, code_rows((1, 1, "a")))


def test_missing_and_wrong_credentials_are_told_with_what_to_set(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_clients()
    with pytest.raises(ConfigError, match=r"credentials do not allow.*AWS_SECRET_ACCESS_KEY"):
        CodebookRegistry(bucket).states()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "nowhere")
    forget_clients()
    with pytest.raises(ConfigError, match=r"no credentials.*AWS_PROFILE"):
        CodebookRegistry(bucket).states()


def test_a_missing_package_is_told_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(object_store._PACKAGE_OF, "s3", "no_such_package")
    object_store._check_package.cache_clear()

    with pytest.raises(MissingDependencyError, match=r'pip install "qarm-feast\[s3\]"'):
        CodeLog("s3://bucket/log")
    object_store._check_package.cache_clear()
