"""The parts of joint-embedding objectives: teachers, prototypes, codes, centres, queues."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslscale.config import AugmentConfig, BackboneConfig, PretrainConfig, RunConfig
from sslscale.errors import UserError
from sslscale.models.heads import Prototypes
from sslscale.models.image import Backbone
from sslscale.objectives import build_objective
from sslscale.objectives.base import by_resolution, full_precision, swapped_cross_entropy
from sslscale.objectives.moco_v3 import contrast
from sslscale.objectives.swav import sinkhorn
from sslscale.objectives.teacher import Teacher
from sslscale.pretrain.stage import check_settings
from sslscale.views.base import Batch
from sslscale.views.keyed import KeyedRandom

VIT = BackboneConfig(
    architecture="vit_tiny_patch16_224",
    kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "dynamic_img_size": True},
    channels=1,
)
SMALL = {"hidden_dim": 16, "output_dim": 8}


def build(name, **settings):
    torch.manual_seed(0)
    return build_objective({"name": name, **SMALL, **settings}, Backbone(VIT), AugmentConfig(size=16))


def batch_of(objective, start=0, stop=6):
    images = torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    random = KeyedRandom.of(0, torch.zeros(12, dtype=torch.int64), torch.arange(12))
    views = objective.views(images, random)
    return Batch({name: view[start:stop] for name, view in views.items()}, random, torch.arange(start, stop))


def test_a_teacher_is_the_average_whose_momentum_goes_to_one_along_a_cosine():
    student = nn.Linear(2, 2)
    teacher = Teacher(student, momentum=0.9)
    expected = student.weight.detach().clone()
    for step in range(10):
        with torch.no_grad():
            student.weight.add_(1.0)
        progress = (step + 1) / 10
        momentum = 1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2
        expected = momentum * expected + (1 - momentum) * student.weight.detach()
        teacher.update(progress)
        torch.testing.assert_close(teacher.network[0].weight, expected)
    settled = teacher.state()
    with torch.no_grad():
        student.weight.add_(1.0)
    teacher.update(1.0)
    assert torch.equal(teacher.state()["0.weight"], settled["0.weight"])


def test_a_teacher_normalises_by_its_own_batch_and_drops_nothing():
    teacher = Teacher(nn.BatchNorm1d(3), nn.Dropout(0.5), momentum=0.9)
    x = 5 + 2 * torch.randn(64, 3)
    torch.testing.assert_close(teacher(x).mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
    assert (teacher(x) != 0).all()
    assert teacher.state()["0.num_batches_tracked"] == 2


def test_a_teacher_moves_with_its_objective_and_stays_out_of_its_tree():
    objective = build("byol").double()
    assert all(p.dtype == torch.float64 for p in objective.teacher.network.parameters())
    assert not any("teacher" in name for name, _ in objective.named_modules())
    assert not any("teacher" in name for name in objective.state_dict())


def test_objectives_with_a_teacher_are_refused_under_zero_3_before_anything_starts():
    def check(objective, stage):
        pretrain = PretrainConfig(
            objective=objective, backbone=VIT, views=AugmentConfig(size=16), zero_stage=stage, num_workers=1
        )
        check_settings(RunConfig(datasets={"train": "shards"}, pretrain=pretrain))

    check({"name": "byol", **SMALL}, 2)
    check({"name": "vicreg", **SMALL}, 3)
    with pytest.raises(UserError, match="'byol' reads whole parameters"):
        check({"name": "byol", **SMALL}, 3)


def test_prototypes_are_cosines_in_full_precision_and_keep_their_length():
    prototypes = Prototypes(6, 4)
    z = torch.randn(5, 6)
    expected = F.cosine_similarity(z[:, None], prototypes.weight[None], dim=2)
    before = prototypes.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prototypes(z), expected)
    assert torch.equal(prototypes.weight, before)


def test_codes_use_every_prototype_equally_and_give_every_sample_one_unit():
    scores = torch.randn(2, 40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tanh()
    codes = sinkhorn(scores, 0.5, 200)
    torch.testing.assert_close(codes.sum(dim=-1), torch.ones(2, 40, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(dim=-2), torch.full((2, 5), 8.0, dtype=torch.float64))
    # the scaling keeps the kernel's cross-ratios: codes = diag(u) exp(scores / epsilon) diag(v)
    ratio = (codes[:, 0, 0] * codes[:, 1, 1] / (codes[:, 0, 1] * codes[:, 1, 0])).log()
    expected = (scores[:, 0, 0] + scores[:, 1, 1] - scores[:, 0, 1] - scores[:, 1, 0]) / 0.5
    torch.testing.assert_close(ratio, expected)


def test_the_queue_holds_the_newest_whole_batches_from_its_start_on():
    swav = build("swav", num_prototypes=5, local_crops=0, queue_batches=2, queue_start=0.5)
    newest = []
    for step, (start, stop) in enumerate([(0, 6), (6, 12), (0, 6), (6, 12)]):
        swav(batch_of(swav, start, stop))
        newest.append(swav._newest)
        swav.after_step((step + 1) / 5)
        assert swav.queue.shape == (2, 6 * max(0, min(2, step - 1)), 8)
    assert torch.equal(swav.queue, torch.cat([newest[3], newest[2]], dim=1))


def test_a_queue_makes_codes_of_the_batch_and_the_past_together():
    swav = build("swav", num_prototypes=5, local_crops=0, queue_batches=1, queue_start=0.0)
    swav(batch_of(swav, 0, 6))
    swav.after_step(0.1)
    scores = torch.randn(2, 6, 5).tanh()
    with torch.no_grad():
        queued = torch.stack([swav.prototypes(z) for z in swav.queue])
    torch.testing.assert_close(swav._codes(scores), sinkhorn(torch.cat([scores, queued], 1), 0.05, 3)[:, :6])


def test_the_centre_follows_the_teachers_mean_over_all_passes_of_a_step():
    dino = build("dino", num_prototypes=7, local_crops=1, local_size=8, centre_momentum=0.8)
    passes = [batch_of(dino, 0, 6), batch_of(dino, 6, 12)]
    outputs = torch.cat([dino.teacher(part[name]) for part in passes for name in ("global_1", "global_2")])
    for part in passes:
        dino(part)
    dino.after_step(0.1)
    torch.testing.assert_close(dino.centre, 0.2 * outputs.mean(dim=0))
    dino(passes[0])
    dino._means.append(torch.full((7,), float("inf")))  # a pass that overflowed, whose step was skipped
    before = dino.centre.clone()
    dino.after_step(0.2)
    assert torch.equal(dino.centre, before)


def test_the_teachers_temperature_warms_up():
    dino = build("dino", num_prototypes=7, local_crops=0, warmup_share=0.5)
    temperatures = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        dino.progress.fill_(progress)
        temperatures.append(dino._temperature().item())
    assert temperatures == pytest.approx([0.04, 0.055, 0.07, 0.07])


@pytest.mark.parametrize(("dynamic", "size"), [(False, 8), (True, 7)])
def test_local_views_that_a_vit_does_not_take_are_refused(dynamic, size):
    vit = VIT.model_copy(update={"kwargs": {**VIT.kwargs, "dynamic_img_size": dynamic}})
    settings = {"name": "dino", **SMALL, "num_prototypes": 7, "local_size": size}
    with pytest.raises(UserError, match="does not take the local views"):
        build_objective(settings, Backbone(vit), AugmentConfig(size=16))
    build_objective({**settings, "local_crops": 0}, Backbone(vit), AugmentConfig(size=16))


def test_views_of_one_size_share_a_pass_and_keep_their_order():
    passes = []

    class Mean(nn.Module):
        def forward(self, images):
            passes.append(images.shape)
            return images.mean(dim=(2, 3))

    views = [torch.full((2, 1, size, size), float(i)) for i, size in enumerate((8, 8, 4, 4, 4))]
    assert by_resolution(Mean(), views).flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert passes == [(4, 1, 8, 8), (6, 1, 4, 4)]


def test_contrast_is_the_papers_formula():
    rng = np.random.default_rng(0)
    q, k = (F.normalize(torch.tensor(rng.normal(size=(5, 7))), dim=1) for _ in range(2))
    rows = [np.exp(q[i].numpy() @ k.numpy().T / 0.3) for i in range(5)]
    expected = np.mean([-2 * 0.3 * np.log(row[i] / row.sum()) for i, row in enumerate(rows)])
    assert contrast(3 * q, 2 * k, 0.3).item() == pytest.approx(expected, rel=1e-12)


def test_swapped_codes_are_compared_in_full_precision():
    scores, codes = torch.randn(3, 8, 5) * 10, torch.randn(2, 8, 5).softmax(dim=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(swapped_cross_entropy(codes, scores), swapped_cross_entropy(codes, scores.float()))
        half = swapped_cross_entropy(codes.bfloat16(), scores.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, swapped_cross_entropy(codes, scores), rtol=0.01, atol=0.01)
    expected = (
        -sum((codes[g] * scores[v].log_softmax(1)).sum(1).mean() for g in range(2) for v in range(3) if v != g) / 4
    )
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(swapped_cross_entropy(codes, scores), expected)


def test_a_loss_in_full_precision_does_not_see_autocast():
    z = torch.randn(8, 8)
    product = full_precision(lambda a, b: a @ b)
    exact = z @ z
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(z, z), exact)
        assert product(z.bfloat16(), z).dtype == torch.float32
        assert (z @ z).dtype == torch.bfloat16


def test_dino_holds_its_output_layer_until_its_share_of_the_steps_is_over():
    objective = build("dino", num_prototypes=32, local_crops=2, local_size=8, freeze_share=0.1)
    output, hidden = objective.head[-1].weight, objective.head[0].weight
    for progress, trained in ((0.0, False), (0.05, False), (0.1, True)):
        objective.zero_grad()
        objective(batch_of(objective))["loss"].backward()
        assert bool(output.grad.any()) is trained and hidden.grad.any()
        objective.after_step(progress + 0.05)


def test_moco_v3_leaves_the_patch_embedding_of_a_vit_as_it_is():
    for frozen in (True, False):
        objective = build("moco_v3", freeze_patch_embed=frozen)
        objective(batch_of(objective))["loss"].backward()
        assert (objective.backbone.vit.patch_embed.proj.weight.grad is None) is frozen
        assert objective.backbone.vit.blocks[0].attn.qkv.weight.grad.any()
