"""Our losses against the package lightly's, on random inputs; constant factors between the two are named."""

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
)

from sslscale.objectives.barlow_twins import barlow_twins_loss
from sslscale.objectives.base import swapped_cross_entropy
from sslscale.objectives.byol import byol_loss
from sslscale.objectives.dino import dino_loss
from sslscale.objectives.simclr import nt_xent
from sslscale.objectives.simsiam import negative_cosine
from sslscale.objectives.swav import sinkhorn
from sslscale.objectives.vicreg import vicreg_loss

SHAPES = [(4, 8), (16, 5), (33, 64)]  # (B, D)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs.reshape(()), rtol=1e-5, atol=1e-5)


@pytest.fixture(params=SHAPES, ids=str)
def pair(request):
    generator = torch.Generator().manual_seed(0)
    z_1 = torch.randn(request.param, generator=generator)
    return z_1, z_1 + 0.5 * torch.randn(request.param, generator=generator)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr(pair, temperature):
    z_1, z_2 = (F.normalize(z, dim=1) for z in pair)
    close(nt_xent(z_1, z_2, temperature), NTXentLoss(temperature)(z_1, z_2))


def test_byol(pair):
    close(byol_loss(*pair), 2 + 2 * NegativeCosineSimilarity()(*pair))  # |q - z|^2 = 2 - 2 cos on the unit sphere


def test_simsiam(pair):
    close(negative_cosine(*pair), NegativeCosineSimilarity()(*pair))


@pytest.mark.parametrize("weight", [5e-3, 0.1])
def test_barlow_twins(pair, weight):
    close(barlow_twins_loss(*pair, weight), BarlowTwinsLoss(weight)(*pair))


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (1.0, 2.0, 3.0)])
def test_vicreg(pair, weights):
    invariance, variance, covariance = weights
    # the paper adds the variance terms of both views, lightly (like the authors' code) takes their mean
    close(vicreg_loss(*pair, *weights), VICRegLoss(invariance, 2 * variance, covariance)(*pair))


def views(count, shape, seed):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("local_crops", [0, 3])
@pytest.mark.parametrize("queued", [0, 7])
def test_swav(shape, local_crops, queued):
    scores = views(2 + local_crops, shape, 1).tanh()  # (V, B, K) in [-1, 1], as cosines are
    queue = views(2, (queued, shape[1]), 2).tanh()
    codes = sinkhorn(torch.cat([scores[:2], queue], dim=1), 0.05, 3)[:, : shape[0]]
    theirs = SwaVLoss(temperature=0.1, sinkhorn_iterations=3, sinkhorn_epsilon=0.05)
    expected = theirs([*scores[:2]], [*scores[2:]], [*queue] if queued else None)
    close(swapped_cross_entropy(codes, scores / 0.1), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("local_crops", [0, 3])
def test_dino(shape, local_crops):
    student, teacher = views(2 + local_crops, shape, 1), views(2, shape, 2)
    theirs = DINOLoss(output_dim=shape[1], student_temp=0.1)
    theirs.center.copy_(views(1, (1, shape[1]), 3))
    centre = theirs.center.flatten().clone()  # theirs moves after its loss, as ours does after the step
    close(
        dino_loss(student, teacher, centre, 0.07, 0.1),
        theirs([*teacher], [*student], teacher_temp=0.07),
    )
