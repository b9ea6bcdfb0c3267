"""The tables of image objectives and of one class at a time."""

import numpy as np
import one_class
import pytest
import quality_images
from sittings import recipe_hash
from sklearn.neighbors import KernelDensity


def image_line(recipe, seed, **more):
    measured = {"acc": 0.5, "nmi": 0.5, "ari": 0.5, "knn": 0.9}
    return {"dataset": "digits", "recipe": recipe, "seed": seed, **measured, **more}


def test_without_a_line_of_pixels_nothing_is_said_of_them():
    rows = quality_images.table([image_line("simclr", 0, seconds=70.0, rankme=None)])
    assert rows[0]["knn_above_pixels"] is None and rows[0]["rankme"] is None


def test_rows_are_compared_with_pixels_and_with_their_budget(capsys):
    lines = [image_line("pixels", 0, knn=0.95), image_line("simclr", 0, seconds=70.0)]
    pixels, simclr = quality_images.table(lines)
    assert pixels["knn_above_pixels"] is None and pixels["budget_share"] is None
    assert simclr["knn_above_pixels"] is False and simclr["budget_share"] == pytest.approx(70 / 60)
    quality_images.show([pixels, simclr])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "simclr" in line]
    assert "kNN not above pixels" in line and "OVER BUDGET" in line


def test_pixels_depend_on_the_base_alone():
    configs = quality_images.recipes("digits")
    assert configs["pixels"].name == "digits.yaml" and "simclr" in configs
    assert recipe_hash(configs["pixels"]) != recipe_hash(configs["simclr"])


def class_line(recipe, normal, **more):
    return {"dataset": "fashion_mnist", "recipe": recipe, "seed": 0, "class": normal, "auroc": 0.9, **more}


def test_a_mean_says_over_how_many_classes_it_is_and_scoring_is_part_of_the_budget(capsys):
    seconds = {"training_seconds": 300.0, "scoring_seconds": 60.0}
    lines = [class_line("deep_svdd", normal, **seconds) for normal in (0, 1, 2)] + [class_line("pixels_5nn", 0)]
    trained, nearest = one_class.table(lines)
    assert trained["classes"] == 3 and trained["budget_share"] == pytest.approx(1.2)
    assert nearest["budget_share"] is None
    one_class.show([trained, nearest])
    out = capsys.readouterr().out
    assert "3/10" in out and "1/10" in out and out.count("OVER BUDGET") == 1


def test_density_is_scikit_learns_at_the_bandwidth_of_the_highest_leave_one_out_likelihood():
    generator = np.random.default_rng(0)
    x, y = (generator.standard_normal((rows, 3)).astype(np.float32) for rows in (60, 20))
    found = one_class.log_density(x, y)
    around = one_class.euclidean_distances(x, squared=True)
    np.fill_diagonal(around, np.inf)
    around = np.median(around.min(axis=1)) / 3
    bandwidths = np.sqrt(around * np.geomspace(1 / 16, 16, one_class.BANDWIDTHS))

    def left_out(bandwidth):
        return sum(
            KernelDensity(bandwidth=bandwidth).fit(np.delete(x, row, axis=0)).score(x[[row]]) for row in range(len(x))
        )

    expected = KernelDensity(bandwidth=max(bandwidths, key=left_out)).fit(x).score_samples(y)
    np.testing.assert_allclose(found - found[0], expected - expected[0], atol=1e-4)
