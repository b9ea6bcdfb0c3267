"""The same commands on a CUDA device; skipped where there is none."""

import json
import sys

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_quickstart_runs_on_cuda_without_ray(tmp_path, monkeypatch, capsys):
    from sslscale.cli import main

    data, run = tmp_path / "data", tmp_path / "run"
    arguments = ["run", "-c", "configs/quickstart.yaml", "--run", str(run), "--runtime", "local", "--json"]
    overrides = [
        *(f"pack.output={data}", f"datasets.train={data}/train", "runtime.workers=1", "baselines=[]"),
        *("pretrain.num_workers=1", "pretrain.epochs=4", "pretrain.device=cuda", "embed.device=cuda"),
    ]
    monkeypatch.setattr(sys, "argv", ["sslscale", *arguments, *overrides])
    main()
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["pretrain"]["device"].startswith("cuda") and result["pretrain"]["backend"] == "nccl"
    rows = np.load(run / "embed" / "train" / "part-00000.npy").astype(np.float32)
    assert np.isfinite(rows).all() and result["embed"]["train"]["failed"] == 0


def test_views_are_the_same_on_cuda_and_on_the_cpu():
    from sslscale.config import AugmentConfig
    from sslscale.views.image import augment
    from sslscale.views.keyed import KeyedRandom

    images = torch.rand(8, 3, 32, 32)
    ids = torch.arange(8)
    recipe = AugmentConfig(size=24, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, erase=0.5, noise=0.1)
    on_cpu = augment(images, KeyedRandom.of(0, torch.zeros_like(ids), ids), recipe)
    ids = ids.cuda()
    on_cuda = augment(images.cuda(), KeyedRandom.of(0, torch.zeros_like(ids), ids), recipe)
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=0, atol=1e-3)
