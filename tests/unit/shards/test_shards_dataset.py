from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest

from sslscale.errors import UserError
from sslscale.rundir import hash_file
from sslscale.shards.cache import ShardCache
from sslscale.shards.dataset import open_shards, write_filtered, write_index
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
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
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


def packed_again(path: Path, write_tar) -> None:
    """Another content of the same size and count."""
    size = path.stat().st_size
    write_tar(path, [(f"{number}.txt", b"other") for number in range(3)])
    with path.open("ab") as file:
        file.truncate(size)
    os.utime(path, (0, 1))


def test_a_shard_that_has_changed_at_its_size_and_count_is_noticed(make_shards, write_tar):
    folder = make_shards([3, 5])
    before = open_shards(str(folder))
    os.utime(folder / "train-00001.tar", (0, 1))  # written again, to the same
    assert open_shards(str(folder)).fingerprint == before.fingerprint
    packed_again(folder / "train-00000.tar", write_tar)
    after = open_shards(str(folder))
    assert after.counts.tolist() == [3, 5] and after.shards[0].bytes == before.shards[0].bytes
    assert after.fingerprint != before.fingerprint
    assert open_shards(str(folder)).fingerprint == after.fingerprint


def test_an_index_that_knows_no_versions_is_believed_as_long_as_the_sizes_are_right(make_shards):
    folder = make_shards([3])
    size = (folder / "train-00000.tar").stat().st_size
    write_index(folder, [{"name": "train-00000.tar", "samples": 4, "bytes": size, "sha256": None}])
    assert open_shards(str(folder)).counts.tolist() == [4]


def test_versions_of_another_store_say_nothing(make_shards, tmp_path, monkeypatch):
    folder = make_shards([3])
    known = open_shards(str(folder))  # which writes shards.json
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/moved", recursive=True)
    monkeypatch.setattr("sslscale.shards.dataset.TarShard", None)  # nothing is copied to be counted again
    assert open_shards("memory://moved").fingerprint == known.fingerprint
    memory.rm("/moved", recursive=True)


@pytest.fixture
def filtered(make_shards, tmp_path):
    """`filtered(hashed)` is a list without record 1 of the first of two shards."""

    def write(hashed: bool) -> Path:
        folder = make_shards([3, 5])
        if hashed:
            write_index(folder, [hashed_row(path, count) for path, count in zip(tars(folder), (3, 5), strict=True)])
        shards = open_shards(str(folder))
        write_filtered(tmp_path / "list.json", [shards.shards[0].without([1]), shards.shards[1]])
        return folder

    return write


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def hashed_row(path: Path, samples: int) -> dict:
    return {"name": path.name, "samples": samples, "bytes": path.stat().st_size, "sha256": hash_file(path)}


@pytest.mark.parametrize("hashed", [True, False])
def test_a_filtered_list_of_shards_that_were_packed_again_is_refused(filtered, tmp_path, write_tar, hashed):
    folder, url = filtered(hashed), str(tmp_path / "list.json")
    shards = open_shards(url)
    assert shards.counts.tolist() == [2, 5] and shards.open(0).keys == ["s0000", "s0002"]
    os.utime(folder / "train-00000.tar", (0, 2))  # written again, to the same
    assert open_shards(url).fingerprint == shards.fingerprint
    packed_again(folder / "train-00000.tar", write_tar)
    if hashed:
        write_index(folder, [hashed_row(path, count) for path, count in zip(tars(folder), (3, 5), strict=True)])
    with pytest.raises(UserError, match=r"(?s)the shards changed since dedup.*train-00000\.tar"):
        open_shards(url)


def test_a_filtered_list_of_shards_of_another_size_or_that_are_gone_is_refused(filtered, tmp_path):
    folder, url = filtered(False), str(tmp_path / "list.json")
    entries = json.loads((tmp_path / "list.json").read_text())
    for entry in entries["shards"]:  # as they were written before layouts were known
        for field in ("layout", "version", "cut"):
            del entry[field]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    assert open_shards(url).counts.tolist() == [2, 5]
    with (folder / "train-00001.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=r"(?s)changed since dedup.*train-00001\.tar"):
        open_shards(url)
    (folder / "train-00001.tar").unlink()
    with pytest.raises(UserError, match=r"(?s)changed since dedup.*train-00001\.tar"):
        open_shards(url)


def test_the_file_that_is_out_of_date_is_named(make_shards, tmp_path, write_tar, monkeypatch):
    folder = make_shards([3])
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    shards = open_shards(str(folder), cache=ShardCache(tmp_path / "cache", 2**30))
    [index] = (tmp_path / "cache" / "indexes").iterdir()
    write_tar(folder / "train-00000.tar", [(f"{number}.png", b"x") for number in range(6)])
    with pytest.raises(UserError) as error:
        shards.open(0)
    assert error.value.fix == f"delete {index}: it is made again on the next use"


def test_a_shard_without_the_permission_to_read_it_is_not_counted_as_damaged(make_shards, monkeypatch):
    folder = make_shards([3])
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.R_OK)
    with pytest.raises(UserError, match="a shard cannot be read"):
        open_shards(str(folder))
    assert not (folder / "shards.json").exists()


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
     ("nosuch://bucket", "cannot be opened"), ("{tmp}/{{a,b}}/x.tar", "in one folder"),
     ("{tmp}/{{a,b}}", "names shards, not folders")],
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
