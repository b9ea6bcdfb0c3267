import numpy as np
import pytest
import torch

from sslscale.cluster import KMeans

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_kmeans_on_a_gpu_is_kmeans_and_the_same_every_time():
    generator = np.random.default_rng(0)
    centres = 4 * generator.normal(size=(50, 32))
    x = (centres[generator.integers(0, 50, 200_000)] + generator.normal(size=(200_000, 32))).astype(np.float32)
    settings = {"num_clusters": 64, "random_state": 0, "max_iterations": 20}
    cpu, gpu, again = (KMeans(**settings, device=device).fit(x) for device in ("cpu", "cuda", "cuda"))
    assert gpu.inertia_ == pytest.approx(cpu.inertia_, rel=1e-2)
    assert gpu.cluster_centers_.tobytes() == again.cluster_centers_.tobytes()
    assert (gpu.labels_ == again.labels_).all()
