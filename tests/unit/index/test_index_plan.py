import faiss
import numpy as np
import pytest

from sslscale.config import IndexConfig
from sslscale.errors import UserError
from sslscale.index.factory import empty_index, is_streamable
from sslscale.index.plan import choose_factory, estimate_bytes, plan_index


@pytest.mark.parametrize(
    ("num_vectors", "dim", "factory"),
    [
        (1_797, 64, "Flat"),
        (70_000, 128, "Flat"),
        (70_000, 768, "RR768,IVF512,PQ384x4fs,Refine(SQfp16)"),
        (1_000_000, 128, "RR128,IVF2048,PQ64x4fs,Refine(SQfp16)"),
        (1_000_000, 99, "RR100,IVF2048,PQ50x4fs,Refine(SQfp16)"),
        (10**9, 384, "RR384,IVF65536_HNSW32,PQ192x4fs,Refine(SQfp16)"),
        (10**10, 64, "RR64,IVF262144_HNSW32,PQ32x4fs,Refine(SQfp16)"),
    ],
)
def test_factory_by_size(num_vectors, dim, factory):
    assert choose_factory(num_vectors, dim, None, 0.95) == factory
    assert empty_index(factory, dim).d == dim


def test_a_tight_memory_ranks_by_fewer_bits_unless_the_wanted_recall_forbids_it():
    million = (1_000_000, 128)
    full = estimate_bytes("RR128,IVF2048,PQ64x4fs,Refine(SQfp16)", *million) / 1e9
    assert choose_factory(*million, full, 0.95).endswith("Refine(SQfp16)")
    assert choose_factory(*million, 0.7 * full, 0.95).endswith("Refine(SQ8)")
    for memory, wanted in ((0.7 * full, 0.99), (0.3 * full, 0.9)):
        with pytest.raises(UserError, match="does not fit"):
            choose_factory(*million, memory, wanted)


def test_on_disk_auto_is_made_of_plain_lists_and_memory_bounds_the_building():
    plan = plan_index(IndexConfig(layout="on_disk", memory_gb=1), 20_000_000, 64)
    assert plan.factory == "IVF16384,SQfp16" and is_streamable(empty_index(plan.factory, 64))
    assert plan.bytes > 2.7e9  # far more than the memory
    assert plan.shard_rows * 136 <= 1e9 / 8 + 136 and plan.train_rows * 64 * 4 <= 1e9 / 4
    assert plan_index(IndexConfig(layout="on_disk"), 200, 8).factory == "IVF64,SQfp16"


@pytest.mark.parametrize(
    "factory",
    ["Flat", "IVF16,Flat", "IVF64_HNSW32,SQfp16", "HNSW32", "RR32,IVF16,PQ16x4fs,Refine(SQfp16)", "PCA16,IVF16,SQ8"],
)
def test_estimate_is_the_size_on_disk(factory):
    x = np.random.default_rng(0).normal(size=(10000, 32)).astype(np.float32)
    index = faiss.index_factory(32, factory)
    index.train(x)
    index.add(x)
    assert estimate_bytes(factory, 10000, 32) == pytest.approx(len(faiss.serialize_index(index)), rel=0.1)
