"""What is gathered equals what brute force over all rows finds, and what was lost is counted."""

from __future__ import annotations

import base64
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sslscale import storage
from sslscale.errors import UserError
from sslscale.features import FeatureStore, open_features
from sslscale.report.collect import collect
from sslscale.report.samples import SIDE, picture, thumbnail
from sslscale.shards.tar import SampleError


def pixels_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_exemplars_are_the_rows_nearest_to_their_centroid(make_run):
    made = make_run()
    clustering = collect(made.run, made.config).clustering
    sizes = np.bincount(made.assignments)
    largest = sorted(range(len(sizes)), key=lambda c: (-sizes[c], c))[:4]
    assert [view.number for view in clustering.shown] == largest
    for view in clustering.shown:
        rows = np.flatnonzero(made.assignments == view.number)
        nearest = sorted(rows, key=lambda row: (made.distances[row], row))[:3]
        assert [sample.key for sample in view.exemplars] == [made.keys[row] for row in nearest]
        for sample, row in zip(view.exemplars, nearest, strict=True):
            assert (pixels_of(sample.image) == row).all()  # sample i is a picture of grey i
        counts = np.bincount(made.labels[rows])
        assert counts[view.label] == counts.max()
        assert view.label_share == counts.max() / len(rows)


def test_most_and_least_anomalous_with_their_neighbours(make_run):
    made = make_run()
    anomalies = collect(made.run, made.config).anomalies
    rows = range(len(made.keys))
    most = sorted(rows, key=lambda row: (-made.scores[row], row))[:5]
    least = sorted(rows, key=lambda row: (made.scores[row], row))[:5]
    assert [(item.sample.key, item.score) for item in anomalies.most] == [(made.keys[r], made.scores[r]) for r in most]
    assert [item.sample.key for item in anomalies.least] == [made.keys[r] for r in least]
    place = {row_id: place for place, row_id in enumerate(made.row_ids.tolist())}
    for item, row in zip(anomalies.most, most, strict=True):
        expected = [made.keys[place[row_id]] for row_id in made.neighbours[row, :2].tolist()]
        assert [sample.key for sample in item.neighbours] == expected
    span = (float(made.scores.min()), float(made.scores.max()))
    counts, edges = np.histogram(made.scores, bins=len(anomalies.counts), range=span)
    assert anomalies.counts == counts.tolist()
    assert anomalies.edges == pytest.approx(edges.tolist())


def test_neighbours_are_rows_of_the_reference_set(make_run):
    made = make_run()
    path = made.run.stage_path("anomaly", "main")
    stage = json.loads((path / "stage.json").read_text())
    stage["parents"]["reference"] = open_features(made.run, ["test"]).identity
    (path / "stage.json").write_text(json.dumps(stage))
    result = json.loads((path / "result.json").read_text())
    (path / "result.json").write_text(json.dumps({**result, "reference": ["test"]}))
    for file in path.glob("neighbours/*/*.npy"):
        np.save(file, np.zeros_like(np.load(file)))  # row 0 of the reference: the first test sample
    anomalies = collect(made.run, made.config).anomalies
    first = made.keys[sum([7, 0, 12])]
    assert {sample.key for item in anomalies.most for sample in item.neighbours} == {first}


def test_a_metric_that_was_not_finite_leaves_a_gap(make_run):
    made = make_run()
    curves = {curve.name: curve for curve in collect(made.run, made.config).training.curves}
    assert 10 not in curves["loss"].steps and len(curves["loss"].steps) == 499
    assert curves["loss"].values[:2] == [5.0, 2.5]
    assert curves["eval_rankme"].values == [41.52]


def test_failures_are_counted_by_reason_whatever_their_numbers(make_run):
    made = make_run()
    lines = [{"key": f"k{i}", "reason": f"the .mp4 ends at byte {i}"} for i in range(5)] + [
        {"key": "n", "reason": "no"}
    ]
    path = made.run.path / "pretrain" / "failed"
    path.mkdir()
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    failures = {failures.stage: failures for failures in collect(made.run, made.config).failures}
    assert set(failures) == {"pretrain", "embed/train", "embed/test"}
    assert failures["pretrain"].count == 6
    assert failures["pretrain"].reasons == [("the .mp4 ends at byte …", 5, "k0"), ("no", 1, "n")]


def test_counts_that_do_not_add_up_are_seen(make_run):
    made = make_run()
    assert all(count.adds_up for count in collect(made.run, made.config).counts)
    path = made.run.stage_path("cluster", "main") / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "num_samples": result["num_samples"] - 1}))
    wrong = [count.stage for count in collect(made.run, made.config).counts if not count.adds_up]
    assert wrong == ["cluster/main"]


@pytest.mark.parametrize("kind", ["index", "cluster", "anomaly"])
def test_an_answer_from_other_features_is_refused(make_run, kind):
    made = make_run()
    for other in {"index", "cluster", "anomaly"} - {kind}:
        shutil.rmtree(made.run.path / other)
    store = FeatureStore.open(made.run.stage_path("embed", "test"))
    record = store.write_part(0, np.ones((9, 4)), made.keys[-9:], ["test-0.tar"] * 9, range(9))
    store.commit([record])
    with pytest.raises(UserError, match=r"(made|built) from other features"):
        collect(made.run, made.config)


def test_the_command_that_mends_an_answer_can_be_pasted(make_run, monkeypatch):
    made = make_run()
    shutil.rmtree(made.run.path / "index")
    store = FeatureStore.open(made.run.stage_path("embed", "test"))
    store.commit([store.write_part(0, np.ones((9, 4)), made.keys[-9:], ["test-0.tar"] * 9, range(9))])
    monkeypatch.setattr(storage, "shown", lambda path: str(path).replace(str(made.run.path), "s3://b/my runs/a"))
    with pytest.raises(UserError) as error:
        collect(made.run, made.config)
    assert error.value.what.startswith("s3://b/my runs/a/cluster/main was made from")
    assert error.value.fix == "sslscale cluster --run 's3://b/my runs/a' --name main --overwrite"


def test_a_sample_that_left_its_shard_is_shown_as_that(make_run, tmp_path):
    made = make_run()
    (tmp_path / "data" / "train" / "train-0.tar").rename(tmp_path / "data" / "train" / "other.tar")
    anomalies = collect(made.run, made.config).anomalies
    assert anomalies.most[0].sample.image is None
    assert anomalies.most[0].sample.problem == "no longer in train-0.tar"


def test_thumbnails_enlarge_exactly_and_shrink_within_the_side():
    rng = np.random.default_rng(0)
    tiny = rng.integers(0, 255, (3, 8, 6), dtype=np.uint8)
    enlarged = pixels_of(thumbnail(tiny))
    assert enlarged.shape == (SIDE, SIDE * 6 // 8, 3)
    assert (enlarged[::12, ::12] == tiny.transpose(1, 2, 0)).all()
    large = thumbnail(rng.integers(0, 255, (3, 400, 200), dtype=np.uint8))
    assert large.startswith("data:image/jpeg;") and pixels_of(large).shape == (SIDE, SIDE // 2, 3)
    with pytest.raises(SampleError, match="no image"):
        picture({"__key__": "a", "txt": b"words"})
