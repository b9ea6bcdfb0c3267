import faiss
import numpy as np
import pytest

from sslscale.index.factory import is_streamable
from sslscale.index.merge import merge_files, merge_rows


@pytest.mark.parametrize(
    ("factory", "streamed"),
    [
        ("IVF32,Flat", True),
        ("IVF32,SQfp16", True),
        ("PCA8,IVF32_HNSW32,SQ8", True),
        ("RR16,IVF32,PQ4x4fs,Refine(SQfp16)", False),
        ("SQ8", False),
    ],
)
def test_merged_shards_are_the_index_of_all_rows(tmp_path, factory, streamed):
    x = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
    trained = faiss.index_factory(16, factory)
    trained.train(x)
    assert is_streamable(trained) == streamed
    faiss.write_index(trained, str(tmp_path / "trained"))
    shards = []
    for start, stop in ((0, 1200), (1200, 1201), (1201, 1201), (1201, 3000)):
        shard = faiss.clone_index(trained)
        if stop > start:
            shard.add(x[start:stop])
        shards.append(tmp_path / f"{start}-{stop}")
        faiss.write_index(shard, str(shards[-1]))
    merge_files(tmp_path / "trained", shards, tmp_path / "merged")
    whole = faiss.clone_index(trained)
    whole.add(x)
    merged = faiss.read_index(str(tmp_path / "merged"))
    assert merged.ntotal == 3000
    for found, expected in zip(merged.search(x[:100], 5), whole.search(x[:100], 5), strict=True):
        np.testing.assert_array_equal(found, expected)
    if streamed:  # to the byte what faiss writes
        assert (tmp_path / "merged").read_bytes() == faiss.serialize_index(whole).tobytes()


def test_row_ids_follow_each_other(tmp_path):
    parts = [np.arange(3), np.empty(0, np.int64), np.array([1 << 32, 1 << 32 | 5])]
    for number, part in enumerate(parts):
        np.save(tmp_path / f"{number}.npy", part)
    merge_rows([tmp_path / f"{number}.npy" for number in range(3)], 5, tmp_path / "rows.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), np.concatenate(parts))
