"""The losses of unsupervised objectives against direct transcriptions of the papers' formulas, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.stats import dirichlet

from sslscale.objectives.csi import csi_score
from sslscale.objectives.deep_svdd import sphere_centre, squared_distance
from sslscale.objectives.experts import expert_losses, gaussian_nll, scored_losses
from sslscale.objectives.idec import cluster_loss, student_t, target_distribution
from sslscale.objectives.iic import iic_losses
from sslscale.objectives.scan import scan_losses, self_label_losses
from sslscale.objectives.sela import label_losses, sela_labels
from sslscale.objectives.subspace import principal_directions
from sslscale.objectives.temi import temi_losses
from sslscale.objectives.transform_likelihood import dirichlet_mle
from sslscale.objectives.transport import transport
from sslscale.views.transforms import transform, transformations

H, B, K, D = 3, 7, 4, 5


EXACT = {"rel": 1e-9, "abs": 1e-9}


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


def test_an_entropy_of_probabilities_that_underflow_has_a_finite_gradient():
    logits = torch.tensor([[[200.0, 0.0]], [[200.0, 0.0]]], requires_grad=True)
    for losses in (scan_losses, iic_losses):
        log_p = F.log_softmax(logits, dim=2)
        (gradient,) = torch.autograd.grad(losses(log_p, log_p, 2.0).sum(), logits)
        assert gradient.isfinite().all()
