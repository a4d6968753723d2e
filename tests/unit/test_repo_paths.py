from pathlib import Path

import pytest
from feast import FeatureStore

from qarm_feast.repo_paths import absolute_registry_url, open_feature_store

OUR_STORE = "offline_store: {type: qarm_feast.offline_store.CodeLogOfflineStore}\n"


def write_repository(repo_dir: Path, offline_store: str) -> None:
    (repo_dir / "data").mkdir(parents=True)
    (repo_dir / "feature_store.yaml").write_text(
        "project: test\n"
        "provider: local\n"
        "registry: {registry_type: sql, path: 'sqlite:///data/registry.db'}\n"
        "online_store: {type: sqlite, path: data/online.db}\n" + offline_store
    )


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///data/registry.db", "sqlite:////repo/data/registry.db"),
        ("sqlite:////var/registry.db", "sqlite:////var/registry.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("sqlite://", "sqlite://"),
        ("postgresql://host/db", "postgresql://host/db"),
    ],
)
def test_only_a_relative_sqlite_file_is_moved_into_the_repository(url: str, expected: str) -> None:
    assert absolute_registry_url(url, Path("/repo")) == expected


def test_a_plain_feature_store_finds_its_registry_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repository(tmp_path / "repo", OUR_STORE)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    FeatureStore(repo_path=str(tmp_path / "repo")).list_entities()

    assert (tmp_path / "repo" / "data" / "registry.db").is_file()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_relative_repository_and_another_yaml_are_opened_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repository(tmp_path / "repo", OUR_STORE)
    other = tmp_path / "repo" / "other.yaml"
    text = (tmp_path / "repo" / "feature_store.yaml").read_text()
    other.write_text(text.replace("data/online.db", "data/second.db"))
    monkeypatch.chdir(tmp_path)

    store = open_feature_store("repo", other)
    store.list_entities()

    assert store.config.online_store.path == "data/second.db"
    assert (tmp_path / "repo" / "data" / "registry.db").is_file()


def test_a_repository_of_other_stores_is_left_as_feast_has_it(tmp_path: Path) -> None:
    write_repository(tmp_path / "repo", "offline_store: {type: dask}\n")

    store = open_feature_store(tmp_path / "repo")

    assert store.config.registry.path == "sqlite:///data/registry.db"
