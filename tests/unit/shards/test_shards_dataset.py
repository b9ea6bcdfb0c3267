from __future__ import annotations

import json
import pickle

import fsspec
import numpy as np
import pytest

from sslscale.errors import UserError
from sslscale.shards.cache import ShardCache
from sslscale.shards.dataset import open_shards, write_index
from sslscale.shards.stream import spread_spans


def test_one_pass_makes_shards_json_and_later_calls_read_it(make_shards):
    folder = make_shards([3, 5])
    made = open_shards(str(folder))
    index = json.loads((folder / "shards.json").read_text())
    assert [(shard["name"], shard["samples"]) for shard in index["shards"]] == [
        ("train-00000.tar", 3),
        ("train-00001.tar", 5),
    ]
    index["shards"][1]["samples"] = 6  # read, not made again
    (folder / "shards.json").write_text(json.dumps(index))
    known = open_shards(str(folder))
    assert (made.num_samples, known.num_samples) == (8, 9)
    assert known.offsets.tolist() == [0, 3]
    assert made.fingerprint != known.fingerprint
    assert made.fingerprint == pickle.loads(pickle.dumps(made)).fingerprint


def test_a_brace_range_and_a_single_tar_are_parts_of_a_folder(make_shards, tmp_path):
    folder = make_shards([3, 5, 2])
    ranged = open_shards(f"{folder}/train-{{00001..00002}}.tar", cache=ShardCache(tmp_path / "cache", 2**30))
    assert ranged.counts.tolist() == [5, 2]
    assert not (folder / "shards.json").exists()  # it would not tell of the first shard
    assert open_shards(str(folder / "train-00001.tar")).counts.tolist() == [5]
    open_shards(str(folder))
    assert open_shards(f"{folder}/train-{{00001..00002}}.tar").fingerprint == ranged.fingerprint


def test_a_folder_that_cannot_be_written_keeps_its_index_in_the_cache(make_shards, tmp_path, monkeypatch):
    folder = make_shards([3])
    monkeypatch.setattr("os.access", lambda *_: False)
    assert open_shards(str(folder), cache=ShardCache(tmp_path / "cache", 2**30)).counts.tolist() == [3]
    assert not (folder / "shards.json").exists()
    monkeypatch.setattr("sslscale.shards.dataset.TarShard", None)  # the second call reads no tar
    assert open_shards(str(folder), cache=ShardCache(tmp_path / "cache", 2**30)).counts.tolist() == [3]


def test_remote_shards_are_copied_once(make_shards, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(make_shards([3, 2])), "/bucket", recursive=True)
    shards = open_shards("memory://bucket", cache=ShardCache(tmp_path / "cache", 2**30))
    path = shards.local_path(shards.shards[1])
    assert path.read_bytes() == memory.cat_file("/bucket/train-00001.tar")
    assert shards.open(1).keys == ["s0003", "s0004"]
    memory.rm("/bucket", recursive=True)
    assert shards.local_path(shards.shards[1]) == path
    assert all(not name.name.startswith(".") for name in path.parent.iterdir())


@pytest.mark.parametrize("limit", [1, 3, 7, 8, 20])
def test_samples_are_spread_over_the_whole_dataset(make_shards, limit):
    shards = open_shards(str(make_shards([3, 5])))
    ids = [int(shards.offsets[span.shard]) + span.start for span in spread_spans(shards, limit)]
    assert len(set(ids)) == min(limit, 8) and ids == sorted(ids)
    assert max(np.diff([*ids, 8])) <= -(-8 // min(limit, 8))


def test_damage_without_a_promise_counts_as_one_lost_sample(make_shards):
    folder = make_shards([3])
    (folder / "train-00001.tar").touch()
    assert open_shards(str(folder)).counts.tolist() == [3, 1]


def test_a_shard_that_has_changed_since_it_was_counted_is_counted_again(make_shards):
    folder = make_shards([3, 5])
    before = open_shards(str(folder))
    make_shards([3, 70])
    after = open_shards(str(folder))
    assert after.counts.tolist() == [3, 70] and after.fingerprint != before.fingerprint


def test_a_promise_stays_where_a_shard_is_cut_off(make_shards):
    folder = make_shards([3])
    tar = folder / "train-00000.tar"
    write_index(folder, [{"name": tar.name, "samples": 3, "bytes": tar.stat().st_size, "sha256": "0"}])
    before = open_shards(str(folder))
    tar.write_bytes(tar.read_bytes()[:1500])
    after = open_shards(str(folder))
    assert after.counts.tolist() == [3] and after.shards[0].bytes == 1500
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("url", "what"),
    [("pipe:cat x.tar", "refused"), ("{tmp}/none", "does not exist"), ("{tmp}/empty", "no shards"),
     ("{tmp}/none.tar", "a shard does not exist"), ("{tmp}/shards-{{0..}}", "does not exist"),
     ("nosuch://bucket", "cannot be opened"), ("{tmp}/{{a,b}}/x.tar", "in one folder")],
)  # fmt: skip
def test_locations_that_are_wrong(tmp_path, url, what):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=what):
        open_shards(url.format(tmp=tmp_path))


def test_a_shards_json_that_does_not_match_is_refused(make_shards, write_tar):
    folder = make_shards([3, 5])
    shards = open_shards(str(folder))
    (folder / "train-00001.tar").rename(folder / "away")
    with pytest.raises(UserError, match=r"(?s)does not match.*train-00001.tar"):
        open_shards(str(folder))
    write_tar(folder / "train-00001.tar", [(f"{i}.png", b"x") for i in range(6)])
    with pytest.raises(UserError, match="out of date"):
        shards.open(1)
    (folder / "shards.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        open_shards(str(folder))
