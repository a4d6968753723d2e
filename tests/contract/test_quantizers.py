"""One suite for every quantizer.

Shape letters in this file: N items, D embedding width, C codes per item.
"""

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from qarm_feast.errors import CodebookError, DataError
from qarm_feast.quantizers import Quantizer, RqConfig, VqConfig, build_quantizer

BUILDERS: dict[str, Callable[[], Quantizer]] = {
    "rq": lambda: build_quantizer(RqConfig(num_levels=3, codebook_size=16)),
    "rq_balanced": lambda: build_quantizer(
        RqConfig(num_levels=2, codebook_size=16, enable_balance=True)
    ),
    "rq_fsq": lambda: build_quantizer(RqConfig(codebook_size=(16, 16, 64), last_level="fsq")),
    "vq": lambda: build_quantizer(VqConfig(num_neighbors=25)),
    "vq_ivf_flat": lambda: build_quantizer(VqConfig(num_neighbors=25, search="ivf_flat")),
    "vq_hnsw": lambda: build_quantizer(VqConfig(num_neighbors=25, search="hnsw")),
}
WIDTH = 24


@pytest.fixture(params=sorted(BUILDERS))
def build(request: pytest.FixtureRequest) -> Callable[[], Quantizer]:
    return BUILDERS[request.param]


@pytest.fixture
def quantizer(build: Callable[[], Quantizer]) -> Quantizer:
    trained = build()
    trained.train(_vectors(900))
    return trained


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _vectors(num_items: int, seed: int = 0) -> np.ndarray:
    """Low-rank vectors with an offset and some duplicates, as encoders make them."""
    rng = np.random.default_rng(seed)
    x_ND = rng.standard_normal((num_items, WIDTH)) / np.arange(1, WIDTH + 1) + 0.3
    x_ND[: num_items // 20] = x_ND[num_items // 2 : num_items // 2 + num_items // 20]
    return (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float32)


def _learnt_digest() -> str:
    digest = hashlib.sha256()
    for name in sorted(BUILDERS):
        quantizer = BUILDERS[name]()
        quantizer.train(_vectors(900))
        for array in quantizer.arrays().values():
            digest.update(array.tobytes())
    return digest.hexdigest()


@pytest.mark.usefixtures("restored_threads")
def test_codes_are_bit_equal_at_any_batch_size_thread_count_and_order(
    quantizer: Quantizer,
) -> None:
    x_ND = _vectors(600, seed=1)
    order_N = np.random.default_rng(2).permutation(600)
    whole_NC = quantizer.encode(x_ND)

    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for batch_size in (1, 7, 256):
            parts = [
                quantizer.encode(x_ND[start : start + batch_size])
                for start in range(0, 600, batch_size)
            ]
            np.testing.assert_array_equal(np.concatenate(parts), whole_NC)
        np.testing.assert_array_equal(quantizer.encode(x_ND[order_N]), whole_NC[order_N])


def test_training_again_learns_the_same_bytes(build: Callable[[], Quantizer]) -> None:
    first, again = build(), build()
    first.train(_vectors(900))
    again.train(_vectors(900))

    for name, array in first.arrays().items():
        assert array.tobytes() == again.arrays()[name].tobytes()


def test_another_process_learns_the_same_bytes() -> None:
    script = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[2]));"
        "sys.path.insert(0, sys.argv[1]);"
        "import test_quantizers; print(test_quantizers._learnt_digest())"
    )
    folder = str(Path(__file__).parent)
    command = [sys.executable, "-c", script, folder, str(torch.get_num_threads())]

    assert subprocess.check_output(command, text=True).strip() == _learnt_digest()


def test_decoded_vectors_are_nearer_than_the_mean_vector(quantizer: Quantizer) -> None:
    x_ND = _vectors(300, seed=3)

    decoded_ND = quantizer.decode(quantizer.encode(x_ND))

    assert decoded_ND.dtype == np.float32
    assert decoded_ND.shape == x_ND.shape
    error = np.square(x_ND - decoded_ND).sum()
    assert error < 0.7 * np.square(x_ND - x_ND.mean(axis=0)).sum()


def test_no_rows_give_no_codes_of_the_right_width(quantizer: Quantizer) -> None:
    width = quantizer.encode(_vectors(40)).shape[1]

    assert quantizer.encode(np.empty((0, WIDTH), np.float32)).shape == (0, width)


def test_encode_leaves_its_input_alone(quantizer: Quantizer) -> None:
    x_ND = _vectors(50)
    before_ND = x_ND.copy()

    quantizer.encode(x_ND)

    np.testing.assert_array_equal(x_ND, before_ND)


def test_an_untrained_quantizer_refuses_to_encode(build: Callable[[], Quantizer]) -> None:
    with pytest.raises(CodebookError, match="call train first"):
        build().encode(_vectors(40))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused(
    build: Callable[[], Quantizer], quantizer: Quantizer, value: float
) -> None:
    x_ND = _vectors(900)
    x_ND[5, 2] = value

    with pytest.raises(DataError, match="first is row 5"):
        quantizer.encode(x_ND)
    with pytest.raises(DataError, match="first is row 5"):
        build().train(x_ND)


def test_another_width_is_refused(quantizer: Quantizer) -> None:
    with pytest.raises(CodebookError, match=f"takes width {WIDTH}"):
        quantizer.encode(_vectors(40)[:, :-1].copy())


def test_an_empty_training_set_is_refused(build: Callable[[], Quantizer]) -> None:
    with pytest.raises(DataError, match="no vectors"):
        build().train(np.empty((0, WIDTH), np.float32))


def test_fewer_points_than_the_codes_need_are_refused(build: Callable[[], Quantizer]) -> None:
    with pytest.raises(CodebookError):
        build().train(_vectors(10))
