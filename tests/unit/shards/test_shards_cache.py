"""Copies of remote shards: within their limit, read ahead, and made again where they are missed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from sslscale import storage
from sslscale.errors import StageError, UserError
from sslscale.rundir import hash_file
from sslscale.shards import cache
from sslscale.shards.cache import ShardCache
from sslscale.shards.dataset import INDEX, ShardSet, open_shards, write_index
from sslscale.shards.plan import Cursor, Span
from sslscale.shards.stream import Failure, Sample, StreamReader, read_spans
from sslscale.shards.tar import _open


@pytest.fixture
def remote(make_shards, tmp_path):
    """`remote(limit, counts)` puts shards into fsspec's memory filesystem and opens them."""
    memory = fsspec.filesystem("memory")

    def put(limit: int, counts: list[int]) -> ShardSet:
        folder = str(make_shards(counts))
        open_shards(folder)  # which writes shards.json
        memory.put(folder, "/cached", recursive=True)
        return open_shards("memory://cached", ShardCache(tmp_path / "cache", limit))

    yield put
    memory.rm("/cached", recursive=True)


def copies(shards: ShardSet) -> list[str]:
    """What is there once nothing more is being fetched."""
    assert shards.cache is not None
    while cache._under_way:
        time.sleep(0.01)
    return sorted(path.name.rpartition("-")[2] for path in (shards.cache.folder / "shards").iterdir())


def keys(samples) -> list[str]:
    assert all(isinstance(sample, Sample) for sample in samples)
    return [sample.key for sample in samples]


def test_the_copies_used_longest_ago_go_first(remote):
    shards = remote(25_000, [3, 3, 3])  # two of three fit
    assert not any(map(shards.is_here, range(3)))
    for shard in (0, 1, 0, 2):
        shards.local_path(shards.shards[shard])
    assert copies(shards) == ["00000.tar", "00002.tar"]
    assert [shards.is_here(shard) for shard in range(3)] == [True, False, True]


def test_a_cache_smaller_than_a_shard_reads_every_sample_once(remote, tmp_path):
    shards = remote(0, [5, 4, 3])
    spans = [Span(0, 0, 5), Span(1, 0, 4), Span(2, 0, 3)]
    assert keys(list(read_spans(shards, spans))) == [f"s{n:04d}" for n in range(12)]
    reader = StreamReader(shards, 0, 1, seed=0, shuffle_block=100, cursor=Cursor())
    assert sorted(keys([reader.next() for _ in range(12)])) == [f"s{n:04d}" for n in range(12)]
    assert len(copies(shards)) <= 1  # two that arrive together may each make room by the other


def test_a_shard_that_is_missed_is_fetched_again_but_not_another_one(remote):
    shards = remote(2**30, [3])
    tar = shards.open(0)
    Path(tar.path).unlink()
    assert tar.read(0)["__key__"] == "s0000"
    fsspec.filesystem("memory").pipe_file("/cached/train-00000.tar", b"x" * 512)
    assert tar.read(1)["__key__"] == "s0001", "an open file stays"
    Path(tar.path).unlink()
    _open.cache_clear()
    with pytest.raises(StageError, match="not complete"):
        tar.read(2)


def test_the_next_shard_comes_while_one_is_read(remote, monkeypatch):
    shards = remote(2**30, [3, 3, 3])
    fetched = []
    arrived = threading.Event()
    download = storage.download

    def watched(fs, source, target, size, sha256):
        download(fs, source, target, size, sha256)
        fetched.append(source.rpartition("-")[2])
        if len(fetched) == 2:
            arrived.set()

    monkeypatch.setattr(storage, "download", watched)
    samples = read_spans(shards, [Span(0, 0, 3), Span(1, 0, 3), Span(2, 0, 3)])
    next(samples)
    assert arrived.wait(10)
    assert sorted(fetched) == ["00000.tar", "00001.tar"]


def put(path: Path, name: str) -> None:
    fsspec.filesystem("memory").put_file(str(path), f"/packed/{name}")


@pytest.fixture
def packed(tmp_path, write_tar):
    """`packed(value, hashed)` packs one shard, always of the same size, and opens its folder."""

    def pack(value: bytes, hashed: bool) -> ShardSet:
        tar = write_tar(tmp_path / "packed" / "a.tar", [("a.txt", value)])
        record = {"name": "a.tar", "samples": 1, "bytes": tar.stat().st_size, "sha256": hash_file(tar)}
        put(tar, "a.tar")
        if hashed:
            write_index(tar.parent, [record])
            put(tar.parent / INDEX, INDEX)
        return open_shards("memory://packed", ShardCache(tmp_path / "cache", 2**30))

    yield pack
    fsspec.filesystem("memory").rm("/packed", recursive=True)


@pytest.mark.parametrize("hashed", [True, False])
def test_a_shard_that_was_packed_again_to_the_same_size_is_fetched_again(packed, hashed):
    for value in (b"old", b"new"):
        shards = packed(value, hashed)
        assert shards.open(0).read(0)["txt"] == value
    assert len(copies(shards)) == 2


def test_a_copy_that_has_not_the_hash_of_shards_json_is_refused(packed, tmp_path, write_tar):
    packed(b"old", True)
    put(write_tar(tmp_path / "packed" / "a.tar", [("a.txt", b"new")]), "a.tar")  # without its line in shards.json
    shards = open_shards("memory://packed", ShardCache(tmp_path / "other", 2**30))
    with pytest.raises(StageError, match="not the one that was listed"):
        shards.open(0)
    assert copies(shards) == []


def test_what_a_cut_shard_lost_is_counted_though_its_hash_is_another(packed, tmp_path):
    packed(b"old", True)
    tar = tmp_path / "packed" / "a.tar"
    tar.write_bytes(tar.read_bytes()[:514])
    put(tar, "a.tar")
    shards = open_shards("memory://packed", ShardCache(tmp_path / "other", 2**30))
    [failure] = read_spans(shards, [Span(0, 0, 1)])
    assert isinstance(failure, Failure) and "truncated" in failure.reason


def test_what_a_killed_process_left_of_a_download_goes(remote):
    shards = remote(2**30, [3])
    folder = shards.cache.folder / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    dead, arriving = folder / ".dead.tar.1.2.tmp", folder / ".arriving.tar.3.4.tmp"
    for path in (dead, arriving):
        path.write_bytes(b"half")
    os.utime(dead, (0, time.time() - 2 * storage.ARRIVING_SECONDS))
    shards.local_path(shards.shards[0])
    assert not dead.exists() and arriving.exists()


def test_remote_shards_want_a_cache(remote):
    remote(0, [3])
    with pytest.raises(UserError, match="need a cache"):
        next(read_spans(open_shards("memory://cached"), [Span(0, 0, 1)]))


def test_a_process_that_ends_waits_for_no_copy():
    script = (
        "import time\nfrom sslscale.shards.cache import _in_background\n"
        "first = _in_background(lambda: 'made')\nassert first.result(10) == 'made'\n"
        "for _ in range(8): _in_background(lambda: time.sleep(60))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


def test_what_a_copy_raises_is_raised_where_it_is_waited_for():
    with pytest.raises(ZeroDivisionError):
        cache._in_background(lambda: 1 / 0).result(10)
