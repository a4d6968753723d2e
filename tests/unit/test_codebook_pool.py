"""A codebook whose pool is searched by an index: stored, loaded, refreshed.

Shape letters in this file: N items, D embedding width.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest

from qarm_feast.codebook import Codebook, EncoderFacts, ItemVectors, QuantizerConfig
from qarm_feast.codebook_config import ContinuityConfig
from qarm_feast.continuity import ParentCodes, refresh_codebook
from qarm_feast.errors import CorruptArtifactError
from qarm_feast.quantizers import RqConfig, VqConfig
from qarm_feast.registry import read_manifest

ENCODER = EncoderFacts("e1", "a" * 64, datetime(2024, 1, 1, tzinfo=UTC))
CREATED = datetime(2024, 2, 1, tzinfo=UTC)
KINDS = ("ivf_flat", "hnsw")


def _config(kind: Any) -> QuantizerConfig:
    vq = VqConfig(search=kind, num_neighbors=5, num_lists=6, num_probes=2, ef_search=20)
    return QuantizerConfig(rq=RqConfig(num_levels=2, codebook_size=4), vq=vq)


def _vectors(num_items: int) -> ItemVectors:
    x_ND = np.random.default_rng(0).standard_normal((num_items, 12)).astype(np.float32)
    x_ND[10:20] = x_ND[:10]
    ids_N = np.arange(100, 100 + num_items, dtype=np.int64)
    return ItemVectors(ids_N, [f"h{item}" for item in ids_N], x_ND)


def _train(items: ItemVectors, kind: str, version: str = "v1") -> Codebook:
    return Codebook.train(
        version, items.item_ids_N, items.x_ND, config=_config(kind), encoder=ENCODER,
        created=CREATED,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_index_is_a_file_of_the_artifact_and_gives_the_same_codes(
    kind: str, tmp_path: Path
) -> None:
    items = _vectors(300)
    codebook = _train(items, kind)
    codebook.save(str(tmp_path))

    loaded = Codebook.load(str(tmp_path), "v1")

    assert sorted(name.partition("-")[0] for name in loaded.manifest.files) == [
        "overrides", "rq", "training", "vq", "vq_index",
    ]  # fmt: skip
    before = codebook.encode(items.item_ids_N, items.content_hashes_N, items.x_ND)
    after = loaded.encode(items.item_ids_N, items.content_hashes_N, items.x_ND)
    np.testing.assert_array_equal(after.vq_NV, before.vq_NV)
    np.testing.assert_array_equal(loaded.vq.pool_vectors_PD, codebook.vq.pool_vectors_PD)
    assert loaded.with_hashes().manifest.files == codebook.manifest.files


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("exact", {}),
        (
            "ivf_flat",
            {"num_lists": 6, "num_probes": 2, "leaf_margin": ANY, "score_margin": ANY}
            | {"full_margin": ANY},
        ),
        ("hnsw", {"hnsw_m": 32, "ef_construction": 80, "ef_search": 20}),
    ],
)
def test_the_manifest_says_how_the_pool_is_searched_and_how_well(
    kind: str, settings: dict[str, int], tmp_path: Path
) -> None:
    codebook = _train(_vectors(300), kind)
    codebook.save(str(tmp_path))

    manifest = read_manifest(str(tmp_path), "v1")

    assert (manifest.search, manifest.search_settings) == (kind, settings)
    assert manifest.search_recall == codebook.vq.search_recall
    assert (manifest.search_recall < 1) == (kind == "ivf_flat")


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    _train(_vectors(300), "ivf_flat").save(str(tmp_path))
    (path,) = (tmp_path / "v1").glob("vq_index-*.faiss")
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 1
    path.write_bytes(payload)

    with pytest.raises(CorruptArtifactError, match=path.name):
        Codebook.load(str(tmp_path), "v1")


@pytest.mark.parametrize("kind", KINDS)
def test_a_refreshed_pool_is_searched_like_the_naive_one(kind: str) -> None:
    old, new = _vectors(300), _vectors(320)
    parent = ParentCodes.served_by(_train(old, kind), old)
    naive = _train(new, kind, "v2")

    refreshed = refresh_codebook(
        naive, new, new.item_ids_N, parent, ContinuityConfig(), _config(kind).rq
    )

    assert refreshed.vq.search_kind == refreshed.manifest.search == kind
    assert refreshed.manifest.search_settings == naive.manifest.search_settings
    assert refreshed.manifest.search_recall == refreshed.vq.search_recall
    np.testing.assert_array_equal(refreshed.vq.pool_item_ids_P[:300], old.item_ids_N)
    assert refreshed.manifest.reset_pool_rows == tuple(range(300, 320))
