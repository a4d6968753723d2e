"""Applied views, as those see them who write while `feast apply` runs."""

from pathlib import Path

from qarm_feast.feature_views import item_code_view
from qarm_feast.online_tables import FeastOnlineTables
from qarm_feast.repo_paths import open_feature_store
from tests.stream_repo import build_repo, publish_codebook


def test_a_view_whose_table_feast_apply_has_still_to_make_is_not_there_yet(tmp_path: Path) -> None:
    repo = build_repo(tmp_path / "repo", {})
    store = open_feature_store(repo.directory)
    tables = FeastOnlineTables(store)
    publish_codebook(repo.directory, "v2", seed=1)

    before = tables.has_view("item_codes_v2")
    store.registry.apply_feature_view(item_code_view("v2"), store.project)
    meanwhile = tables.has_view("item_codes_v2")
    repo.apply()

    assert (before, meanwhile, tables.has_view("item_codes_v2")) == (False, False, True)
    assert tables.has_view("item_codes_v1")
