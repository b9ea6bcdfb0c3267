"""Pictures of samples in shards on a store: found by ranges of bytes, and never for more of them than is allowed."""

from __future__ import annotations

import tarfile
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
from tars import encode_png, write_tar

from sslscale.config import RunConfig
from sslscale.report import ranges as ranges_module
from sslscale.report.ranges import RangeReader, ranges
from sslscale.report.samples import SampleReader
from sslscale.rundir import RunDir
from sslscale.shards.dataset import ShardInfo, write_index
from sslscale.shards.tar import SampleError

SAMPLES = 400


class Store:
    """Shards in fsspec's memory, and how many bytes of them have been read."""

    def __init__(self, folder: Path, shards: dict[str, Path]) -> None:
        self.url = f"memory://{uuid.uuid4().hex}"
        self.fs = fsspec.filesystem("memory")
        listed = [
            {"name": name, "samples": SAMPLES, "bytes": path.stat().st_size, "sha256": None}
            for name, path in shards.items()
        ]
        write_index(folder, listed)
        for path in [*shards.values(), folder / "shards.json"]:
            self.fs.pipe_file(f"{self.url}/{path.name}", path.read_bytes())
        self.read = 0

    def count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From here on, what is read is counted."""
        cat_file = type(self.fs).cat_file

        def counted(fs, path, start=None, end=None, **kwargs):
            data = cat_file(fs, path, start=start, end=end, **kwargs)
            self.read += len(data)
            return data

        monkeypatch.setattr(type(self.fs), "cat_file", counted)


def pixels(number: int) -> np.ndarray:
    """Noise, so that sizes vary by the side of the picture: sample `number` is of its own."""
    generator = np.random.default_rng(number)
    return generator.integers(0, 255, (int(generator.integers(20, 100)), 60), dtype=np.uint8)


def samples(first: int, format: int = tarfile.PAX_FORMAT) -> list[tuple[str, bytes]]:
    long = "folder/" * 20 if format != tarfile.USTAR_FORMAT else ""  # in a header of its own
    members = []
    for number in range(first, first + SAMPLES):
        members += [(f"{long}s{number:05d}.png", encode_png(pixels(number))), (f"{long}s{number:05d}.cls", b"3")]
    return members


@pytest.fixture
def small_ranges(monkeypatch):
    """Ranges that begin at a few samples: shards of a megabyte are then large."""
    monkeypatch.setattr(ranges_module, "LEAST_BYTES", 4096)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_any_record_is_found_from_a_part_of_the_shard(tmp_path, monkeypatch, small_ranges, format):
    members = samples(0, format)
    path = write_tar(tmp_path / "a.tar", members, format)
    store = Store(tmp_path, {"a.tar": path})
    store.count(monkeypatch)
    info = ShardInfo("a.tar", f"{store.url}/a.tar", SAMPLES, path.stat().st_size)
    reader = RangeReader(2**40)
    wanted = [0, 1, 7, 100, 200, 201, 398, 399]
    for record in wanted:
        (name, png), _ = members[2 * record : 2 * record + 2]
        sample = reader.read(store.fs, f"{store.url}/a.tar", info, record, name.removesuffix(".png"))
        assert sample["png"] == png and sample["cls"] == b"3"
    assert store.read == 2**40 - reader.allowance
    assert store.read < len(wanted) * info.bytes / 4


def test_a_record_far_from_its_place_is_found_and_one_that_left_is_said_to(tmp_path, small_ranges):
    members = [("first.png", encode_png(pixels(0)) + b"\0" * 500_000), *samples(1)]  # moves all the others
    path = write_tar(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)
    store = Store(tmp_path, {"a.tar": path})
    info = ShardInfo("a.tar", f"{store.url}/a.tar", SAMPLES + 1, path.stat().st_size)
    key, png = members[1][0].removesuffix(".png"), members[1][1]
    assert RangeReader(2**40).read(store.fs, info.url, info, 1, key)["png"] == png
    with pytest.raises(SampleError, match=r"no longer in a\.tar"):
        RangeReader(2**40).read(store.fs, info.url, info, 1, "another")


@pytest.mark.parametrize(("size", "samples"), [(10240, 1), (10**9, 10_000), (10**6, 5), (513, 700)])
def test_ranges_grow_from_around_the_record_to_the_whole_shard(size, samples):
    info = ShardInfo("a.tar", "a.tar", samples, size)
    for record in (0, samples // 3, samples - 1, samples + 5):
        found = list(ranges(info, record))
        assert found[-1] == (0, size)
        for (start, stop), (before, after) in zip(found[1:], found, strict=False):
            assert start <= before <= after <= stop and stop - start > after - before
    first, last = next(ranges(ShardInfo("a.tar", "a.tar", 10_000, 10**9), 5000))
    assert first < 5 * 10**8 < last and last - first < 2 * 10**7


@pytest.fixture
def remote(tmp_path, monkeypatch, small_ranges):
    """A reader of 20 shards on a store, whose settings may be given, and the records of one sample of each."""
    shards = {f"{n:02d}.tar": write_tar(tmp_path / f"{n:02d}.tar", samples(n * SAMPLES)) for n in range(20)}
    store = Store(tmp_path, shards)
    store.count(monkeypatch)
    records = [
        {"dataset": "train", "shard": name, "offset": 150, "key": f"{'folder/' * 20}s{n * SAMPLES + 150:05d}"}
        for n, name in enumerate(shards)
    ]

    def reader(**report: object) -> SampleReader:
        config = {"run": str(tmp_path / "run"), "datasets": {"train": store.url}, "report": report}
        return SampleReader(RunDir(tmp_path / "run"), RunConfig.model_validate(config))

    return reader, records, store, sum(path.stat().st_size for path in shards.values())


def test_single_samples_of_many_shards_do_not_bring_the_shards(remote, tmp_path):
    reader, records, store, total = remote
    shown = (own := reader()).show(records)
    assert own.unread == 0 and all(sample.image for sample in shown)
    assert len({sample.image for sample in shown}) == len(records)
    assert store.read < total / 4
    assert not list((tmp_path / "run").rglob("*.tar"))


def test_many_samples_of_one_shard_bring_it_once_and_a_copy_costs_nothing(remote):
    reader, records, store, _ = remote
    of_one = [
        {**records[0], "offset": number, "key": f"{'folder/' * 20}s{number:05d}"} for number in range(0, SAMPLES, 2)
    ]
    before = store.read
    assert all(sample.image for sample in reader().show(of_one))
    size = store.fs.size(f"{store.url}/00.tar")
    assert store.read - before < size + 10_000  # and the list of the shards
    assert all(sample.image for sample in reader(fetch_gb=0.0).show(of_one[:3]))


def test_what_is_beyond_the_allowance_is_counted_and_not_read(remote):
    reader, records, store, _ = remote
    own = reader(fetch_gb=300_000 / 2**30)
    shown = own.show(records)
    read = [sample for sample in shown if sample.image]
    assert 0 < len(read) < len(records)
    assert own.unread == len(records) - len(read)
    assert {sample.problem for sample in shown} - {None} == {"not read: it lies in a remote shard"}
    assert store.read < 310_000
