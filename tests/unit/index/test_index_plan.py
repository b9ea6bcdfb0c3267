import faiss
import numpy as np
import pytest

from sslscale.index.plan import choose_factory, estimate_bytes


@pytest.mark.parametrize(
    ("num_vectors", "dim", "factory"),
    [
        (1_797, 64, "Flat"),
        (70_000, 128, "Flat"),
        (70_000, 768, "IVF1024,Flat"),
        (999_999, 384, "IVF4096,Flat"),
        (5_000_000, 384, "IVF65536_HNSW32,SQfp16"),
        (50_000_000, 384, "IVF262144_HNSW32,SQfp16"),
        (10**9, 384, "IVF1048576_HNSW32,SQfp16"),
    ],
)
def test_factory_by_size(num_vectors, dim, factory):
    assert choose_factory(num_vectors, dim) == factory
    assert faiss.index_factory(dim, factory).d == dim


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "IVF64_HNSW32,SQfp16"])
def test_estimate_is_the_size_on_disk(factory):
    x = np.random.default_rng(0).normal(size=(5000, 32)).astype(np.float32)
    index = faiss.index_factory(32, factory)
    index.train(x)
    if factory == "Flat":
        index = faiss.IndexIDMap2(index)
    index.add_with_ids(x, np.arange(5000))
    assert estimate_bytes(factory, 5000, 32) == pytest.approx(len(faiss.serialize_index(index)), rel=0.08)
