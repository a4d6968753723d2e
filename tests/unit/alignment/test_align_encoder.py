from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from qarm_feast.alignment.backbone import FeatureCache, TextBackbone, find_backbone
from qarm_feast.alignment.encoder import (
    AlignmentHead,
    EncoderManifest,
    ItemEncoder,
    content_features,
    item_texts,
    load_encoder,
    source_of,
)
from qarm_feast.errors import ConfigError, CorruptArtifactError, DataError

WIDTH = 6


def ready_vectors(num_items: int, seed: int = 0) -> pa.Table:
    values = np.random.default_rng(seed).normal(size=num_items * WIDTH).astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), WIDTH)
    return pa.table({"item_id": np.arange(num_items), "embedding": vectors})


def new_encoder(backbone: TextBackbone | None = None, feature_dim: int = 16) -> ItemEncoder:
    torch.manual_seed(0)
    head = AlignmentHead(feature_dim, embedding_dim=16, hidden_dim=24)
    torch.nn.init.normal_(head.correction.weight)
    manifest = EncoderManifest(
        version="e1",
        source="embedding" if backbone is None else "text",
        embedding_dim=16,
        feature_dim=feature_dim,
        hidden_dim=24,
        max_tokens=None if backbone is None else backbone.max_tokens,
        backbone_hash=None,
        behaviour_cutoff=datetime(2024, 1, 1, tzinfo=UTC),
        created=datetime(2024, 1, 2, tzinfo=UTC),
        training={"seed": 0},
        files={},
    )
    return ItemEncoder(manifest=manifest, head=head.eval(), backbone=backbone)


def test_ready_vectors_are_encoded_alike_one_by_one_and_all_at_once() -> None:
    items = ready_vectors(150)
    encoder = new_encoder()

    whole_ND = encoder.encode(items)
    single_ND = np.concatenate([encoder.encode(items.slice(row, 1)) for row in range(150)])

    assert whole_ND.dtype == np.float32
    assert np.array_equal(whole_ND, single_ND)
    np.testing.assert_allclose(np.linalg.norm(whole_ND, axis=1), 1.0, atol=1e-6)
    assert encoder.encode(items.slice(0, 0)).shape == (0, 16)


def test_a_loaded_encoder_equals_the_saved_one(tmp_path: Path) -> None:
    encoder = new_encoder()

    folder = encoder.save(str(tmp_path))
    loaded = load_encoder(str(tmp_path), "e1")

    assert sorted(path.name for path in folder.iterdir()) == ["head.safetensors", "manifest.json"]
    assert loaded.manifest.files.keys() == {"head.safetensors"}
    assert loaded.manifest.model_copy(update={"files": {}}) == encoder.manifest
    assert np.array_equal(loaded.encode(ready_vectors(5)), encoder.encode(ready_vectors(5)))


def test_a_changed_file_of_an_artifact_is_refused(tmp_path: Path) -> None:
    path = new_encoder().save(str(tmp_path)) / "head.safetensors"
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(payload)

    with pytest.raises(CorruptArtifactError, match=r"head\.safetensors has SHA-256"):
        load_encoder(str(tmp_path), "e1")


def test_an_artifact_is_never_overwritten(tmp_path: Path) -> None:
    new_encoder().save(str(tmp_path))

    with pytest.raises(ConfigError, match=r"set alignment\.encoder_version to a new name"):
        new_encoder().save(str(tmp_path))


def test_a_save_that_dies_before_the_rename_leaves_no_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: Path, target: Path) -> Path:
        raise OSError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", die)
        with pytest.raises(OSError, match="power cut"):
            new_encoder().save(str(tmp_path))

    with pytest.raises(DataError, match="run `qarm align train` first"):
        load_encoder(str(tmp_path), "e1")
    # The next attempt starts over the rest of the first.
    new_encoder().save(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["e1"]


def test_an_item_without_its_ready_vector_is_refused() -> None:
    vector = pa.array([[1.0] * WIDTH, None], pa.list_(pa.float32(), WIDTH))

    with pytest.raises(DataError, match="reads ready vectors"):
        new_encoder().encode(pa.table({"embedding": vector}))
    with pytest.raises(DataError, match="reads ready vectors"):
        new_encoder().encode(pa.table({"title": ["a"]}))


@pytest.mark.parametrize(
    ("columns", "source"),
    [
        (["embedding"], "embedding"),
        (["brand"], "text"),
        (["embedding", "title"], "text"),
        (["image", "title"], "text"),
    ],
)
def test_text_wins_over_ready_vectors(columns: list[str], source: str) -> None:
    assert source_of(pa.table({name: [None] for name in columns})) == source


@pytest.mark.parametrize("column", ["image", "audio"])
def test_items_with_only_an_image_or_audio_get_an_error_that_says_so(column: str) -> None:
    with pytest.raises(DataError, match=f"only content of the items is {column}"):
        source_of(pa.table({"item_id": [1], column: [b"x"]}))


def test_item_texts_skip_what_is_missing() -> None:
    items = pa.table({"brand": ["b", None, None], "title": ["t", "t", None]})

    assert item_texts(items) == ["t. b", "t", ""]
    assert item_texts(pa.table({"item_id": [1, 2]})) == ["", ""]


def test_a_backbone_that_is_neither_name_nor_folder_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json.*minilm"):
        find_backbone(str(tmp_path / "nothing"))


LONG = "stainless steel hex bolt for outdoor use " * 40
TEXTS = [
    "",
    "bolt",
    LONG,
    "hex nut, M8",
    "café ☕ 漢字",
    "x" * 100_000,
    *(f"part {n}" for n in range(70)),
]


def test_texts_are_encoded_alike_one_by_one_and_all_at_once(minilm_folder: Path) -> None:
    encoder = new_encoder(TextBackbone(minilm_folder, max_tokens=32), feature_dim=384)
    items = pa.table({"title": TEXTS})

    whole_ND = encoder.encode(items)
    rows = [0, 1, 2, 3, 4, 5, 6, 40, 75]
    single_ND = np.concatenate([encoder.encode(items.slice(row, 1)) for row in rows])
    reversed_ND = encoder.encode(items.take(np.arange(len(TEXTS))[::-1].copy()))[::-1]

    assert np.array_equal(whole_ND[rows], single_ND)
    assert np.array_equal(whole_ND, reversed_ND)
    assert np.isfinite(whole_ND).all()


def test_features_are_the_mean_of_the_last_layer_without_padding(minilm_folder: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(minilm_folder, local_files_only=True).eval()
    tokens = tokenizer(["a hex nut"], return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens).last_hidden_state.mean(dim=1).numpy()

    features = TextBackbone(minilm_folder, max_tokens=32).encode(["a hex nut"])

    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_a_loaded_text_encoder_reads_the_copied_backbone(
    minilm_folder: Path, tmp_path: Path
) -> None:
    encoder = new_encoder(TextBackbone(minilm_folder, max_tokens=16), feature_dim=384)
    items = pa.table({"title": ["a hex nut", None]})

    encoder.save(str(tmp_path))
    loaded = load_encoder(str(tmp_path), "e1")

    assert loaded.backbone is not None
    assert loaded.backbone.folder == tmp_path / "e1" / "backbone"
    assert np.array_equal(loaded.encode(items), encoder.encode(items))


class CountingBackbone(TextBackbone):
    """Encodes a text as its length and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: list[str]) -> np.ndarray:  # type: ignore[override]
        self.asked += texts
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


def test_cached_features_are_computed_once_per_content(tmp_path: Path) -> None:
    backbone = CountingBackbone()
    cache = FeatureCache(str(tmp_path), backbone_hash="f" * 64, max_tokens=8)
    first = pa.table({"title": ["aa", "b", "aa"]})
    second = pa.table({"title": ["ccc", "b"]})

    first_NE = content_features(first, backbone, cache)
    second_NE = content_features(second, backbone, cache)

    assert first_NE.tolist() == [[2, 1], [1, 1], [2, 1]]
    assert second_NE.tolist() == [[3, 1], [1, 1]]
    assert backbone.asked == ["aa", "b", "ccc"]
