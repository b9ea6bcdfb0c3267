"""One suite over every registered objective: what the loop relies on, and nothing that names one of them."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from objective_cases import GLOBAL_BATCH, NAMES, batch, build, gradients_of_a_rank, images, pretrain_config

from sslscale.pretrain.engine import Engine
from sslscale.views.base import Batch
from sslscale.views.keyed import KeyedRandom


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small models run no faster on more
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two_rank_gradients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(gradients_of_a_rank, args=(2, str(folder)), nprocs=2)
    return torch.load(folder / "gradients.pt")


def train(name, steps, precision="fp32"):
    objective = build(name)
    engine = Engine(objective, pretrain_config(name, precision=precision), steps, torch.device("cpu"))
    fixed = batch(objective, 0, GLOBAL_BATCH)
    losses = []
    for step in range(steps):
        outcome = engine.step([fixed], step)
        assert outcome.applied
        objective.after_step((step + 1) / steps)
        losses.append(outcome.metrics["loss"])
    return objective, losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_on_fixed_views_lower_the_loss(name, precision):
    _, losses = train(name, 20, precision)
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_give_the_gradient_of_one(name, two_rank_gradients):
    objective = build(name, torch.float64)
    objective(batch(objective, 0, GLOBAL_BATCH, dtype=torch.float64))["loss"].backward()
    ours = {key: p.grad for key, p in objective.named_parameters() if p.requires_grad}
    theirs = two_rank_gradients[name]
    assert ours.keys() == theirs.keys()
    scale = max(gradient.norm() for gradient in ours.values())
    for key, gradient in ours.items():
        assert (theirs[key] - gradient).norm() < 1e-6 * max(gradient.norm(), 1e-6 * scale), key


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trips_exactly(name):
    objective, _ = train(name, 3)
    restored = build(name)
    restored.load_state_dict(dict(objective.named_parameters()), strict=False)
    restored.load_slow_state(objective.slow_state())
    held = batch(objective, 0, GLOBAL_BATCH, epoch=5)
    assert torch.equal(restored(held)["loss"], objective(held)["loss"])
    for (key, buffer), other in zip(objective.named_buffers(), restored.buffers(), strict=True):
        assert torch.equal(buffer, other), key


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_given_views_and_keyed_draws_and_nothing_else(name):
    assert {field.name for field in dataclasses.fields(Batch)} == {"views", "random"}
    objective = build(name)
    made, again = (
        objective.views(
            images(objective.backbone.config.channels),
            KeyedRandom.of(0, torch.zeros(32, dtype=torch.int64), torch.arange(32)),
        )
        for _ in range(2)
    )
    assert made.keys() == again.keys() and all(torch.equal(made[key], again[key]) for key in made)
    assert all(len(view) == GLOBAL_BATCH for view in made.values())


@pytest.mark.parametrize("name", NAMES)
def test_outputs_have_features_of_the_backbones_width(name):
    objective = build(name).eval()
    with torch.no_grad():
        outputs = objective.outputs(images(objective.backbone.config.channels))
    assert outputs["features"].shape == (GLOBAL_BATCH, objective.backbone.feature_dim)
    if "cluster_probs" in outputs:
        torch.testing.assert_close(outputs["cluster_probs"].sum(dim=1), torch.ones(GLOBAL_BATCH))


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    objective = build("rotation")
    engine = Engine(objective, pretrain_config("rotation", max_bad_steps=3), 10, torch.device("cpu"))
    good = batch(objective, 0, GLOBAL_BATCH)
    engine.step([good], 0)
    before = {key: p.detach().clone() for key, p in objective.named_parameters()}
    poisoned = Batch({**good.views, "view": torch.full_like(good["view"], float("nan"))}, good.random)
    for step in (1, 2):
        assert not engine.step([poisoned], step).applied
    assert all(torch.equal(before[key], p) for key, p in objective.named_parameters())
    assert engine.bad_steps == 2
    from sslscale.errors import StageError

    with pytest.raises(StageError, match="3 steps in a row"):
        engine.step([poisoned], 3)
