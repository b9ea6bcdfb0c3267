from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest

from sslscale.config.models import PackConfig
from sslscale.errors import UserError
from sslscale.rundir import Stage
from sslscale.shards import write
from sslscale.shards.dataset import open_shards
from sslscale.shards.decode import decode_image, label_of
from sslscale.shards.plan import Span
from sslscale.shards.sources import make_source
from sslscale.shards.stream import read_spans


def config(output, **settings) -> PackConfig:
    return PackConfig(**{"source": "digits", "output": str(output), "samples_per_shard": 40, "limit": 100, "workers": 1}
                      | settings)  # fmt: skip


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_the_shards_hold_the_source(tmp_path):
    result = write.run_pack(config(tmp_path))
    shards = open_shards(str(tmp_path / "train"))
    assert shards.counts.tolist() == [40, 40, 20]
    source = make_source("digits")
    samples = [sample for i, n in enumerate(shards.counts) for sample in read_spans(shards, [Span(i, 0, n)])]
    assert [sample.key for sample in samples] == [f"train-{index:06d}" for index in range(100)]
    for index in (0, 41, 99):
        example = source.example("train", index)
        assert np.array_equal(decode_image(samples[index].data, 1, None)[0], example.data)
        assert label_of(samples[index].data) == example.label
    assert result == json.loads((tmp_path / "pack.json").read_text())
    assert result["splits"]["train"]["fingerprint"] == shards.fingerprint
    assert result["samples"] == 100
    for info in shards.shards:
        data = (tmp_path / "train" / info.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (info.bytes, info.sha256)


def test_shards_are_byte_identical_whatever_the_workers(tmp_path):
    write.run_pack(config(tmp_path / "one"))
    write.run_pack(config(tmp_path / "two", workers=2))
    assert contents(tmp_path / "one" / "train") == contents(tmp_path / "two" / "train")


def test_images_in_files_are_copied_as_they_are(tmp_path, png):
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "a.png").write_bytes(png(3))
    write.run_pack(config(tmp_path / "out", source="imagefolder", path=str(tmp_path / "in"), format="jpeg"))
    [sample] = read_spans(open_shards(str(tmp_path / "out" / "train")), [Span(0, 0, 1)])
    assert sample.data["png"] == png(3)
    assert json.loads(sample.data["json"]) == {"class": "cat", "path": "cat/a.png"}


def test_a_second_call_writes_only_what_is_missing(tmp_path, monkeypatch):
    first = write.run_pack(config(tmp_path))
    before = contents(tmp_path / "train")
    written = []
    original = write.ShardWriter.write
    monkeypatch.setattr(
        write.ShardWriter, "write", lambda self, job, broadcast=None: (written.append(job.name), original(self, job))[1]
    )
    assert write.run_pack(config(tmp_path, workers=2)) == first
    assert written == []
    (tmp_path / "train" / "train-00001.tar").rename(tmp_path / "train" / ".train-00001.tar.1.tmp")
    assert write.run_pack(config(tmp_path)) == first
    assert written == ["train-00001.tar"]
    assert contents(tmp_path / "train") == before


def test_other_settings_are_refused_and_overwritten_on_demand(tmp_path):
    write.run_pack(config(tmp_path))
    with pytest.raises(UserError, match=r"samples_per_shard: 40 -> 60"):
        write.run_pack(config(tmp_path, samples_per_shard=60))
    assert open_shards(str(tmp_path / "train")).counts.tolist() == [40, 40, 20]
    write.run_pack(config(tmp_path, samples_per_shard=60), overwrite=True)
    assert sorted(contents(tmp_path / "train")) == ["shards.json", "train-00000.tar", "train-00001.tar"]


def test_files_of_others_are_not_overwritten(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        write.run_pack(config(tmp_path))
    assert (tmp_path / "train" / "mine.txt").read_text() == "mine"


def test_a_failing_source_leaves_no_half_shard(tmp_path, monkeypatch):
    original = write.ShardWriter._encode
    calls = iter(range(1000))

    def fails(self, image):
        if next(calls) == 50:
            raise RuntimeError("disk on fire")
        return original(self, image)

    monkeypatch.setattr(write.ShardWriter, "_encode", fails)
    with pytest.raises(RuntimeError, match="disk on fire"):
        write.run_pack(config(tmp_path))
    assert list(contents(tmp_path / "train")) == ["train-00000.tar"]
    assert not (tmp_path / "pack.json").exists()
    assert write.run_pack(config(tmp_path))["samples"] == 100


def test_a_pack_killed_before_its_first_marker_goes_on(tmp_path, monkeypatch):
    original = Stage.finish_part

    def killed(self, part, *arguments):
        if part.endswith(".tar"):
            raise KeyboardInterrupt
        original(self, part, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stage, "finish_part", killed)
        write.run_pack(config(tmp_path))
    assert list(contents(tmp_path / "train")) == ["train-00000.tar"]
    assert write.run_pack(config(tmp_path))["samples"] == 100


def test_a_split_whose_name_would_end_its_keys_is_refused(tmp_path, png):
    (tmp_path / "in/train.v2/cat").mkdir(parents=True)
    (tmp_path / "in/train.v2/cat/a.png").write_bytes(png(3))
    settings = {"source": "imagefolder", "path": str(tmp_path / "in"), "options": {"splits": ["train.v2"]}}
    with pytest.raises(UserError, match=r"no dot.*\n.*train\.v2"):
        write.run_pack(config(tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_an_empty_split_is_refused_before_anything_starts(tmp_path, png):
    for file in ("train/cat/a.png", "test/cat/b.tif"):
        (tmp_path / "in" / file).parent.mkdir(parents=True)
        (tmp_path / "in" / file).write_bytes(png(3))
    settings = {"source": "imagefolder", "path": str(tmp_path / "in")}
    with pytest.raises(UserError, match=r"a split has no samples\n  got:     test \(skipped: 1 tif\)"):
        write.run_pack(config(tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()
    packed = write.run_pack(config(tmp_path / "out", **settings, options={"splits": ["train"]}))
    assert list(packed["splits"]) == ["train"]


def test_what_the_source_passed_over_is_in_pack_json(tmp_path, png):
    (tmp_path / "in").mkdir()
    for file in ("a.png", "b.tif"):
        (tmp_path / "in" / file).write_bytes(png(3))
    write.run_pack(config(tmp_path / "out", source="imagefolder", path=str(tmp_path / "in")))
    assert json.loads((tmp_path / "out" / "pack.json").read_text())["skipped"] == {"tif": 1}
    assert write.run_pack(config(tmp_path / "digits"))["skipped"] == {}


def test_other_pixels_in_files_of_equal_names_and_sizes_are_refused(tmp_path, png):
    for name, value in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png(value))
        os.utime(tmp_path / name / "a.png", (0, value))
    sizes = {(tmp_path / name / "a.png").stat().st_size for name in ("one", "two")}
    assert len(sizes) == 1
    write.run_pack(config(tmp_path / "out", source="imagefolder", path=str(tmp_path / "one")))
    with pytest.raises(UserError, match=r"newest of 1970-01-01 00:00:01 UTC.* -> '1 files.*00:00:02 UTC"):
        write.run_pack(config(tmp_path / "out", source="imagefolder", path=str(tmp_path / "two")))
