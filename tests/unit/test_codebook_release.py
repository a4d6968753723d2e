"""From a draft to what is served: caps at publish, differences of versions, removal.

Shape letters in this file: N items, D embedding width, L levels.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from codebook_input import NUM_ITEMS, write_vectors

from qarm_feast.codebook import Codebook, ItemVectors
from qarm_feast.codebook_cli import codebook_group
from qarm_feast.codebook_evaluation import evaluate_codebook
from qarm_feast.codebook_release import published_last_codes
from qarm_feast.continuity import ParentCodes
from qarm_feast.errors import (
    CodebookError,
    CodebookNotFoundError,
    ConfigError,
    CorruptArtifactError,
    DataError,
    GateRefusedError,
)
from qarm_feast.quantizers.base import unit_rows
from qarm_feast.registry import CodebookRegistry, Manifest, VersionState, read_manifest, report_path
from qarm_feast.vector_files import VectorFiles


def _invoke(config_path: Path, *arguments: str, answer: str | None = None) -> Result:
    command = [arguments[0], "--config", str(config_path), *arguments[1:]]
    return CliRunner().invoke(codebook_group, command, input=answer)


def _run(config_path: Path, *arguments: str) -> str:
    result = _invoke(config_path, *arguments)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def _publish(config_path: Path, version: str, *train_arguments: str) -> str:
    _run(config_path, "train", "--codebook-version", version, *train_arguments)
    _run(config_path, "evaluate", "--codebook-version", version)
    return _run(config_path, "publish", "--codebook-version", version)


def _cap(monkeypatch: pytest.MonkeyPatch, most: int | None) -> None:
    if most is None:
        monkeypatch.delenv("QARM_CODEBOOK__MAX_ITEMS_PER_CODE")
    else:
        monkeypatch.setenv("QARM_CODEBOOK__MAX_ITEMS_PER_CODE", str(most))


def _uri(config_path: Path) -> str:
    return str(config_path.parent / "data" / "codebooks")


def _vectors(config_path: Path, encoder: str = "e1") -> ItemVectors:
    return VectorFiles.open(config_path.parent / "data" / "vectors" / encoder).read()


def _served(config_path: Path, version: str) -> np.ndarray:
    vectors = _vectors(config_path)
    codebook = Codebook.load(_uri(config_path), version)
    return codebook.encode(vectors.item_ids_N, vectors.content_hashes_N, vectors.x_ND).rq_NL


def _largest_bucket(rq_NL: np.ndarray) -> int:
    return int(np.unique(rq_NL, axis=0, return_counts=True)[1].max())


def test_a_cap_moves_catalogue_items_and_the_gates_see_the_codes_as_served(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 240 items on 4 x 4 codes: without a cap 16 codes at most, so a collision rate above .93.
    _cap(monkeypatch, 16)
    monkeypatch.setenv("QARM_CODEBOOK__GATES__MAX_COLLISION_RATE", "0.94")

    printed = _publish(config_path, "v1")

    manifest = read_manifest(_uri(config_path), "v1")
    served_NL = _served(config_path, "v1")
    vectors = _vectors(config_path)
    edited_NL = (
        Codebook.load(_uri(config_path), "v1")
        .encode(vectors.item_ids_N, ["edited"] * NUM_ITEMS, vectors.x_ND)
        .rq_NL
    )
    caps = manifest.caps
    assert (caps["max_items_per_code"], caps["num_held"]) == (16, 0)
    assert caps["num_moved"] == manifest.num_overrides > 0
    assert caps["num_moved"] == (served_NL != edited_NL).any(axis=1).sum()
    assert (served_NL[:, 0] == edited_NL[:, 0]).all()
    assert _largest_bucket(served_NL) < _largest_bucket(edited_NL)
    assert manifest.quality["max_bucket"] == _largest_bucket(served_NL)
    assert caps["without_caps"]["max_bucket"] == _largest_bucket(edited_NL)
    assert f"{caps['num_moved']} moved, {caps['num_without_room']} found no free code" in printed
    report = json.loads(report_path(_uri(config_path), "v1").read_text())
    assert report["quality"] == manifest.quality
    # Items of one code decode alike, so what moves costs or gains neighbours.
    assert caps["with_caps"]["hr10"] == manifest.quality["hr10"] != caps["without_caps"]["hr10"]
    hr10 = [f"{caps[key]['hr10']:.5g}" for key in ("without_caps", "with_caps")]
    assert f"HR@10 {hr10[0]} -> {hr10[1]}, " in printed
    assert "behaviour" in report["quality"]
    assert report_path(_uri(config_path), "v1").with_name("quality.html").is_file()


def test_the_page_of_a_capped_version_tells_that_it_was_published_by_force(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cap(monkeypatch, 16)
    monkeypatch.setenv("QARM_CODEBOOK__GATES__MAX_COLLISION_RATE", "0.5")
    _run(config_path, "train", "--codebook-version", "v1")

    _run(config_path, "publish", "--codebook-version", "v1", "--force")

    report = report_path(_uri(config_path), "v1")
    (refusal,) = read_manifest(_uri(config_path), "v1").forced_gates
    assert json.loads(report.read_text())["forced_gates"] == [refusal]
    assert f"against:<br>{refusal}" in report.with_name("quality.html").read_text()


class _KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.fault
def test_evaluate_killed_between_any_two_steps_leaves_no_page_of_other_figures(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(config_path, "train", "--codebook-version", "v1")
    report = report_path(_uri(config_path), "v1")
    page, x_ND = report.with_name("quality.html"), _vectors(config_path).x_ND
    left, seen = 0, []

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise _KilledError
            return function(*args, **kwargs)

        return call

    for num_changes in range(10):
        _replace_vectors(config_path, x_ND)
        evaluate_codebook(str(config_path), "v1")
        _replace_vectors(config_path, x_ND[:200])
        left = num_changes
        with monkeypatch.context() as patch, suppress(_KilledError):
            for name in ("replace", "unlink"):
                patch.setattr(os, name, dying(getattr(os, name)))
            evaluate_codebook(str(config_path), "v1")

        num_items = json.loads(report.read_text())["quality"]["num_items"]
        seen.append((num_items, page.is_file()))
        if page.is_file():
            assert f"measured on {num_items} items" in page.read_text()
        if left >= 0:
            break

    # Killed before the old page goes, before the figures, before the new page; and not at all.
    assert seen == [(NUM_ITEMS, True), (NUM_ITEMS, False), (200, False), (200, True)]


def test_a_gate_refuses_by_the_capped_figures_and_nothing_is_stored(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(config_path, "train", "--codebook-version", "v1")
    _run(config_path, "evaluate", "--codebook-version", "v1")
    _cap(monkeypatch, 16)
    monkeypatch.setenv("QARM_CODEBOOK__GATES__MAX_COLLISION_RATE", "0.5")

    with pytest.raises(GateRefusedError, match=r"max_collision_rate: measured 0\.9333"):
        _run(config_path, "publish", "--codebook-version", "v1")

    assert not (Path(_uri(config_path)) / "v1").exists()
    # The draft is as it was: without the cap it goes out without overrides.
    _cap(monkeypatch, None)
    monkeypatch.delenv("QARM_CODEBOOK__GATES__MAX_COLLISION_RATE")
    _run(config_path, "publish", "--codebook-version", "v1")
    assert read_manifest(_uri(config_path), "v1").num_overrides == 0


def test_an_upload_after_publishing_is_not_capped(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cap(monkeypatch, 16)
    _publish(config_path, "v1")
    codebook = Codebook.load(_uri(config_path), "v1")
    vectors = _vectors(config_path)
    served_NL = _served(config_path, "v1")

    uploads = np.arange(10_000, 10_000 + NUM_ITEMS)
    codes_NL = codebook.encode(uploads, vectors.content_hashes_N, vectors.x_ND).rq_NL

    np.testing.assert_array_equal(codes_NL, codebook.rq.encode(unit_rows(vectors.x_ND)))
    assert (codes_NL != served_NL).any()


def test_a_refresh_under_a_cap_moves_no_published_code(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish(config_path, "v1")
    before_NL = _served(config_path, "v1")
    _cap(monkeypatch, 2)

    _publish(config_path, "v2", "--parent", "v1")

    manifest = read_manifest(_uri(config_path), "v2")
    after_NL = _served(config_path, "v2")
    kept_N = (before_NL == after_NL).all(axis=1)
    assert manifest.label_map == (tuple(range(4)),) * 2
    assert (
        manifest.caps["num_held"]
        == NUM_ITEMS - manifest.caps["num_moved"] - (manifest.caps["num_without_room"])
    )
    assert kept_N.sum() == manifest.caps["num_held"] > 0.9 * NUM_ITEMS


def test_published_codes_are_read_through_the_label_map_for_the_same_content_only() -> None:
    parent = ParentCodes(
        version="v1",
        level_sizes=(2, 2),
        level_kinds=("kmeans", "kmeans"),
        behaviour_cutoff=None,
        pool_item_ids_P=np.array([1]),
        item_ids_N=np.array([1, 2, 3, 4]),
        content_hashes_N=["a", "b", "c", "d"],
        rq_NL=np.array([[0, 1], [0, 1], [1, 0], [1, 1]]),
        vq_NV=np.zeros((4, 1), dtype=np.int64),
    )
    # New code 0 of level 1 goes on from old 1, new 1 from old 0; of level 2 new 1 is new.
    manifest = Manifest.model_construct(label_map=((1, 0), (1, -1)))
    vectors = ItemVectors(
        np.array([1, 2, 3, 4, 5]), ["a", "edited", "c", "d", "e"], np.ones((5, 1), np.float32)
    )
    rq_NL = np.array([[1, 1], [1, 0], [0, 1], [1, 0], [1, 0]])

    published_N = published_last_codes(manifest, vectors, rq_NL, parent)

    # Item 1 has its prefix; 2 was edited, 3's last code does not go on, 4 has another prefix.
    assert published_N.tolist() == [0, -1, -1, -1, -1]


def test_a_refresh_in_the_same_space_gives_capped_items_their_capped_codes_again(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QARM_QUANTIZER__RQ__CODEBOOK_SIZE", "[4, 96]")
    _cap(monkeypatch, 1)
    _publish(config_path, "v1")

    published = _publish(config_path, "v2", "--parent", "v1")

    is_other_N = (_served(config_path, "v1") != _served(config_path, "v2")).any(axis=1)
    first, second = (read_manifest(_uri(config_path), version) for version in ("v1", "v2"))
    assert first.caps["num_moved"] > 0.1 * NUM_ITEMS
    assert first.caps["churn"] is None
    assert is_other_N.mean() <= 0.01
    # The refresh alone gives items back what the cap had moved: its own churn is larger.
    assert second.continuity["churn"]["full"] > 0.01
    assert second.caps["churn"]["full"] == is_other_N.mean()
    page = report_path(_uri(config_path), "v2").with_name("quality.html").read_text()
    assert f"as served, {is_other_N.mean():.1%}".replace("%", " %") in page
    assert f"as served {is_other_N.mean():.1%} of full codes changed" in published


def test_a_version_that_is_no_draft_cannot_be_capped(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(config_path, "train", "--codebook-version", "v1")
    uri = Path(_uri(config_path))
    shutil.move(uri / ".drafts" / "v1", uri / "v1")
    _cap(monkeypatch, 2)

    with pytest.raises(CodebookError, match=r"'v1' is no draft .* --codebook-version v2"):
        _run(config_path, "publish", "--codebook-version", "v1")
    with pytest.raises(CodebookNotFoundError, match="'v7'"):
        _run(config_path, "publish", "--codebook-version", "v7")


def _diff(config_path: Path, version: str, against: str) -> dict:
    arguments = ("--codebook-version", version, "--against", against, "--json")
    return json.loads(_run(config_path, "diff", *arguments))


def test_a_version_does_not_differ_from_itself(config_path: Path) -> None:
    _publish(config_path, "v1")

    changes = _diff(config_path, "v1", "v1")

    assert changes["manifest"] == {}
    assert changes["pool"]["num_reset"] == 0
    assert changes["catalogue"]["rq_churn"]["full"] == 0.0
    assert changes["catalogue"]["vq_churn"] == 0.0
    assert all(new == old for new, old in changes["quality"].values())


def test_the_table_of_differences_prints_long_values_in_full(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QARM_QUANTIZER__RQ__NUM_LEVELS", "4")
    _run(config_path, "train", "--codebook-version", "v1")
    monkeypatch.setenv("QARM_QUANTIZER__RQ__LAST_LEVEL", "fsq")
    _run(config_path, "train", "--codebook-version", "v2")

    table = _run(config_path, "diff", "--codebook-version", "v2", "--against", "v1")

    lines = table.splitlines()
    place = lines.index("level_kinds")
    assert lines[place + 1 : place + 3] == [
        "  v2: kmeans, kmeans, kmeans, fsq",
        "  v1: kmeans, kmeans, kmeans, kmeans",
    ]
    assert "..." not in table


def test_a_refreshed_version_is_read_through_its_label_map_over_a_chain(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish(config_path, "v1")
    # Another size: labels are matched, so that numbers alone say little.
    monkeypatch.setenv("QARM_QUANTIZER__RQ__CODEBOOK_SIZE", "6")
    _publish(config_path, "v2", "--parent", "v1")
    _publish(config_path, "v3", "--parent", "v2")

    child, grandchild = _diff(config_path, "v2", "v1"), _diff(config_path, "v3", "v1")

    figures = read_manifest(_uri(config_path), "v2").continuity
    assert (child["labels"], grandchild["labels"]) == ("map", "map")
    assert child["recorded_churn"] == figures["churn"]
    assert child["pool"]["num_kept"] == figures["pool"]["num_kept"]
    assert child["manifest"]["parent"] == ["v1", None]
    assert len(child["codes_that_go_on"]) == 2
    maps = [read_manifest(_uri(config_path), name).label_map or () for name in ("v3", "v2")]
    read = [
        [-1 if later[code] < 0 else earlier[later[code]] for code in codes_N]
        for later, earlier, codes_N in zip(*maps, _served(config_path, "v3").T, strict=True)
    ]
    is_other_NL = _served(config_path, "v1") != np.array(read).T
    expected = float(is_other_NL.any(axis=1).mean())
    assert grandchild["catalogue"]["rq_churn"]["full"] == pytest.approx(expected)
    assert 0 < expected < 0.9
    assert _diff(config_path, "v1", "v2")["labels"] == "number"


def test_the_table_of_differences_names_what_a_reader_looks_for(config_path: Path) -> None:
    _publish(config_path, "v1")
    _run(config_path, "train", "--codebook-version", "v2", "--parent", "v1")

    table = _run(config_path, "diff", "--codebook-version", "v2", "--against", "v1")

    lines = table.splitlines()
    assert lines[0].split() == ["v2", "v1"]
    assert any(line.split()[:3] == ["parent", "v1", "-"] for line in lines)
    # The draft was not evaluated.
    assert any(line.split()[:2] == ["collision_rate", "-"] for line in lines)
    assert "pool rows: 220 keep their item, 0 start anew (of 220; v1 has 220)" in table
    assert "labels: codes that go on from v1, level by level: 4/4, 4/4" in table
    assert "items: of 240 with equal content (of 240) 0.0% changed" in table


def test_the_differences_name_another_search_of_the_pool(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish(config_path, "v1")
    monkeypatch.setenv("QARM_QUANTIZER__VQ__SEARCH", "hnsw")
    _run(config_path, "train", "--codebook-version", "v2", "--parent", "v1")

    manifest = _diff(config_path, "v2", "v1")["manifest"]

    assert manifest["search"] == ["hnsw", "exact"]
    assert manifest["search_settings"][0]["hnsw_m"] == 32
    assert manifest["search_settings"][1] == {}


def test_without_vectors_of_an_encoder_items_are_not_compared(config_path: Path) -> None:
    _publish(config_path, "v1")
    shutil.rmtree(config_path.parent / "data" / "vectors" / "e1")

    assert _diff(config_path, "v1", "v1")["catalogue"] is None


def test_an_edited_item_is_not_compared(config_path: Path) -> None:
    _publish(config_path, "v1")
    _publish(config_path, "v2")
    vectors = config_path.parent / "data" / "vectors"
    write_vectors(vectors / "e2", num_edited=5)
    (config_path.parent / "data" / "encoders" / "e2").mkdir()
    manifest = {"version": "e2", "behaviour_cutoff": None}
    path = config_path.parent / "data" / "encoders" / "e2" / "manifest.json"
    path.write_text(json.dumps(manifest))
    with config_path.open("a") as file:
        file.write("alignment: {encoder_version: e2}\n")
    _run(config_path, "train", "--codebook-version", "v3")

    changes = _diff(config_path, "v3", "v1")

    assert changes["manifest"]["encoder_version"] == ["e2", "e1"]
    assert changes["catalogue"]["num_compared"] == NUM_ITEMS - 5


def test_purge_asks_and_leaves_a_name_that_list_shows_and_train_refuses(config_path: Path) -> None:
    for version in ("v1", "v2"):
        _publish(config_path, version)
    _run(config_path, "default", "--codebook-version", "v2")
    _run(config_path, "retire", "--codebook-version", "v1")

    refused = _invoke(config_path, "purge", "--codebook-version", "v1", answer="n\n")
    states = CodebookRegistry(_uri(config_path)).states()
    purged = _run(config_path, "purge", "--codebook-version", "v1", "--yes")

    assert "cannot be undone" in refused.output
    assert (refused.output.splitlines()[-1], refused.exit_code) == ("kept v1", 0)
    assert states == {"v1": VersionState.RETIRED, "v2": VersionState.DEFAULT}
    assert purged.startswith("purged v1: ")
    assert _run(config_path, "list").splitlines()[-1].split() == ["v1", "purged"]
    assert not (Path(_uri(config_path)) / "v1").exists()
    for command in (["train"], ["show"], ["evaluate"], ["publish"], ["diff", "--against", "v2"]):
        with pytest.raises(CodebookError, match=r"'v1' was purged .* --codebook-version v3`"):
            _run(config_path, *command, "--codebook-version", "v1")
    with pytest.raises(CodebookError, match="'v1' was purged"):
        _run(config_path, "train", "--codebook-version", "v3", "--parent", "v1")
    assert _run(config_path, "purge", "--codebook-version", "v1", "--yes") == (
        "purged v1: no file was left\n"
        "online rows: none looked for, no feature_store.yaml stands beside the configuration\n"
    )


def test_purge_refuses_a_store_that_gives_no_rows_away_while_the_version_is_still_there(
    config_path: Path,
) -> None:
    for version in ("v1", "v2"):
        _publish(config_path, version)
    _run(config_path, "default", "--codebook-version", "v2")
    _run(config_path, "retire", "--codebook-version", "v1")
    stock = "{type: sqlite, path: online.db}"
    config_path.with_name("feature_store.yaml").write_text(
        f"project: shop\nprovider: local\nregistry: registry.db\nonline_store: {stock}\n"
        "entity_key_serialization_version: 3\n"
    )

    with pytest.raises(ConfigError, match="names the online store SqliteOnlineStore"):
        _run(config_path, "purge", "--codebook-version", "v1", "--yes")

    assert CodebookRegistry(_uri(config_path)).states()["v1"] is VersionState.RETIRED
    assert (Path(_uri(config_path)) / "v1").exists()


def test_purge_refuses_a_version_in_use_before_it_asks(config_path: Path) -> None:
    _publish(config_path, "v1")

    with pytest.raises(CodebookError, match="'v1' is default"):
        _run(config_path, "purge", "--codebook-version", "v1")


def test_train_refuses_a_published_name_before_it_reads_anything(config_path: Path) -> None:
    _publish(config_path, "v1")
    shutil.rmtree(config_path.parent / "data" / "vectors")

    with pytest.raises(CodebookError, match=r"'v1' is default .* --codebook-version v2`"):
        _run(config_path, "train", "--codebook-version", "v1")


def _replace_vectors(config_path: Path, x_ND: np.ndarray, ids: list[int] | None = None) -> None:
    folder = config_path.parent / "data" / "vectors" / "e1"
    shutil.rmtree(folder)
    folder.mkdir()
    values = pa.array(x_ND.astype(np.float32).ravel())
    table = pa.table(
        {
            "item_id": pa.array(ids or list(range(len(x_ND))), pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(values, x_ND.shape[1]),
            "content_hash": pa.array([f"{n:032x}" for n in range(len(x_ND))], pa.string()),
        }
    )
    pq.write_table(table, folder / "part-00000.parquet")


@pytest.mark.parametrize("verb", ["evaluate", "publish"])
def test_a_missing_file_of_a_draft_is_named_with_the_command_that_makes_it_again(
    config_path: Path, verb: str
) -> None:
    _publish(config_path, "v1")
    _run(config_path, "train", "--codebook-version", "v2", "--parent", "v1")
    _run(config_path, "evaluate", "--codebook-version", "v2")
    (path,) = (Path(_uri(config_path)) / ".drafts" / "v2").glob("vq-*.safetensors")
    path.unlink()

    again = r"qarm codebook train --codebook-version v2 --parent v1"
    with pytest.raises(CorruptArtifactError, match=rf"{path} is missing, .*; run `{again}`"):
        _run(config_path, verb, "--codebook-version", "v2")


def test_a_missing_file_of_a_published_version_is_named_with_what_is_left_to_do(
    config_path: Path,
) -> None:
    _publish(config_path, "v1")
    (path,) = (Path(_uri(config_path)) / "v1").glob("rq-*.safetensors")
    path.unlink()

    with pytest.raises(CorruptArtifactError, match=rf"{path} is missing, .*; put back a copy"):
        _run(config_path, "evaluate", "--codebook-version", "v1")


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("verb", ["train", "evaluate", "publish"])
def test_a_vector_without_a_code_ends_every_verb_and_names_its_item(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, value: float
) -> None:
    if verb != "train":
        _run(config_path, "train", "--codebook-version", "v1")
    x_ND = _vectors(config_path).x_ND.copy()
    x_ND[7] = value
    _replace_vectors(config_path, x_ND)
    _cap(monkeypatch, 2)

    with pytest.raises(DataError, match=r"1 of \d+ vectors .* that of item 7$"):
        _run(config_path, verb, "--codebook-version", "v1")


@pytest.mark.parametrize("verb", ["evaluate", "publish"])
def test_vectors_of_another_width_end_what_reads_them(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    _run(config_path, "train", "--codebook-version", "v1")
    _replace_vectors(config_path, np.ones((NUM_ITEMS, 5)))
    _cap(monkeypatch, 2)

    with pytest.raises(CodebookError, match="5 wide, this codebook takes width 8"):
        _run(config_path, verb, "--codebook-version", "v1")


def test_an_item_that_comes_twice_is_refused(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(config_path, "train", "--codebook-version", "v1")
    x_ND = _vectors(config_path).x_ND
    _replace_vectors(config_path, x_ND, [*range(NUM_ITEMS - 1), 3])
    _cap(monkeypatch, 2)

    for verb in ("evaluate", "publish"):
        with pytest.raises(DataError, match="1 item ids come more than once; the first is 3"):
            _run(config_path, verb, "--codebook-version", "v1")
    with pytest.raises(DataError, match="1 item ids come more than once; the first is 3"):
        _run(config_path, "train", "--codebook-version", "v2")


def test_equal_vectors_and_too_few_are_refused_by_train(config_path: Path) -> None:
    _replace_vectors(config_path, np.ones((NUM_ITEMS, 8)))
    with pytest.raises(CodebookError, match="1 distinct vectors are too few"):
        _run(config_path, "train", "--codebook-version", "v1")

    _replace_vectors(config_path, np.random.default_rng(0).standard_normal((20, 8)))
    with pytest.raises(CodebookError, match="20 distinct vectors are too few"):
        _run(config_path, "train", "--codebook-version", "v1")


def test_an_empty_set_is_refused(config_path: Path) -> None:
    _replace_vectors(config_path, np.ones((0, 8)))

    with pytest.raises(DataError, match="holds no vectors; run `qarm align export`"):
        _run(config_path, "train", "--codebook-version", "v1")


def test_equal_vectors_are_capped_as_far_as_there_is_room_and_counted(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(config_path, "train", "--codebook-version", "v1")
    x_ND = np.tile(_vectors(config_path).x_ND[:1], (NUM_ITEMS, 1))
    _replace_vectors(config_path, x_ND)
    _cap(monkeypatch, 10)

    _run(config_path, "publish", "--codebook-version", "v1", "--force")

    # One prefix, four codes of the last level, ten items each.
    caps = read_manifest(_uri(config_path), "v1").caps
    assert (caps["num_moved"], caps["num_without_room"]) == (30, NUM_ITEMS - 40)


def test_one_centroid_is_refused_by_the_configuration(config_path: Path) -> None:
    result = _invoke(config_path, "train", "--codebook-version", "v1")
    config_path.write_text("quantizer: {rq: {codebook_size: 1}}\n")
    refused = _invoke(config_path, "train", "--codebook-version", "v2")

    assert result.exit_code == 0
    assert "quantizer.rq.codebook_size" in str(refused.exception)
    assert "greater than 1" in str(refused.exception)


def test_an_fsq_codebook_goes_through_train_cap_publish_and_refresh(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QARM_QUANTIZER__RQ__LAST_LEVEL", "fsq")
    monkeypatch.setenv("QARM_QUANTIZER__RQ__ENABLE_BALANCE", "true")
    trained = _run(config_path, "train", "--codebook-version", "v1")
    _cap(monkeypatch, 1)
    _run(config_path, "publish", "--codebook-version", "v1")
    _cap(monkeypatch, None)

    _publish(config_path, "v2", "--parent", "v1")

    # 220 items: 4 k-means centroids (39 items each), 32 lattice points (4 each).
    assert "RQ levels 4 x 32 (the last FSQ)" in trained
    first, second = (read_manifest(_uri(config_path), version) for version in ("v1", "v2"))
    assert first.level_kinds == second.level_kinds == ("kmeans", "fsq")
    assert _largest_bucket(_served(config_path, "v1")) > 1
    assert first.caps["with_caps"]["num_unique_codes"] == 4 * 32
    # The refresh is asked for no cap: what the first cap moved far goes back to a nearer code.
    assert second.continuity["churn"]["prefixes"][0] <= 0.01


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("QARM_QUANTIZER__RQ__CODEBOOK_SIZE", "[4, 4, 4]", "lists 3 levels, .*num_levels is 2$"),
        ("QARM_QUANTIZER__RQ__CODEBOOK_SIZE", "6", "6 codes was asked for; its size must be a"),
    ],
)
def test_sizes_that_contradict_each_other_are_a_fault_of_the_configuration(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv("QARM_QUANTIZER__RQ__LAST_LEVEL", "fsq")
    monkeypatch.setenv(variable, value)

    with pytest.raises(ConfigError, match=message) as caught:
        _run(config_path, "train", "--codebook-version", "v1")

    place = f"{config_path} with {variable}, QARM_QUANTIZER__RQ__LAST_LEVEL is wrong:"
    assert str(caught.value).startswith(place)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--codebook-version", "V 1"),
        ("train", "--codebook-version", "v2", "--parent", "../v1"),
        ("evaluate", "--codebook-version", "v-1"),
        ("publish", "--codebook-version", "v-1"),
        ("show", "--codebook-version", "v-1"),
        ("retire", "--codebook-version", "v-1"),
        ("default", "--codebook-version", "v-1"),
        ("purge", "--codebook-version", "v-1", "--yes"),
        ("diff", "--codebook-version", "v1", "--against", "v-1"),
    ],
)
def test_a_name_that_is_not_legal_ends_every_verb_with_the_status_of_a_usage_error(
    config_path: Path, arguments: tuple[str, ...]
) -> None:
    refused = _invoke(config_path, *arguments)

    assert isinstance(refused.exception, ConfigError)
    assert refused.exception.exit_code == 2
    assert "is no legal name" in str(refused.exception)
