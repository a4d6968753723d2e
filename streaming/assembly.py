"""The real parts of a worker, opened from the configuration.

May import: feast, torch, everything in qarm_feast and in this package.
"""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from feast import FeatureStore

from qarm_feast import view_tags
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.code_log import CodeLog
from qarm_feast.codebook import Codebook, QuantizerConfig
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import load_section
from qarm_feast.errors import CodebookError, ConfigError
from qarm_feast.feature_views import reads_aligned_vectors
from qarm_feast.input_data import DataConfig
from qarm_feast.item_vectors import Encoder
from qarm_feast.offline_store import open_code_log
from qarm_feast.online_tables import FeastOnlineTables
from qarm_feast.registry import CodebookRegistry, read_manifest
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import (
    CONTENT_LOG,
    CONTENT_LOG_ROWS,
    INTERACTION_LOG,
    RECENT_ITEMS_VIEW,
    code_view_name,
    interaction_rows,
    vector_view_name,
)
from streaming.codebook_watch import (
    CodebookWatch,
    EncoderCache,
    VersionParts,
    written_versions,
)
from streaming.config import StreamConfig
from streaming.sink import DeadLetterTopic, FeastSink
from streaming.source import KafkaSource
from streaming.worker import Pipeline, WorkerSettings

_INTERACTIONS_FILE = "interactions.parquet"


def limit_threads(num_threads: int) -> None:
    """Keep this process to so many compute threads, so that workers do not fight for cores."""
    torch.set_num_threads(num_threads)
    # For libraries that are loaded later and bring their own pool.
    os.environ["OMP_NUM_THREADS"] = str(num_threads)


@contextmanager
def open_pipeline(
    config_path: str, config: StreamConfig
) -> Iterator[tuple[Pipeline, WorkerSettings]]:
    """Yield a worker's parts, and close them afterwards.

    The group is joined last: a worker that cannot work never takes partitions.

    Args:
        config_path: Path of ``qarm.yaml``.
        config: Its section ``stream``.

    Yields:
        The parts, and the settings for reading events.

    Raises:
        ConfigError: If ``feast apply`` has not run or the task names are not known.
        CodebookError: If no codebook is published or one is damaged.
        ServiceUnavailableError: If the broker does not answer.
    """
    feature_store = open_feature_store(Path(config_path).resolve().parent)
    online = FeastOnlineTables(feature_store)
    codebooks = watch_codebooks(config_path, config, online)
    online.check_views([RECENT_ITEMS_VIEW])
    code_log = open_code_log(feature_store.config)
    settings = worker_settings(config_path, config, feature_store, code_log)
    code_log.create(CONTENT_LOG, CONTENT_LOG_ROWS)
    code_log.create(INTERACTION_LOG, interaction_rows(settings.task_names))
    sink = FeastSink(code_log, online, history_length(feature_store))
    with (
        codebooks,
        closing(DeadLetterTopic(config)) as dead_letters,
        closing(KafkaSource(config)) as source,
    ):
        yield Pipeline(source, sink, dead_letters, codebooks), settings


def load_codebooks(config_path: str) -> dict[str, Codebook]:
    """Return the codebooks that workers write, hashes verified, the default version first.

    Args:
        config_path: Path of ``qarm.yaml``.

    Returns:
        The codebooks by version.

    Raises:
        CodebookError: If no version is live or default, or a file is damaged.
    """
    uri = load_section(config_path, "codebook", CodebookConfig).uri
    versions = written_versions(CodebookRegistry(uri).states())
    if not versions:
        raise CodebookError(
            f"{uri} has no live codebook version; run "
            "`qarm codebook publish --codebook-version VERSION` first"
        )
    placement = load_section(config_path, "quantizer", QuantizerConfig).placement
    return {version: Codebook.load(uri, version, placement) for version in versions}


def watch_codebooks(
    config_path: str, config: StreamConfig, online: FeastOnlineTables
) -> CodebookWatch:
    """Return the worker's codebooks, loaded; they follow the registry inside a ``with`` block.

    Args:
        config_path: Path of ``qarm.yaml``.
        config: Its section ``stream``.
        online: Knows which views are applied.

    Returns:
        The codebooks.

    Raises:
        ConfigError: If ``feast apply`` has not run.
        CodebookError: If no version is live, or not one can be loaded.
    """
    uri = load_section(config_path, "codebook", CodebookConfig).uri
    placement = load_section(config_path, "quantizer", QuantizerConfig).placement
    encoder_uri = load_section(config_path, "alignment", AlignmentConfig).encoder_uri

    def load_encoder(version: str) -> Encoder:
        # Imported with the first content event: a worker that gets ready embeddings needs none.
        from qarm_feast.alignment import encoder

        return encoder.load_encoder(encoder_uri, version)

    parts = VersionParts(
        states=CodebookRegistry(uri),
        has_view=lambda version: _has_views(config_path, uri, version, online),
        load=lambda version: Codebook.load(uri, version, placement),
    )
    watch = CodebookWatch(parts, EncoderCache(load_encoder), config.codebook_poll_seconds)
    watch.load_first()
    return watch


def _has_views(config_path: str, uri: str, version: str, online: FeastOnlineTables) -> bool:
    """Return whether all views are applied that rows of a version go into."""
    if not online.has_view(code_view_name(version)):
        return False
    if not reads_aligned_vectors(config_path):
        return True
    try:
        encoder_version = read_manifest(uri, version).encoder_version
    except (CodebookError, OSError):
        # Loading the version comes next, and tells of it without a halt of the others.
        return True
    return online.has_view(vector_view_name(encoder_version))


def worker_settings(
    config_path: str, config: StreamConfig, feature_store: FeatureStore, code_log: CodeLog
) -> WorkerSettings:
    """Return how this repository's events are read.

    Args:
        config_path: Path of ``qarm.yaml``.
        config: Section ``stream``.
        feature_store: The opened repository.
        code_log: Its offline log.

    Returns:
        Task names, positive label and limits.

    Raises:
        ConfigError: If the task names are not known, or the positive label is none of them.
    """
    task_names = find_task_names(config_path, config, code_log)
    tags = feature_store.get_feature_view(RECENT_ITEMS_VIEW).tags
    label = tags.get(view_tags.POSITIVE_LABEL, "auto")
    label = task_names[0] if label == "auto" else label
    if label not in task_names:
        raise ConfigError(
            f"data.positive_label is {label!r}, but interaction events carry "
            f"{', '.join(task_names)}; mend it in qarm.yaml and run `feast apply`"
        )
    return WorkerSettings(
        item_topic=config.item_topic,
        task_names=task_names,
        positive_label=label,
        limits=config.limits,
        max_retry_wait_seconds=config.max_retry_wait_seconds,
        drift_window_items=config.drift_window_items,
        enable_vectors=reads_aligned_vectors(config_path),
    )


def find_task_names(config_path: str, config: StreamConfig, code_log: CodeLog) -> tuple[str, ...]:
    """Return the task flags that interaction events carry, in the log's order.

    Args:
        config_path: Path of ``qarm.yaml``.
        config: Section ``stream``.
        code_log: Its offline log.

    Returns:
        The names; the first one is the positive label unless the configuration says another.

    Raises:
        ConfigError: If nothing tells them.
    """
    if config.task_names != "auto":
        return config.task_names
    if code_log.exists(INTERACTION_LOG):
        return _bool_columns(code_log.schema(INTERACTION_LOG))
    input_dir = load_section(config_path, "data", DataConfig).input_dir
    path = Path(input_dir) / _INTERACTIONS_FILE
    names = _bool_columns(pq.read_schema(path)) if path.is_file() else ()
    if not names:
        raise ConfigError(
            f"which task flags do interaction events carry? There is no interaction log yet and "
            f"no {path} with bool columns; set stream.task_names, for example [is_click, is_like]"
        )
    return names


def history_length(feature_store: FeatureStore) -> int:
    """Return how many positives a row of the recent items view holds."""
    return int(feature_store.get_feature_view(RECENT_ITEMS_VIEW).tags[view_tags.HISTORY_LENGTH])


def _bool_columns(schema: pa.Schema) -> tuple[str, ...]:
    return tuple(field.name for field in schema if pa.types.is_boolean(field.type))
