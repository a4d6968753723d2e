"""Shape letters in this file: N items, D embedding width, L levels, V neighbours."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from qarm_feast.artifact import MANIFEST_NAME
from qarm_feast.codebook import Codebook, EncoderFacts, QuantizerConfig
from qarm_feast.errors import CodebookError, ConfigError, CorruptArtifactError, DataError
from qarm_feast.overrides import Overrides
from qarm_feast.quantizers import ResidualQuantizer, RqConfig, VqConfig
from qarm_feast.registry import read_manifest

DIM = 12
NUM_ITEMS = 300
CONFIG = QuantizerConfig(rq=RqConfig(num_levels=2, codebook_size=8), vq=VqConfig(num_neighbors=5))
ENCODER = EncoderFacts("e1", "a" * 64, datetime(2024, 1, 1, tzinfo=UTC))
CREATED = datetime(2024, 2, 1, tzinfo=UTC)


def _items(num_items: int = NUM_ITEMS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x_ND = rng.standard_normal((num_items, DIM)).astype(np.float32)
    return rng.permutation(10 * num_items)[:num_items].astype(np.int64), x_ND


def _train(item_ids_N: np.ndarray, x_ND: np.ndarray, version: str = "v1") -> Codebook:
    return Codebook.train(
        version, item_ids_N, x_ND, config=CONFIG, encoder=ENCODER, created=CREATED
    )


@pytest.fixture(scope="module")
def codebook() -> Codebook:
    return _train(*_items())


def test_the_manifest_describes_what_was_trained(codebook: Codebook) -> None:
    manifest = codebook.manifest

    assert (manifest.version, manifest.encoder_version) == ("v1", "e1")
    assert manifest.level_sizes == (8, 8)
    assert (manifest.num_neighbors, manifest.pool_size) == (5, NUM_ITEMS)
    assert (manifest.embedding_dim, manifest.num_training_items) == (DIM, NUM_ITEMS)
    assert manifest.behaviour_cutoff == ENCODER.behaviour_cutoff
    assert (manifest.parent, manifest.label_map, manifest.num_overrides) == (None, None, 0)
    assert sorted(name.partition("-")[0] for name in manifest.files) == [
        "overrides",
        "rq",
        "training",
        "vq",
    ]


def test_more_neighbours_than_the_pool_serves_are_refused_before_rq_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trained(quantizer: ResidualQuantizer, x_ND: np.ndarray) -> None:
        pytest.fail("the residual quantizer was trained first")

    monkeypatch.setattr(ResidualQuantizer, "train", trained)
    for pool_size, most in (("auto", NUM_ITEMS), (20, 20)):
        vq = VqConfig(num_neighbors=most, pool_size=pool_size)
        refused = rf"num_neighbors is {most}, but the pool has {most} of the 300 .* below {most}"
        with pytest.raises(CodebookError, match=refused):
            Codebook.train(
                "v1",
                *_items(),
                config=QuantizerConfig(vq=vq),
                encoder=ENCODER,
                created=CREATED,
            )


def test_a_loaded_codebook_gives_the_same_codes(codebook: Codebook, tmp_path: Path) -> None:
    item_ids_N, x_ND = _items(400, seed=1)
    hashes = ["h"] * 400
    codebook.save(str(tmp_path))

    loaded = Codebook.load(str(tmp_path), "v1")

    before, after = (
        codebook.encode(item_ids_N, hashes, x_ND),
        loaded.encode(item_ids_N, hashes, x_ND),
    )
    assert loaded.manifest == codebook.manifest
    assert before.rq_NL.shape == (400, 2)
    assert before.vq_NV.shape == (400, 5)
    np.testing.assert_array_equal(after.rq_NL, before.rq_NL)
    np.testing.assert_array_equal(after.vq_NV, before.vq_NV)


def test_a_codebook_remembers_how_its_training_set_used_the_codes(
    codebook: Codebook, tmp_path: Path
) -> None:
    item_ids_N, x_ND = _items()
    rq_NL = codebook.encode(item_ids_N, [""] * len(item_ids_N), x_ND).rq_NL
    codebook.save(str(tmp_path))

    training = Codebook.load(str(tmp_path), "v1").training

    assert training is not None
    for level, counts_K in enumerate(training.counts):
        np.testing.assert_array_equal(counts_K, np.bincount(rq_NL[:, level], minlength=8))
    unit_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    for level, error in enumerate(training.errors_L):
        left_ND = unit_ND - codebook.decode_rq(rq_NL[:, : level + 1])
        assert error == pytest.approx((left_ND**2).mean(), rel=1e-5)


def test_an_artifact_from_before_the_training_reference_loads_without_one(
    codebook: Codebook, tmp_path: Path
) -> None:
    old = Codebook(codebook.manifest, codebook.rq, codebook.vq, codebook.overrides).with_hashes()
    old.save(str(tmp_path))

    loaded = Codebook.load(str(tmp_path), "v1")

    assert loaded.training is None
    assert loaded.with_hashes().manifest == old.manifest


def test_the_same_items_in_another_order_give_the_same_bytes(
    codebook: Codebook, tmp_path: Path
) -> None:
    item_ids_N, x_ND = _items()
    order_N = np.random.default_rng(5).permutation(NUM_ITEMS)

    other = _train(item_ids_N[order_N], x_ND[order_N])

    codebook.save(str(tmp_path / "a"))
    other.save(str(tmp_path / "b"))
    for name in (MANIFEST_NAME, *codebook.manifest.files):
        first, second = (tmp_path / folder / "v1" / name for folder in "ab")
        assert first.read_bytes() == second.read_bytes()


def test_saving_again_is_nothing_and_saving_other_content_is_refused(
    codebook: Codebook, tmp_path: Path
) -> None:
    codebook.save(str(tmp_path))
    codebook.save(str(tmp_path))

    with pytest.raises(CodebookError, match="already stored"):
        _train(*_items(seed=9)).save(str(tmp_path))

    assert read_manifest(str(tmp_path), "v1") == codebook.manifest


@pytest.mark.parametrize("part", ["rq", "vq", "overrides"])
def test_loading_a_changed_file_is_refused(codebook: Codebook, tmp_path: Path, part: str) -> None:
    codebook.save(str(tmp_path))
    (path,) = (tmp_path / "v1").glob(f"{part}-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(CorruptArtifactError, match=path.name):
        Codebook.load(str(tmp_path), "v1")


def test_an_override_holds_for_its_item_and_content_only(
    codebook: Codebook, tmp_path: Path
) -> None:
    item_ids_N, x_ND = _items()
    nearest_NL = codebook.encode(item_ids_N, ["old"] * NUM_ITEMS, x_ND).rq_NL
    stored_ML = (nearest_NL[[3, 7]] + 1) % 8
    table = Overrides.from_rows(item_ids_N[[7, 3]], ["old", "old"], stored_ML[::-1])
    codebook.with_overrides(table).save(str(tmp_path))
    loaded = Codebook.load(str(tmp_path), "v1")

    served = loaded.encode(item_ids_N, ["old"] * NUM_ITEMS, x_ND)
    edited = loaded.encode(item_ids_N, ["new"] * NUM_ITEMS, x_ND)

    expected_NL = nearest_NL.copy()
    expected_NL[[3, 7]] = stored_ML
    np.testing.assert_array_equal(served.rq_NL, expected_NL)
    np.testing.assert_array_equal(edited.rq_NL, nearest_NL)
    assert loaded.manifest.num_overrides == 2


def test_one_item_may_have_overrides_for_several_contents(codebook: Codebook) -> None:
    table = Overrides.from_rows(
        np.array([5, 5]), ["a", "bb"], np.array([[1, 2], [3, 4]], dtype=np.int64)
    )
    x_ND = _items(3)[1]

    codes = codebook.with_overrides(table).encode(np.array([5, 5, 6]), ["bb", "a", "a"], x_ND)

    assert codes.rq_NL[:2].tolist() == [[3, 4], [1, 2]]


def test_overrides_that_cannot_be_served_are_refused(codebook: Codebook) -> None:
    codes_ML = np.array([[0, 8]], dtype=np.int64)

    with pytest.raises(CodebookError, match="levels have"):
        codebook.with_overrides(Overrides.from_rows(np.array([1]), ["a"], codes_ML))
    with pytest.raises(CodebookError, match="1 overrides come twice; the first is that of item 1"):
        Overrides.from_rows(np.array([1, 1]), ["a", "a"], np.zeros((2, 2), dtype=np.int64))


def test_no_item_has_its_own_pool_row_in_its_code(codebook: Codebook) -> None:
    item_ids_N, x_ND = _items()
    codes = codebook.encode(item_ids_N, ["h"] * NUM_ITEMS, x_ND)

    assert not (codebook.vq.pool_item_ids_P[codes.vq_NV] == item_ids_N[:, None]).any()
    strangers = codebook.encode(item_ids_N + 10**6, ["h"] * NUM_ITEMS, x_ND)
    np.testing.assert_array_equal(codebook.vq.pool_item_ids_P[strangers.vq_NV[:, 0]], item_ids_N)


def test_the_length_of_a_vector_does_not_matter(codebook: Codebook) -> None:
    item_ids_N, x_ND = _items(50, seed=2)
    hashes = ["h"] * 50

    # Powers of two scale without rounding.
    first, scaled = (codebook.encode(item_ids_N, hashes, x_ND * f) for f in (1, np.float32(64)))

    np.testing.assert_array_equal(first.rq_NL, scaled.rq_NL)
    np.testing.assert_array_equal(first.vq_NV, scaled.vq_NV)


def test_no_items_give_no_codes(codebook: Codebook) -> None:
    codes = codebook.encode(np.empty(0, np.int64), [], np.empty((0, DIM), np.float32))

    assert (codes.rq_NL.shape, codes.vq_NV.shape) == ((0, 2), (0, 5))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_vector_without_a_code_is_refused_with_its_item(codebook: Codebook, value: float) -> None:
    item_ids_N, x_ND = _items()
    x_ND[4] = value

    message = f"1 of 300 vectors .* that of item {item_ids_N[4]}$"
    with pytest.raises(DataError, match=message):
        codebook.encode(item_ids_N, ["h"] * NUM_ITEMS, x_ND)
    with pytest.raises(DataError, match=message):
        _train(item_ids_N, x_ND)


def test_input_of_another_shape_is_refused(codebook: Codebook) -> None:
    item_ids_N, x_ND = _items(10)

    with pytest.raises(CodebookError, match="11 wide, this codebook takes width 12"):
        codebook.encode(item_ids_N, ["h"] * 10, x_ND[:, 1:])
    with pytest.raises(DataError, match="10 items came with 9 content hashes"):
        codebook.encode(item_ids_N, ["h"] * 9, x_ND)
    with pytest.raises(DataError, match="10 items came with vectors of shape"):
        codebook.encode(item_ids_N, ["h"] * 10, x_ND[:9])


def test_training_input_that_is_empty_or_has_an_item_twice_is_refused() -> None:
    item_ids_N, x_ND = _items()
    item_ids_N[8] = item_ids_N[2]

    with pytest.raises(DataError, match=f"1 item ids .* first is {item_ids_N[2]}"):
        _train(item_ids_N, x_ND)
    with pytest.raises(DataError, match="no vectors"):
        _train(item_ids_N[:0], x_ND[:0])


def test_equal_vectors_and_a_pool_that_is_too_small_are_refused() -> None:
    item_ids_N, x_ND = _items()

    with pytest.raises(CodebookError, match="level 1 has 1 distinct residuals"):
        _train(item_ids_N, np.tile(x_ND[:1], (NUM_ITEMS, 1)))
    with pytest.raises(CodebookError, match="level 1 has 6 distinct residuals"):
        _train(item_ids_N[:6], x_ND[:6])
    with pytest.raises(CodebookError, match="the pool has 5 of the 5 training items"):
        _train(item_ids_N[:5], x_ND[:5])
    with pytest.raises(ConfigError, match="no legal name"):
        _train(item_ids_N, x_ND, version="V1")
