"""Shape letters in this file: N items, D embedding width, L levels."""

import logging

import numpy as np
import numpy_reference as reference
import pytest
from pydantic import ValidationError

from qarm_feast.errors import CodebookError
from qarm_feast.quantizers.rq import ResidualQuantizer, RqConfig, level_sizes


def _vectors(num_items: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_items, dim)).astype(np.float32)


def test_encode_uses_what_the_level_before_left_over() -> None:
    codebooks = [
        np.array([[0, 0], [10, 0]], dtype=np.float32),
        np.array([[0, 0], [0, 1]], dtype=np.float32),
    ]
    x_ND = np.array([[10, 1], [0, 0]], dtype=np.float32)

    codes_NL = ResidualQuantizer(codebooks=codebooks).encode(x_ND)

    assert codes_NL.tolist() == [[1, 1], [0, 0]]


def test_encode_equals_the_plain_reference_at_any_batch_size() -> None:
    quantizer = ResidualQuantizer(RqConfig(codebook_size=(16, 8, 4)))
    x_ND = _vectors(700)
    quantizer.train(x_ND)
    expected_NL = reference.encode_residual(x_ND[:300], quantizer.codebooks)

    for batch_size in (1, 7, 256):
        parts = [
            quantizer.encode(x_ND[start : min(start + batch_size, 300)])
            for start in range(0, 300, batch_size)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), expected_NL)


def test_decode_adds_the_centroids_and_takes_prefixes() -> None:
    codebooks = [
        np.array([[1, 0], [10, 0]], dtype=np.float32),
        np.array([[0, 2], [0, 3]], dtype=np.float32),
    ]
    quantizer = ResidualQuantizer(codebooks=codebooks)

    assert quantizer.decode(np.array([[1, 0], [0, 1]])).tolist() == [[10, 2], [1, 3]]
    assert quantizer.decode(np.array([[1]])).tolist() == [[10, 0]]


@pytest.mark.parametrize("codes", [[[2, 0]], [[-1, -1]], [[0, 0, 0]]])
def test_decode_refuses_codes_of_another_codebook(codes: list[list[int]]) -> None:
    quantizer = ResidualQuantizer(codebooks=[np.eye(2, dtype=np.float32)] * 2)

    with pytest.raises(CodebookError, match=r"levels have \[2, 2\] codes"):
        quantizer.decode(np.array(codes))


def test_every_level_lowers_the_error() -> None:
    x_ND = _vectors(2000)
    quantizer = ResidualQuantizer(RqConfig(num_levels=4, codebook_size=16))
    quantizer.train(x_ND)
    codes_NL = quantizer.encode(x_ND)

    errors = [np.square(x_ND - quantizer.decode(codes_NL[:, :n])).sum() for n in (1, 2, 3, 4)]

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]


@pytest.mark.parametrize(
    ("num_points", "size"), [(78, 2), (155, 2), (156, 4), (1247, 16), (1248, 32), (10**7, 4096)]
)
def test_automatic_size_leaves_39_points_per_centroid(num_points: int, size: int) -> None:
    assert level_sizes(RqConfig(), num_points) == (size,) * 3


def test_sizes_may_be_given_for_all_levels_or_one_by_one() -> None:
    assert level_sizes(RqConfig(num_levels=2, codebook_size=64), 10) == (64, 64)
    assert level_sizes(RqConfig(codebook_size=(8, 4, 2)), 10) == (8, 4, 2)
    with pytest.raises(CodebookError, match=r"lists 3 levels, .* is 2"):
        level_sizes(RqConfig(num_levels=2, codebook_size=(8, 4, 2)), 10)


def test_too_few_vectors_for_an_automatic_size_are_refused() -> None:
    with pytest.raises(CodebookError, match=r"77 distinct vectors are too few .* 78"):
        ResidualQuantizer().train(_vectors(77))


def test_a_codebook_of_one_centroid_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than 1"):
        RqConfig(codebook_size=1)
    with pytest.raises(ValidationError, match="greater than 1"):
        RqConfig(codebook_size=(4, 1))


def test_equal_vectors_are_refused_however_many() -> None:
    x_ND = np.tile(_vectors(1), (1000, 1))

    with pytest.raises(CodebookError, match="1 distinct vectors are too few"):
        ResidualQuantizer().train(x_ND)
    with pytest.raises(CodebookError, match="level 1 has 1 distinct residuals among 1000 items"):
        ResidualQuantizer(RqConfig(codebook_size=2)).train(x_ND)


def test_a_level_whose_residuals_are_used_up_is_refused() -> None:
    x_ND = np.tile(_vectors(8), (10, 1))

    with pytest.raises(CodebookError, match="level 2 has 1 distinct residuals among 80 items"):
        ResidualQuantizer(RqConfig(num_levels=2, codebook_size=8)).train(x_ND)


def test_a_thin_level_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="qarm_feast"):
        ResidualQuantizer(RqConfig(num_levels=1, codebook_size=64)).train(_vectors(100))

    assert "rq_level_thin level=1 num_distinct=100 codebook_size=64" in caplog.text


def test_training_on_a_sample_depends_on_the_seed_alone() -> None:
    x_ND = _vectors(3000)
    config = RqConfig(num_levels=1, codebook_size=8, train_sample_size=500)
    first, again = ResidualQuantizer(config), ResidualQuantizer(config)
    other = ResidualQuantizer(config.model_copy(update={"seed": 1}))
    for quantizer in (first, again, other):
        quantizer.train(x_ND)

    np.testing.assert_array_equal(first.codebooks[0], again.codebooks[0])
    assert not np.array_equal(first.codebooks[0], other.codebooks[0])
