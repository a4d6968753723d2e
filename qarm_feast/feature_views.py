"""Feast objects of this system: entities, views, push sources, feature services.

A team adds codes to a repository of its own with::

    from qarm_feast import item_code_view, item_entity

    item = item_entity()
    item_codes_v1 = item_code_view("v1", entity=item)

(Feast wants the entity declared as well, or materializing fails), and the repository of this
project declares all of them in ``feature_definitions.py``. May import: feast, pyarrow; neither
torch nor faiss, so that ``feast apply`` starts fast.
"""

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from feast import (
    Entity,
    FeatureService,
    FeatureView,
    Field,
    FileSource,
    OnDemandFeatureView,
    PushSource,
    RequestSource,
    ValueType,
)
from feast.data_source import DataSource
from feast.types import (
    Array,
    Bool,
    Bytes,
    FeastType,
    Float32,
    Float64,
    Int32,
    Int64,
    String,
    UnixTimestamp,
)
from pydantic import ConfigDict

from qarm_feast import view_tags
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import Section, load_section
from qarm_feast.cross_features import CODES_INPUT, HISTORY_INPUT, PREFIX_NAMES
from qarm_feast.errors import ConfigError
from qarm_feast.input_data import DataConfig
from qarm_feast.registry import CodebookRegistry, VersionState, read_manifest
from qarm_feast.schema import (
    CREATED,
    EVENT_TIMESTAMP,
    INTERACTION_LOG,
    ITEM_ID,
    RECENT_ITEMS_VIEW,
    TRAIN_ITEMS_VIEW,
    USER_ID,
    USER_PROFILE_VIEW,
    code_view_name,
    cross_view_name,
    vector_view_name,
)

DEFAULT_OFFLINE_URI = "data/offline"

_NO_EXPIRY = timedelta(0)
_SCALAR_TYPES: dict[pa.DataType, FeastType] = {
    pa.int64(): Int64,
    pa.int32(): Int32,
    pa.float64(): Float64,
    pa.float32(): Float32,
    pa.bool_(): Bool,
    pa.string(): String,
    pa.large_string(): String,
}


def item_entity() -> Entity:
    """Return the entity ``item``, joined on ``item_id``."""
    return Entity(name="item", join_keys=[ITEM_ID], value_type=ValueType.INT64)


def user_entity() -> Entity:
    """Return the entity ``user``, joined on ``user_id``."""
    return Entity(name="user", join_keys=[USER_ID], value_type=ValueType.INT64)


@dataclass(frozen=True)
class CodebookFacts:
    """What a code view says of its codebook, as the manifest has it."""

    encoder_version: str = ""
    num_levels: int = 0
    num_neighbors: int = 0
    embedding_dim: int = 0


def item_code_view(
    codebook_version: str,
    facts: CodebookFacts | None = None,
    offline_uri: str = DEFAULT_OFFLINE_URI,
    entity: Entity | None = None,
) -> FeatureView:
    """Return the view ``item_codes_<version>``, which can also be pushed to.

    Args:
        codebook_version: Version whose codes the view holds; another version is another view.
        facts: Sizes and encoder, kept as tags; None: not said.
        offline_uri: Folder of the offline log, as in ``feature_store.yaml``.
        entity: The item entity; None: :func:`item_entity`.

    Returns:
        The view, with ``item_codes_<version>_push`` as its push source.
    """
    name = code_view_name(codebook_version)
    tags = {
        view_tags.KIND: view_tags.ITEM_CODES_KIND,
        view_tags.DEDUP_KEY: f"{ITEM_ID},{EVENT_TIMESTAMP},content_hash",
        view_tags.CODEBOOK_VERSION: codebook_version,
    }
    if facts is not None:
        tags[view_tags.ENCODER_VERSION] = facts.encoder_version
        tags[view_tags.NUM_LEVELS] = str(facts.num_levels)
        tags[view_tags.NUM_NEIGHBORS] = str(facts.num_neighbors)
    log = _log_source(name, f"{offline_uri}/{name}", tags, created_column=CREATED)
    return FeatureView(
        name=name,
        entities=[entity or item_entity()],
        ttl=_NO_EXPIRY,
        schema=[
            Field(name=ITEM_ID, dtype=Int64),
            Field(name="rq_code", dtype=Array(Int64)),
            Field(name="vq_code", dtype=Array(Int64)),
            Field(name="encoder_version", dtype=String),
            Field(name="content_hash", dtype=String),
            Field(name="is_deleted", dtype=Bool),
        ],
        source=PushSource(name=f"{name}_push", batch_source=log),
        tags=tags,
        description=f"VQ and RQ codes of items, codebook {codebook_version}",
    )


def item_vector_view(
    encoder_version: str,
    embedding_dim: int,
    offline_uri: str = DEFAULT_OFFLINE_URI,
    entity: Entity | None = None,
) -> FeatureView:
    """Return the view ``item_vectors_<encoder_version>``: aligned vectors, for rankers of them.

    Args:
        encoder_version: Encoder that makes the vectors; codebooks of one encoder share the view.
        embedding_dim: Numbers in each vector.
        offline_uri: Folder of the offline log, as in ``feature_store.yaml``.
        entity: The item entity; None: :func:`item_entity`.

    Returns:
        The view; its feature ``embedding`` is bytes of little-endian float16, which
        :meth:`qarm_feast.reader.CodeReader.read_vectors` decodes.
    """
    name = vector_view_name(encoder_version)
    tags = {
        view_tags.KIND: view_tags.ITEM_VECTORS_KIND,
        view_tags.DEDUP_KEY: f"{ITEM_ID},{EVENT_TIMESTAMP},content_hash",
        view_tags.ENCODER_VERSION: encoder_version,
        view_tags.EMBEDDING_DIM: str(embedding_dim),
    }
    return FeatureView(
        name=name,
        entities=[entity or item_entity()],
        ttl=_NO_EXPIRY,
        schema=[
            Field(name=ITEM_ID, dtype=Int64),
            Field(name="embedding", dtype=Bytes),
            Field(name="content_hash", dtype=String),
            Field(name="is_deleted", dtype=Bool),
        ],
        source=_log_source(name, f"{offline_uri}/{name}", tags, created_column=CREATED),
        tags=tags,
        description=f"Aligned vectors of items, encoder {encoder_version}",
    )


@dataclass(frozen=True)
class HistorySettings:
    """Which interactions make a user's history, and how long it is."""

    history_length: int = 50
    positive_label: str = "auto"


def recent_items_view(
    settings: HistorySettings,
    offline_uri: str = DEFAULT_OFFLINE_URI,
    entity: Entity | None = None,
) -> FeatureView:
    """Return ``user_recent_items``: each user's latest positives, newest first.

    Args:
        settings: Length of the lists and the label that makes a positive.
        offline_uri: Folder of the offline log, as in ``feature_store.yaml``.
        entity: The user entity; None: :func:`user_entity`.

    Returns:
        The view.
    """
    tags = _history_tags(settings) | {view_tags.MERGE: view_tags.RECENT_ITEMS_KIND}
    return _history_view(RECENT_ITEMS_VIEW, tags, offline_uri, entity)


def train_items_view(
    settings: HistorySettings,
    split: str | None = "train",
    offline_uri: str = DEFAULT_OFFLINE_URI,
    entity: Entity | None = None,
) -> FeatureView:
    """Return ``user_train_items``: histories for training rows, offline only.

    Args:
        settings: As in :func:`recent_items_view`.
        split: Split whose events enter the lists; None: all events.
        offline_uri: Folder of the offline log, as in ``feature_store.yaml``.
        entity: The user entity; None: :func:`user_entity`.

    Returns:
        The view.
    """
    tags = _history_tags(settings) | ({view_tags.SPLIT: split} if split else {})
    return _history_view(TRAIN_ITEMS_VIEW, tags, offline_uri, entity)


def user_profile_view(
    columns: pa.Schema, offline_uri: str = DEFAULT_OFFLINE_URI, entity: Entity | None = None
) -> FeatureView:
    """Return ``user_profile`` with one feature per column of ``users.parquet``.

    Args:
        columns: Schema of ``users.parquet``, ``user_id`` among its columns.
        offline_uri: Folder of the offline log, as in ``feature_store.yaml``.
        entity: The user entity; None: :func:`user_entity`.

    Returns:
        The view.

    Raises:
        ConfigError: If a column has a type that Feast has none for, or a reserved name.
    """
    tags = {
        view_tags.KIND: view_tags.USER_PROFILE_KIND,
        view_tags.DEDUP_KEY: f"{USER_ID},{EVENT_TIMESTAMP}",
    }
    path = f"{offline_uri}/{USER_PROFILE_VIEW}"
    return FeatureView(
        name=USER_PROFILE_VIEW,
        entities=[entity or user_entity()],
        ttl=_NO_EXPIRY,
        schema=[Field(name=column.name, dtype=_feast_type(column)) for column in columns],
        source=_log_source(USER_PROFILE_VIEW, path, tags, created_column=CREATED),
        tags=tags,
        description="Columns of users.parquet",
    )


def cross_feature_view(codebook_version: str, code_view: FeatureView) -> OnDemandFeatureView:
    """Return ``cross_features_<version>``: what a user's items share with the candidate, on demand.

    A request brings ``history_rq_codes``, the RQ codes of the user's latest items, newest first,
    as one flat list per row, None for a user without any (Feast cannot tell the type of empty
    lists); the candidate's codes come from the view.

    Args:
        codebook_version: Version of the codes on both sides.
        code_view: The view of that version.

    Returns:
        The view, computed by :mod:`qarm_feast.cross_features`.
    """
    outputs = [("count", Int64), ("position", Int64), ("share", Float64)]
    history = RequestSource(
        name=HISTORY_INPUT, schema=[Field(name=HISTORY_INPUT, dtype=Array(Int64))]
    )
    return OnDemandFeatureView(
        name=cross_view_name(codebook_version),
        sources=[code_view[[CODES_INPUT]], history],
        schema=[
            Field(name=f"{prefix}_{name}", dtype=dtype)
            for prefix in PREFIX_NAMES
            for name, dtype in outputs
        ],
        mode="python",
        udf=_cross_features,
        udf_string=inspect.getsource(_cross_features),
        tags={view_tags.CODEBOOK_VERSION: codebook_version},
        description="History items that share the candidate's first code, and its first two: how "
        "many, the newest one's place (0 = newest, -1 = none), their share",
    )


def _cross_features(inputs: dict[str, Any]) -> dict[str, Any]:
    # Feast keeps this text and runs it anywhere: all it may do is call what is installed there.
    from qarm_feast.cross_features import on_demand_features

    return on_demand_features(inputs)


def feature_service(
    ranker_name: str, codebook_version: str, views: Sequence[FeatureView | OnDemandFeatureView]
) -> FeatureService:
    """Return the service ``<ranker>_<version>``: what one ranker reads online.

    Args:
        ranker_name: ``ranker.name`` of ``qarm.yaml``.
        codebook_version: Version of the code view among ``views``.
        views: Views that the ranker reads.

    Returns:
        The service.
    """
    return FeatureService(
        name=f"{ranker_name}_{codebook_version}",
        features=list(views),
        tags={view_tags.CODEBOOK_VERSION: codebook_version},
    )


@dataclass(frozen=True)
class RepositoryFacts:
    """What ``qarm.yaml``, the input data and the codebook registry say about the views.

    ``user_columns`` is None without ``users.parquet``; ``has_input_data`` tells whether histories
    for training come from data with a split; ``codebooks`` are the versions that have views;
    ``has_cross_features`` tells whether the ranker reads them, so that each version has their view,
    and ``has_vectors`` whether it reads aligned vectors, so that each encoder has theirs.
    """

    ranker_name: str
    offline_uri: str
    history: HistorySettings
    has_input_data: bool
    user_columns: pa.Schema | None = None
    codebooks: dict[str, CodebookFacts] = field(default_factory=dict)
    has_cross_features: bool = False
    has_vectors: bool = False


def read_repository_facts(repo_dir: Path) -> RepositoryFacts:
    """Read what ``feature_definitions.py`` declares views from.

    Args:
        repo_dir: Folder of ``qarm.yaml`` and ``feature_store.yaml``. No data and no codebook
            need be there yet.

    Returns:
        The facts; ``codebooks`` is empty without a registry.

    Raises:
        ConfigError: If a section is wrong.
    """
    config_path = repo_dir / "qarm.yaml"
    data = load_section(config_path, "data", DataConfig)
    codebook = load_section(config_path, "codebook", CodebookConfig)
    ranker = load_section(config_path, "ranker", _RankerReads)
    input_dir = Path(data.input_dir)
    users = input_dir / "users.parquet"
    return RepositoryFacts(
        ranker_name=ranker.name,
        offline_uri=_offline_uri(repo_dir),
        history=HistorySettings(data.history_length, data.positive_label),
        has_input_data=(input_dir / "interactions.parquet").is_file(),
        user_columns=pq.read_schema(users) if users.is_file() else None,
        codebooks=_codebook_facts(codebook.uri),
        has_cross_features="cross" in ranker.features,
        has_vectors=ranker.reads_aligned_vectors,
    )


def reads_aligned_vectors(config_path: str | Path) -> bool:
    """Tell whether the ranker of ``qarm.yaml`` reads aligned vectors, so that writers write them.

    Args:
        config_path: Path of ``qarm.yaml``.

    Returns:
        Whether ``item_vectors_<encoder_version>`` is declared.
    """
    return load_section(config_path, "ranker", _RankerReads).reads_aligned_vectors


def declare_views(
    facts: RepositoryFacts,
) -> dict[str, Entity | FeatureView | OnDemandFeatureView | FeatureService]:
    """Return every object of this project's repository under the name to declare it by.

    Args:
        facts: From :func:`read_repository_facts`.

    Returns:
        Entities, views and services by name.
    """
    item, user, uri = item_entity(), user_entity(), facts.offline_uri
    user_views = [recent_items_view(facts.history, uri, user)]
    if facts.user_columns is not None:
        user_views.append(user_profile_view(facts.user_columns, uri, user))
    split = "train" if facts.has_input_data else None
    views: list[FeatureView | OnDemandFeatureView] = [
        *user_views,
        train_items_view(facts.history, split, uri, user),
    ]
    services = []
    vector_views: dict[str, FeatureView] = {}
    for version, codebook in facts.codebooks.items():
        code_view = item_code_view(version, codebook, uri, item)
        code_views = [code_view]
        if facts.has_vectors:
            view = item_vector_view(codebook.encoder_version, codebook.embedding_dim, uri, item)
            # Codebooks of one encoder share its view.
            vector_view = vector_views.setdefault(view.name, view)
            code_views.append(vector_view)
        if facts.has_cross_features:
            code_views.append(cross_feature_view(version, code_view))
        views += [view for view in code_views if view not in vector_views.values()]
        services.append(feature_service(facts.ranker_name, version, [*code_views, *user_views]))
    declared = [*views, *vector_views.values(), *services]
    return {"item": item, "user": user} | {
        declaration.name: declaration for declaration in declared
    }


class _RankerReads(Section):
    """The keys of section ``ranker`` that services need; its owner checks them and the others."""

    model_config = ConfigDict(extra="ignore")

    name: str = "ranker"
    features: tuple[str, ...] = ()
    vector_source: str = "aligned"

    @property
    def reads_aligned_vectors(self) -> bool:
        """Whether `item_vectors_<encoder_version>` is declared and written."""
        if {"vector", "long_history"} & set(self.features):
            # Raw vectors are not served, so nothing of such a ranker is.
            return self.vector_source == "aligned"
        return "aligned_cosine" in self.features


def _offline_uri(repo_dir: Path) -> str:
    """Return ``offline_store.uri``, so that views and writers mean one folder."""
    path = repo_dir / "feature_store.yaml"
    if not path.is_file():
        return DEFAULT_OFFLINE_URI
    content = yaml.safe_load(os.path.expandvars(path.read_text(encoding="utf-8")))
    offline_store = content.get("offline_store")
    # Feast also takes the store's type alone, as a text.
    settings = offline_store if isinstance(offline_store, dict) else {}
    uri: str = settings.get("uri", DEFAULT_OFFLINE_URI)
    return uri


def _codebook_facts(uri: str) -> dict[str, CodebookFacts]:
    states = (VersionState.STAGED, VersionState.LIVE, VersionState.DEFAULT)
    manifests = [read_manifest(uri, version) for version in CodebookRegistry(uri).versions(*states)]
    return {
        manifest.version: CodebookFacts(
            manifest.encoder_version,
            manifest.num_levels,
            manifest.num_neighbors,
            manifest.embedding_dim,
        )
        for manifest in manifests
    }


def _history_tags(settings: HistorySettings) -> dict[str, str]:
    return {
        view_tags.KIND: view_tags.RECENT_ITEMS_KIND,
        view_tags.DEDUP_KEY: f"{USER_ID},{ITEM_ID},{EVENT_TIMESTAMP}",
        view_tags.HISTORY_LENGTH: str(settings.history_length),
        view_tags.POSITIVE_LABEL: settings.positive_label,
    }


def _history_view(
    name: str, tags: dict[str, str], offline_uri: str, entity: Entity | None
) -> FeatureView:
    # The rows are computed, so the interactions' `created` says nothing of them.
    source = _log_source(name, f"{offline_uri}/{INTERACTION_LOG}", tags, created_column="")
    return FeatureView(
        name=name,
        entities=[entity or user_entity()],
        ttl=_NO_EXPIRY,
        schema=[
            Field(name=USER_ID, dtype=Int64),
            Field(name="item_ids", dtype=Array(Int64)),
            Field(name="item_timestamps", dtype=Array(Int64)),
        ],
        source=source,
        online=name == RECENT_ITEMS_VIEW,
        tags=tags,
        description="A user's latest positives, newest first; times in microseconds UTC; after an "
        "erasure of the user the last item is -1, at the erasure's time",
    )


def _log_source(view_name: str, path: str, tags: dict[str, str], created_column: str) -> DataSource:
    return FileSource(
        name=f"{view_name}_log",
        path=path,
        timestamp_field=EVENT_TIMESTAMP,
        created_timestamp_column=created_column,
        tags=tags,
    )


def _feast_type(column: pa.Field) -> FeastType:
    if column.name in (EVENT_TIMESTAMP, CREATED):
        raise ConfigError(f"users.parquet: the column name {column.name!r} is taken by Feast rows")
    if pa.types.is_timestamp(column.type):
        return UnixTimestamp
    # The input data are read with dictionary columns made plain.
    is_list = pa.types.is_list(column.type)
    has_values = is_list or pa.types.is_dictionary(column.type)
    found = _SCALAR_TYPES.get(column.type.value_type if has_values else column.type)
    if found is None:
        raise ConfigError(
            f"users.parquet: column {column.name!r} is {column.type}, for which Feast has no type; "
            f"use one of {', '.join(str(known) for known in _SCALAR_TYPES)} or a list of it"
        )
    return Array(found) if is_list else found
