"""``qarm rollout`` over a real repository with a sqlite store; workers and backfill stand in."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner
from kafka.structs import TopicPartition

from qarm_feast.backfill_writer import BackfillCounts
from qarm_feast.cli import qarm
from qarm_feast.errors import CodebookError, CodebookNotFoundError, ConfigError, DataError
from qarm_feast.registry import VersionState
from streaming.acknowledgements import Acknowledgement
from streaming.config import StreamConfig
from streaming.rollout_cli import open_parts, rollout_group
from tests.stream_repo import StreamRepo, build_repo, publish_codebook

UpTo = Mapping[tuple[str, int], int]


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StreamRepo:
    """v1 is the default, v2 staged with a view; a worker writes what it shall from offset 7 on."""
    made = build_repo(tmp_path / "repo", {"ranker": {"name": "home"}})
    publish_codebook(made.directory, "v2", seed=1)
    made.apply()

    def read(config: StreamConfig) -> dict[TopicPartition, Acknowledgement | None]:
        written = made.registry.versions(VersionState.LIVE, VersionState.DEFAULT)
        told = Acknowledgement(dict.fromkeys(written, 7), 1)
        return {TopicPartition(config.item_topic, 0): told}

    monkeypatch.setattr("streaming.acknowledgements.read_acknowledgements", read)
    return made


@pytest.fixture
def backfills(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, UpTo, str]]:
    """What the backfill was called with."""
    calls: list[tuple[str, str, UpTo, str]] = []

    def backfill_codes(
        config_path: str, version: str, *, up_to: UpTo, engine: str
    ) -> BackfillCounts:
        calls.append((config_path, version, up_to, engine))
        return BackfillCounts()

    monkeypatch.setattr("qarm_feast.backfill.backfill_codes", backfill_codes)
    return calls


def _run(repo: StreamRepo, *arguments: str, answer: str = "") -> list[str]:
    command = ["rollout", arguments[0], "--config", str(repo.config_path), *arguments[1:]]
    result = CliRunner().invoke(qarm, command, input=answer)
    if result.exception is not None:
        raise result.exception
    return result.stdout.splitlines()


def _is_done(lines: list[str], step: str) -> bool:
    [line] = [line for line in lines if f" {step} " in line[:20]]
    return line[20:].startswith("done")


def test_the_commands_walk_a_version_to_the_default_and_retire_the_old_one(
    repo: StreamRepo, backfills: list[tuple[str, str, UpTo, str]]
) -> None:
    version = ("--codebook-version", "v2")

    planned = _run(repo, "plan", *version)
    started = _run(repo, "start", *version, "--engine", "ray")
    shown = _run(repo, "status")
    kept = _run(repo, "finish", answer="n\n")
    states_before = repo.registry.states()
    finished = _run(repo, "finish", "--yes")

    assert planned[0] == "rollout of v2 in place of v1: planned"
    assert started[0].startswith("rollout of v2 in place of v1: under way, started 20")
    assert _is_done(planned, "declare")
    assert not _is_done(planned, "live")
    assert planned[-1] == "next: `qarm rollout start --codebook-version v2`"
    topic = repo.stream_config.item_topic
    assert backfills == [(str(repo.config_path), "v2", {(topic, 0): 7}, "ray")]
    assert _is_done(started, "default")
    assert any("0 items compared: 0 missing" in line for line in started)
    assert shown == started
    assert "no way back [y/N]" in kept[0]
    assert kept[-1] == "kept v1"
    assert states_before == {"v1": VersionState.LIVE, "v2": VersionState.DEFAULT}
    assert finished[-1] == "next: `feast apply`, which drops item_codes_v1"
    assert repo.registry.states() == {"v1": VersionState.RETIRED, "v2": VersionState.DEFAULT}


def test_damaged_parts_of_the_content_log_hold_the_default_up(
    repo: StreamRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([BackfillCounts(num_damaged_parts=2), BackfillCounts()])
    monkeypatch.setattr(
        "qarm_feast.backfill.backfill_codes", lambda *arguments, **options: next(found)
    )

    with pytest.raises(DataError, match=r"2 damaged parts .* `qarm offline status`"):
        _run(repo, "start", "--codebook-version", "v2")
    states_meanwhile = repo.registry.states()
    mended = _run(repo, "start", "--codebook-version", "v2")

    assert states_meanwhile == {"v1": VersionState.DEFAULT, "v2": VersionState.LIVE}
    assert _is_done(mended, "default")


def test_an_undone_rollout_says_how_it_begins_anew(
    repo: StreamRepo, backfills: list[tuple[str, str, UpTo, str]]
) -> None:
    _run(repo, "start", "--codebook-version", "v2")

    undone = _run(repo, "undo")

    assert undone[0].startswith("rollout of v2 in place of v1: undone")
    assert undone[-1] == "next: `qarm rollout start --codebook-version v2` begins anew"
    assert repo.registry.states() == {"v1": VersionState.DEFAULT, "v2": VersionState.STAGED}


def test_without_a_rollout_status_and_undo_say_so(repo: StreamRepo) -> None:
    for command in ("status", "undo"):
        lines = _run(repo, command)
        assert lines[0] == "no rollout was started here"
        assert "`qarm rollout plan --codebook-version VERSION`" in lines[1]


def test_faults_reach_the_command_line_with_what_comes_next(repo: StreamRepo) -> None:
    with pytest.raises(CodebookNotFoundError, match="v9"):
        _run(repo, "plan", "--codebook-version", "v9")
    with pytest.raises(CodebookError, match="no rollout is under way"):
        _run(repo, "finish", "--yes")
    publish_codebook(repo.directory, "v3", seed=2)
    with pytest.raises(ConfigError, match="run `feast apply`, then"):
        _run(repo, "start", "--codebook-version", "v3")


def test_what_somebody_else_changed_is_a_line_of_the_status(
    repo: StreamRepo, backfills: list[tuple[str, str, UpTo, str]]
) -> None:
    _run(repo, "start", "--codebook-version", "v2")
    repo.registry.set_state("v1", VersionState.DEFAULT)
    repo.registry.set_state("v2", VersionState.RETIRED)

    lines = _run(repo, "status")

    fault = "changed by somebody else: 'v2', whose rollout is half done, is retired by now"
    assert lines[-2:] == [fault, "next: `qarm rollout undo`"]


def test_an_encoder_is_looked_for_where_workers_load_it(repo: StreamRepo) -> None:
    parts = open_parts(str(repo.config_path))
    (repo.directory / "data" / "encoders" / "e2").mkdir(parents=True)
    before = parts.has_encoder("e2")
    (repo.directory / "data" / "encoders" / "e2" / "manifest.json").write_text("{}")

    assert (before, parts.has_encoder("e2")) == (False, True)
    assert parts.service_name("v2") == "home_v2"


def test_the_options_of_every_command_are_pinned() -> None:
    options = {
        name: [option for parameter in command.params for option in parameter.opts]
        for name, command in rollout_group.commands.items()
    }

    common = ["--config", "--log-level"]
    assert options == {
        "plan": [*common, "--codebook-version"],
        "start": [*common, "--codebook-version", "--wait-seconds", "--engine"],
        "status": common,
        "finish": [*common, "--wait-seconds", "--yes"],
        "undo": common,
    }
