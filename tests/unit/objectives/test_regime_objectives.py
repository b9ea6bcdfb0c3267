"""What the objectives of regimes B and C begin with, prepare, choose, export and refuse."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import dirichlet
from sklearn.metrics import adjusted_rand_score

from sslscale.config import AugmentConfig, BackboneConfig, CollapseConfig, PretrainConfig, RunConfig, load_config
from sslscale.corpus import TOOLS
from sslscale.errors import UserError
from sslscale.models.export import export_backbone
from sslscale.models.image import Backbone
from sslscale.objectives import build_objective, transform_likelihood
from sslscale.objectives.base import Moment
from sslscale.objectives.clustering import nearest_centroid_logits
from sslscale.objectives.export import export_objective, load_heads, load_objective, read_objective_meta
from sslscale.objectives.transform_likelihood import dirichlet_mle
from sslscale.pretrain.evaluate import warnings_of
from sslscale.pretrain.stage import check_settings
from sslscale.views.base import Batch
from sslscale.views.keyed import KeyedRandom

RESNET = BackboneConfig(architecture="resnet18", kwargs={"layers": [1, 1, 1, 1], "channels": [8] * 4}, channels=1)
RECIPE = AugmentConfig(size=16)
CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted(path for kind in ("regimes", "one_class") for path in (CONFIGS / kind).glob("*/*.yaml"))
RESNET8 = BackboneConfig(architecture="resnet18", kwargs={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]})
K = 4


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_terms_that_would_be_computed_again_with_anothers_draws_are_refused():
    vit = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "drop_path_rate": 0.1}
    backbone = Backbone(BackboneConfig(architecture="vit_tiny_patch16_224", kwargs=vit, channels=1))
    terms = {"name": "joint", "terms": [{"objective": {"name": "rotation"}}, {"objective": {"name": "simclr"}}]}
    build_objective(terms, backbone, AugmentConfig(size=16))
    backbone.checkpoint_activations()
    with pytest.raises(UserError, match="draw as the last one"):
        build_objective(terms, backbone, AugmentConfig(size=16))


def test_the_head_with_the_lowest_held_out_loss_gives_the_clusters():
    objective = build_objective({"name": "iic", "num_clusters": 4, "num_heads": 3}, Backbone(RESNET), RECIPE).eval()
    with torch.no_grad():  # heads 0 and 2 say the same of every image: no information
        objective.head.weight.unflatten(0, (3, 4))[[0, 2]] = 0.0
        objective.head.weight.unflatten(0, (3, 4))[1].mul_(50.0)
    images = torch.rand(32, 1, 16, 16) * torch.linspace(0, 1, 32)[:, None, None, None]
    random = KeyedRandom.of(0, torch.zeros(32, dtype=torch.int64), torch.arange(32))
    measured = objective.evaluate(images, random)
    assert objective.chosen == 1 and measured["held_out_loss"] < 0
    expected = objective.log_probs(objective.backbone(images))[1].exp()
    torch.testing.assert_close(objective.outputs(images)["cluster_probs"], expected)


def test_a_collapse_of_experts_is_reported():
    objective = build_objective({"name": "experts", "num_clusters": 4, "target_dim": 4}, Backbone(RESNET), RECIPE)
    images = torch.rand(32, 1, 16, 16)
    random = KeyedRandom.of(0, torch.zeros(32, dtype=torch.int64), torch.arange(32))
    torch.nn.init.normal_(objective.directions)
    torch.nn.init.constant_(objective.mixtures.means, 50.0)
    with torch.no_grad():
        objective.mixtures.means[:, 2] = 0.0
    measured = objective.eval().evaluate(images, random)
    assert measured["collapsed"] == 1 and measured["clusters_used"] == 1 and measured["largest_cluster"] == 1
    assert measured["bits_saved_low"] < measured["bits_saved"] < measured["bits_saved_high"]
    guard = CollapseConfig()
    healthy = {"feature_std": 1.0, "rankme": 9.0}
    assert warnings_of({**measured, **healthy}, guard) == ["one cluster holds 100.0% of the evaluated samples"]
    assert warnings_of(healthy, guard) == []


def test_the_score_of_transformations(rng):
    torch.manual_seed(0)
    objective = build_objective(
        {"name": "transform_likelihood", "flip": False, "shift": 0.0, "copies": 2}, Backbone(RESNET), RECIPE
    )
    images = torch.rand(50, 1, 16, 16)
    objective.eval()
    with torch.no_grad():
        turned = [torch.rot90(images, k, dims=(2, 3)) for k in range(4)]
        y = [objective.head(objective.backbone(view)).softmax(dim=1).double().numpy() for view in turned]
        simplified = -np.mean([np.log(y[t][:, t]) for t in range(4)], axis=0)
        np.testing.assert_allclose(objective.outputs(images)["score"].numpy(), simplified, atol=1e-5)

        class Images:
            def map(self, function):
                return function(images, None)

        objective.prepare(Images(), Moment(10, 5, 10))
        expected = np.zeros(50)
        for own in y:
            alpha = dirichlet_mle(torch.tensor(own).log()).numpy()
            expected -= dirichlet(alpha).logpdf((own / own.sum(axis=1, keepdims=True)).T)
        ours = objective.outputs(images)["score"].numpy()
        np.testing.assert_allclose(ours - ours.mean(), expected - expected.mean(), rtol=1e-3, atol=1e-2)


def test_moments():
    every = [step for step in range(21) if Moment(step, 5, 20).every(2)]
    assert every == [0, 10]
    assert [step for step in range(21) if Moment(step, 5, 20).every(0)] == [0]


@pytest.mark.parametrize(("last_step", "last_refresh"), [(704, 468), (821, 702)])
def test_nothing_is_prepared_for_a_few_last_steps(last_step, last_refresh):
    due = [step for step in range(last_step + 1) if Moment(step, 234, last_step).every(1)]
    assert due == list(range(0, last_refresh + 1, 234))


class Rows:
    """A corpus of which all that is asked is the features."""

    def __init__(self, features: torch.Tensor) -> None:
        self.features, self.num_samples = features, len(features)

    def map(self, function):
        return self.features

    def by_id(self, values):
        return values

    def neighbours(self, features, k):
        return torch.from_numpy(TOOLS.neighbours(features.numpy(), slice(0, len(features)), k))

    def centroids(self, features, num_clusters, seed=0):
        return torch.from_numpy(TOOLS.centroids(features.numpy(), num_clusters, seed, 1))


@pytest.mark.parametrize("name", ["scan", "temi", "sela", "iic"])
def test_heads_begin_at_the_clusters_of_the_features(rng, name):
    backbone = Backbone(RESNET8)
    truth = rng.integers(0, K, 200)
    far = rng.normal(size=(K, 8)) * 3 + 100  # far from the origin: what all have in common must cancel
    features = torch.tensor(far[truth] + rng.normal(size=(200, 8)) * 0.3, dtype=torch.float32)
    objective = build_objective({"name": name, "num_clusters": K, "num_heads": 2}, backbone, AugmentConfig(size=8))
    objective.prepare(Rows(features), Moment(0, 10, 10))
    probs = objective.log_probs(features).exp()
    for head in probs.argmax(dim=2):
        assert adjusted_rand_score(truth, head.numpy()) == 1.0
    squared = torch.cdist(features, torch.stack([features[truth == k].mean(dim=0) for k in range(K)])).square()
    expected = (-squared / squared.amin(dim=1).mean()).softmax(dim=1)
    ours = probs[0].sort(dim=1).values
    torch.testing.assert_close(ours, expected.sort(dim=1).values, rtol=0, atol=1e-2)
    if name == "temi":
        for ours, student in zip(
            objective.teacher.network.parameters(), objective.teacher.students.parameters(), strict=True
        ):
            assert torch.equal(ours, student)


def test_heads_of_equal_features_are_finite_and_random_ones_ask_for_no_features():
    backbone = Backbone(RESNET8)
    weight, bias = nearest_centroid_logits(torch.ones(20, 8), torch.ones(K, 8))
    assert weight.isfinite().all() and bias.isfinite().all()
    iic = build_objective({"name": "iic", "num_clusters": K, "init": "random"}, backbone, AugmentConfig(size=8))
    before = iic.head.weight.clone()
    corpus = Rows(torch.ones(20, 8))
    corpus.map = None  # not to be called
    iic.prepare(corpus, Moment(0, 10, 10))
    assert torch.equal(iic.head.weight, before)


def test_deep_svdd_trains_no_bias():
    objective = build_objective({"name": "deep_svdd"}, Backbone(RESNET), RECIPE)
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert trained and not any(name.endswith("bias") for name in trained)


def test_an_exported_objective_gives_the_same_outputs(tmp_path):
    term = {"objective": {"name": "iic", "num_clusters": 4, "num_heads": 2}}
    config = {"name": "joint", "terms": [{"objective": {"name": "deep_svdd"}}, term]}
    objective = build_objective(config, Backbone(RESNET), RECIPE).eval()
    objective.parts[1].chosen.fill_(1)
    state, images = objective.state_dict(), torch.rand(6, 1, 16, 16)
    model = {name.removeprefix("backbone.model."): value for name, value in state.items() if "backbone." in name}
    sha256 = export_backbone(objective.backbone, model, tmp_path / "backbone", size=16)
    export_objective(objective, RECIPE, state, tmp_path / "objective", backbone=sha256)
    assert read_objective_meta(tmp_path / "objective")["further_outputs"] == ["score", "cluster_probs"]
    ours, theirs = objective.outputs(images), load_objective(tmp_path / "objective").outputs(images)
    assert ours.keys() == theirs.keys() == {"features", "score", "cluster_probs"}
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, msg=name)
    other = Backbone(RESNET)
    export_backbone(other, other.model.state_dict(), tmp_path / "backbone", size=16)
    with pytest.raises(UserError, match="belongs to other weights"):
        read_objective_meta(tmp_path / "objective")


def test_the_same_objective_goes_on_with_its_heads_alone_or_beside_others(tmp_path):
    def build(*objectives):
        terms = {"name": "joint", "terms": [{"objective": objective} for objective in objectives]}
        return build_objective(terms if len(objectives) > 1 else objectives[0], Backbone(RESNET), RECIPE)

    byol, rotation = {"name": "byol", "hidden_dim": 16, "output_dim": 8}, {"name": "rotation"}
    trained = build(byol)
    weights = {name: value.clone() for name, value in trained.own_parameters().items()}
    assert weights and not any("backbone" in name for name in weights)
    pretrain = tmp_path / "pretrain"
    sha256 = export_backbone(trained.backbone, trained.backbone.model.state_dict(), pretrain / "backbone", size=16)
    export_objective(trained, RECIPE, trained.state_dict(), pretrain / "objective", backbone=sha256)
    both, other = build(rotation, byol), build({**byol, "output_dim": 4})
    assert load_heads(both, str(tmp_path)) == read_objective_meta(pretrain / "objective")["sha256"]
    assert all(torch.equal(value, weights[name]) for name, value in both.parts[1].own_parameters().items())
    teacher = both.parts[1].teacher
    for mine, student in zip(teacher.network.parameters(), teacher.students.parameters(), strict=True):
        assert torch.equal(mine, student)
    assert load_heads(other, str(tmp_path)) is None and load_heads(build(rotation), str(tmp_path)) is None
    assert load_heads(both, str(tmp_path / "elsewhere")) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "iic", "num_clusters": 1}, "num_clusters"),
        ({"name": "joint", "terms": [{"objective": {"name": "scna"}}]}, "did you mean 'scan'"),
        ({"name": "joint", "terms": [{"objective": {"name": "simclr"}, "wieght": 2}]}, "unknown setting .*wieght"),
        ({"name": "joint", "terms": []}, "terms"),
        (
            {"name": "joint", "terms": [{"objective": {"name": "simclr"}, "schedule": [[0.5, 1.0], [0.2, 0.0]]}]},
            "ascend in progress",
        ),
        ({"name": "simclr", "temperature": 0.0}, "temperature"),
        ({"name": "dino", "student_temperature": -1.0}, "student_temperature"),
        ({"name": "transform_likelihood", "copies": 99}, "more copies than transformations"),
        (
            {"name": "joint", "terms": [{"objective": {"name": "experts", "num_clusters": 3}}]},
            "holds the backbone fixed",
        ),
    ],
)
def test_wrong_settings_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        build_objective(config, Backbone(RESNET), RECIPE)


def test_loading_an_objective_leaves_its_backbone_as_it_was_trained(tmp_path):
    terms = [{"objective": {"name": name}} for name in ("colorization", "deep_svdd")]
    objective = build_objective({"name": "joint", "terms": terms}, Backbone(RESNET8), RECIPE).eval()
    with torch.no_grad():
        objective.backbone.model.conv1.weight[:, 0] += 1.0  # which another term than colorization is free to learn
    state, images = objective.state_dict(), torch.rand(4, 3, 16, 16)
    model = {name.removeprefix("backbone.model."): value for name, value in state.items() if "backbone." in name}
    sha256 = export_backbone(objective.backbone, model, tmp_path / "backbone", size=16)
    export_objective(objective, RECIPE, state, tmp_path / "objective", backbone=sha256)
    theirs = load_objective(tmp_path / "objective").outputs(images)
    torch.testing.assert_close(theirs["features"], objective.outputs(images)["features"])


def test_what_a_frozen_backbone_allows_is_not_refused():
    objective = {"name": "temi", "num_clusters": 4, "num_heads": 2, "num_neighbours": 3}
    settings = {"objective": objective, "backbone": RESNET, "views": RECIPE, "num_workers": 1}
    batches = {"global_batch": 64, "micro_batch": 16, "num_streams": 4}
    pretrain = PretrainConfig(**settings, **batches, freeze_backbone=True, init_from="elsewhere")
    check_settings(RunConfig(datasets={"train": "shards"}, pretrain=pretrain))
    with pytest.raises(UserError, match="cannot accumulate"):
        check_settings(RunConfig(datasets={"train": "shards"}, pretrain=PretrainConfig(**settings, **batches)))


def test_scores_of_held_out_samples_are_those_of_any_pass(monkeypatch):
    settings = {"name": "transform_likelihood", "flip": False, "copies": 2}
    objective = build_objective(settings, Backbone(RESNET), RECIPE).eval()
    images, ids = torch.rand(10, 1, 16, 16), torch.arange(10)
    random = KeyedRandom.of(0, torch.zeros_like(ids), ids)
    whole = objective.evaluate(images, random)["held_out_loss"]
    monkeypatch.setattr(transform_likelihood, "_HELD_OUT", 4)
    assert objective.evaluate(images, random)["held_out_loss"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_recipes_build_what_they_name(path):
    config = load_config(str(path))
    assert config.run.endswith("/".join(path.with_suffix("").parts[-3:]))
    check_settings(config)


def test_joint_weighs_its_terms_by_their_schedules():
    terms = [
        {"objective": {"name": "simsiam"}, "weight": 2.0, "schedule": [[0.0, 1.0], [0.5, 0.0]]},
        {"objective": {"name": "rotation"}},
    ]
    objective = build_objective({"name": "joint", "terms": terms}, Backbone(RESNET), RECIPE)
    names = [name for name, _ in objective.named_parameters()]
    assert len(names) == len(set(names))
    assert not any(name.startswith("terms.0.backbone") for name in objective.state_dict())
    random = KeyedRandom.of(0, torch.zeros(8, dtype=torch.int64), torch.arange(8))
    views = objective.views(torch.rand(8, 1, 16, 16), random)
    for progress, factor in ((0.0, 2.0), (0.25, 1.0), (0.75, 0.0)):
        objective.after_step(progress)
        found = objective(Batch(views, random, torch.arange(8)))
        expected = factor * found["simsiam_loss"] + found["rotation_loss"]
        torch.testing.assert_close(found["loss"], expected)
