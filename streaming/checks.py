"""``qarm-stream check``: what a worker needs, looked at without joining the group.

May import: feast, kafka-python, torch.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from feast.errors import FeastObjectNotFoundException
from kafka.admin import ConfigResource
from kafka.errors import KafkaError
from sqlalchemy.exc import SQLAlchemyError

from qarm_feast.config import load_section
from qarm_feast.errors import ConfigError, QarmError, ServiceUnavailableError
from qarm_feast.object_store import Place, StorePath, check_conditional_put
from qarm_feast.offline_store import open_code_log
from qarm_feast.online_tables import FeastOnlineTables
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import RECENT_ITEMS_VIEW, code_view_name
from streaming.assembly import history_length, load_codebooks, worker_settings
from streaming.clients import connect_admin
from streaming.config import StreamConfig

_REQUIRED_TOPIC_SETTINGS = {
    "message.timestamp.type": "LogAppendTime",
    "cleanup.policy": "delete",
    # Else a megabyte of gzip may unpack to a gigabyte in a worker, before it sees a record, and
    # a worker needs the library of every producer's codec.
    "compression.type": "uncompressed",
}


@dataclass(frozen=True)
class CheckResult:
    """One thing that was looked at; ``exit_code`` 0 is good."""

    name: str
    detail: str
    exit_code: int = 0

    def line(self) -> str:
        """Return the line that ``qarm-stream check`` prints."""
        return f"{'ok  ' if self.exit_code == 0 else 'FAIL'} {self.name:<10} {self.detail}"


def run_checks(config_path: str) -> list[CheckResult]:
    """Look at everything, also after a failure.

    Args:
        config_path: Path of ``qarm.yaml``.

    Returns:
        One result per thing; topics are left out when no broker answers.
    """
    try:
        config = load_section(config_path, "stream", StreamConfig)
    except ConfigError as error:
        return [CheckResult("config", str(error), error.exit_code)]
    checks: dict[str, Callable[[], str]] = {
        "broker": lambda: check_broker(config),
        "topics": lambda: check_topics(config),
        "codebooks": lambda: check_codebooks(config_path),
        "stores": lambda: check_stores(config_path, config),
    }
    results = [CheckResult("config", f"{config_path}, group {config.consumer_group}")]
    for name, look in checks.items():
        if name == "topics" and results[-1].exit_code:
            continue
        try:
            results.append(CheckResult(name, look()))
        except QarmError as error:
            results.append(CheckResult(name, str(error), error.exit_code))
    return results


def exit_code_of(results: Sequence[CheckResult]) -> int:
    """Return the exit status of the first failure, or 0."""
    return next((result.exit_code for result in results if result.exit_code), 0)


def check_broker(config: StreamConfig) -> str:
    """Return the broker's address.

    Args:
        config: Section ``stream``.

    Returns:
        The address.

    Raises:
        ServiceUnavailableError: If it does not answer.
    """
    with closing(connect_admin(config)):
        return config.bootstrap_servers


def check_topics(config: StreamConfig) -> str:
    """Return the topics' names.

    Args:
        config: Section ``stream``.

    Returns:
        The names.

    Raises:
        ConfigError: If one is missing or has settings under which events get lost.
        ServiceUnavailableError: If the broker does not answer.
    """
    names = (*config.topics, config.dead_letter_topic)
    with closing(connect_admin(config)) as admin:
        try:
            missing = sorted(set(names) - set(admin.list_topics()))
            if missing:
                raise ConfigError(f"no topic {', '.join(missing)}; create it, then check again")
            resources = [ConfigResource("topic", name) for name in names]
            described = admin.describe_configs(resources, config_filter="all")["topic"]
        except KafkaError as error:
            raise ServiceUnavailableError(
                f"{config.bootstrap_servers} does not describe its topics: {error}"
            ) from error
    wrong = [
        f"{topic} has {setting}={described[topic][setting]['value']}, it needs {wanted}"
        for topic in names
        for setting, wanted in _REQUIRED_TOPIC_SETTINGS.items()
        if described[topic][setting]["value"] != wanted
    ]
    if wrong:
        raise ConfigError("; ".join(wrong) + " (kafka-configs.sh --alter)")
    return ", ".join(names)


def check_codebooks(config_path: str) -> str:
    """Return the versions that workers write; every file's hash is verified.

    Args:
        config_path: Path of ``qarm.yaml``.

    Returns:
        The versions.

    Raises:
        CodebookError: If there is none, or one is damaged.
    """
    return ", ".join(load_codebooks(config_path))


def check_stores(config_path: str, config: StreamConfig) -> str:
    """Return where both stores are; nothing is written.

    Args:
        config_path: Path of ``qarm.yaml``.
        config: Section ``stream``.

    Returns:
        Where they are and what they hold.

    Raises:
        ConfigError: If ``feast apply`` has not run, or a setting is wrong.
        ServiceUnavailableError: If the registry or a store does not answer.
    """
    repo_dir = Path(config_path).resolve().parent
    try:
        feature_store = open_feature_store(repo_dir)
        online = FeastOnlineTables(feature_store)
        versions = list(load_codebooks(config_path))
        online.check_views([*map(code_view_name, versions), RECENT_ITEMS_VIEW])
    except (FeastObjectNotFoundException, FileNotFoundError) as error:
        raise ConfigError(f"{repo_dir}: {error}; run `feast -c {repo_dir} apply`") from error
    except SQLAlchemyError as error:
        raise ServiceUnavailableError(f"Feast's registry does not answer: {error}") from error
    code_log = open_code_log(feature_store.config)
    settings = worker_settings(config_path, config, feature_store, code_log)
    online.check_reachable()
    _check_writable(code_log.root)
    return (
        f"offline {code_log.root}, online {feature_store.config.online_store.type}, "
        f"tasks {', '.join(settings.task_names)}, {history_length(feature_store)} recent items"
    )


def _check_writable(root: Place) -> None:
    if isinstance(root, StorePath):
        # Puts an object: that tells of credentials, and whether a compaction can have its lock.
        check_conditional_put(root)
        return
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"the offline log {root} cannot be written by this user")
