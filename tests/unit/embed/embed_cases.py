"""One embed stage over `tmp_path / "shards"`, in `tmp_path / "run"`."""

from __future__ import annotations

import numpy as np

from sslscale.config import RunConfig
from sslscale.embed.stage import run_embed
from sslscale.features import FeatureStore
from sslscale.rundir import RunDir
from sslscale.runtime.base import make_runtime


def embed(tmp_path, overwrite=False, limit=None, pretrain=None, **settings):
    defaults = {"backbone": "pixels", "size": 8, "channels": 1, "part_rows": 32, "batch_size": 16, "dtype": "fp32"}
    config = RunConfig.model_validate(
        {
            "datasets": {"train": str(tmp_path / "shards"), "test": str(tmp_path / "shards")},
            "limit": limit,
            "runtime": {"name": "local", "workers": 1},
            "embed": {**defaults, **settings},
            **({"pretrain": pretrain} if pretrain else {}),
        }
    )
    with RunDir(tmp_path / "run") as run:
        return run_embed(run, config, make_runtime("local"), overwrite=overwrite)["train"]


def part_files(tmp_path):
    return {file.name: file.read_bytes() for file in sorted((tmp_path / "run/embed/train").glob("part-*"))}


def all_rows(tmp_path):
    store = FeatureStore.open(tmp_path / "run/embed/train")
    return np.concatenate([store.open_block(part.part) for part in store.parts])
