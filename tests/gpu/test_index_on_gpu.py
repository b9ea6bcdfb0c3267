import faiss
import numpy as np
import pytest

from sslscale.config import RunConfig
from sslscale.features import FeatureStore
from sslscale.index import Index
from sslscale.index.build import run_index
from sslscale.rundir import RunDir
from sslscale.runtime.base import make_runtime

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="faiss sees no GPU")]


def test_trained_and_searched_on_gpus_it_answers_as_on_the_cpu(tmp_path):
    x = np.random.default_rng(0).normal(size=(20_000, 32)).astype(np.float32)
    store = FeatureStore.create(tmp_path / "embed" / "train", dim=32, dtype="fp32", normalized=False, backbone="b")
    keys = [str(row) for row in range(len(x))]
    store.commit([store.write_part(0, x, keys, ["s"] * len(x), range(len(x)))])
    index = {"factory": "IVF64,Flat", "metric": "l2", "device": "cuda"}
    config = RunConfig.model_validate({"index": index, "runtime": {"name": "local", "workers": 1}})
    assert run_index(RunDir(tmp_path), config, make_runtime("local"))["recall_at_10"] >= 0.95
    expected = Index.open(tmp_path).search(x[:200], 10)
    found = Index.open(tmp_path, device="cuda").search(x[:200], 10)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-3)
    assert np.mean(found[1] == expected[1]) > 0.99
