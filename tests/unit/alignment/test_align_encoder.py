import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
import torch

from qarm_feast.alignment.backbones.base import Backbone, Encoded
from qarm_feast.alignment.backbones.ready import ReadyVectors
from qarm_feast.alignment.backbones.text import TextBackbone, find_text_backbone
from qarm_feast.alignment.encoder import (
    EncoderManifest,
    ItemEncoder,
    backbone_manifests,
    load_encoder,
    read_encoder_manifest,
)
from qarm_feast.alignment.features import FeatureCache, read_features
from qarm_feast.alignment.fusion import AlignmentHead, FusionSizes
from qarm_feast.alignment.modalities import choose_modalities, item_texts
from qarm_feast.errors import ConfigError, CorruptArtifactError, DataError

WIDTH = 6


def ready_vectors(num_items: int, seed: int = 0) -> pa.Table:
    values = np.random.default_rng(seed).normal(size=num_items * WIDTH).astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), WIDTH)
    return pa.table({"item_id": np.arange(num_items), "embedding": vectors})


def new_encoder(text: TextBackbone | None = None) -> ItemEncoder:
    backbones: dict[str, Backbone] = {"embedding": ReadyVectors(WIDTH)}
    if text is not None:
        backbones = {"text": text}
    shapes = {name: (one.num_tokens, one.width) for name, one in backbones.items()}
    torch.manual_seed(0)
    head = AlignmentHead(shapes, embedding_dim=16, hidden_dim=24)
    torch.nn.init.normal_(head.correction.weight)
    manifest = EncoderManifest(
        version="e1",
        embedding_dim=16,
        backbones=backbone_manifests(backbones),
        fusion=FusionSizes(hidden_dim=24),
        behaviour_cutoff=datetime(2024, 1, 1, tzinfo=UTC),
        created=datetime(2024, 1, 2, tzinfo=UTC),
        training={"seed": 0},
        files={},
    )
    return ItemEncoder(manifest, head.eval(), backbones)


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


def test_an_artifact_of_format_1_still_loads(tmp_path: Path) -> None:
    encoder = new_encoder()
    path = encoder.save(str(tmp_path)) / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name in ("format", "backbones", "fusion", "parent"):
        del manifest[name]
    manifest |= {"source": "embedding", "feature_dim": 16, "hidden_dim": 24}
    path.write_text(json.dumps(manifest | {"max_tokens": None, "backbone_hash": None}))

    loaded = load_encoder(str(tmp_path), "e1")

    assert np.array_equal(loaded.encode(ready_vectors(5)), encoder.encode(ready_vectors(5)))


def test_a_text_artifact_of_format_1_names_its_old_folder(tmp_path: Path) -> None:
    old = {
        "version": "e1",
        "source": "text",
        "embedding_dim": 128,
        "feature_dim": 384,
        "hidden_dim": 256,
        "max_tokens": 64,
        "backbone_hash": "f" * 64,
        "behaviour_cutoff": "2024-01-01T00:00:00Z",
        "created": "2024-01-02T00:00:00Z",
        "training": {},
        "files": {},
    }
    path = tmp_path / "e1" / "manifest.json"
    path.parent.mkdir()
    path.write_text(json.dumps(old))

    text = read_encoder_manifest(str(tmp_path), "e1").backbones["text"]

    assert (text.folder, text.num_tokens, text.width) == ("backbone", 1, 384)
    assert text.settings == {"max_tokens": 64, "num_tokens": 1}
    path.write_text(json.dumps(old | {"format": 3}))
    with pytest.raises(DataError, match=r"manifest\.json is no manifest of an encoder"):
        read_encoder_manifest(str(tmp_path), "e1")


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


def test_a_ready_vector_of_zeros_counts_as_none() -> None:
    vectors = [np.full(WIDTH, value, dtype=np.float32) for value in (0.5, 0.0, np.nan)]
    table = pa.table({"embedding": pa.array(vectors[:2], pa.list_(pa.float32(), WIDTH))})

    encoded = ReadyVectors(WIDTH).encode(vectors)

    assert encoded.is_present_N.tolist() == [True, False, False]
    assert encoded.faults == [None, "empty", None]
    with pytest.raises(DataError, match=r"1 item\(s\) have no 'embedding', or one of zeros"):
        new_encoder().encode(table)


@pytest.mark.parametrize(
    ("columns", "wanted", "chosen"),
    [
        ({"embedding": [[1.0]]}, "auto", ("embedding",)),
        ({"brand": ["a"]}, "auto", ("text",)),
        ({"embedding": [[1.0]], "title": ["a"]}, "auto", ("text",)),
        ({"embedding": [[1.0]], "title": ["a"]}, ("embedding", "text"), ("text", "embedding")),
        ({"image": [b"x"], "title": ["a"]}, "auto", ("text", "image")),
        ({"image": ["https://host/a.png"], "title": ["a"]}, "auto", ("text",)),
        ({"image": ["a.png"], "title": [None]}, "auto", ("image",)),
        ({"audio": [b"x"], "title": ["a"]}, ("audio",), ("audio",)),
    ],
)
def test_an_encoder_reads_what_items_have_and_ready_vectors_where_they_have_nothing_else(
    columns: dict[str, list[object]], wanted: Literal["auto"], chosen: tuple[str, ...]
) -> None:
    assert choose_modalities(pa.table(columns), wanted) == chosen


@pytest.mark.parametrize(
    ("columns", "wanted", "message"),
    [
        ({"item_id": [1]}, "auto", "no item has a value for any modality"),
        ({"title": ["a"]}, ("text", "image"), "no item has a value for image: the items have text"),
        ({"image": ["https://host/a"]}, "auto", "the items have no content"),
    ],
)
def test_items_without_the_content_that_is_wanted_get_an_error_that_says_so(
    columns: dict[str, list[object]], wanted: Literal["auto"], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        choose_modalities(pa.table(columns), wanted)


def test_item_texts_skip_what_is_missing() -> None:
    items = pa.table({"brand": ["b", None, None], "title": ["t", "t", None]})

    assert item_texts(items) == ["t. b", "t", ""]
    assert item_texts(pa.table({"item_id": [1, 2]})) == ["", ""]


def test_a_backbone_that_is_neither_name_nor_folder_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json.*minilm"):
        find_text_backbone(str(tmp_path / "nothing"))


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
    encoder = new_encoder(TextBackbone(minilm_folder, max_tokens=32))
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

    features = TextBackbone(minilm_folder, max_tokens=32).encode(["a hex nut"]).features_NTE

    np.testing.assert_allclose(features[:, 0], expected, atol=1e-5)


def test_a_loaded_text_encoder_reads_the_copied_backbone(
    minilm_folder: Path, tmp_path: Path
) -> None:
    encoder = new_encoder(TextBackbone(minilm_folder, max_tokens=16))
    items = pa.table({"title": ["a hex nut", None]})

    encoder.save(str(tmp_path))
    loaded = load_encoder(str(tmp_path), "e1")

    backbone = loaded.backbones["text"]
    assert isinstance(backbone, TextBackbone)
    assert backbone.folder == tmp_path / "e1" / "text"
    assert backbone.hash == loaded.manifest.backbones["text"].hash
    assert np.array_equal(loaded.encode(items), encoder.encode(items))


class CountingBackbone(TextBackbone):
    """Encodes a text as its length and remembers what it was asked for."""

    hash = "f" * 64
    width = 2

    def __init__(self) -> None:
        self.num_tokens = 1
        self.asked: list[str] = []

    def encode(self, values: Sequence[str]) -> Encoded:
        self.asked += values
        rows = [[[len(text), 1.0]] for text in values]
        features = np.array(rows, dtype=np.float32).reshape(-1, 1, 2)
        return Encoded(features, np.array([bool(t) for t in values], bool), [None] * len(values))


def test_cached_features_are_computed_once_per_content(tmp_path: Path) -> None:
    backbone = CountingBackbone()
    cache = FeatureCache(str(tmp_path))
    first = pa.table({"title": ["aa", "b", "aa", None]})
    second = pa.table({"title": ["ccc", "b"]})

    features = read_features(first, {"text": backbone}, cache)
    later = read_features(second, {"text": backbone}, cache)

    assert features.by_modality["text"].tolist() == [[[2, 1]], [[1, 1]], [[2, 1]], [[0, 1]]]
    assert features.present["text"].tolist() == [True, True, True, True]
    assert later.by_modality["text"].tolist() == [[[3, 1]], [[1, 1]]]
    assert backbone.asked == ["aa", "b", "", "ccc"]
    assert features.counts == {
        "text": {"repeated": 1, "encoded": 2, "absent": 1, "present": 3},
        "all": {"items": 4, "without_content": 1},
    }
