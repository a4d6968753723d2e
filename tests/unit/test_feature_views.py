import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureService, FeatureView, FileSource, OnDemandFeatureView, PushSource

from qarm_feast import schema
from qarm_feast.errors import ConfigError
from qarm_feast.feature_views import (
    CodebookFacts,
    HistorySettings,
    RepositoryFacts,
    declare_views,
    item_code_view,
    read_repository_facts,
    reads_aligned_vectors,
    recent_items_view,
    train_items_view,
    user_profile_view,
)
from qarm_feast.input_data import USER_COLUMN_TYPES
from qarm_feast.registry import CodebookRegistry, VersionState

USERS = pa.schema([("user_id", pa.int64()), ("age", pa.int64()), ("gender", pa.string())])


def facts(**known: object) -> RepositoryFacts:
    defaults = {
        "ranker_name": "home",
        "offline_uri": "data/offline",
        "history": HistorySettings(),
        "has_input_data": False,
    }
    return RepositoryFacts(**(defaults | known))


def plant_codebook(uri: Path, version: str, state: VersionState) -> None:
    """Store a manifest without arrays, which no declaration reads, and give it a state."""
    manifest = {
        "version": version,
        "encoder_version": "e1",
        "encoder_hash": "00",
        "behaviour_cutoff": None,
        "embedding_dim": 8,
        "level_sizes": [4, 4, 4],
        "num_neighbors": 5,
        "pool_size": 10,
        "seed": 0,
        "num_training_items": 10,
        "files": {},
        "created": datetime(2026, 1, 1, tzinfo=UTC).isoformat(),
    }
    (uri / version).mkdir(parents=True)
    (uri / version / "manifest.json").write_text(json.dumps(manifest))
    CodebookRegistry(str(uri)).publish(version)
    CodebookRegistry(str(uri)).set_state(version, state)


def write_repository(repo_dir: Path) -> None:
    (repo_dir / "qarm.yaml").write_text("ranker: {name: home}\ndata: {history_length: 7}\n")
    (repo_dir / "feature_store.yaml").write_text(
        "offline_store: {type: qarm_feast.offline_store.CodeLogOfflineStore, uri: data/log}\n"
    )


def test_a_code_view_has_the_columns_of_code_rows_and_never_expires() -> None:
    view = item_code_view("v1")

    names = {field.name for field in view.schema}
    assert names == set(schema.CODE_ROWS.names) - {"event_timestamp", "created"}
    assert view.ttl == timedelta(0)
    assert view.tags["qarm.dedup_key"] == "item_id,event_timestamp,content_hash"


def test_a_code_view_is_pushed_to_through_its_log() -> None:
    view = item_code_view("v1", offline_uri="elsewhere")

    assert isinstance(view.stream_source, PushSource)
    assert view.stream_source.name == "item_codes_v1_push"
    assert view.batch_source.path == "elsewhere/item_codes_v1"
    assert view.batch_source.tags == view.tags


def test_history_views_read_the_interaction_log_and_only_one_is_online() -> None:
    settings = HistorySettings(history_length=9, positive_label="is_like")

    recent, train = recent_items_view(settings), train_items_view(settings)

    assert recent.batch_source.path == train.batch_source.path == "data/offline/interaction_log"
    assert recent.batch_source.tags["qarm.history_length"] == "9"
    assert recent.tags["qarm.merge"] == "recent_items"
    assert "qarm.split" not in recent.tags
    assert train.tags["qarm.split"] == "train"
    assert (recent.online, train.online) == (True, False)


def test_tags_of_a_source_survive_feasts_registry_format() -> None:
    source = recent_items_view(HistorySettings()).batch_source

    assert FileSource.from_proto(source.to_proto()).tags == source.tags


def test_a_profile_view_has_a_feature_per_user_column() -> None:
    view = user_profile_view(USERS)

    assert [(feature.name, str(feature.dtype)) for feature in view.features] == [
        ("age", "Int64"),
        ("gender", "String"),
    ]
    assert [column.name for column in view.entity_columns] == ["user_id"]


@pytest.mark.parametrize(
    "column_type", [*USER_COLUMN_TYPES, pa.dictionary(pa.int32(), pa.string()), pa.large_string()]
)
def test_every_user_column_that_passes_the_contract_can_be_a_feature(
    column_type: pa.DataType,
) -> None:
    view = user_profile_view(USERS.append(pa.field("city", column_type)))

    assert [feature.name for feature in view.features] == ["age", "gender", "city"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.field("created", pa.int64()), "'created' is taken"),
        (pa.field("home", pa.struct([("x", pa.int64())])), "'home' is struct"),
    ],
)
def test_a_user_column_that_cannot_be_a_feature_is_refused_by_name(
    column: pa.Field, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        user_profile_view(USERS.append(column))


def test_without_data_and_codebook_only_user_histories_are_declared() -> None:
    declared = declare_views(facts())

    assert sorted(declared) == ["item", "user", "user_recent_items", "user_train_items"]
    train = declared["user_train_items"]
    assert isinstance(train, FeatureView)
    assert "qarm.split" not in train.tags


def test_each_codebook_version_has_a_view_and_a_service_with_the_user_views() -> None:
    codebooks = {"v1": CodebookFacts("e1", 3, 5), "v2": CodebookFacts("e2", 4, 5)}

    declared = declare_views(facts(user_columns=USERS, has_input_data=True, codebooks=codebooks))

    service = declared["home_v2"]
    assert isinstance(service, FeatureService)
    assert [projection.name for projection in service.feature_view_projections] == [
        "item_codes_v2",
        "user_recent_items",
        "user_profile",
    ]
    view = declared["item_codes_v2"]
    assert isinstance(view, FeatureView)
    assert (view.tags["qarm.num_levels"], view.tags["qarm.encoder_version"]) == ("4", "e2")
    assert "home_v1" in declared


def test_cross_features_are_declared_and_served_where_the_ranker_reads_them() -> None:
    codebooks = {"v1": CodebookFacts("e1", 3, 5)}

    declared = declare_views(facts(codebooks=codebooks, has_cross_features=True))

    view, service = declared["cross_features_v1"], declared["home_v1"]
    assert isinstance(view, OnDemandFeatureView)
    assert isinstance(service, FeatureService)
    assert [(feature.name, str(feature.dtype)) for feature in view.features] == [
        (f"{prefix}_{name}", dtype)
        for prefix in ("c1", "c1_c2")
        for name, dtype in (("count", "Int64"), ("position", "Int64"), ("share", "Float64"))
    ]
    assert [projection.name for projection in service.feature_view_projections] == [
        "item_codes_v1",
        "cross_features_v1",
        "user_recent_items",
    ]
    assert "cross_features_v1" not in declare_views(facts(codebooks=codebooks))


@pytest.mark.parametrize(
    ("ranker", "is_on"), [("{name: home}", False), ("{features: [item_id, cross]}", True)]
)
def test_the_rankers_features_tell_whether_there_are_cross_features(
    tmp_path: Path, ranker: str, is_on: bool
) -> None:
    (tmp_path / "qarm.yaml").write_text(f"ranker: {ranker}\n")

    assert read_repository_facts(tmp_path).has_cross_features is is_on


def test_facts_come_from_the_files_beside_the_definitions(tmp_path: Path) -> None:
    write_repository(tmp_path)
    input_dir = tmp_path / "data" / "input"
    input_dir.mkdir(parents=True)
    pq.write_table(USERS.empty_table(), input_dir / "users.parquet")
    codebooks = tmp_path / "data" / "codebooks"
    for version, state in (
        ("v1", VersionState.DEFAULT),
        ("v2", VersionState.STAGED),
        ("v3", VersionState.RETIRED),
    ):
        plant_codebook(codebooks, version, state)

    found = read_repository_facts(tmp_path)

    assert (found.ranker_name, found.offline_uri) == ("home", "data/log")
    assert found.history == HistorySettings(history_length=7)
    assert found.user_columns is not None
    assert found.user_columns.names == ["user_id", "age", "gender"]
    assert not found.has_input_data
    assert found.codebooks == dict.fromkeys(("v1", "v2"), CodebookFacts("e1", 3, 5, 8))


def test_an_offline_store_may_be_named_by_its_type_alone(tmp_path: Path) -> None:
    write_repository(tmp_path)
    name = "qarm_feast.offline_store.CodeLogOfflineStore"
    (tmp_path / "feature_store.yaml").write_text(f"offline_store: {name}\n")

    assert read_repository_facts(tmp_path).offline_uri == "data/offline"


def test_an_empty_repository_has_facts(tmp_path: Path) -> None:
    write_repository(tmp_path)

    found = read_repository_facts(tmp_path)

    assert found.user_columns is None
    assert found.codebooks == {}


@pytest.mark.parametrize(
    ("ranker", "is_declared"),
    [
        ("{features: [item_id, vector]}", True),
        ("{features: [item_id, vector], vector_source: raw}", False),
        ("{features: [item_id, aligned_cosine], vector_source: raw}", True),
        ("{features: [item_id, vector, aligned_cosine], vector_source: raw}", False),
        ("{features: [item_id]}", False),
    ],
)
def test_each_encoder_whose_vectors_the_ranker_reads_has_one_view(
    tmp_path: Path, ranker: str, is_declared: bool
) -> None:
    (tmp_path / "qarm.yaml").write_text(f"ranker: {ranker}\ncodebook: {{uri: data/codebooks}}\n")
    for version, state in (("v1", VersionState.DEFAULT), ("v2", VersionState.LIVE)):
        plant_codebook(tmp_path / "data" / "codebooks", version, state)

    declared = declare_views(read_repository_facts(tmp_path))

    assert reads_aligned_vectors(tmp_path / "qarm.yaml") == is_declared
    assert ("item_vectors_e1" in declared) == is_declared
    for version in ("v1", "v2"):
        views = [view.name for view in declared[f"ranker_{version}"].feature_view_projections]
        assert ("item_vectors_e1" in views) == is_declared
    if is_declared:
        tags = declared["item_vectors_e1"].tags
        assert (tags["qarm.encoder_version"], tags["qarm.embedding_dim"]) == ("e1", "8")
