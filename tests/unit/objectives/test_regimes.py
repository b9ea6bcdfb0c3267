"""The losses of unsupervised objectives against direct transcriptions of the papers' formulas, in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.stats import dirichlet
from sklearn.metrics import adjusted_rand_score

from sslscale.config import AugmentConfig, BackboneConfig, CollapseConfig, load_config
from sslscale.corpus import TOOLS
from sslscale.errors import UserError
from sslscale.models.export import export_backbone
from sslscale.models.image import Backbone
from sslscale.objectives import build_objective
from sslscale.objectives.base import Moment
from sslscale.objectives.clustering import nearest_centroid_logits
from sslscale.objectives.csi import csi_score
from sslscale.objectives.deep_svdd import sphere_centre, squared_distance
from sslscale.objectives.experts import expert_losses, gaussian_nll, scored_losses
from sslscale.objectives.export import export_objective, load_heads, load_objective, read_objective_meta
from sslscale.objectives.idec import cluster_loss, student_t, target_distribution
from sslscale.objectives.iic import iic_losses
from sslscale.objectives.scan import scan_losses, self_label_losses
from sslscale.objectives.sela import label_losses, sela_labels
from sslscale.objectives.subspace import principal_directions
from sslscale.objectives.temi import temi_losses
from sslscale.objectives.transform_likelihood import dirichlet_mle
from sslscale.objectives.transport import transport
from sslscale.pretrain.evaluate import warnings_of
from sslscale.pretrain.stage import check_settings
from sslscale.views.base import Batch
from sslscale.views.keyed import KeyedRandom
from sslscale.views.transforms import transform, transformations

H, B, K, D = 3, 7, 4, 5
EXACT = {"rel": 1e-9, "abs": 1e-9}


def test_terms_that_would_be_computed_again_with_anothers_draws_are_refused():
    vit = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "drop_path_rate": 0.1}
    backbone = Backbone(BackboneConfig(architecture="vit_tiny_patch16_224", kwargs=vit, channels=1))
    terms = {"name": "joint", "terms": [{"objective": {"name": "rotation"}}, {"objective": {"name": "simclr"}}]}
    build_objective(terms, backbone, AugmentConfig(size=16))
    backbone.checkpoint_activations()
    with pytest.raises(UserError, match="draw as the last one"):
        build_objective(terms, backbone, AugmentConfig(size=16))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def probabilities(rng, *shape):
    """Of the last axis, as log-probabilities for us and as probabilities for numpy."""
    logits = torch.tensor(rng.normal(size=shape) * 2)
    return logits.log_softmax(-1), logits.softmax(-1).numpy()


def test_scan(rng):
    (log_p, p), (log_q, q) = probabilities(rng, H, B, K), probabilities(rng, H, B, K)
    expected = []
    for h in range(H):
        consistency = -sum(np.log(p[h, i] @ q[h, i]) for i in range(B)) / B
        mean = p[h].mean(axis=0)
        expected.append(consistency + 5.0 * sum(mean[c] * np.log(mean[c]) for c in range(K)))
    assert scan_losses(log_p, log_q, 5.0).tolist() == pytest.approx(expected, **EXACT)


def test_self_labelling_weighs_every_cluster_that_was_found_the_same(rng):
    (log_p, p), (log_q, q) = probabilities(rng, H, B, K), probabilities(rng, H, B, K)
    expected = []
    for h in range(H):
        sure = [i for i in range(B) if q[h, i].max() >= 0.6]
        labels = {i: q[h, i].argmax() for i in sure}
        groups = [[-np.log(p[h, i, c]) for i in sure if labels[i] == c] for c in set(labels.values())]
        expected.append(np.mean([np.mean(group) for group in groups]) if groups else 0.0)
    assert self_label_losses(log_p, log_q, 0.6).tolist() == pytest.approx(expected, **EXACT)
    assert self_label_losses(log_p, log_q, 1.0).tolist() == [0.0] * H  # nobody is sure


def test_temi(rng):
    logs, plain = zip(*(probabilities(rng, H, B, K) for _ in range(4)), strict=True)
    log_marginal, marginal = probabilities(rng, H, K)
    s, s_other, t, t_other = plain
    weight = [np.mean([t[h, i] @ t_other[h, i] for h in range(H)]) for i in range(B)]
    expected = []
    for h in range(H):
        total = 0.0
        for i in range(B):
            pmi = np.log(sum((s[h, i, c] * t_other[h, i, c]) ** 0.6 / marginal[h, c] for c in range(K)))
            back = np.log(sum((s_other[h, i, c] * t[h, i, c]) ** 0.6 / marginal[h, c] for c in range(K)))
            total -= weight[i] * (pmi + back) / 2
        expected.append(total / B)
    assert temi_losses(*logs, log_marginal, 0.6).tolist() == pytest.approx(expected, **EXACT)


def test_idec(rng):
    z, centres = rng.normal(size=(B, D)), rng.normal(size=(K, D))
    kernel = np.array([[(1 + ((x - m) ** 2).sum() / 2.0) ** (-(2.0 + 1) / 2) for m in centres] for x in z])
    q = kernel / kernel.sum(axis=1, keepdims=True)
    log_q = student_t(torch.tensor(z), torch.tensor(centres), 2.0)
    np.testing.assert_allclose(log_q.exp(), q, rtol=1e-9)
    weight = q**2 / q.sum(axis=0)
    p = weight / weight.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(target_distribution(torch.tensor(q)), p, rtol=1e-9)
    expected = (p * np.log(p / q)).sum(axis=1).mean()
    assert cluster_loss(torch.tensor(p), log_q).item() == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize("weight", [1.0, 1.5])
def test_iic(rng, weight):
    (log_p, p), (log_q, q) = probabilities(rng, H, B, K), probabilities(rng, H, B, K)
    expected = []
    for h in range(H):
        joint = sum(np.outer(p[h, i], q[h, i]) for i in range(B)) / B
        joint = (joint + joint.T) / 2
        own = joint.sum(axis=1)
        terms = joint * (np.log(joint) - weight * np.log(own)[:, None] - weight * np.log(own)[None])
        expected.append(-terms.sum())
    assert iic_losses(log_p, log_q, weight).tolist() == pytest.approx(expected, **EXACT)


def test_sela_labels_are_algorithm_1(rng):
    log_p, p = probabilities(rng, 1, 60, K)
    kernel = p[0].T ** 3.0  # K x N, as in the paper
    beta = np.full(60, 1 / 60)
    for _ in range(2000):
        alpha = (1 / K) / (kernel @ beta)
        beta = (1 / 60) / (alpha @ kernel)
    q = alpha[:, None] * kernel * beta[None]
    np.testing.assert_allclose(q.sum(axis=1), 1 / K, rtol=1e-9)
    uniform = torch.full((K,), 1 / K, dtype=torch.float64).log()
    ours = transport(3.0 * log_p, uniform, iterations=2000).exp()[0] / 60
    np.testing.assert_allclose(ours, q.T, rtol=1e-6)
    labels = sela_labels(log_p, 3.0)
    assert labels[0].tolist() == q.argmax(axis=0).tolist()
    expected = -np.mean([np.log(p[0, i, labels[0, i]]) for i in range(60)])
    assert label_losses(log_p, labels).item() == pytest.approx(expected, **EXACT)


def test_transport_goes_from_the_rows_own_choice_to_a_balanced_one(rng):
    kernel = torch.tensor(rng.normal(size=(50, K)) + np.array([2.0, 0, 0, 0]))
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    torch.testing.assert_close(transport(kernel, prior, 0.0), kernel.log_softmax(1))
    columns = [transport(kernel, prior, balance).exp().mean(dim=0) for balance in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(columns[2], prior.exp())
    free, half = ((column - prior.exp()).abs().sum() for column in columns[:2])
    assert half < 0.7 * free


def test_experts_are_gaussians_and_their_loss_has_the_entropy(rng):
    tasks = 3
    y, means, log_std = rng.normal(size=(B, tasks, D)), rng.normal(size=(H, B, K, D)), rng.normal(size=(H, D)) / 3
    expected = np.empty((H, B, K, tasks))
    for h, i, k, t in np.ndindex(expected.shape):
        variance = np.exp(2 * log_std[h])
        density = np.exp(-((y[i, t] - means[h, i, k]) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
        expected[h, i, k, t] = -np.log(density).sum()
    losses = gaussian_nll(torch.tensor(y), torch.tensor(means), torch.tensor(log_std))
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    _, q = probabilities(rng, H, B, K)
    mean = expected.mean(axis=3)
    total = [
        sum(q[h, i, k] * (mean[h, i, k] + 0.7 * np.log(q[h, i, k])) for i, k in np.ndindex(B, K)) / B for h in range(H)
    ]
    assert expert_losses(losses.mean(dim=3), torch.tensor(q), 0.7).tolist() == pytest.approx(total, **EXACT)


def test_experts_infer_from_some_tasks_and_are_scored_on_the_others(rng):
    losses = rng.normal(size=(H, B, K, 5)) * 3
    expected = np.empty((H, B))
    for h, i in np.ndindex(H, B):
        weight = np.exp(-losses[h, i, :, :2].mean(axis=1) / 0.7)
        q = weight / weight.sum()
        expected[h, i] = -np.log(sum(q[k] * np.prod(np.exp(-losses[h, i, k, 2:])) for k in range(K))) / 3
    np.testing.assert_allclose(scored_losses(torch.tensor(losses), 2, 0.7), expected, rtol=1e-9)


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


def test_deep_svdd_and_its_centre(rng):
    z = rng.normal(size=(B, D))
    z[:, 0], z[:, 1] = 0.001, -0.001
    centre = sphere_centre(torch.tensor(z), 0.1)
    assert centre[:2].tolist() == [0.1, -0.1] and (centre.abs() >= 0.1).all()
    kept = np.abs(z.mean(axis=0)) >= 0.1
    np.testing.assert_allclose(centre[kept], z.mean(axis=0)[kept])
    expected = [((x - centre.numpy()) ** 2).sum() for x in z]
    assert squared_distance(torch.tensor(z), centre).tolist() == pytest.approx(expected, **EXACT)


def test_csi(rng):
    turns, members = 4, 6
    z, bank = rng.normal(size=(turns, B, D)), rng.normal(size=(turns, members, D))
    bank /= np.linalg.norm(bank, axis=2, keepdims=True)
    logits, scale = rng.normal(size=(turns, B)), rng.uniform(0.5, 2, size=(2, turns))
    expected = []
    for i in range(B):
        score = 0.0
        for s in range(turns):
            length = np.linalg.norm(z[s, i])
            score += scale[0, s] * max(z[s, i] @ m / length for m in bank[s]) * length + scale[1, s] * logits[s, i]
        expected.append(-score)
    ours = csi_score(*(torch.tensor(value) for value in (z, bank, logits, scale)))
    assert ours.tolist() == pytest.approx(expected, **EXACT)


def test_transformations_are_exact_flips_shifts_and_turns():
    images = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = transformations(flip=True, shift=0.25)
    assert len(maps) == 72 and len(transformations(False, 0.0)) == 4
    made = transform(images.expand(72, -1, -1, -1), maps)
    torch.testing.assert_close(made[0], images[0])
    for turns in range(4):
        torch.testing.assert_close(made[turns], torch.rot90(images, turns, dims=(2, 3))[0])
    flipped = made[36]
    torch.testing.assert_close(flipped, images.flip(3)[0])
    shifted = made[4]  # by a quarter of the side, along one axis
    both = (images[0, :, :-2], images[0, :, 2:])
    assert any(torch.allclose(part, source, atol=1e-5) for part in (shifted[:, 2:], shifted[:, :-2]) for source in both)
    assert len({tuple(image.flatten().mul(1e4).round().tolist()) for image in made}) == 72


def test_the_dirichlet_that_fits_best_is_scipys(rng):
    y = rng.dirichlet([0.3, 2.0, 5.0], size=400)
    ours = dirichlet_mle(torch.tensor(np.log(y)))
    theirs = minimize(lambda log_a: -dirichlet(np.exp(log_a)).logpdf(y.T).sum(), np.zeros(3), method="Nelder-Mead")
    np.testing.assert_allclose(ours.numpy(), np.exp(theirs.x), rtol=1e-3)
    sure = torch.tensor(rng.normal(size=(300, 4)) + np.array([60.0, 0, 0, 0])).log_softmax(
        dim=1
    )  # of a classifier that is right
    assert dirichlet_mle(sure).isfinite().all()
    assert dirichlet_mle(torch.full((9, 4), 0.25).log()).isfinite().all()  # no spread at all


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


def test_principal_directions_are_scaled_to_unit_variance_and_survive_constant_features(rng):
    x = torch.tensor(rng.normal(size=(200, D)) @ rng.normal(size=(D, D)))
    mean, directions = principal_directions(x, 3)
    z = (x - mean) @ directions.T
    covariance = z.T @ z / len(z)
    torch.testing.assert_close(covariance, torch.diag(covariance.diagonal()))
    assert covariance.diagonal().mean().item() == pytest.approx(1.0)
    _, wider = principal_directions(x, D + 2)
    assert (wider[D:] == 0).all()
    assert (principal_directions(torch.ones(9, D), 2)[1] == 0).all()


# ------------------------------------------------------------------ what an objective does around its loss


RESNET = BackboneConfig(architecture="resnet18", kwargs={"layers": [1, 1, 1, 1], "channels": [8] * 4}, channels=1)
RECIPE = AugmentConfig(size=16)
CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted(path for kind in ("regimes", "one_class") for path in (CONFIGS / kind).glob("*/*.yaml"))


def test_moments():
    every = [step for step in range(21) if Moment(step, 5, 20).every(2)]
    assert every == [0, 10]
    assert [step for step in range(21) if Moment(step, 5, 20).every(0)] == [0]


@pytest.mark.parametrize(("last_step", "last_refresh"), [(704, 468), (821, 702)])
def test_nothing_is_prepared_for_a_few_last_steps(last_step, last_refresh):
    due = [step for step in range(last_step + 1) if Moment(step, 234, last_step).every(1)]
    assert due == list(range(0, last_refresh + 1, 234))


RESNET8 = BackboneConfig(architecture="resnet18", kwargs={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]})


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
    assert load_heads(both, tmp_path) == read_objective_meta(pretrain / "objective")["sha256"]
    assert all(torch.equal(value, weights[name]) for name, value in both.parts[1].own_parameters().items())
    teacher = both.parts[1].teacher
    for mine, student in zip(teacher.network.parameters(), teacher.students.parameters(), strict=True):
        assert torch.equal(mine, student)
    assert load_heads(other, tmp_path) is None and load_heads(build(rotation), tmp_path) is None
    assert load_heads(both, tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "iic", "num_clusters": 1}, "num_clusters"),
        ({"name": "joint", "terms": [{"objective": {"name": "scna"}}]}, "did you mean 'scan'"),
        ({"name": "joint", "terms": [{"objective": {"name": "simclr"}, "wieght": 2}]}, "unknown setting .*wieght"),
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


def test_an_entropy_of_probabilities_that_underflow_has_a_finite_gradient():
    logits = torch.tensor([[[200.0, 0.0]], [[200.0, 0.0]]], requires_grad=True)
    for losses in (scan_losses, iic_losses):
        log_p = F.log_softmax(logits, dim=2)
        (gradient,) = torch.autograd.grad(losses(log_p, log_p, 2.0).sum(), logits)
        assert gradient.isfinite().all()
