import json
import os
import re
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qarm_feast import artifact
from qarm_feast.artifact import sha256
from qarm_feast.codebook_config import GateConfig
from qarm_feast.errors import (
    CodebookError,
    CodebookNotFoundError,
    ConfigError,
    CorruptArtifactError,
    GateRefusedError,
)
from qarm_feast.registry import (
    CodebookRegistry,
    Manifest,
    ServedArtifact,
    VersionState,
    drafts_uri,
    publish_codebook,
    read_manifest,
    stored_versions,
    trained_uri,
    write_artifact,
    write_report,
)
from qarm_feast.shared_state import SharedDocument, Snapshot

GOOD = {
    "collision_rate": 0.25,
    "hr10": 0.9,
    "levels": [
        {"codebook_coverage": 0.75, "relative_residual_norm": 0.5},
        {"codebook_coverage": 1.0, "relative_residual_norm": 0.25},
    ],
}


def _artifact(version: str = "v1", content: bytes = b"arrays") -> tuple[Manifest, dict[str, bytes]]:
    payloads = {f"rq-{sha256(content)[:16]}.safetensors": content}
    manifest = Manifest(
        version=version,
        encoder_version="e1",
        encoder_hash="0" * 64,
        behaviour_cutoff=datetime(2024, 1, 1, tzinfo=UTC),
        embedding_dim=8,
        level_sizes=(4, 4),
        num_neighbors=2,
        pool_size=10,
        seed=0,
        num_training_items=10,
        files={name: sha256(payload) for name, payload in payloads.items()},
        created=datetime(2024, 1, 2, tzinfo=UTC),
    )
    return manifest, payloads


def _store(uri: str, version: str = "v1", content: bytes = b"arrays") -> Manifest:
    manifest, payloads = _artifact(version, content)
    write_artifact(uri, manifest, payloads)
    return manifest


def _draft(uri: str, version: str = "v1", content: bytes = b"arrays") -> Manifest:
    manifest, payloads = _artifact(version, content)
    write_artifact(drafts_uri(uri), manifest, payloads, replace=True)
    return manifest


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "codebooks")


def test_the_first_published_version_is_the_default_and_later_ones_are_staged(uri: str) -> None:
    _store(uri, "v1")
    _store(uri, "v2")
    codebooks = CodebookRegistry(uri)

    assert codebooks.states() == {}
    assert codebooks.publish("v1") is VersionState.DEFAULT
    assert codebooks.publish("v2") is VersionState.STAGED
    assert codebooks.publish("v1") is VersionState.DEFAULT
    assert codebooks.states() == {"v1": VersionState.DEFAULT, "v2": VersionState.STAGED}
    assert codebooks.default_version() == "v1"


def test_versions_are_found_by_state(uri: str) -> None:
    codebooks = CodebookRegistry(uri)
    for version in ("v1", "v2", "v3"):
        _store(uri, version)
        codebooks.publish(version)
    codebooks.set_state("v2", VersionState.LIVE)
    codebooks.set_state("v3", VersionState.RETIRED)

    assert codebooks.versions() == ["v1", "v2", "v3"]
    assert codebooks.versions(VersionState.LIVE, VersionState.DEFAULT) == ["v1", "v2"]


def test_a_new_default_makes_the_old_one_live(uri: str) -> None:
    codebooks = CodebookRegistry(uri)
    for version in ("v1", "v2"):
        _store(uri, version)
        codebooks.publish(version)

    codebooks.set_state("v2", VersionState.DEFAULT)

    assert codebooks.states() == {"v1": VersionState.LIVE, "v2": VersionState.DEFAULT}


def test_the_default_cannot_be_retired_and_the_refusal_changes_nothing(uri: str) -> None:
    _store(uri)
    codebooks = CodebookRegistry(uri)
    codebooks.publish("v1")

    with pytest.raises(CodebookError, match="make another version the default"):
        codebooks.set_state("v1", VersionState.RETIRED)

    assert codebooks.default_version() == "v1"


def test_what_is_not_there_is_named_with_what_is(uri: str) -> None:
    _store(uri)
    codebooks = CodebookRegistry(uri)

    with pytest.raises(CodebookNotFoundError, match=r"'v2' \(it holds: v1\)"):
        codebooks.publish("v2")
    with pytest.raises(CodebookNotFoundError, match=r"'v1' \(it holds: none\)"):
        codebooks.set_state("v1", VersionState.LIVE)
    with pytest.raises(CodebookError, match="has no default codebook version"):
        codebooks.default_version()


@pytest.mark.parametrize("name", ["V1", "1v", "", "v-1", "v" * 33, "../v1", ".drafts"])
def test_an_illegal_version_name_is_refused(uri: str, name: str) -> None:
    with pytest.raises(ConfigError, match="no legal name"):
        read_manifest(uri, name)


def test_a_manifest_comes_back_as_it_was_stored(uri: str) -> None:
    manifest = _store(uri)

    assert read_manifest(uri, "v1") == manifest
    assert manifest.num_levels == 2


def test_a_manifest_of_another_format_is_refused(uri: str) -> None:
    _store(uri)
    path = Path(uri) / "v1" / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format_version": 2}))

    with pytest.raises(CodebookError, match="no codebook manifest that this version"):
        read_manifest(uri, "v1")


def test_storing_the_same_content_again_changes_nothing(uri: str) -> None:
    manifest = _store(uri)
    _, payloads = _artifact()
    later = manifest.model_copy(update={"created": datetime(2025, 1, 1, tzinfo=UTC)})

    write_artifact(uri, later, payloads)

    assert read_manifest(uri, "v1") == manifest


def test_a_stored_version_is_never_overwritten(uri: str) -> None:
    manifest = _store(uri)

    with pytest.raises(CodebookError, match=r"already stored .* with other content"):
        _store(uri, content=b"other arrays")

    assert read_manifest(uri, "v1") == manifest


def test_a_draft_may_be_replaced_and_leaves_no_file_behind(uri: str) -> None:
    _draft(uri, content=b"first")
    second = _draft(uri, content=b"second")

    names = {path.name for path in (Path(drafts_uri(uri)) / "v1").iterdir()}

    assert names == {"manifest.json", *second.files}


def test_training_a_draft_again_mends_its_damaged_file(uri: str) -> None:
    (name,) = _draft(uri).files
    damaged = Path(drafts_uri(uri)) / "v1" / name
    damaged.write_bytes(b"arrayz")

    _draft(uri)

    assert damaged.read_bytes() == b"arrays"


@pytest.mark.parametrize("content", ["{", '{"format_version": 2}', '{"versions": {"v1": "gone"}}'])
def test_a_registry_that_cannot_be_read_is_named(uri: str, content: str) -> None:
    _store(uri)
    (Path(uri) / "registry.json").write_text(content)

    for act in (CodebookRegistry(uri).states, lambda: CodebookRegistry(uri).publish("v1")):
        with pytest.raises(CodebookError, match=r"registry\.json is no registry"):
            act()


def test_a_lost_registry_is_refused_with_the_versions_that_it_told_of(uri: str) -> None:
    for version in ("v1", "v2"):
        write_report(uri, _draft(uri, version), GOOD)
        publish_codebook(uri, version, GateConfig(max_collision_rate=0.2), force=True)
    codebooks = CodebookRegistry(uri)
    path = Path(uri) / "registry.json"
    path.unlink()

    write_report(uri, _draft(uri, "v3"), GOOD)
    for act in (
        codebooks.states,
        codebooks.default_version,
        lambda: codebooks.set_state("v2", VersionState.DEFAULT),
        lambda: publish_codebook(uri, "v3", GateConfig()),
        lambda: codebooks.check_unpublished("v1"),
        lambda: codebooks.purge("v1"),
    ):
        with pytest.raises(CodebookError, match=r"registry\.json is missing, .*: v1, v2;") as lost:
            act()

    # The file that the message shows is one.
    example = re.search(r"by hand, like (.*), with one", str(lost.value))
    assert example is not None
    path.write_text(example[1])
    assert codebooks.states() == {"v1": VersionState.DEFAULT, "v2": VersionState.STAGED}


def test_a_version_trained_anew_after_a_killed_first_publication_is_no_lost_registry(
    uri: str,
) -> None:
    manifest, payloads = _artifact()
    write_artifact(uri, manifest.model_copy(update={"quality": GOOD}), payloads)

    _draft(uri, content=b"trained anew")
    write_report(uri, _draft(uri, "v2"), GOOD)

    assert CodebookRegistry(uri).states() == {}
    assert publish_codebook(uri, "v2", GateConfig()) is VersionState.DEFAULT


def test_a_first_publication_that_ends_while_the_registry_is_read_does_not_look_lost(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(uri, _draft(uri), GOOD)
    read, asked = SharedDocument.read, []

    def read_before_a_publication(document: SharedDocument) -> Snapshot:
        found = read(document)
        if not asked:
            asked.append(document.path)
            publish_codebook(uri, "v1", GateConfig())
        return found

    monkeypatch.setattr(SharedDocument, "read", read_before_a_publication)

    assert CodebookRegistry(uri).states() == {"v1": VersionState.DEFAULT}
    assert asked


def test_an_unknown_kind_of_store_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError, match=r"no object store of scheme 's4'; write s3://BUCKET/"):
        _store("s4://bucket/codebooks")
    with pytest.raises(ConfigError, match="'s3://' names no bucket"):
        CodebookRegistry("s3://")
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_another_hash_or_none_is_refused(uri: str) -> None:
    manifest = _store(uri)
    folder = Path(uri) / "v1"
    (name,) = manifest.files
    (folder / name).write_bytes(b"arrayz")

    with pytest.raises(CorruptArtifactError, match=f"{name} has SHA-256 {sha256(b'arrayz')}"):
        artifact.read_verified(folder, name, manifest.files)
    (folder / name).unlink()
    with pytest.raises(CorruptArtifactError, match=rf"{name} is missing, its manifest names it"):
        artifact.read_verified(folder, name, manifest.files)


def test_publish_stores_the_figures_and_removes_the_draft(uri: str) -> None:
    manifest = _draft(uri)
    write_report(uri, manifest, GOOD)
    assert trained_uri(uri, "v1") == drafts_uri(uri)

    assert publish_codebook(uri, "v1", GateConfig()) is VersionState.DEFAULT

    assert read_manifest(uri, "v1").quality == GOOD
    assert read_manifest(uri, "v1").forced_gates == ()
    assert stored_versions(drafts_uri(uri)) == []
    assert trained_uri(uri, "v1") == uri
    assert publish_codebook(uri, "v1", GateConfig()) is VersionState.DEFAULT


def test_publish_refuses_below_a_gate_and_says_which_and_by_how_much(uri: str) -> None:
    write_report(uri, _draft(uri), GOOD)
    gates = GateConfig(max_collision_rate=0.2, min_codebook_coverage=0.5, min_hr10=0.95)

    with pytest.raises(GateRefusedError) as refusal:
        publish_codebook(uri, "v1", gates)

    assert "max_collision_rate: measured 0.2500, limit 0.2000, missed by 0.0500" in str(
        refusal.value
    )
    assert "min_hr10: measured 0.9000, limit 0.9500, missed by 0.0500" in str(refusal.value)
    assert "coverage" not in str(refusal.value)
    assert CodebookRegistry(uri).states() == {}
    assert stored_versions(uri) == []


def test_a_forced_publication_is_written_into_the_manifest(uri: str) -> None:
    write_report(uri, _draft(uri), GOOD)

    publish_codebook(uri, "v1", GateConfig(max_relative_residual_norm=0.2), force=True)

    assert read_manifest(uri, "v1").forced_gates == (
        "max_relative_residual_norm: measured 0.2500, limit 0.2000, missed by 0.0500",
    )


def test_an_evaluation_of_an_earlier_draft_does_not_count(uri: str) -> None:
    write_report(uri, _draft(uri, content=b"first"), GOOD)
    _draft(uri, content=b"second")

    with pytest.raises(GateRefusedError, match="not evaluated"):
        publish_codebook(uri, "v1", GateConfig())


def test_training_a_published_version_anew_cannot_change_it(uri: str) -> None:
    write_report(uri, _draft(uri), GOOD)
    publish_codebook(uri, "v1", GateConfig())
    published = read_manifest(uri, "v1")

    write_report(uri, _draft(uri), GOOD)
    assert publish_codebook(uri, "v1", GateConfig()) is VersionState.DEFAULT
    manifest, payloads = _artifact(content=b"other")
    anew = manifest.model_copy(update={"created": datetime(2024, 1, 3, tzinfo=UTC)})
    write_artifact(drafts_uri(uri), anew, payloads, replace=True)
    write_report(uri, anew, GOOD)
    with pytest.raises(CodebookError, match="already stored"):
        publish_codebook(uri, "v1", GateConfig())

    assert read_manifest(uri, "v1") == published
    assert trained_uri(uri, "v1") == uri


def test_a_draft_left_over_by_a_killed_publication_no_longer_counts(uri: str) -> None:
    capped, payloads = _artifact(content=b"arrays with caps")
    write_report(uri, _draft(uri), GOOD)
    write_artifact(uri, capped.model_copy(update={"quality": GOOD}), payloads)
    CodebookRegistry(uri).publish("v1")

    assert trained_uri(uri, "v1") == uri
    assert publish_codebook(uri, "v1", GateConfig()) is VersionState.DEFAULT
    assert read_manifest(uri, "v1").files == capped.files
    assert stored_versions(drafts_uri(uri)) == []


@pytest.mark.fault
@pytest.mark.parametrize("is_capped", [False, True])
def test_publish_killed_between_any_two_steps_leaves_old_or_new_and_ends_well(
    tmp_path: Path, is_capped: bool
) -> None:
    """Kills a publishing process before its n-th change of the disk, for every n."""
    capped, capped_payloads = _artifact(content=b"arrays with caps")
    capped = capped.model_copy(update={"quality": GOOD, "caps": {"max_items_per_code": 1}})
    served = ServedArtifact(capped, capped_payloads)

    statement = (
        (
            "registry.publish_codebook(sys.argv[1], 'v1', GateConfig(), served="
            "registry.ServedArtifact(registry.Manifest.model_validate_json(sys.argv[3]), "
            f"{capped_payloads!r}))"
        )
        if is_capped
        else "registry.publish_codebook(sys.argv[1], 'v1', GateConfig())"
    )
    outcomes = []
    for num_changes in range(30):
        uri = str(tmp_path / str(num_changes))
        draft = _draft(uri)
        write_report(uri, draft, GOOD)

        outcomes.append(_run_dying(statement, uri, num_changes, capped.model_dump_json()))

        published = "v1" in CodebookRegistry(uri).states()
        if published:
            manifest = read_manifest(uri, "v1")
            assert manifest.files == (capped if is_capped else draft).files
            for name in manifest.files:
                artifact.read_verified(Path(uri) / "v1", name, manifest.files)
        else:
            assert stored_versions(drafts_uri(uri)) == ["v1"]
            assert read_manifest(drafts_uri(uri), "v1") == draft
        again = publish_codebook(uri, "v1", GateConfig(), served=served if is_capped else None)
        assert again is VersionState.DEFAULT
        assert not list(Path(drafts_uri(uri)).glob("v1"))
        assert read_manifest(uri, "v1").quality == GOOD
        assert read_manifest(uri, "v1").caps == ({"max_items_per_code": 1} if is_capped else {})
        if outcomes[-1] == 0:
            break

    assert outcomes[-1] == 0
    assert set(outcomes[:-1]) == {-signal.SIGKILL}
    assert len(outcomes) > 5


@pytest.mark.fault
def test_training_killed_between_any_two_steps_leaves_the_old_or_the_new_draft(
    tmp_path: Path,
) -> None:
    anew, payloads = _artifact(content=b"other")
    statement = (
        "registry.write_artifact(registry.drafts_uri(sys.argv[1]), "
        f"registry.Manifest.model_validate_json(sys.argv[3]), {payloads!r}, replace=True)"
    )
    outcomes, found = [], []
    for num_changes in range(30):
        uri = str(tmp_path / str(num_changes))
        before = _draft(uri)

        outcomes.append(_run_dying(statement, uri, num_changes, anew.model_dump_json()))

        found.append(read_manifest(drafts_uri(uri), "v1"))
        for name in found[-1].files:
            artifact.read_verified(Path(drafts_uri(uri)) / "v1", name, found[-1].files)
        if outcomes[-1] == 0:
            break

    assert outcomes[-1] == 0
    assert set(outcomes[:-1]) == {-signal.SIGKILL}
    assert (found[0], found[-1]) == (before, anew)
    assert all(manifest in (before, anew) for manifest in found)


def _run_dying(statement: str, uri: str, num_changes: int, extra: str = "") -> int:
    """Run a statement in a process that dies before its n-th change of the disk."""
    script = (
        "import os, signal, sys\n"
        "from qarm_feast import artifact, registry\n"
        "from qarm_feast.codebook_config import GateConfig\n"
        "left = int(sys.argv[2])\n"
        "def dying(function):\n"
        "    def call(*args, **kwargs):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left < 0:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return function(*args, **kwargs)\n"
        "    return call\n"
        "for name in ('replace', 'link', 'unlink', 'rmdir', 'mkdir'):\n"
        "    setattr(os, name, dying(getattr(os, name)))\n"
    )
    command = [sys.executable, "-c", script + statement, uri, str(num_changes), extra]
    return subprocess.run(command, check=False).returncode


def _retired(uri: str) -> None:
    """Two published versions, of which the first is retired."""
    for version in ("v1", "v2"):
        write_report(uri, _draft(uri, version), GOOD)
        publish_codebook(uri, version, GateConfig())
    CodebookRegistry(uri).set_state("v2", VersionState.DEFAULT)
    CodebookRegistry(uri).set_state("v1", VersionState.RETIRED)


@pytest.mark.fault
def test_purge_killed_between_any_two_steps_leaves_all_or_a_tombstone_and_ends_well(
    tmp_path: Path,
) -> None:
    outcomes = []
    for num_changes in range(30):
        uri = str(tmp_path / str(num_changes))
        _retired(uri)
        manifest = read_manifest(uri, "v1")

        statement = "registry.CodebookRegistry(sys.argv[1]).purge('v1')"
        outcomes.append(_run_dying(statement, uri, num_changes))

        codebooks = CodebookRegistry(uri)
        if codebooks.states()["v1"] is VersionState.RETIRED:
            assert read_manifest(uri, "v1") == manifest
            for name in manifest.files:
                artifact.read_verified(Path(uri) / "v1", name, manifest.files)
        else:
            assert codebooks.versions() == ["v2"]
        codebooks.purge("v1")
        assert codebooks.states()["v1"] is VersionState.PURGED
        assert not list(Path(uri).rglob("v1"))
        if outcomes[-1] == 0:
            break

    assert outcomes[-1] == 0
    assert set(outcomes[:-1]) == {-signal.SIGKILL}
    assert len(outcomes) > 5


def test_the_name_of_a_purged_version_stays_taken(uri: str) -> None:
    _retired(uri)
    codebooks = CodebookRegistry(uri)

    codebooks.purge("v1")

    write_report(uri, _draft(uri, "v1"), GOOD)
    with pytest.raises(CodebookError, match=r"'v1' was purged .* --codebook-version v3"):
        publish_codebook(uri, "v1", GateConfig())
    for refused in (codebooks.publish, codebooks.check_unpublished):
        with pytest.raises(CodebookError, match="was purged"):
            refused("v1")
    with pytest.raises(CodebookError, match="was purged"):
        codebooks.set_state("v1", VersionState.LIVE)
    assert codebooks.versions() == ["v2"]
    assert codebooks.states() == {"v1": VersionState.PURGED, "v2": VersionState.DEFAULT}


def test_only_a_retired_version_is_purged_and_the_refusal_says_what_comes_first(uri: str) -> None:
    for version in ("v1", "v2"):
        _store(uri, version)
        CodebookRegistry(uri).publish(version)
    codebooks = CodebookRegistry(uri)

    with pytest.raises(CodebookError, match=r"'v1' is default .* `qarm codebook default .* retire"):
        codebooks.purge("v1")
    with pytest.raises(CodebookError, match=r"'v2' is staged .* run `qarm codebook retire"):
        codebooks.purge("v2")
    with pytest.raises(CodebookNotFoundError, match="'v3'"):
        codebooks.purge("v3")

    assert stored_versions(uri) == ["v1", "v2"]


def test_a_version_published_while_it_is_purged_keeps_its_files(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = _store(uri)
    lock, calls = CodebookRegistry._lock, []

    def lock_with_a_publication_before_the_second(registry: CodebookRegistry) -> object:
        calls.append(registry)
        if len(calls) == 2:
            CodebookRegistry(uri).publish("v1")
        return lock(registry)

    monkeypatch.setattr(CodebookRegistry, "_lock", lock_with_a_publication_before_the_second)
    with pytest.raises(CodebookError, match="only a retired one can be purged"):
        CodebookRegistry(uri).purge("v1")

    assert read_manifest(uri, "v1") == manifest


def test_purging_a_draft_removes_its_report_too_and_frees_its_name(uri: str) -> None:
    write_report(uri, _draft(uri), GOOD)

    removed = CodebookRegistry(uri).purge("v1")

    assert [path.parent.name for path in removed] == [".drafts", ".reports"]
    assert not list(Path(uri).rglob("v1"))
    CodebookRegistry(uri).check_unpublished("v1")
    assert publish_after_training(uri) is VersionState.DEFAULT


def publish_after_training(uri: str) -> VersionState:
    write_report(uri, _draft(uri), GOOD)
    return publish_codebook(uri, "v1", GateConfig())


def test_a_published_name_cannot_be_trained_and_a_free_one_is_offered(uri: str) -> None:
    for version in ("v1", "v9"):
        _store(uri, version)
    CodebookRegistry(uri).publish("v1")

    with pytest.raises(CodebookError, match=r"'v1' is default .* --codebook-version v10`"):
        CodebookRegistry(uri).check_unpublished("v1")
    assert CodebookRegistry(uri).next_name("books") == "books2"


def test_a_retired_version_cannot_become_the_default(uri: str) -> None:
    _retired(uri)

    with pytest.raises(CodebookError, match=r"'v1' is retired: .* v3 --parent v1"):
        CodebookRegistry(uri).set_state("v1", VersionState.DEFAULT)

    assert CodebookRegistry(uri).default_version() == "v2"


def test_two_publishers_at_once_make_one_default(uri: str) -> None:
    versions = [f"v{number}" for number in range(8)]
    for version in versions:
        _store(uri, version)
    barrier = threading.Barrier(len(versions))

    def publish(version: str) -> None:
        barrier.wait()
        CodebookRegistry(uri).publish(version)

    threads = [threading.Thread(target=publish, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    states = CodebookRegistry(uri).states()
    assert sorted(states) == versions
    assert list(states.values()).count(VersionState.DEFAULT) == 1


def test_of_two_creators_of_one_file_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"

    assert artifact.create_file(path, b"first")
    assert not artifact.create_file(path, b"second")

    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_the_registry_is_light() -> None:
    script = (
        "import sys, qarm_feast.registry;"
        "print([n for n in ('torch', 'faiss', 'numpy', 'pyarrow') if n in sys.modules])"
    )

    found = subprocess.check_output([sys.executable, "-c", script], text=True)

    assert found.strip() == "[]"
