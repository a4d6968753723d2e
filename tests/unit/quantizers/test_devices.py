import threading

import numpy as np
import pytest
import torch

from qarm_feast.errors import ConfigError
from qarm_feast.quantizers.devices import GpuBackend, Placement, gpu_owner
from qarm_feast.quantizers.search import NearestSearch

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


def test_one_thread_runs_every_call_of_the_gpu_owner() -> None:
    names = {gpu_owner().run(threading.current_thread).name for _ in range(8)}

    assert len(names) == 1
    assert threading.current_thread().name not in names
