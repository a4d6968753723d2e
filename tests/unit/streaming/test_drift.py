import itertools
import math
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from prometheus_client import REGISTRY

from qarm_feast.codebook import Codebook, EncoderFacts, QuantizerConfig
from qarm_feast.item_vectors import EncodedItems
from qarm_feast.quantizers import RqConfig, VqConfig
from qarm_feast.schema import CODES
from streaming.drift import DriftMonitor, jensen_shannon_bits
from streaming.rows import LiveCodebooks

NUM_LEVELS, DIM = 2, 6


@pytest.fixture(scope="module")
def items() -> np.ndarray:
    x_ND = np.random.default_rng(0).standard_normal((240, DIM)).astype(np.float32)
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def codebook(items: np.ndarray) -> Codebook:
    return Codebook.train(
        "v1",
        np.arange(len(items)),
        items,
        config=QuantizerConfig(
            rq=RqConfig(num_levels=NUM_LEVELS, codebook_size=4), vq=VqConfig(num_neighbors=2)
        ),
        encoder=EncoderFacts("e1", "0" * 64, None),
        created=datetime(2024, 1, 1, tzinfo=UTC),
    )


def _monitor(window_items: int) -> DriftMonitor:
    """A monitor to which every batch comes two seconds after the one before."""
    return DriftMonitor(window_items, clock=itertools.count(0, 2).__next__)


def _observe(
    monitor: DriftMonitor, codebook: Codebook, x_ND: np.ndarray, num_takedowns: int = 0
) -> None:
    rq_NL = codebook.rq.encode(x_ND)
    rows = rq_NL.tolist() + [[-1] * NUM_LEVELS] * num_takedowns
    table = pa.table({"rq_code": pa.array(rows, CODES)})
    encoded = EncodedItems("e1", np.arange(len(x_ND)), x_ND)
    live = LiveCodebooks({"v1": codebook}, lambda version: pytest.fail("no content here"))
    monitor.observe(live, [encoded], {"v1": table})


def _figure(name: str, level: int) -> float:
    labels = {"version": "v1", "level": str(level)}
    value = REGISTRY.get_sample_value(f"qarm_codebook_{name}", labels)
    assert value is not None
    return value


def _num_items() -> float | None:
    return REGISTRY.get_sample_value("qarm_codebook_drift_items", {"version": "v1"})


def _divergence_reference(first: list[int], second: list[int]) -> float:
    """The definition by Kullback-Leibler divergences, number by number."""
    total = 0.0
    for p, q in zip(np.array(first) / sum(first), np.array(second) / sum(second), strict=True):
        middle = (p + q) / 2
        total += (p * math.log2(p / middle) if p else 0) / 2
        total += (q * math.log2(q / middle) if q else 0) / 2
    return total


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 1, 0], [0, 1, 1], 0.5),
        ([2, 0], [0, 5], 1.0),
        ([3, 1, 4], [6, 2, 8], 0.0),
        ([5, 0, 1, 2], [1, 1, 0, 9], None),
    ],
)
def test_the_divergence_is_the_definition(
    first: list[int], second: list[int], expected: float | None
) -> None:
    found = jensen_shannon_bits(np.array(first), np.array(second))

    assert found == pytest.approx(_divergence_reference(first, second), abs=1e-12)
    if expected is not None:
        assert found == pytest.approx(expected, abs=1e-12)


def test_two_samples_of_one_distribution_diverge_by_the_stated_amount() -> None:
    rng = np.random.default_rng(5)
    size, n, w = 64, 20_000, 2_000
    found = [
        jensen_shannon_bits(
            rng.multinomial(n, np.full(size, 1 / size)), rng.multinomial(w, np.full(size, 1 / size))
        )
        for _ in range(200)
    ]

    assert np.mean(found) == pytest.approx(
        (size - 1) * (1 / n + 1 / w) / (8 * math.log(2)), rel=0.1
    )


def test_the_training_set_itself_shows_no_drift(codebook: Codebook, items: np.ndarray) -> None:
    monitor = _monitor(1000)

    _observe(monitor, codebook, items, num_takedowns=3)

    assert _num_items() == len(items)
    for level in (1, 2):
        assert _figure("quantization_error_ratio", level) == pytest.approx(1, rel=1e-6)
        assert _figure("code_divergence_bits", level) == pytest.approx(0, abs=1e-12)


def test_uploads_of_another_kind_show_up_in_both_figures(
    codebook: Codebook, items: np.ndarray
) -> None:
    monitor = _monitor(1000)
    one_corner = np.abs(items) + 1
    one_corner /= np.linalg.norm(one_corner, axis=1, keepdims=True)

    _observe(monitor, codebook, one_corner)

    codes_NL = codebook.rq.encode(one_corner)
    left_ND = one_corner - codebook.decode_rq(codes_NL)
    before_ND = items - codebook.decode_rq(codebook.rq.encode(items))
    expected = np.square(left_ND).mean() / np.square(before_ND).mean()
    assert _figure("quantization_error_ratio", 2) == pytest.approx(expected, rel=1e-5)
    counts = np.bincount(codebook.rq.encode(items)[:, 0], minlength=4).tolist()
    recent = np.bincount(codes_NL[:, 0], minlength=4).tolist()
    assert _figure("code_divergence_bits", 1) == pytest.approx(
        _divergence_reference(counts, recent)
    )
    assert _figure("code_divergence_bits", 1) > 0.2


def test_the_window_holds_the_latest_uploads_only(codebook: Codebook, items: np.ndarray) -> None:
    sliding, fresh = _monitor(100), _monitor(100)

    for start in range(0, 240, 60):
        _observe(sliding, codebook, items[start : start + 60])
    slid = [_figure("quantization_error_ratio", level) for level in (1, 2)]
    _observe(fresh, codebook, items[140:])

    assert _num_items() == 100
    assert slid == pytest.approx([_figure("quantization_error_ratio", level) for level in (1, 2)])


def test_a_large_batch_is_sampled_evenly(codebook: Codebook, items: np.ndarray) -> None:
    monitor = _monitor(10_000)

    _observe(monitor, codebook, np.tile(items, (10, 1)))

    assert _num_items() == 256


def test_a_retired_version_and_one_without_a_reference_have_no_figures(
    codebook: Codebook, items: np.ndarray
) -> None:
    monitor = _monitor(1000)
    _observe(monitor, codebook, items)
    old = Codebook(codebook.manifest, codebook.rq, codebook.vq, codebook.overrides)

    monitor.observe(LiveCodebooks({}, lambda version: pytest.fail("none")), [], {})
    gone = [_num_items(), _figure("quantization_error_ratio", 1)]
    _observe(monitor, old, items)

    assert gone[0] == 0
    assert math.isnan(gone[1])
    assert _num_items() == 0


def test_a_batch_of_takedowns_changes_nothing(codebook: Codebook, items: np.ndarray) -> None:
    monitor = _monitor(1000)
    _observe(monitor, codebook, items[:50])

    _observe(monitor, codebook, items[:0], num_takedowns=4)

    assert _num_items() == 50


def test_figures_are_taken_at_most_once_a_second(codebook: Codebook, items: np.ndarray) -> None:
    times = iter([0.0, 0.9, 1.0])
    monitor = DriftMonitor(1000, clock=lambda: next(times))
    told = []

    for _ in range(3):
        _observe(monitor, codebook, items[:10])
        told.append(_num_items())

    assert told == [10, 10, 30]
