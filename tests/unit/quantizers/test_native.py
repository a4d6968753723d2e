"""Shape letters in this file: N items, K centroids, D embedding width."""

import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy_reference as reference
import pytest
import torch

from qarm_feast.quantizers import kmeans, native, search
from qarm_feast.quantizers.kmeans import cell_means, lloyd
from qarm_feast.quantizers.search import NearestSearch, nearest

HAS_KERNELS = native.kernels() is not None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="needs AVX-512 bf16 and a compiler")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Point the process at a cache folder without kernels, and forget the loaded ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._open_kernels.cache_clear()
    yield tmp_path / "qarm-feast"
    native._open_kernels.cache_clear()


def _codes_equal_the_rule() -> bool:
    rng = np.random.default_rng(0)
    x_ND = rng.standard_normal((20, 9)).astype(np.float32)
    c_KD = rng.standard_normal((30, 9)).astype(np.float32)
    return bool((nearest(x_ND, c_KD) == reference.nearest(x_ND, c_KD)).all())


@needs_kernels
def test_kernels_are_built_once_and_then_read_from_the_cache_folder(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.kernels() is not None
    (built,) = empty_cache.iterdir()

    native._open_kernels.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)

    assert native.kernels() is not None
    assert list(empty_cache.iterdir()) == [built]


@needs_kernels
def test_processes_that_build_at_once_leave_one_whole_library(empty_cache: Path) -> None:
    code = "from qarm_feast.quantizers.native import kernels; assert kernels() is not None"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]

    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    (built,) = empty_cache.iterdir()
    assert ctypes.CDLL(str(built)).search is not None


def _without_a_feature(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx512f avx2 fma\n")
    monkeypatch.setattr(native, "CPU_INFO", tmp_path / "cpuinfo")


def _without_a_processor_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "CPU_INFO", tmp_path / "missing")


def _without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _with_all_features(monkeypatch, tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def _with_a_failing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _with_all_features(monkeypatch, tmp_path)
    (tmp_path / "cxx").write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    (tmp_path / "cxx").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))


def _with_a_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _with_all_features(monkeypatch, tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


def _with_a_folder_of_another_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _with_all_features(monkeypatch, tmp_path)
    monkeypatch.setattr(native.os, "geteuid", lambda: os.getuid() + 1)


def _with_all_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {' '.join(native.CPU_FEATURES)}\n")
    monkeypatch.setattr(native, "CPU_INFO", tmp_path / "cpuinfo")


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (_without_a_feature, "lacks avx512bw, avx512vl, avx512dq, avx512_bf16"),
        (_without_a_processor_list, "cannot be read"),
        (_without_a_compiler, "no C++ compiler"),
        (_with_a_failing_compiler, "cxx failed: no such target"),
        (_with_a_folder_that_cannot_be_made, "Not a directory"),
        (_with_a_folder_of_another_user, "belongs to another user"),
    ],
)
def test_a_machine_without_kernels_says_why_once_and_searches_in_torch(
    prepare: object,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    prepare(monkeypatch, tmp_path)
    caplog.set_level(logging.INFO)

    assert _codes_equal_the_rule()
    assert _codes_equal_the_rule()

    (record,) = [record for record in caplog.records if "native_kernels" in record.message]
    assert record.levelname == "INFO"
    assert reason in record.message


@needs_kernels
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("num_rows", "dim"), [(3500, 1), (200_000, 48)])
def test_cell_sums_have_the_bits_of_the_plain_ones(
    num_rows: int, dim: int, num_threads: int
) -> None:
    rng = np.random.default_rng(dim)
    scale_N1 = 10.0 ** rng.integers(-9, 9, (num_rows, 1))
    x_ND = (rng.standard_normal((num_rows, dim)) * scale_N1).astype(np.float32)
    codes_N = rng.integers(6, size=num_rows) * 2
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)

    sums_KD = native.cell_sums(native.kernels(), x_ND, codes_N, 12, kmeans._ROWS_PER_BLOCK)
    torch.set_num_threads(before)

    assert sums_KD.tobytes() == kmeans._cell_sums(x_ND, codes_N, 12).tobytes()
    assert not sums_KD[1::2].any()


@needs_kernels
def test_codes_and_centroids_are_the_same_with_and_without_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x_ND = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32)
    with_kernels_KD = lloyd(x_ND, x_ND[:40], 5)

    monkeypatch.setattr(search, "kernels", lambda: None)
    monkeypatch.setattr(kmeans, "kernels", lambda: None)

    assert lloyd(x_ND, x_ND[:40], 5).tobytes() == with_kernels_KD.tobytes()


@needs_kernels
def test_rows_are_the_same_however_many_threads_share_them() -> None:
    rng = np.random.default_rng(1)
    x_ND, c_KD = (rng.standard_normal((n, 64)).astype(np.float32) for n in (6000, 900))
    before = torch.get_num_threads()
    codes = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        codes.append(NearestSearch(c_KD).search(x_ND)[:, 0])
    torch.set_num_threads(before)

    np.testing.assert_array_equal(codes[1], codes[0])
    np.testing.assert_array_equal(codes[2], codes[0])


@pytest.mark.parametrize("has_kernels", [True, False])
def test_the_mean_of_a_cell_is_that_of_its_rows(
    has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernels:
        monkeypatch.setattr(kmeans, "kernels", lambda: None)
    x_ND = np.array([[1, 0], [3, 0], [0, 8]], dtype=np.float32)

    means_KD = cell_means(x_ND, np.array([0, 0, 1]), np.zeros((2, 2), np.float32))

    assert means_KD.tolist() == [[2, 0], [0, 8]]
