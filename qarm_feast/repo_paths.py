"""Paths of a feature repository that do not depend on the working directory.

Feast resolves its file registry, its sqlite store and file sources against the repository, but
hands the URL of a SQL registry to SQLAlchemy as it is, so that ``sqlite:///data/registry.db``
means another file in every working directory; ``feast apply`` changes into the repository,
``feast -c DIR materialize`` and ``FeatureStore(repo_path=DIR)`` do not. May import: feast.
"""

from pathlib import Path
from typing import Any

from feast import FeatureStore
from feast.repo_config import RepoConfig, load_repo_config

_SQLITE_FILE = "sqlite:///"
_OUR_STORES = "qarm_feast."


def open_feature_store(
    repo_dir: str | Path, fs_yaml_file: str | Path | None = None
) -> FeatureStore:
    """Return the store of a feature repository, usable from any working directory.

    Args:
        repo_dir: Folder that relative paths start at.
        fs_yaml_file: Another ``feature_store.yaml``; None: the one in ``repo_dir``.

    Returns:
        The store; its ``repo_path`` and registry path are absolute.
    """
    repo_path = Path(repo_dir).resolve()
    yaml_path = Path(fs_yaml_file) if fs_yaml_file else repo_path / "feature_store.yaml"
    resolve_registry_path_against_repo()
    config = load_repo_config(repo_path, yaml_path)
    return FeatureStore(repo_path=str(repo_path), config=config)


def absolute_registry_url(url: str, repo_path: Path) -> str:
    """Return a SQLAlchemy URL whose sqlite file, if it is a relative one, lies in ``repo_path``."""
    file_name = url.removeprefix(_SQLITE_FILE)
    is_relative_file = file_name != url and file_name and not file_name.startswith(("/", ":"))
    return f"{_SQLITE_FILE}{repo_path.resolve() / file_name}" if is_relative_file else url


def resolve_registry_path_against_repo() -> None:
    """Make Feast resolve the sqlite URL of a SQL registry against the repository's folder.

    Only for repositories whose offline store is ours; safe to call again. Feast offers no hook:
    ``FeatureStore`` builds ``SqlRegistry(registry_config, project, None)``, so the one place that
    knows both the URL and the folder is the ``registry`` property of ``RepoConfig``.
    """
    if not isinstance(RepoConfig.registry, _RegistryInRepo):
        RepoConfig.registry = _RegistryInRepo(RepoConfig.registry.fget)


class _RegistryInRepo(property):
    """``RepoConfig.registry`` with an absolute path."""

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        registry_config = super().__get__(config, owner)
        if config is None or registry_config is None:
            return registry_config
        if registry_config.registry_type == "sql" and _is_ours(config) and config.repo_path:
            registry_config.path = absolute_registry_url(registry_config.path, config.repo_path)
            _make_folder(registry_config.path)
        return registry_config


def _make_folder(url: str) -> None:
    """Make the folder of a sqlite file: a fresh clone has none, and SQLAlchemy makes none."""
    if url.startswith(f"{_SQLITE_FILE}/"):
        Path(url.removeprefix(_SQLITE_FILE)).parent.mkdir(parents=True, exist_ok=True)


def _is_ours(config: RepoConfig) -> bool:
    offline = config.offline_config
    store_type = offline.get("type") if isinstance(offline, dict) else offline
    return str(store_type).startswith(_OUR_STORES)
