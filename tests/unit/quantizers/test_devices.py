import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qarm_feast.errors import ConfigError, GpuLostError
from qarm_feast.observability import GPU_LOST
from qarm_feast.quantizers import devices, ivf_lists
from qarm_feast.quantizers.devices import (
    Gpu,
    GpuBackend,
    GpuOwner,
    GuardedSearch,
    Placement,
    gpu_owner,
)
from qarm_feast.quantizers.pool_index import PoolIndex, build_lists
from qarm_feast.quantizers.search import NearestSearch


class LostSearch(NearestSearch):
    """Fails as a backend does whose GPU has gone."""

    def search(self, x_ND: np.ndarray, k: int = 1) -> np.ndarray:
        raise RuntimeError("CUDA error: device-side assert triggered\nmore lines")

    def subtract_nearest(self, residual_ND: np.ndarray) -> np.ndarray:
        return self.search(residual_ND)


@pytest.fixture(autouse=True)
def _no_gpu_is_lost() -> None:
    GPU_LOST.set(0)


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")


@needs_no_gpu
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_cuda_without_a_gpu_is_refused_with_the_backend_that_looked(backend: GpuBackend) -> None:
    with pytest.raises(ConfigError, match=f"device is cuda, but {backend} sees no GPU"):
        Placement("cuda", backend).open(np.eye(3, dtype=np.float32))


@needs_no_gpu
def test_auto_without_a_gpu_is_the_cpu() -> None:
    assert isinstance(Placement("auto").open(np.eye(3, dtype=np.float32)), NearestSearch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_codes_do_not_depend_on_the_device(backend: GpuBackend) -> None:
    rng = np.random.default_rng(0)
    x_ND, centroids_KD = (rng.standard_normal((n, 16)).astype(np.float32) for n in (500, 40))

    on_gpu = Placement("cuda", backend).open(centroids_KD).search(x_ND)

    np.testing.assert_array_equal(on_gpu, NearestSearch(centroids_KD).search(x_ND))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_two_processes_share_one_gpu(backend: GpuBackend) -> None:
    script = (
        "import numpy as np\n"
        "from qarm_feast.quantizers.devices import Gpu, Placement\n"
        "x_ND = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float32)\n"
        f"on_gpu = Placement('cuda', {backend!r}, Gpu(0, scratch_mib=64)).open(x_ND[:40])\n"
        "for _ in range(50): codes_N1 = on_gpu.search(x_ND)\n"
        "print(codes_N1[:, 0].tolist())\n"
    )
    command = [sys.executable, "-c", script]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in both]

    x_ND = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float32)
    expected = NearestSearch(x_ND[:40]).search(x_ND)[:, 0].tolist()
    assert printed == [f"{expected}\n"] * 2


def test_one_thread_runs_every_call_of_the_gpu_owner() -> None:
    names = {gpu_owner().run(threading.current_thread).name for _ in range(8)}

    assert len(names) == 1
    assert threading.current_thread().name not in names


def _lost_search(placement: Placement) -> GuardedSearch:
    centroids_KD = np.eye(3, dtype=np.float32)
    return GuardedSearch(LostSearch(centroids_KD), placement, centroids_KD)


def test_a_lost_gpu_is_an_error_that_names_it_the_reason_and_the_setting() -> None:
    guarded = _lost_search(Placement("cuda", gpu=Gpu(1)))

    with pytest.raises(GpuLostError, match=r"GPU 1 failed .*device-side.*enable_cpu_fallback") as e:
        guarded.search(np.eye(3, dtype=np.float32))

    assert "more lines" not in str(e.value)
    assert GPU_LOST._value.get() == 1


def test_with_the_fallback_on_the_processor_gives_the_codes_from_then_on() -> None:
    guarded = _lost_search(Placement("cuda", enable_cpu_fallback=True))
    residual_ND = np.float32([[0, 5, 0], [1, 0, 0]])

    assert guarded.search(residual_ND).tolist() == [[1], [0]]
    assert guarded.subtract_nearest(residual_ND).tolist() == [1, 0]

    np.testing.assert_array_equal(residual_ND, [[0, 4, 0], [0, 0, 0]])
    assert GPU_LOST._value.get() == 1


def _index_with_a_lost_copy(placement: Placement, monkeypatch: pytest.MonkeyPatch) -> PoolIndex:
    """Return an IVF-Flat index whose copy on a GPU fails when it is asked."""

    def scan(*_: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Placement, "has_gpu", lambda _: True)
    monkeypatch.setattr(ivf_lists, "_GpuCopy", lambda *_: SimpleNamespace(scan=scan))
    x_PD = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    arrays = build_lists(x_PD, 4, seed=0).arrays()
    return PoolIndex.from_bytes(arrays["index"].tobytes(), arrays, placement)


@pytest.mark.parametrize("enable_cpu_fallback", [False, True])
def test_a_lost_copy_of_a_pool_is_an_error_or_replaced_by_the_processor(
    enable_cpu_fallback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = Placement("cuda", enable_cpu_fallback=enable_cpu_fallback)
    index = _index_with_a_lost_copy(placement, monkeypatch)
    x_ND = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    index.effort = 4

    if not enable_cpu_fallback:
        with pytest.raises(GpuLostError, match="out of memory"):
            index.search(x_ND, 3)
        return

    expected_Nk = NearestSearch(index.vectors(np.arange(200))).search(x_ND, 3)
    np.testing.assert_array_equal(index.search(x_ND, 3), expected_Nk)


def test_a_gpu_that_the_backend_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    assert Placement("cuda", "torch", Gpu(1)).has_gpu()
    with pytest.raises(ConfigError, match=r"gpu_number is 2, but torch sees 2 GPU"):
        Placement("cuda", "torch", Gpu(2)).has_gpu()


def test_all_copies_on_one_gpu_share_resources_of_the_wanted_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Resources:
        num_bytes = 0

        def setTempMemory(self, num_bytes: int) -> None:  # noqa: N802 - faiss's own name
            self.num_bytes = num_bytes

    faiss = SimpleNamespace(
        StandardGpuResources=Resources, index_cpu_to_gpu=lambda *arguments: arguments
    )
    monkeypatch.setattr(devices, "load_faiss", lambda: faiss)
    owner, gpu = GpuOwner(), Gpu(1, scratch_mib=64)

    first, number, index = owner.copy_to_gpu("index", gpu)
    second = owner.copy_to_gpu("other", gpu)[0]

    assert (number, index, first.num_bytes) == (1, "index", 64 * 2**20)
    assert second is first
