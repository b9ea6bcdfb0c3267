"""The recipes of configs/large: they load, fit together, and have the rates and sizes that were published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sslscale.config import load_config
from sslscale.models.image import Backbone
from sslscale.pretrain.optimizer import learning_rate, weight_decay
from sslscale.pretrain.stage import check_settings

FOLDER = Path(__file__).parents[2] / "configs" / "large"
IMAGES = 1_281_167  # of ImageNet-1k's training set
# name -> base rate for a batch of 256, batch, warm-up epochs, epochs, last weight decay, millions of parameters
PUBLISHED = {
    "dino_vits16": (5e-4, 512, 10, 100, 0.4, 21.7),
    "dino_vitb16": (5e-4, 1024, 10, 100, 0.4, 85.8),
    "mae_vitb16": (1.5e-4, 4096, 40, 800, 0.05, 85.8),
    "mae_vitl16": (1.5e-4, 4096, 40, 800, 0.05, 303.3),
}


def test_every_recipe_is_checked_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} - {"imagenet"} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_schedule(name):
    base, batch, warmup_epochs, epochs, last_decay, millions = PUBLISHED[name]
    config = load_config(str(FOLDER / f"{name}.yaml"))
    pretrain = config.pretrain
    assert pretrain.global_batch == batch and pretrain.epochs == epochs
    total = epochs * IMAGES // batch
    warmup = warmup_epochs * IMAGES // batch
    rates = [learning_rate(pretrain.optimizer, step, total) for step in (0, warmup, total - 1)]
    assert rates[0] == pytest.approx(base * batch / 256 / warmup, rel=1e-3)
    assert rates[1] == pytest.approx(base * batch / 256, rel=1e-4)
    assert rates[2] == pytest.approx(pretrain.optimizer.final_lr, abs=1e-8)
    assert weight_decay(pretrain.optimizer, total, total) == pytest.approx(last_decay)
    with torch.device("meta"):
        backbone = Backbone(pretrain.backbone)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_fits_together(name):
    config = load_config(str(FOLDER / f"{name}.yaml"))
    check_settings(config)
