import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qarm_feast.cli import qarm
from qarm_feast.codebook import Codebook
from qarm_feast.command import run_command_line
from qarm_feast.errors import ConfigError, DataError, GateRefusedError
from qarm_feast.refresh.job import RefreshOptions, planned, refresh
from qarm_feast.refresh.plan import RefreshRequest
from qarm_feast.refresh.state import read_state, refresh_lock
from qarm_feast.refresh.steps import STEPS, RefreshSteps
from qarm_feast.registry import CodebookRegistry, VersionState, read_manifest
from qarm_feast.vector_files import VectorFiles
from tests.refresh_repo import SETTINGS, write_data, write_repo


class Killed(BaseException):
    """Ends a refresh as a signal would: no ``except Exception`` holds it up."""


class Repo:
    """A folder with data, settings, and what refreshes made of them."""

    def __init__(self, config_path: Path) -> None:
        self.config_path = config_path
        self.data = config_path.parent / "data"
        self.registry = CodebookRegistry(str(self.data / "codebooks"))
        self.lines: list[str] = []

    def refresh(self, **wishes: str) -> dict[str, Any]:
        self.lines = []
        request = RefreshRequest(**wishes)
        return refresh(str(self.config_path), request, RefreshOptions(), self.lines.append)

    def set(self, settings: str) -> None:
        self.config_path.write_text(SETTINGS + settings)

    def vectors(self, encoder_version: str) -> VectorFiles:
        return VectorFiles.open(self.data / "vectors" / encoder_version)

    def codes(self, version: str, encoder_version: str) -> np.ndarray:
        found = self.vectors(encoder_version).read()
        codebook = Codebook.load(self.registry.uri, version)
        codes = codebook.encode(found.item_ids_N, found.content_hashes_N, found.x_ND)
        return np.hstack([codes.rq_NL, codes.vq_NV])


@pytest.fixture(scope="module")
def first_refresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with v1 of twenty days; nobody alters it."""
    config_path = write_repo(tmp_path_factory.mktemp("first"), num_days=20)
    Repo(config_path).refresh()
    return config_path.parent


@pytest.fixture
def repo(first_refresh: Path, tmp_path: Path) -> Repo:
    """The repository ten days later."""
    shutil.copytree(first_refresh, tmp_path / "repo")
    write_data(tmp_path / "repo" / "data" / "input", num_days=30)
    return Repo(tmp_path / "repo" / "qarm.yaml")


def test_the_first_refresh_makes_the_default_that_later_ones_start_from(
    first_refresh: Path,
) -> None:
    registry = CodebookRegistry(str(first_refresh / "data" / "codebooks"))

    assert registry.states() == {"v1": VersionState.DEFAULT}
    manifest = read_manifest(registry.uri, "v1")
    assert (manifest.encoder_version, manifest.parent) == ("e1", None)


def test_newer_rows_become_a_staged_version_that_keeps_its_parents_labels(repo: Repo) -> None:
    report = repo.refresh()

    assert repo.registry.states() == {"v1": VersionState.DEFAULT, "v2": VersionState.STAGED}
    manifest = read_manifest(repo.registry.uri, "v2")
    assert (manifest.encoder_version, manifest.parent) == ("e2", "v1")
    assert manifest.label_map is not None
    encoder = json.loads((repo.data / "encoders" / "e2" / "manifest.json").read_bytes())
    assert encoder["parent"] == "e1"
    assert list(report["steps"]) == list(STEPS)
    assert report["outcome"] == "published"
    assert report["next"][1] == "qarm rollout start --codebook-version v2"
    stored = json.loads(Path(report["report"]).read_bytes())
    assert stored == {key: report[key] for key in stored}
    assert all(Path(page).is_file() for page in report["pages"])


def test_nothing_is_done_again_for_the_same_data_also_when_the_new_version_is_the_default(
    repo: Repo,
) -> None:
    repo.refresh()

    again = repo.refresh()
    repo.registry.set_state("v2", VersionState.DEFAULT)
    rolled_out = repo.refresh()

    assert (again["was_made_now"], rolled_out["was_made_now"]) == (False, False)
    assert "nothing: v2 was made from just this data" in repo.lines[0]
    assert list(repo.registry.states()) == ["v1", "v2"]


def test_a_refresh_killed_after_the_work_of_each_step_comes_to_the_same_as_one_that_was_not(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Repo(shutil.copytree(repo.config_path.parent, tmp_path / "whole") / "qarm.yaml")
    whole.refresh()

    for name in STEPS:
        kill_after_work_of(name, monkeypatch)
        with pytest.raises(Killed):
            repo.refresh()
        monkeypatch.undo()
        state = read_state(repo.data / "refresh")
        assert state is not None
        assert list(state.steps) == list(STEPS[: STEPS.index(name)])
    report = repo.refresh()

    assert repo.lines[0].startswith("resume: the last run was stopped; done of it: pairs, train,")
    assert report["outcome"] == "published"
    assert repo.registry.states() == whole.registry.states()
    np.testing.assert_array_equal(repo.vectors("e2").read().x_ND, whole.vectors("e2").read().x_ND)
    np.testing.assert_array_equal(repo.codes("v2", "e2"), whole.codes("v2", "e2"))
    label_maps = [read_manifest(each.registry.uri, "v2").label_map for each in (repo, whole)]
    assert label_maps[0] == label_maps[1]
    names = {path.name for path in (repo.data / "encoders").iterdir()}
    assert {name for name in names if name.startswith(".e")} == {".e1.lock", ".e2.lock"}


@pytest.mark.parametrize("step", ["publish", "report"])
def test_the_first_refresh_that_was_killed_after_it_has_published_is_gone_on_with(
    first_refresh: Path, tmp_path: Path, step: str
) -> None:
    repo = Repo(shutil.copytree(first_refresh, tmp_path / "repo") / "qarm.yaml")
    state = read_state(repo.data / "refresh")
    assert state is not None
    # As it stood when v1 was the default already, and the step was not noted yet.
    state.outcome, state.finished = "running", None
    state.steps = {name: state.steps[name] for name in STEPS[: STEPS.index(step)]}
    state.write(repo.data / "refresh")

    report = repo.refresh()

    assert repo.lines[0].startswith("resume: the last run was stopped")
    assert (report["outcome"], report["codebook_version"]) == ("published", "v1")
    assert repo.registry.states() == {"v1": VersionState.DEFAULT}


def kill_after_work_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work: Callable[[RefreshSteps], object] = getattr(RefreshSteps, name)

    def work_and_die(steps: RefreshSteps) -> None:
        work(steps)
        raise Killed

    monkeypatch.setattr(RefreshSteps, name, work_and_die)


def test_an_encoder_that_its_gates_refuse_is_not_exported_and_goes_on_once_they_let_it_pass(
    repo: Repo,
) -> None:
    repo.set("")
    with_gate = "{min_neighbor_auc_gain: 1.0}"
    repo.config_path.write_text(
        SETTINGS.replace("num_epochs: 1", f"num_epochs: 1, gates: {with_gate}")
    )

    with pytest.raises(GateRefusedError, match="is worse than the raw vectors"):
        repo.refresh()

    assert list(repo.registry.states()) == ["v1"]
    assert not (repo.data / "vectors" / "e2").exists()
    refused = json.loads((repo.data / "refresh" / "reports" / "v2.json").read_bytes())
    assert (refused["outcome"], list(refused["steps"])) == ("refused", ["pairs", "train"])
    assert "neighbor_auc_all" in refused["refusal"]
    repo.set("")
    trained = (repo.data / "encoders" / "e2" / "manifest.json").read_bytes()
    report = repo.refresh()
    assert repo.lines[0].startswith("resume: the last run was refused by a gate")
    assert report["encoder_version"] == "e2"
    assert (repo.data / "encoders" / "e2" / "manifest.json").read_bytes() == trained


@pytest.mark.parametrize(
    ("gate", "words", "missing"),
    [
        ("codebook: {gates: {min_hr10: 1.0}}", "was not published", "publish"),
        (
            "refresh: {max_full_churn: 0.0}\ncodebook: {continuity: {hysteresis: 0.0}}",
            "changes more codes than section refresh allows",
            "quality",
        ),
    ],
)
def test_a_codebook_that_a_gate_refuses_is_not_published(
    repo: Repo, gate: str, words: str, missing: str
) -> None:
    repo.set(gate)

    with pytest.raises(GateRefusedError, match=words):
        repo.refresh()

    assert repo.registry.states() == {"v1": VersionState.DEFAULT}
    state = read_state(repo.data / "refresh")
    assert state is not None
    assert (state.outcome, missing in state.steps) == ("refused", False)


def test_items_that_came_since_the_last_export_are_encoded_by_the_parents_encoder_too(
    repo: Repo,
) -> None:
    write_data(repo.data / "input", num_days=30, num_new_items=10)

    repo.refresh()

    # The workers gave them codes of v1 when they came; those are kept like all others.
    assert len(repo.vectors("e1").item_ids()) == 130
    assert read_manifest(repo.registry.uri, "v2").continuity["num_items"]["compared"] == 130


def test_data_that_is_replaced_meanwhile_ends_the_refresh(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = RefreshSteps.pairs

    def replace_data(steps: RefreshSteps) -> object:
        found = pairs(steps)
        write_data(repo.data / "input", num_days=31)
        return found

    monkeypatch.setattr(RefreshSteps, "pairs", replace_data)
    with pytest.raises(DataError, match="changed while the refresh ran"):
        repo.refresh()
    monkeypatch.undo()

    repo.refresh()
    assert repo.lines[0] == "new: changed since the last run: interactions.parquet"


def test_settings_that_are_changed_meanwhile_end_the_refresh(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = RefreshSteps.pairs

    def change_settings(steps: RefreshSteps) -> object:
        found = pairs(steps)
        repo.config_path.write_text(SETTINGS.replace("codebook_size: 8", "codebook_size: 4"))
        return found

    monkeypatch.setattr(RefreshSteps, "pairs", change_settings)
    with pytest.raises(ConfigError, match=r"section quantizer of .* changed while the refresh ran"):
        repo.refresh()


def test_a_dry_run_says_what_is_to_be_done_and_writes_nothing(repo: Repo) -> None:
    before = {path for path in repo.data.rglob("*") if path.is_file()}

    lines = planned(str(repo.config_path), RefreshRequest())

    assert lines[0] == "new: changed since the last run: interactions.parquet"
    assert lines[1] == "parent v1 of encoder e1 -> encoder e2, codebook v2"
    assert lines[2:] == [f"  {name:<9}to do" for name in STEPS]
    assert {path for path in repo.data.rglob("*") if path.is_file()} == before


def test_names_are_free_ones_unless_they_are_wished_for(repo: Repo) -> None:
    (repo.data / "vectors" / "e2").mkdir()

    chosen = planned(str(repo.config_path), RefreshRequest())
    wished = planned(str(repo.config_path), RefreshRequest("v1", "e7", "w1"))

    assert chosen[1].endswith("-> encoder e3, codebook v2")
    assert wished[1].endswith("-> encoder e7, codebook w1")
    with pytest.raises(ConfigError, match="e1 exists"):
        planned(str(repo.config_path), RefreshRequest(encoder_version="e1"))


def test_a_name_that_somebody_took_meanwhile_is_not_taken_for_the_own_encoder(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = RefreshSteps.pairs

    def take_name(steps: RefreshSteps) -> object:
        shutil.copytree(repo.data / "encoders" / "e1", repo.data / "encoders" / "e2")
        return pairs(steps)

    monkeypatch.setattr(RefreshSteps, "pairs", take_name)

    with pytest.raises(ConfigError, match="made by another process"):
        repo.refresh()


def test_a_parent_whose_encoder_is_not_the_one_it_was_made_with_is_refused(repo: Repo) -> None:
    path = repo.data / "encoders" / "e1" / "manifest.json"
    path.write_bytes(path.read_bytes() + b"\n")

    with pytest.raises(DataError, match="they are not of one kind"):
        repo.refresh()


def test_the_exit_status_says_what_became_of_a_refresh(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QARM_OBSERVABILITY__LOG_LEVEL", "error")

    def status(**variables: str) -> object:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["qarm", "refresh", "--config", str(repo.config_path)])
            try:
                run_command_line(qarm)
            except SystemExit as ended:
                return ended.code
        return 0

    assert status(QARM_REFRESH__MAX_FULL_CHURN="7") == 2
    assert status(QARM_DATA__INPUT_DIR="nowhere") == 4
    assert status(QARM_CODEBOOK__GATES='{"min_hr10": 1.0}') == 5
    with refresh_lock(repo.registry.uri, repo.data / "refresh"):
        assert status() == 7
    assert status() == 0
    printed = capsys.readouterr()
    assert f"is at work: process {os.getpid()} on " in printed.err
    last = json.loads(printed.out.splitlines()[-1])
    assert (last["outcome"], last["codebook_version"]) == ("published", "v2")
