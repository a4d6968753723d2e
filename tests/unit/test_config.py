import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field
from test_qarm_yaml import OWNERS

from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import SECTIONS, ConfigPath, Section, load_section, parse_overrides
from qarm_feast.errors import ConfigError


class DataSection(Section):
    input_dir: ConfigPath = "data/input"
    history_length: int = 50
    names: tuple[str, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)


def write(folder: Path, text: str) -> Path:
    path = folder / "qarm.yaml"
    path.write_text(text)
    return path


def test_the_environment_wins_over_the_file_and_the_command_line_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "data: {history_length: 1, names: [a], options: {kept: 1}}")
    monkeypatch.setenv("QARM_DATA__HISTORY_LENGTH", "2")
    monkeypatch.setenv("QARM_DATA__NAMES", "[b, c]")
    monkeypatch.setenv("QARM_DATA__OPTIONS__PASSWORD", "0123")

    from_environment = load_section(path, "data", DataSection)
    overridden = load_section(path, "data", DataSection, {"history_length": 3})

    assert from_environment.history_length == 2
    assert from_environment.names == ("b", "c")
    assert from_environment.options == {"kept": 1, "password": "0123"}
    assert overridden.history_length == 3


def test_relative_paths_start_at_the_file_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "repo", "{}")
    monkeypatch.chdir(tmp_path / "elsewhere")

    section = load_section("../repo/qarm.yaml", "data", DataSection)

    assert section.input_dir == str(tmp_path / "repo" / "data" / "input")


def test_an_object_store_is_refused_where_a_folder_is_wanted(tmp_path: Path) -> None:
    path = write(tmp_path, "{data: {input_dir: 's3://b/input'}, codebook: {uri: 's3://b/books'}}")

    with pytest.raises(ConfigError, match=r"data\.input_dir.*s3://b/input is no folder"):
        load_section(path, "data", DataSection)
    assert load_section(path, "codebook", CodebookConfig).uri == "s3://b/books"


def test_every_wrong_key_of_a_section_is_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {history_length: many, inputs: x}")

    with pytest.raises(ConfigError, match=r"(?s)data\.history_length.*data\.inputs"):
        load_section(path, "data", DataSection)


def test_an_unknown_or_empty_section_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, "daat: {history_length: 5}\nstream:\n")

    with pytest.raises(ConfigError, match=r"(?s)daat: no such section.*stream: is None"):
        load_section(path, "data", DataSection)


def test_every_section_that_the_repository_ships_is_known() -> None:
    assert set(OWNERS) <= set(SECTIONS)


def test_a_misspelt_section_of_the_environment_is_refused_with_the_name_that_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Kubernetes sets for a service called qarm-stream is not for us.
    monkeypatch.setenv("QARM_STREAM_PORT_9108_TCP", "tcp://10.0.0.1:9108")
    load_section(write(tmp_path, "{}"), "data", DataSection)
    monkeypatch.setenv("QARM_DAAT__HISTORY_LENGTH", "2")

    with pytest.raises(ConfigError, match=r"QARM_DAAT__HISTORY_LENGTH.*did you mean data\? there"):
        load_section(write(tmp_path, "{}"), "data", DataSection)


def test_a_wrong_value_is_blamed_on_the_place_that_it_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "data: {history_length: many, names: a}")
    monkeypatch.setenv("QARM_DATA__NAMES", "7")

    with pytest.raises(ConfigError) as caught:
        load_section(path, "data", DataSection, {"input_dir": 3})

    assert [line.partition(" (got")[0] for line in str(caught.value).splitlines()] == [
        "the command line is wrong:",
        "  - data.input_dir: Input should be a valid string",
        f"{path} is wrong:",
        "  - data.history_length: Input should be a valid integer, unable to parse string as an "
        "integer",
        "the environment is wrong:",
        "  - QARM_DATA__NAMES: Input should be a valid tuple",
    ]


@pytest.mark.parametrize("place", ["file", "environment"])
def test_an_unknown_key_is_refused_with_the_known_ones_and_the_one_that_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = write(tmp_path, "{}")
    if place == "file":
        path.write_text("codebook: {gates: {min_hr100: 0.5}}")
    else:
        monkeypatch.setenv("QARM_CODEBOOK__GATES__MIN_HR100", "0.5")

    with pytest.raises(ConfigError) as caught:
        load_section(path, "codebook", CodebookConfig)

    key = "codebook.gates.min_hr100" if place == "file" else "QARM_CODEBOOK__GATES__MIN_HR100"
    assert f"{key}: no such key; did you mean min_hr10? there are max_coll" in str(caught.value)
    assert ("qarm.yaml" in str(caught.value)) == (place == "file")


def test_a_variable_that_is_not_yaml_is_named_without_its_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QARM_DATA__INPUT_DIR", "[secret")

    with pytest.raises(ConfigError, match="QARM_DATA__INPUT_DIR is not YAML") as caught:
        load_section(write(tmp_path, "{}"), "data", DataSection)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('stream: {}\nranker: {password: "hunter2\n', "line 3, column 1"),
        ("stream:\n  password: *hunter2\n", "line 2, column 13"),
        ("stream:\n  password: !hunter2 x\n", "line 2, column 13"),
        ("hunter2: a: b\n", "line 1, column 11"),
    ],
)
def test_a_file_that_is_not_yaml_is_named_with_the_place_and_without_its_text(
    tmp_path: Path, text: str, place: str
) -> None:
    path = write(tmp_path, text)

    with pytest.raises(ConfigError, match=f"qarm.yaml is not YAML: {place};") as caught:
        load_section(path, "data", DataSection)

    # Nor in the traceback that a log may hold.
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_file_with_a_control_character_is_not_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not YAML"):
        load_section(write(tmp_path, "stream: hunter2\x00"), "data", DataSection)


def test_assignments_are_sorted_by_section_and_their_values_are_yaml() -> None:
    found = parse_overrides(("ranker.batch_size=64", "ranker.tasks=[a, b]", "data.input_dir=x=y"))

    assert found == {
        "ranker": {"batch_size": 64, "tasks": ["a", "b"]},
        "data": {"input_dir": "x=y"},
    }


@pytest.mark.parametrize("assignment", ["ranker.batch_size", "batch_size=64", "ranker.tasks=["])
def test_an_assignment_that_cannot_be_read_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_overrides((assignment,))
