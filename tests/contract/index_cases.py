"""A feature store of clusters, and the index that tests build over it."""

from __future__ import annotations

import numpy as np

from sslscale.config import RunConfig
from sslscale.features import FeatureStore
from sslscale.index.build import run_index
from sslscale.runtime.base import make_runtime

DIM, PART_ROWS, PARTS = 16, 500, 8
CENTRES = np.random.default_rng(7).normal(size=(60, DIM))


def write_store(path, name, parts=PARTS, generation=0):
    """Clusters; `label` is the row within its part modulo 100, so label = 7 keeps one row in a hundred."""
    store = FeatureStore.create(path / "embed" / name, dim=DIM, dtype="fp16", normalized=False, backbone="b0")
    records = []
    for part in range(parts):
        generator = np.random.default_rng([len(name), part, generation])
        rows = CENTRES[generator.integers(0, 60, PART_ROWS)] + generator.normal(scale=0.3, size=(PART_ROWS, DIM))
        keys = [f"{name}-{part}-{row}" for row in range(PART_ROWS)]
        labels = [row % 100 for row in range(PART_ROWS)]
        records.append(store.write_part(part, rows, keys, ["s"] * PART_ROWS, range(PART_ROWS), labels))
    store.commit(records)


def settings(workers=1, **index):
    index = {"factory": "IVF16,SQfp16", "metric": "l2", "shard_rows": 1000, "recall_queries": 200, **index}
    return RunConfig.model_validate({"index": index, "runtime": {"name": "local", "workers": workers}})


LOCAL = make_runtime("local")


def build(run, workers=1, runtime=LOCAL, overwrite=False, **index):
    return run_index(run, settings(workers, **index), runtime, overwrite=overwrite)


def queries(count=50):
    generator = np.random.default_rng(1)
    return CENTRES[generator.integers(0, 60, count)] + generator.normal(scale=0.3, size=(count, DIM))
