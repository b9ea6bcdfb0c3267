import itertools

import numpy as np
import pytest
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.datasets import load_digits, make_blobs
from sklearn.utils.estimator_checks import parametrize_with_checks

from sslscale.cluster import KMeans
from sslscale.cluster import lloyd as lloyd_module
from sslscale.cluster.lloyd import ArrayRows, LloydState, lloyd, schedule
from sslscale.cluster.seeding import initial_state
from sslscale.errors import UserError


def expected_failures(estimator):
    return {"check_sample_weight_equivalence_on_dense_data": "the random start depends on the number of rows"}


@parametrize_with_checks([KMeans()], expected_failed_checks=expected_failures)
def test_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


def datasets():
    generator = np.random.default_rng(0)
    digits = load_digits().data
    integers = generator.integers(-2, 3, size=(200, 3))
    return {
        "digits": digits,
        # mirrored, so that scikit-learn's subtraction of the mean leaves the ties exact
        "integers with ties": np.concatenate([integers, -integers]),
        "duplicates": np.repeat(generator.normal(size=(50, 6)), 8, axis=0),
        "blobs": make_blobs(500, 5, centers=8, random_state=0)[0],
        "far from the origin": generator.normal(size=(500, 4)) + 100,
    }


@pytest.mark.parametrize("name", datasets())
def test_agrees_with_scikit_learn_from_the_same_start(name):
    x = datasets()[name].astype(np.float32)
    init = np.unique(x, axis=0)[:: max(1, len(np.unique(x, axis=0)) // 8)][:8]
    theirs = SklearnKMeans(len(init), init=init, n_init=1, max_iter=20, tol=0, algorithm="lloyd").fit(x)
    ours = KMeans(len(init), init=init, max_iterations=20, tolerance=0).fit(x)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
    assert (ours.labels_ == theirs.labels_).mean() >= 0.99
    assert ours.cluster_centers_.dtype == np.float32


def test_weights_count_rows():
    x = make_blobs(60, 3, centers=4, random_state=1)[0]
    counts = np.random.default_rng(0).integers(1, 4, size=60)
    weighted = KMeans(4, init=x[:4], tolerance=0).fit(x, sample_weight=counts)
    repeated = KMeans(4, init=x[:4], tolerance=0).fit(np.repeat(x, counts, axis=0))
    np.testing.assert_allclose(weighted.cluster_centers_, repeated.cluster_centers_)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_)


def test_an_empty_cluster_takes_the_farthest_row():
    x = np.array([[0.0], [1.0], [2.0], [50.0]], dtype=np.float32)
    init = np.array([[1.0], [1000.0], [2000.0]], dtype=np.float32)  # two clusters without rows
    model = KMeans(3, init=init).fit(x)
    assert sorted(np.bincount(model.labels_, minlength=3)) == [1, 1, 2]
    assert model.inertia_ == pytest.approx(0.5)


def test_fewer_distinct_rows_than_clusters():
    x = np.repeat(np.array([[0.0, 1.0], [2.0, 3.0]]), 5, axis=0)
    model = KMeans(4, random_state=0).fit(x)
    assert model.inertia_ == 0 and len(np.unique(model.labels_)) == 2
    assert np.isfinite(model.cluster_centers_).all()


def test_a_cluster_for_every_row():
    x = np.random.default_rng(0).normal(size=(12, 3))
    model = KMeans(12, random_state=0).fit(x)
    assert model.inertia_ == 0 and len(np.unique(model.labels_)) == 12


def test_restarts_keep_the_best():
    x = make_blobs(300, 2, centers=12, cluster_std=0.3, random_state=3)[0]
    model = KMeans(12, init="random", num_init=8, random_state=0).fit(x)
    single = [KMeans(12, init="random", random_state=seed).fit(x).inertia_ for seed in range(8)]
    assert model.inertia_ <= np.median(single)
    assert model.inertia_ == pytest.approx(
        ((x - model.cluster_centers_[model.labels_]) ** 2).sum(), rel=1e-12
    )  # fmt: skip


def test_cosine_ignores_length():
    generator = np.random.default_rng(0)
    directions = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    truth = generator.integers(0, 3, size=200)
    x = (directions[truth] + 0.05 * generator.normal(size=(200, 3))) * generator.uniform(0.1, 50, size=(200, 1))
    model = KMeans(3, metric="cosine", num_init=3, random_state=0).fit(x)
    assert all(len(np.unique(truth[model.labels_ == cluster])) == 1 for cluster in range(3))
    np.testing.assert_allclose(np.linalg.norm(model.cluster_centers_, axis=1), 1)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert model.inertia_ == pytest.approx((1 - (unit * model.cluster_centers_[model.labels_]).sum(axis=1)).sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clusters": 11}, "more clusters than samples"),
        ({"num_clusters": 0}, "must be positive"),
        ({"num_clusters": 2, "metric": "l1"}, "unknown metric"),
        ({"num_clusters": 2, "init": "kmeans"}, "unknown init"),
        ({"num_clusters": 2, "init": np.ones((3, 2))}, "another shape"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        KMeans(**settings).fit(np.ones((10, 2)))


def test_nan_is_refused():
    x = np.ones((10, 2))
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        KMeans(2).fit(x)


def test_goes_on_from_any_saved_iteration(tmp_path):
    x = load_digits().data.astype(np.float32)[:400]
    rows = ArrayRows(x, "l2")
    settings = {"metric": "l2", "max_iterations": 8, "tolerance": 0.0}
    saved = []

    def checkpoint(state):
        saved.append(tmp_path / f"{state.passes}.npz")
        state.save(saved[-1])

    whole = lloyd(rows, initial_state(rows, 10, "random", 3, seed=0), checkpoint=checkpoint, **settings)
    assert len(saved) == 9 and whole.iterations.max() == 8
    for path in saved:
        resumed = lloyd(rows, LloydState.load(path), **settings)
        assert resumed.centroids.tobytes() == whole.centroids.tobytes()
        assert resumed.objective.tobytes() == whole.objective.tobytes()


def test_a_restart_does_not_depend_on_its_neighbours():
    rows = ArrayRows(load_digits().data.astype(np.float32)[:300], "l2")
    settings = {"metric": "l2", "max_iterations": 30, "tolerance": 1e-3}
    state = initial_state(rows, 10, "k-means++", 4, seed=0)
    alone = [
        lloyd(
            rows,
            LloydState.start(state.centroids[[at]].copy()),
            **settings,
        )
        for at in range(4)
    ]
    together = lloyd(rows, state, **settings)
    assert together.centroids.tobytes() == np.concatenate([one.centroids for one in alone]).tobytes()
    assert len(set(together.iterations)) > 1  # they did not all stop at once


def many_rows():
    generator = np.random.default_rng(0)
    centres = 3 * generator.normal(size=(40, 16))
    return (centres[generator.integers(0, 40, 6000)] + generator.normal(size=(6000, 16))).astype(np.float16)


@pytest.fixture
def small_scale(monkeypatch):
    """The schedule of large data, on small data."""
    for name, value in {"FIRST_PER_CLUSTER": 8, "MIN_SAMPLE": 300, "CHUNK_ROWS": 1000}.items():
        monkeypatch.setattr(lloyd_module, name, value)


def test_the_schedule_grows_to_plain_passes_over_all_rows():
    assert schedule("lloyd", 10**9, 1000) == [lloyd_module.PLAIN]
    assert schedule("minibatch", 10_000, 10) == [lloyd_module.PLAIN]
    steps = schedule("minibatch", 10**9, 1000)
    shares = [step.share for step in steps]
    assert shares == sorted(shares) and shares[0] * 10**9 >= 48_000 > shares[0] * 10**9 / 4 and shares[-2:] == [1, 1]
    assert [step.relaxation for step in steps] == [lloyd_module.RELAXATION] * (len(steps) - 1) + [1]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_going_past_the_means_never_raises_the_objective_and_takes_fewer_passes(metric):
    rows = ArrayRows(np.random.default_rng(0).normal(size=(4000, 8)), metric)  # no gaps between clusters
    passes = {1.0: 0, lloyd_module.RELAXATION: 0}
    for seed in range(4):
        objectives = {relaxation: [] for relaxation in passes}
        for relaxation, seen in objectives.items():
            lloyd(
                rows,
                initial_state(rows, 40, "random", 1, seed),
                metric=metric,
                max_iterations=40,
                tolerance=0.0,
                steps=[lloyd_module.Step(1.0, relaxation, 0.0, exact=True), lloyd_module.PLAIN],
                checkpoint=lambda state, seen=seen: seen.append(float(state.objective[0])),
            )
            assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(seen))
        target = 1.005 * objectives[1.0][-1]
        for relaxation, seen in objectives.items():
            passes[relaxation] += next(at for at, value in enumerate(seen) if value <= target)
    assert passes[lloyd_module.RELAXATION] < 0.9 * passes[1.0]


def test_the_last_update_goes_to_the_means_however_few_there_are():
    x = many_rows().astype(np.float32)
    rows, reached = ArrayRows(x, "l2"), []
    lloyd(
        rows,
        initial_state(rows, 10, "random", 1, seed=0),
        metric="l2",
        max_iterations=3,
        tolerance=0.0,
        steps=[lloyd_module.Step(1.0, lloyd_module.RELAXATION, 0.0, exact=True), lloyd_module.PLAIN],
        checkpoint=lambda state: reached.append(state.centroids[0].copy()),
    )
    before, last = reached[1], reached[-1]
    labels = ((x[:, None] - before) ** 2).sum(axis=2).argmin(axis=1)
    means = np.stack([x[labels == cluster].mean(axis=0) for cluster in range(10)])
    np.testing.assert_allclose(last, means, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_hierarchical(metric):
    x = many_rows().astype(np.float32)
    flat = KMeans(300, metric=metric, random_state=0, init="k-means++").fit(x)
    one, two = (
        KMeans(300, metric=metric, method="hierarchical", init="k-means++", threads=threads, random_state=0).fit(x)
        for threads in (1, 2)
    )
    assert one.cluster_centers_.shape == (300, 16) and one.inertia_ < 1.06 * flat.inertia_
    assert one.cluster_centers_.tobytes() == two.cluster_centers_.tobytes()
    np.testing.assert_array_equal(one.predict(x), one.labels_)
    assert np.bincount(one.labels_, minlength=300).max() < 200
    with pytest.raises(UserError, match="neither weights nor an array"):
        KMeans(300, method="hierarchical").fit(x, sample_weight=np.ones(len(x)))


def test_few_iterations_are_not_all_spent_on_samples(small_scale):
    x = many_rows()
    after = {
        (method, iterations): KMeans(40, method=method, max_iterations=iterations, random_state=0).fit(x).inertia_
        for method in ("minibatch", "lloyd")
        for iterations in (1, 3)
    }
    assert after["minibatch", 1] == after["lloyd", 1]
    assert after["minibatch", 3] < 1.03 * after["lloyd", 3]


def test_minibatch_ends_like_lloyd(small_scale):
    x = many_rows()
    assert len(schedule("minibatch", len(x), 40)) > 2
    minibatch, full = (
        KMeans(40, method=method, random_state=0, tolerance=1e-4).fit(x) for method in ("minibatch", "lloyd")
    )
    assert minibatch.inertia_ <= 1.02 * full.inertia_
    distances = ((x[:, None].astype(np.float32) - minibatch.cluster_centers_) ** 2).sum(axis=2)
    assert (minibatch.labels_ == distances.argmin(axis=1)).mean() > 0.999  # the final assignment is exact


def test_a_schedule_goes_on_from_any_saved_iteration(small_scale, tmp_path):
    rows = ArrayRows(many_rows(), "l2")
    settings = {
        "metric": "l2", "max_iterations": 7, "tolerance": 1e-3, "steps": schedule("minibatch", 6000, 40),
    }  # fmt: skip
    saved = []

    def checkpoint(state):
        saved.append(tmp_path / f"{state.passes}.npz")
        state.save(saved[-1])

    whole = lloyd(rows, initial_state(rows, 40, "random", 2, seed=0), checkpoint=checkpoint, **settings)
    assert (whole.steps == len(settings["steps"]) - 1).all()
    for path in saved[::2]:
        resumed = lloyd(rows, LloydState.load(path), **settings)
        assert resumed.centroids.tobytes() == whole.centroids.tobytes()


@pytest.mark.parametrize(("num_clusters", "init"), [(40, "random"), (600, "kmeans||")])
def test_threads_do_not_change_a_bit(small_scale, num_clusters, init):
    x = many_rows()
    one, three = (KMeans(num_clusters, threads=threads, init=init, random_state=0).fit(x) for threads in (1, 3))
    assert one.cluster_centers_.tobytes() == three.cluster_centers_.tobytes()
    assert one.inertia_ == three.inertia_


@pytest.mark.parametrize("init", ["auto", "k-means++", "kmeans||"])
def test_spread_starts_beat_a_random_one(init):
    x = many_rows()
    start = {name: [KMeans(40, init=name, max_iterations=1, random_state=seed).fit(x).inertia_ for seed in range(4)]
             for name in (init, "random")}  # fmt: skip
    assert np.mean(start[init]) < 0.9 * np.mean(start["random"])


def test_kmeans_parallel_with_few_distinct_rows():
    x = np.repeat(np.array([[0.0, 1.0], [2.0, 3.0], [5.0, 5.0]]), 50, axis=0)
    model = KMeans(5, init="kmeans||", random_state=0).fit(x)
    assert model.inertia_ == 0 and len(np.unique(model.labels_)) == 3
