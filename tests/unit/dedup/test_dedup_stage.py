"""Planted duplicates are found, and the list of shards without them is a dataset."""

import io
import json
import struct
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from tars import write_tar

from sslscale.config import RunConfig
from sslscale.dedup.pairs import exact_pairs, groups_of
from sslscale.dedup.stage import CompareWorker, run_dedup
from sslscale.embed.stage import run_embed
from sslscale.errors import UserError
from sslscale.rundir import RunDir
from sslscale.runtime.base import make_runtime
from sslscale.shards.dataset import open_shards
from sslscale.shards.plan import Span
from sslscale.shards.stream import Failure, read_spans

IMAGES, EXACT, NEAR, SIDE, SHARDS = 600, 40, 60, 32, 3


def encoded(pixels, format, **options):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format, **options)
    return data.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder of shards, and key -> key of what each planted sample is a duplicate of."""
    folder, generator = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    photos = load_sample_images().images
    samples = []
    while len(samples) < IMAGES:  # many of them overlap
        photo = photos[len(samples) % 2]
        x, y = generator.integers(0, photo.shape[1] - SIDE), generator.integers(0, photo.shape[0] - SIDE)
        pixels = photo[y : y + SIDE, x : x + SIDE]
        if pixels.std() > 15:  # a piece of plain sky is like any other
            samples.append((f"own-{len(samples):04d}", "png", pixels))
    files = [(key, kind, encoded(pixels, "PNG")) for key, kind, pixels in samples]
    originals = generator.choice(IMAGES, EXACT + NEAR, replace=False)
    truth = {}
    for number, original in enumerate(originals.tolist()):
        key, _, pixels = samples[original]
        if number < EXACT:
            copy = (f"exact-{number:04d}", "png", files[original][2])
        else:
            copy = (f"near-{number:04d}", "jpg", encoded(pixels, "JPEG", quality=int(generator.integers(40, 95))))
        files.append(copy)
        truth[copy[0]] = key
    generator.shuffle(files)
    for shard in range(SHARDS):
        members = [(f"{key}.{kind}", data) for key, kind, data in files[shard::SHARDS]]
        write_tar(folder / f"s-{shard}.tar", [*members, (f"broken-{shard}.png", b"")])
    return folder, truth


def config(folder, workers=1, **dedup):
    return RunConfig.model_validate(
        {
            "datasets": {"train": str(folder)},
            "runtime": {"name": "local", "workers": workers},
            "embed": {"backbone": "pixels", "size": SIDE, "channels": 3},
            "dedup": dedup,
        }
    )


@pytest.fixture(scope="module")
def found(planted, tmp_path_factory):
    path = tmp_path_factory.mktemp("found") / "run"
    with RunDir(path) as run:
        return run, run_dedup(run, config(planted[0]), make_runtime("local"))


def test_planted_duplicates_are_found(planted, found):
    truth, (run, result) = planted[1], found
    table = pq.read_table(run.path / "dedup/main/duplicates.parquet").to_pylist()
    groups = {}
    for row in table:
        groups.setdefault(row["group"], []).append(row)
    group_of = {row["key"]: row["group"] for row in table}
    hits = {copy: group_of.get(copy, -1) == group_of.get(original, -2) for copy, original in truth.items()}
    assert all(hit for copy, hit in hits.items() if copy.startswith("exact"))
    assert sum(hit for copy, hit in hits.items() if copy.startswith("near")) >= 0.98 * NEAR
    wrong = [row for row in table if row["key"] not in truth and row["key"] not in truth.values()]
    assert len(wrong) <= 0.02 * len(table)
    for members in groups.values():
        assert [member["kind"] == "kept" for member in members] == [True] + [False] * (len(members) - 1)
    assert result["exact"] == EXACT and result["kept"] + result["exact"] + result["near"] == result["num_samples"]
    assert result["num_samples"] == IMAGES + EXACT + NEAR and result["unread_pairs"] == 0


def test_the_list_without_them_is_a_dataset(planted, found, tmp_path):
    folder, (run, result) = planted[0], found
    whole, kept = open_shards(str(folder)), open_shards(result["lists"]["train"])
    assert kept.num_samples == result["kept"] + SHARDS  # the broken ones are not duplicates
    assert kept.num_excluded == result["exact"] + result["near"] and kept.fingerprint != whole.fingerprint
    samples = [
        sample
        for shard, count in enumerate(kept.counts.tolist())
        for sample in read_spans(kept, [Span(shard, 0, count)])
    ]
    keys = [sample.key for sample in samples]
    table = pq.read_table(run.path / "dedup/main/duplicates.parquet").to_pylist()
    excluded = {row["key"] for row in table if row["kind"] != "kept"}
    assert len(set(keys)) == len(keys) and not excluded & set(keys) and len(keys) + len(excluded) == whole.num_samples
    assert not any(isinstance(sample, Failure) for sample in samples)
    with RunDir(tmp_path / "run") as other:
        settings = config(result["lists"]["train"])
        embedded = run_embed(other, settings, make_runtime("local"))["train"]
        assert embedded["samples_in"] == kept.num_samples and embedded["excluded"] == kept.num_excluded
        assert embedded["failed"] == SHARDS
        again = run_dedup(other, settings, make_runtime("local"))
    assert again["exact"] == 0 and again["near"] <= 1  # neighbourhoods are others without the duplicates


def test_workers_and_a_second_call_change_nothing(planted, found, tmp_path):
    run, result = found
    with RunDir(run.path) as same:
        assert run_dedup(same, config(planted[0]), make_runtime("local")) == result
    with RunDir(tmp_path / "run") as other:
        run_dedup(other, config(planted[0], workers=2), make_runtime("local"))
    tables = [pq.read_table(path / "dedup/main/duplicates.parquet") for path in (run.path, tmp_path / "run")]
    assert tables[0].equals(tables[1])


def test_a_pair_that_cannot_be_read_is_not_called_different(tmp_path):
    picture = encoded(np.arange(64, dtype=np.uint8).reshape(8, 8), "PNG")
    profiled = (
        picture[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21))) + picture[33:]
    )  # more than PIL takes
    members = [("a.png", picture), ("b.png", picture), ("c.png", picture[:40]), ("d.png", profiled), ("e.txt", b"text")]
    write_tar(tmp_path / "shards" / "a.tar", members)
    worker = CompareWorker({"train": open_shards(str(tmp_path / "shards"))})
    a, b, c, d, e = (("train", 0, record) for record in range(5))
    assert worker.compare([(a, b, True), (a, c, True), (a, d, True), (a, e, True)]) == [True, None, None, None]


def test_a_threshold_on_the_features_of_the_run(planted, tmp_path):
    with RunDir(tmp_path / "run") as run:
        run_embed(run, config(planted[0]), make_runtime("local"))
        strict = run_dedup(
            run, config(planted[0], features="embedded", threshold=0.9999), make_runtime("local"), name="strict"
        )
        loose = run_dedup(run, config(planted[0], features="embedded", threshold=0.98), make_runtime("local"))
    assert strict["exact"] == loose["exact"] == EXACT and strict["near"] < loose["near"]
    assert loose["near_pairs"] == loose["candidate_pairs"] and not (tmp_path / "run/thumbnails").exists()


def test_features_that_are_not_there_are_asked_for(planted, tmp_path):
    with RunDir(tmp_path / "run") as run, pytest.raises(UserError, match="sslscale embed"):
        run_dedup(run, config(planted[0], features="embedded"), make_runtime("local"))
    assert not (tmp_path / "run").exists()


def test_shards_that_were_not_embedded_are_not_compared(planted, found, tmp_path):
    filtered = found[1]["lists"]["train"]
    with RunDir(tmp_path / "run") as run:
        run_embed(run, config(filtered), make_runtime("local"))
        with pytest.raises(UserError, match="other shards than the config names"):
            run_dedup(run, config(planted[0], features="embedded"), make_runtime("local"))


def test_all_copies_of_a_picture_that_has_more_than_k(tmp_path):
    photo, generator = load_sample_images().images[0], np.random.default_rng(1)
    crops = [
        photo[y : y + SIDE, x : x + SIDE]
        for x, y in generator.integers(0, min(photo.shape[:2]) - SIDE, (800, 2))
        if photo[y : y + SIDE, x : x + SIDE].std() > 15
    ]
    copies = [encoded(crops[0], "JPEG", quality=quality) for quality in range(40, 96, 4)]
    members = [(f"own-{number:03d}.png", encoded(crop, "PNG")) for number, crop in enumerate(crops[:400])]
    write_tar(tmp_path / "a.tar", [*members, *((f"copy-{number:02d}.jpg", data) for number, data in enumerate(copies))])
    with RunDir(tmp_path / "run") as run:
        run_dedup(run, config(tmp_path / "a.tar"), make_runtime("local"))
        table = pq.read_table(run.path / "dedup/main/duplicates.parquet").to_pylist()
    (group,) = {row["group"] for row in table if row["key"] == "own-000"}
    assert sorted(row["key"] for row in table if row["group"] == group) == sorted(
        ["own-000", *(f"copy-{number:02d}" for number in range(len(copies)))]
    )


def test_texts_have_no_thumbnails(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{number}.txt", b"a text") for number in range(3)])
    with RunDir(tmp_path / "run") as run, pytest.raises(UserError, match="read as an image"):
        run_dedup(run, config(tmp_path / "a.tar"), make_runtime("local"))


def test_pairs_and_groups():
    hashes = np.array([b"a", b"b", b"a", b"c", b"a"], dtype="V16")
    assert exact_pairs(hashes).tolist() == [[0, 2], [0, 4]]
    assert groups_of(np.array([[0, 2], [2, 4], [5, 3]]), 7).tolist() == [0, 1, 0, 3, 0, 3, 6]


@pytest.mark.parametrize(("text", "message"), [(None, "does not exist"), ("{}", "cannot be read")])
def test_a_list_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "list.json"
    if text is not None:
        path.write_text(json.dumps(json.loads(text)))
    with pytest.raises(UserError, match=message):
        open_shards(str(path))
