"""One suite over every registered objective: what the loop relies on, and nothing that names one of them."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from objective_cases import (
    BACKBONES,
    FRAMES,
    GLOBAL_BATCH,
    NAMES,
    RESNET,
    batch,
    build,
    gradients_of_a_rank,
    inputs,
    pretrain_config,
)

from sslscale.config import BackboneConfig, FramesConfig
from sslscale.models.norm import statistics
from sslscale.objectives import find_objective
from sslscale.objectives.teacher import TeacherObjective
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


def flat(state, prefix=""):
    """Nested slow state as one dict of tensors."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    return {key: value for name, part in state.items() for key, value in flat(part, f"{prefix}/{name}").items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_on_fixed_views_lower_the_loss(name, precision):
    objective, losses = train(name, 20, precision)
    assert all(map(math.isfinite, losses))
    # a teacher, a centre or a queue moves the target: both losses are taken against the one that training ended with
    untrained = build(name)
    untrained.load_slow_state(objective.slow_state())
    fixed = batch(objective, 0, GLOBAL_BATCH)
    first, last = (model(fixed)["loss"].item() for model in (untrained, objective))
    assert last < first - 0.05 * abs(first)


@pytest.mark.parametrize("name", [name for name in NAMES if issubclass(find_objective(name), TeacherObjective)])
def test_a_teacher_follows_in_bf16_and_is_never_trained(name):
    objective, _ = train(name, 3, "bf16")
    start, now = build(name).teacher.state(), objective.teacher.state()
    students = dict(objective.teacher.students.named_parameters())
    for key, student in students.items():
        assert now[key].dtype == torch.float32 and now[key].isfinite().all()
        assert ((now[key] - start[key]) * (student - start[key])).sum() > 0, key
    trained = {id(p) for p in objective.parameters()}
    assert all(id(p) not in trained and not p.requires_grad for p in objective.teacher.network.parameters())


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


def test_by_stream_the_running_moments_move_once_a_step_in_however_many_passes():
    def after_a_step(passes):
        objective, share = build("byol"), GLOBAL_BATCH // passes
        settings = {"batch_norm": "stream", "num_streams": 4, "num_workers": 1, "micro_batch": share}
        engine = Engine(objective, pretrain_config("byol", **settings), 10, torch.device("cpu"))
        parts = [batch(objective, start, start + share) for start in range(0, GLOBAL_BATCH, share)]
        assert engine.passes == passes and engine.step(parts, 0).applied
        return statistics(objective.batch_norms())

    untouched = statistics(build("byol").batch_norms())
    whole, cut = after_a_step(1), after_a_step(4)
    assert len(whole) == len(untouched) and not any(map(torch.equal, whole, untouched))
    for expected, found in zip(whole, cut, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trips_exactly(name, tmp_path):
    objective, _ = train(name, 3)
    torch.save(objective.slow_state(), tmp_path / "slow.pt")
    restored, _ = train(name, 0)  # an engine's objective, which knows the streams that sums are taken over
    restored.load_state_dict(dict(objective.named_parameters()), strict=False)
    restored.load_slow_state(torch.load(tmp_path / "slow.pt", weights_only=True))
    held = batch(objective, 0, GLOBAL_BATCH, epoch=5)
    assert torch.equal(restored(held)["loss"], objective(held)["loss"])
    for model in (restored, objective):
        model.after_step(0.5)
    ours, theirs = flat(objective.slow_state()), flat(restored.slow_state())
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_given_views_and_keyed_draws_and_nothing_else(name):
    assert {field.name for field in dataclasses.fields(Batch)} == {"views", "random", "ids", "partner"}
    objective = build(name)
    made, again = (
        objective.make_views(inputs(objective), KeyedRandom.of(0, torch.zeros(32, dtype=torch.int64), torch.arange(32)))
        for _ in range(2)
    )
    assert made.keys() == again.keys() and all(torch.equal(made[key], again[key]) for key in made)
    assert all(len(view) == GLOBAL_BATCH for view in made.values())


@pytest.mark.parametrize("name", NAMES)
def test_outputs_have_features_of_the_backbones_width(name):
    objective = build(name).eval()
    with torch.no_grad():
        outputs = objective.outputs(inputs(objective))
    assert outputs["features"].shape == (GLOBAL_BATCH, objective.backbone.feature_dim)
    assert outputs.keys() == {"features", *objective.further_outputs}
    if "cluster_probs" in outputs:
        torch.testing.assert_close(outputs["cluster_probs"].sum(dim=1), torch.ones(GLOBAL_BATCH))


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(BACKBONES.get(name, RESNET), BackboneConfig)])
def test_objectives_of_images_train_on_sampled_frames(name):
    of_frames = BACKBONES.get(name, RESNET).model_dump(exclude={"library"})
    objective = build(name, config=FramesConfig(**of_frames, frames=FRAMES, window=2))
    objective(batch(objective, 0, GLOBAL_BATCH))["loss"].backward()
    objective.eval()
    with torch.no_grad():
        outputs = objective.outputs(inputs(objective))
    assert all(len(output) == GLOBAL_BATCH and output.isfinite().all() for output in outputs.values())


@pytest.mark.parametrize("name", ["rotation", "byol"])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(name):
    objective = build(name)
    engine = Engine(objective, pretrain_config(name, max_bad_steps=3), 10, torch.device("cpu"))
    good = batch(objective, 0, GLOBAL_BATCH)
    engine.step([good], 0)
    before = {key: p.detach().clone() for key, p in objective.named_parameters()} | flat(objective.slow_state())
    assert any("running_mean" in key for key in before)
    views = {key: view * float("nan") if view.is_floating_point() else view for key, view in good.views.items()}
    poisoned = Batch(views, good.random, good.ids)
    for step in (1, 2):
        assert not engine.step([poisoned], step).applied
    after = dict(objective.named_parameters()) | flat(objective.slow_state())
    assert all(torch.equal(before[key], value) for key, value in after.items())
    assert engine.bad_steps == 2
    from sslscale.errors import StageError

    with pytest.raises(StageError, match="3 steps in a row"):
        engine.step([poisoned], 3)
