"""What `qarm init` writes, and what it refuses; its use by Feast is an integration test."""

from pathlib import Path

import pytest
import yaml
from test_qarm_yaml import OWNERS

from qarm_feast.config import load_section, read_yaml
from qarm_feast.errors import ConfigError
from qarm_feast.new_repo import write_repository

OWN_REPO = Path(__file__).parents[2] / "feature_repo"


def settings_of(directory: Path) -> dict[str, object]:
    loaded: dict[str, object] = yaml.safe_load((directory / "feature_store.yaml").read_text())
    return loaded


def test_a_written_repository_declares_and_stores_as_this_projects_own_does(
    tmp_path: Path,
) -> None:
    write_repository(tmp_path / "shop")

    definitions = "feature_definitions.py"
    assert (tmp_path / "shop" / definitions).read_text() == (OWN_REPO / definitions).read_text()
    assert settings_of(tmp_path / "shop") == settings_of(OWN_REPO) | {"project": "shop"}


def test_every_key_of_the_written_configuration_is_known_to_its_owner(tmp_path: Path) -> None:
    write_repository(tmp_path / "shop")
    config_path = tmp_path / "shop" / "qarm.yaml"

    assert list(read_yaml(config_path)) == list(OWNERS)
    for name, owner in OWNERS.items():
        section = load_section(config_path, name, owner)
        assert set(read_yaml(config_path)[name]) <= section.model_fields_set


def test_redis_and_the_project_are_what_was_asked_for(tmp_path: Path) -> None:
    write_repository(tmp_path / "shop", "redis", "my_project")

    settings = settings_of(tmp_path / "shop")
    assert settings["project"] == "my_project"
    assert settings["online_store"] == {
        "type": "qarm_feast.online_stores.redis.CodeRedisOnlineStore",
        "connection_string": "localhost:6379",
    }


@pytest.mark.parametrize(
    ("folder", "project"), [("my shop-2", "my_shop_2"), ("007", "007"), ("Köln", "K_ln")]
)
def test_the_project_is_named_after_the_folder(tmp_path: Path, folder: str, project: str) -> None:
    write_repository(tmp_path / folder)

    assert settings_of(tmp_path / folder)["project"] == project


@pytest.mark.parametrize("project", ["", "_x", "a b", "ä"])
def test_an_illegal_project_is_refused_before_anything_is_written(
    tmp_path: Path, project: str
) -> None:
    with pytest.raises(ConfigError, match="is no legal name"):
        write_repository(tmp_path / "shop", project=project)

    assert not (tmp_path / "shop").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shop").write_text("kept")

    with pytest.raises(ConfigError, match="shop is a file"):
        write_repository(tmp_path / "shop")

    assert (tmp_path / "shop").read_text() == "kept"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()

    written = write_repository(tmp_path / "shop")

    names = {"feature_store.yaml", "qarm.yaml", "feature_definitions.py"}
    assert {path.name for path in written} == names
