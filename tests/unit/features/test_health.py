import numpy as np
import pytest

from sslscale.features.health import alignment, alpha_req, feature_std, lidar, rankme, uniformity


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def with_spectrum(generator, singular_values, n):
    """(n, d) with centred columns and exactly these singular values."""
    d = len(singular_values)
    x = generator.normal(size=(n, d))
    left = np.linalg.qr(x - x.mean(axis=0))[0]
    right = np.linalg.qr(generator.normal(size=(d, d)))[0]
    return left * np.asarray(singular_values) @ right


def test_rankme_counts_equal_singular_values(generator):
    assert rankme(with_spectrum(generator, [3.0] * 5 + [0.0] * 3, 40)) == pytest.approx(5, rel=1e-4)
    p = np.array([0.5, 0.25, 0.25])
    assert rankme(with_spectrum(generator, p, 40)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert rankme(np.ones((10, 4))) == pytest.approx(1, rel=1e-4)
    assert rankme(np.zeros((10, 4))) == 0


def test_feature_std(generator):
    assert feature_std(generator.normal(size=(20_000, 16))) == pytest.approx(1 / 4, rel=0.01)
    assert feature_std(np.ones((10, 4)) * np.arange(1, 11)[:, None]) == pytest.approx(0, abs=1e-12)  # one direction


def test_alignment():
    x, y = np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 3.0], [0.0, 5.0]])
    assert alignment(x, y) == pytest.approx((2 + 0) / 2)  # orthogonal unit vectors are sqrt(2) apart
    assert alignment(x, y, alpha=1) == pytest.approx(np.sqrt(2) / 2)


def test_uniformity():
    opposite = np.array([[1.0, 0.0], [-4.0, 0.0]])
    assert uniformity(opposite) == pytest.approx(-8)  # one pair, 2 apart: log exp(-2 * 4)
    assert uniformity(np.ones((5, 3))) == pytest.approx(0, abs=1e-12)


def test_lidar_counts_the_directions_that_tell_samples_apart(generator):
    samples = np.concatenate([np.eye(4)[:3], -np.eye(4)[:3]])  # three directions, equally strong
    jitter = np.array([1e-3, -1e-3])[None, :, None] * np.ones(4)
    assert lidar(samples[:, None] + jitter) == pytest.approx(3, rel=1e-2)
    collapsed = np.zeros((6, 1, 4)) + jitter
    assert lidar(collapsed) < 1.5


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_finds_the_exponent(generator, alpha):
    eigenvalues = np.arange(1, 21) ** -alpha
    assert alpha_req(with_spectrum(generator, np.sqrt(eigenvalues), 100)) == pytest.approx(alpha, rel=1e-6)


def test_alpha_req_of_collapsed_features_is_infinite():
    assert alpha_req(np.zeros((5, 3))) == alpha_req(np.ones((5, 3))) == np.inf
    assert alpha_req(np.outer(np.arange(5.0), [1, 0, 0])) == np.inf
