"""The command line from exported vectors to a published codebook."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from codebook_input import NEWEST_TRAIN, NUM_COLD, NUM_ITEMS

from qarm_feast.code_log import CodeLog
from qarm_feast.codebook import Codebook
from qarm_feast.codebook_cli import codebook_group
from qarm_feast.codebook_evaluation import titles_of
from qarm_feast.encode import TAKEDOWN_HASH
from qarm_feast.errors import CodebookNotFoundError, DataError, GateRefusedError
from qarm_feast.registry import (
    CodebookRegistry,
    VersionState,
    drafts_uri,
    read_manifest,
    report_path,
    write_artifact,
)
from qarm_feast.schema import CONTENT_LOG, CONTENT_LOG_ROWS
from qarm_feast.vector_files import VectorFiles


def _run(config_path: Path, *arguments: str) -> str:
    command = [arguments[0], "--config", str(config_path), *arguments[1:]]
    result = CliRunner().invoke(codebook_group, command, catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_train_evaluate_publish_list_show(config_path: Path) -> None:
    uri = str(config_path.parent / "data" / "codebooks")
    version = ("--codebook-version", "v1")

    trained = _run(config_path, "train", *version)
    drafted = _run(config_path, "list")
    evaluated = _run(config_path, "evaluate", *version)
    published = _run(config_path, "publish", *version)

    assert trained.startswith("trained v1: 220 items, RQ levels 4 x 4, VQ pool 220 (top 5)")
    assert drafted.splitlines()[1].split()[:2] == ["v1", "draft"]
    assert "collision rate" in evaluated
    report = Path(evaluated.splitlines()[-1].removeprefix("written to "))
    quality = json.loads(report.read_text())["quality"]
    assert quality["num_items"] == NUM_ITEMS
    # Of the items from 220 on the even ones are positives: three users, each after six items.
    assert quality["behaviour"]["num_pairs"] == 7
    page = report.with_name("quality.html").read_text()
    assert quality["worst_buckets"][0]["titles"][0] in page
    assert published == f"published v1 as default in {uri}\n"
    assert _run(config_path, "list").splitlines()[1].split()[:2] == ["v1", "default"]
    assert json.loads(_run(config_path, "show", *version))["quality"]["num_items"] == NUM_ITEMS
    assert Codebook.load(uri, "v1").vq.pool_item_ids_P.max() == NUM_ITEMS - NUM_COLD - 1


def test_the_cutoff_is_the_newest_interaction_that_encoder_or_pool_saw(config_path: Path) -> None:
    _run(config_path, "train", "--codebook-version", "v1")

    uri = config_path.parent / "data" / "codebooks" / ".drafts"
    assert read_manifest(str(uri), "v1").behaviour_cutoff == NEWEST_TRAIN


def test_a_second_version_can_be_retired_and_the_default_cannot(config_path: Path) -> None:
    for version in ("v1", "v2"):
        for verb in ("train", "evaluate", "publish"):
            _run(config_path, verb, "--codebook-version", version)

    staged = _run(config_path, "publish", "--codebook-version", "v2")
    _run(config_path, "retire", "--codebook-version", "v2")

    assert staged.endswith("next: `qarm rollout plan --codebook-version v2`\n")
    states = CodebookRegistry(str(config_path.parent / "data" / "codebooks")).states()
    assert states == {"v1": VersionState.DEFAULT, "v2": VersionState.RETIRED}
    again = _run(config_path, "publish", "--codebook-version", "v2")
    assert again.startswith("v2 was published before and stays retired in ")


def test_a_refresh_keeps_the_codes_of_its_parent(config_path: Path) -> None:
    for verb in ("train", "evaluate", "publish"):
        _run(config_path, verb, "--codebook-version", "v1")

    trained = _run(config_path, "train", "--codebook-version", "v2", "--parent", "v1")

    uri = config_path.parent / "data" / "codebooks" / ".drafts"
    manifest = read_manifest(str(uri), "v2")
    assert "kept from v1: of 240 items 0." in trained
    assert "VQ lists 0.0% (nearest alone 0.0%)" in trained
    assert manifest.parent == "v1"
    assert manifest.label_map == (tuple(range(4)),) * 2
    assert manifest.continuity["num_items"]["compared"] == NUM_ITEMS
    for verb in ("evaluate", "publish"):
        _run(config_path, verb, "--codebook-version", "v2")
    shown = json.loads(_run(config_path, "show", "--codebook-version", "v2"))
    assert shown["continuity"]["churn"]["full"] <= 0.01


def test_a_refresh_drops_the_pool_rows_of_items_that_were_taken_down(config_path: Path) -> None:
    for verb in ("train", "evaluate", "publish"):
        _run(config_path, verb, "--codebook-version", "v1")
    _log_content_events(
        config_path.parent,
        [
            # Down; down and uploaded anew; uploaded anew before the takedown came in; edited.
            (3, 10, True),
            (4, 10, True),
            (4, 11, False),
            (5, 11, True),
            (5, 10, False),
            (6, 10, False),
        ],
    )

    trained = _run(config_path, "train", "--codebook-version", "v2", "--parent", "v1")

    uri = config_path.parent / "data" / "codebooks"
    old = Codebook.load(str(uri), "v1").vq.pool_item_ids_P
    new = Codebook.load(str(uri / ".drafts"), "v2").vq.pool_item_ids_P
    assert trained.startswith("trained v2: 218 items")
    assert set(old) - set(new) == {3, 5}
    # Two rows are freed, which those at the end move into.
    assert (new == old[: len(new)]).sum() >= len(new) - 2


def _log_content_events(repo_dir: Path, events: list[tuple[int, int, bool]]) -> None:
    """Make a feature repository whose content log holds events: item, second, is a takedown."""
    (repo_dir / "feature_store.yaml").write_text(
        "project: shop\nprovider: local\nregistry: data/registry.db\n"
        "offline_store:\n  type: qarm_feast.offline_store.CodeLogOfflineStore\n"
        "  uri: data/offline\nentity_key_serialization_version: 3\n"
    )
    log = CodeLog(repo_dir / "data" / "offline")
    log.create(CONTENT_LOG, CONTENT_LOG_ROWS)
    for offset, (item_id, second, is_deleted) in enumerate(events):
        event_time = datetime(2026, 1, 1, 0, 0, second, tzinfo=UTC)
        row = dict.fromkeys(CONTENT_LOG_ROWS.names) | {
            "item_id": item_id,
            "content_hash": TAKEDOWN_HASH if is_deleted else f"{item_id:064d}",
            "is_deleted": is_deleted,
            "topic": "items",
            "partition": 0,
            "offset": offset,
            "event_timestamp": event_time,
            "created": event_time,
        }
        log.append(CONTENT_LOG, pa.Table.from_pylist([row], schema=CONTENT_LOG_ROWS))


def test_a_parent_that_is_not_published_is_refused(config_path: Path) -> None:
    _run(config_path, "train", "--codebook-version", "v1")

    publish_first = r"holds no published codebook version 'v1' .* codebook publish .*v1` first"
    with pytest.raises(CodebookNotFoundError, match=publish_first):
        _run(config_path, "train", "--codebook-version", "v2", "--parent", "v1")
    with pytest.raises(CodebookNotFoundError, match=publish_first):
        _run(config_path, "retire", "--codebook-version", "v1")


def test_an_unknown_version_is_answered_with_the_known_ones_and_the_drafts(
    config_path: Path,
) -> None:
    with pytest.raises(CodebookNotFoundError, match=r"it holds: none\); run .* train .*v7` first"):
        _run(config_path, "show", "--codebook-version", "v7")
    for verb in ("train", "evaluate", "publish"):
        _run(config_path, verb, "--codebook-version", "v1")
    _run(config_path, "train", "--codebook-version", "v2")

    for arguments in (
        ("show", "--codebook-version", "v7"),
        ("evaluate", "--codebook-version", "v7"),
        ("purge", "--codebook-version", "v7", "--yes"),
        ("retire", "--codebook-version", "v7"),
        ("default", "--codebook-version", "v7"),
        ("diff", "--codebook-version", "v7", "--against", "v1"),
        ("diff", "--codebook-version", "v1", "--against", "v7"),
        ("train", "--codebook-version", "v3", "--parent", "v7"),
    ):
        offered = r"'v7' \(it holds: v1; drafts: v2\); name one of these; `qarm codebook list`"
        with pytest.raises(CodebookNotFoundError, match=offered):
            _run(config_path, *arguments)


def test_a_gate_of_the_configuration_refuses(config_path: Path) -> None:
    with config_path.open("a") as file:
        file.write("codebook: {gates: {max_collision_rate: 0.1}}\n")
    _run(config_path, "train", "--codebook-version", "v1")
    _run(config_path, "evaluate", "--codebook-version", "v1")

    with pytest.raises(GateRefusedError, match=r"max_collision_rate: measured 0\.9"):
        _run(config_path, "publish", "--codebook-version", "v1")
    _run(config_path, "publish", "--codebook-version", "v1", "--force")

    shown = json.loads(_run(config_path, "show", "--codebook-version", "v1"))
    assert shown["forced_gates"][0].startswith("max_collision_rate")


def test_evaluate_says_of_each_gate_what_publish_would(config_path: Path) -> None:
    with config_path.open("a") as file:
        file.write("codebook: {gates: {max_collision_rate: 0.1}}\n")
    _run(config_path, "train", "--codebook-version", "v1")

    refused = _run(config_path, "evaluate", "--codebook-version", "v1")
    config_path.write_text(config_path.read_text().replace("0.1", "0.95"))
    accepted = _run(config_path, "evaluate", "--codebook-version", "v1")

    # 16 codes for 240 items: 1 - 16 / 240.
    name = "gate max_collision_rate          measured 0.9333, "
    assert f"{name}limit 0.1000, missed by 0.8333\n" in refused
    assert f"{name}limit 0.9500, kept by 0.0167\n" in accepted
    gate = "gate min_codebook_coverage       measured 1.0000, limit 0.5000, kept by 0.5000\n"
    assert gate in refused
    assert re.search(r"gate min_hr10 +measured 0\.\d{4}, no limit \(gate off\)\n", refused)
    assert "by these figures a publication is refused (1 missed)\n" in refused
    assert "by these figures a publication is accepted\n" in accepted


def test_a_publication_by_force_is_told_wherever_the_version_is_shown(config_path: Path) -> None:
    with config_path.open("a") as file:
        file.write("codebook: {gates: {max_collision_rate: 0.1}}\n")
    version = ("--codebook-version", "v1")
    _run(config_path, "train", *version)
    before = _run(config_path, "evaluate", *version)
    published = _run(config_path, "publish", *version, "--force")

    shown = CliRunner().invoke(codebook_group, ["show", "--config", str(config_path), *version])
    evaluated = _run(config_path, "evaluate", *version)

    told = "max_collision_rate: measured 0.9333, limit 0.1000, missed by 0.8333"
    assert shown.stderr == f"v1 was published by force against a gate: {told}\n"
    assert f"published by force against a gate: {told}\n" in evaluated
    assert "by force" not in before
    assert "still that of the draft; `qarm codebook evaluate --codebook-version v1`" in published
    report = report_path(str(config_path.parent / "data" / "codebooks"), "v1")
    assert json.loads(report.read_text())["forced_gates"] == [told]
    page = report.with_name("quality.html").read_text()
    assert f"Published by force (--force), against:<br>{told}" in page
    head, row = (line.split() for line in _run(config_path, "list").splitlines())
    assert row[head.index("forced")] == "1"


def test_the_list_is_aligned_and_narrow_for_ordinary_values(config_path: Path) -> None:
    _run(config_path, "train", "--codebook-version", "v1")
    drafts = drafts_uri(str(config_path.parent / "data" / "codebooks"))
    large = {
        "version": "books_v12",
        "parent": "books_v11",
        "encoder_version": "minilm_2024_06",
        "level_sizes": (4096, 4096, 4096),
        "pool_size": 1_000_000,
        "search": "ivf_flat",
        "caps": {"max_items_per_code": 16},
    }
    manifest = read_manifest(drafts, "v1").model_copy(update=large)
    write_artifact(drafts, manifest, {}, replace=True)

    head, *rows = _run(config_path, "list").splitlines()

    assert max(map(len, [head, *rows])) <= 120
    for name, values in {
        "parent": ("books_v11", "-"),
        "cap": ("16", "-"),
        "search": ("ivf_flat", "exact"),
        "levels": ("4096x4096x4096", "4x4"),
    }.items():
        assert tuple(row[head.index(name) :].split()[0] for row in rows) == values


def test_an_encoder_manifest_that_cannot_be_read_is_named(config_path: Path) -> None:
    manifest = config_path.parent / "data" / "encoders" / "e1" / "manifest.json"
    manifest.write_text("{")

    with pytest.raises(DataError, match=r"e1/manifest\.json is no encoder manifest"):
        _run(config_path, "train", "--codebook-version", "v1")


def test_vectors_of_unequal_width_are_refused_with_both_files(tmp_path: Path) -> None:
    for name, width in (("a", 2), ("b", 3)):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array([1.0] * width, pa.float32()), width)
        table = pa.table({"item_id": [1], "embedding": vectors, "content_hash": ["x"]})
        pq.write_table(table, tmp_path / f"{name}.parquet")

    with pytest.raises(DataError, match=r"b\.parquet holds vectors of width 3, .*a\.parquet of 2"):
        VectorFiles.open(tmp_path).read()


def test_the_options_of_every_command_are_pinned() -> None:
    options = {
        name: [option for parameter in command.params for option in parameter.opts]
        for name, command in codebook_group.commands.items()
    }

    common = ["--config", "--log-level", "--codebook-version"]
    assert options == {
        "train": [*common, "--parent"],
        "evaluate": common,
        "publish": [*common, "--force"],
        "list": ["--config"],
        "show": ["--config", "--codebook-version"],
        "retire": common,
        "default": common,
        "purge": [*common, "--yes"],
        "diff": [*common, "--against", "--json"],
        "backfill": [*common, "--engine", "--up-to"],
    }


def test_an_item_without_a_title_is_named_by_its_id() -> None:
    items = pa.table({"item_id": pa.array([1, 2], pa.int64()), "title": ["saw", None]})

    assert titles_of(items, np.array([2, 1, 3])) == ["item 2", "saw", "item 3"]
    assert titles_of(items.drop_columns("title"), np.array([1])) == ["item 1"]


def test_vectors_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="qarm align export"):
        VectorFiles.open(tmp_path).read()

    embedding = pa.array([[1.0]], pa.list_(pa.float32()))
    table = pa.table({"item_id": [1], "embedding": embedding, "content_hash": ["h"]})
    pq.write_table(table, tmp_path / "part.parquet")
    with pytest.raises(DataError, match="embedding is list"):
        VectorFiles.open(tmp_path).read()

    fixed = pa.FixedSizeListArray.from_arrays(pa.array([1.0], pa.float32()), 1)
    table = pa.table(
        {"item_id": pa.array([None], pa.int64()), "embedding": fixed, "content_hash": ["h"]}
    )
    pq.write_table(table, tmp_path / "part.parquet")
    with pytest.raises(DataError, match="1 values of item_id are null"):
        VectorFiles.open(tmp_path).read()

    table = pa.table({"item_id": [1], "embedding": fixed, "content_hash": [7]})
    pq.write_table(table, tmp_path / "part.parquet")
    with pytest.raises(DataError, match="content_hash is int64, it must be string"):
        VectorFiles.open(tmp_path).read()


def test_a_version_is_evaluated_on_the_vectors_of_its_own_encoder(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(config_path, "train", "--codebook-version", "v1")
    before = _run(config_path, "evaluate", "--codebook-version", "v1")
    monkeypatch.setenv("QARM_ALIGNMENT__ENCODER_VERSION", "e2")

    assert _run(config_path, "evaluate", "--codebook-version", "v1") == before
