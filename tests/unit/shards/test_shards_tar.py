from __future__ import annotations

import errno
import io
import os
import tarfile
import time

import numpy as np
import pytest
import webdataset as wds

from sslscale.shards.tar import SampleError, TarShard, _open

SKIPPED = [("README", b"x"), ("__m__/x.json", b"1")]
PLAIN = [("a/0.png", b"zero"), ("a/0.cls", b"0"), ("a/1.PNG", b"one"), ("b.x/2.seg.png", b"two"), ("b.x/2.json", b"{}")]


def by_webdataset(path):
    samples = []
    for sample in wds.WebDataset(str(path), shardshuffle=False):
        sample.pop("__local_path__", None)
        samples.append(dict(sample))
    return samples


def problems(shard):
    """`(key, reason)` of every record that `read` refuses, and `(None, damage)`."""
    found = [(shard.keys[record], why) for record, why in shard._refused.items()]
    return [*found, (None, shard.damage)] if shard.damage else found


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_equal_webdatasets(tmp_path, write_tar, format):
    long = "deep/" * 60 + "x" * 120 if format != tarfile.USTAR_FORMAT else "d" * 90 + "/" + "x" * 80
    accented = "é" * 40
    members = [*PLAIN, (f"{long}.png", b"long"), (f"{accented}.png", b"a" * 512), *SKIPPED]
    shard = TarShard(write_tar(tmp_path / "s.tar", members, format))
    assert [shard.read(i) for i in range(len(shard))] == by_webdataset(shard.path)
    assert shard.keys == ["a/0", "a/1", "b.x/2", long, accented]
    assert problems(shard) == []


def test_a_link_is_a_record_that_is_refused_and_a_folder_is_none(tmp_path):
    path = tmp_path / "s.tar"
    kinds = {
        "folder.png": tarfile.DIRTYPE,
        "soft.png": tarfile.SYMTYPE,
        "hard.png": tarfile.LNKTYPE,
        "l": tarfile.SYMTYPE,
    }
    with tarfile.open(path, "w") as tar:
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, 0, "x.png"
            tar.addfile(info)
        for name in ("hard.cls", "x.png"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    shard = TarShard(path)
    assert shard.keys == ["soft", "hard", "x"]
    for record in (0, 1):
        with pytest.raises(
            SampleError, match=r"the \.png is a link, which has no data: tar with -h --hard-dereference"
        ):
            shard.read(record)
    assert shard.read(2)["png"] == b"abc"


def test_what_macos_puts_beside_files_does_not_split_records(tmp_path, write_tar):
    names = [
        "a/._1.jpg",
        "a/1.jpg",
        "a/._1.cls",
        "a/1.cls",
        "a/.h.jpg",
        "a/._h.jpg",
        "._2.jpg",
        "2.jpg",
        "._2.cls",
        "2.cls",
    ]
    shard = TarShard(write_tar(tmp_path / "s.tar", [(name, name.encode()) for name in names]))
    assert shard.keys == ["a/1", "a/", "2"]
    assert [list(shard.read(record))[2:] for record in range(3)] == [["jpg", "cls"], ["h.jpg"], ["jpg", "cls"]]
    assert shard.read(0)["cls"] == b"a/1.cls" and problems(shard) == []


def test_a_record_of_many_members_takes_linear_time(tmp_path, write_tar):
    names = [(f"frame.{number:06d}.png", b"") for number in range(20_000)]
    path = write_tar(tmp_path / "s.tar", names)
    begin = time.process_time()
    shard = TarShard(path)
    assert time.process_time() - begin < 1  # seconds; 2.5 where every member is compared with all before it
    assert len(shard) == 1 and len(shard._extensions) == 20_000 and problems(shard) == []


def test_a_size_beyond_octal_is_read_as_base_256(tmp_path, write_tar):
    path = write_tar(tmp_path / "s.tar", [("a.png", b"abc"), ("b.png", b"d")], tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (3).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 8 * 32)
    path.write_bytes(data)
    shard = TarShard(path)
    assert [shard.read(i)["png"] for i in range(2)] == [b"abc", b"d"]


def test_truncation_within_a_member_fails_its_sample_only(tmp_path, write_tar):
    path = write_tar(tmp_path / "s.tar", [("a.png", b"a" * 600), ("b.png", b"b" * 2000)])
    path.write_bytes(path.read_bytes()[: 512 + 1024 + 512 + 100])
    shard = TarShard(path)
    assert shard.keys == ["a", "b"]
    assert shard.read(0)["png"] == b"a" * 600
    with pytest.raises(SampleError, match="truncated: the file ends at byte 2148"):
        shard.read(1)
    assert [key for key, _ in problems(shard)] == ["b", None]


@pytest.mark.parametrize("keep", [1024, 1024 + 200])
def test_truncation_between_members_is_damage(tmp_path, write_tar, keep):
    path = write_tar(tmp_path / "s.tar", [("a.png", b"a"), ("b.png", b"b")])
    path.write_bytes(path.read_bytes()[:keep])
    shard = TarShard(path)
    assert shard.keys == ["a"]
    assert shard.damage == f"truncated: no end-of-archive mark before byte {keep}"


def test_a_zero_byte_shard_is_damage(tmp_path):
    (tmp_path / "s.tar").touch()
    shard = TarShard(tmp_path / "s.tar")
    assert len(shard) == 0
    assert problems(shard) == [(None, "the shard is empty (zero bytes)")]


@pytest.mark.parametrize("byte", [0, 50, 130, 150, 300])
def test_a_flipped_bit_in_a_header_is_found(tmp_path, write_tar, byte):
    path = write_tar(tmp_path / "s.tar", [("a.png", b"a"), ("b.png", b"b"), ("c.png", b"c")])
    data = bytearray(path.read_bytes())
    data[1024 + byte] ^= 1
    path.write_bytes(data)
    shard = TarShard(path)
    assert shard.keys == ["a"]
    assert shard.damage is not None
    assert shard.damage.startswith("corrupt: the header at byte 1024")


def test_what_is_no_tar_is_damage(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"hello" * 1000)
    assert TarShard(tmp_path / "s.tar").damage is not None


@pytest.mark.parametrize(
    ("member", "reason"),
    [("a.pkl", "refused member .pkl: it would be unpickled"), ("a.pyd", "unpickled"), ("a.x.pickle", "unpickled"),
     ("a.exe", "refused member .exe: allowed are bmp cls"), ("a.png", "two members .png")],
)  # fmt: skip
def test_a_refused_member_fails_its_sample_only(tmp_path, write_tar, member, reason):
    shard = TarShard(write_tar(tmp_path / "s.tar", [("a.png", b"1"), (member, b"2"), ("b.png", b"3")]))
    with pytest.raises(SampleError, match=reason):
        shard.read(0)
    assert shard.read(1)["png"] == b"3"
    assert [key for key, _ in problems(shard)] == ["a"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_that_is_not_utf_8_fails_its_sample_only(tmp_path, write_tar, format):
    members = [("a.png", b"1"), ("caf\udce9.png", b"2"), ("caf\udce9.cls", b"3"), ("b.p\udce9g", b"4"), ("c.png", b"5")]
    shard = TarShard(write_tar(tmp_path / "s.tar", members, format))
    assert shard.keys == ["a", "caf\\xe9", "b", "c"]
    for record in (1, 2):
        with pytest.raises(SampleError, match="its name is not UTF-8"):
            shard.read(record)
    assert [shard.read(0)["png"], shard.read(3)["png"]] == [b"1", b"5"]
    path = write_tar(tmp_path / "cut.tar", [("caf\udce9.png", b"2" * 2000)], format)
    path.write_bytes(path.read_bytes()[:2000])
    damaged = TarShard(path)
    assert damaged.damage is not None and damaged.damage.endswith("within caf\\xe9.png")


def test_a_file_cut_off_after_opening_fails_the_sample(tmp_path, write_tar):
    path = write_tar(tmp_path / "s.tar", [("a.png", b"a"), ("b.png", b"b" * 5000)])
    shard = TarShard(path)
    assert shard.read(0)["png"] == b"a"
    with path.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(SampleError, match="the file ends within png"):
        shard.read(1)


def test_what_one_read_does_not_give_is_read_on(tmp_path, write_tar, monkeypatch):
    data = bytes(range(256)) * 20
    shard = TarShard(write_tar(tmp_path / "s.tar", [("a.png", b"first"), ("b.png", data)]))
    pread = os.pread
    monkeypatch.setattr("os.pread", lambda descriptor, size, offset: pread(descriptor, min(size, 1000), offset))
    assert shard.read(1)["png"] == data  # Linux gives 2,147,479,552 bytes at most


def test_a_record_that_the_disk_cannot_read_fails_alone(tmp_path, write_tar, monkeypatch):
    shard = TarShard(write_tar(tmp_path / "s.tar", [("a.png", b"a"), ("b.png", b"b")]))
    pread = os.pread

    def failing(descriptor, size, offset):
        if offset == shard._offsets[0]:
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, size, offset)

    monkeypatch.setattr("os.pread", failing)
    with pytest.raises(SampleError, match=r"the \.png cannot be read: Input/output error"):
        shard.read(0)
    assert shard.read(1)["png"] == b"b"


def test_a_disk_that_answers_in_the_end_loses_nothing(tmp_path, write_tar, monkeypatch):
    shard = TarShard(write_tar(tmp_path / "s.tar", [("a.png", b"a")]))
    pread, failures = os.pread, iter([True, True])

    def failing(descriptor, size, offset):
        if next(failures, False):
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, size, offset)

    monkeypatch.setattr("os.pread", failing)
    assert shard.read(0)["png"] == b"a"


@pytest.mark.parametrize("passing", [errno.ESTALE, errno.EMFILE, errno.EIO])
def test_what_passes_is_an_error_and_no_lost_shard(tmp_path, write_tar, monkeypatch, passing):
    shard = TarShard(write_tar(tmp_path / "s.tar", [("a.png", b"a")]))
    _open.cache_clear()

    def failing(*arguments):
        raise OSError(passing, "for now")

    monkeypatch.setattr("os.open", failing)
    with pytest.raises(OSError, match="for now"):
        shard.read(0)
    with pytest.raises(OSError, match="for now"):
        TarShard(shard.path)


def test_a_file_that_is_gone_fails_the_sample(tmp_path, write_tar):
    path = write_tar(tmp_path / "s.tar", [("a.png", b"a")])
    shard = TarShard(path)
    path.unlink()
    _open.cache_clear()
    with pytest.raises(SampleError, match="the shard cannot be opened: No such file"):
        shard.read(0)
    assert problems(TarShard(path)) == [(None, "the shard cannot be opened: No such file or directory")]


def test_the_layout_tells_contents_of_one_size_apart(tmp_path, write_tar):
    members = [("a.png", b"a" * 100), ("a.cls", b"12"), ("b.png", b"b" * 50)]
    layout = TarShard(write_tar(tmp_path / "s.tar", members)).layout
    assert TarShard(write_tar(tmp_path / "copy.tar", members)).layout == layout
    for other in (
        [("a.png", b"a" * 99), ("a.cls", b"123"), ("b.png", b"b" * 50)],
        [("a.png", b"a" * 100), ("a.cls", b"12"), ("c.png", b"b" * 50)],
        [("a.png", b"a" * 100), ("a.cls", b"12"), ("a.txt", b"b" * 50)],
    ):
        changed = write_tar(tmp_path / "other.tar", other)
        assert changed.stat().st_size == (tmp_path / "s.tar").stat().st_size
        assert TarShard(changed).layout != layout
    with tarfile.open(tmp_path / "later.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.7e9
            tar.addfile(info, io.BytesIO(data))
    assert TarShard(tmp_path / "later.tar").layout != layout  # a label of one digit that is another now


def test_a_file_replaced_after_opening_fails_the_sample(tmp_path, write_tar):
    shard = TarShard(write_tar(tmp_path / "s.tar", [("a.png", b"a")]))
    write_tar(tmp_path / "new.tar", [("a.png", b"b")]).replace(shard.path)
    with pytest.raises(SampleError, match="replaced"):
        shard.read(0)


def test_another_copy_of_a_file_that_can_be_made_anew_is_as_good(tmp_path, write_tar):
    shard = TarShard(write_tar(tmp_path / "s.tar", [("a.png", b"a")]), again=lambda: None)
    write_tar(tmp_path / "new.tar", [("a.png", b"a")]).replace(shard.path)
    assert shard.read(0)["png"] == b"a"
    write_tar(tmp_path / "new.tar", [("a.png", b"a" * 50_000)]).replace(shard.path)
    _open.cache_clear()
    with pytest.raises(SampleError, match="replaced"):
        shard.read(0)


def mixed_tar(path, rng):
    """Members of every form that writers use, in runs and alone: ustar, GNU and pax, long names, folders, links."""
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    with tarfile.open(path, "w", format=formats[rng.integers(3)]) as tar:
        for number in range(rng.integers(1, 300)):
            folder = rng.choice(["", "", "", "a/", "a.b/c/", "d" * 90 + "/"])
            for extension in rng.choice(["png", "cls", "json", "SEG.png", "exe", "__", "\udce9"], rng.integers(1, 4)):
                info = tarfile.TarInfo(f"{folder}{rng.choice(['', '', '__', '.', '._'])}{number // 2}.{extension}")
                info.size, info.mtime = int(rng.integers(0, 1500)), float(rng.integers(2) and 1.5)
                unusual = [tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]
                info.type = rng.choice([tarfile.REGTYPE] * 30 + unusual)
                tar.addfile(info, io.BytesIO(rng.bytes(info.size)))


def contents(shard):
    return [shard.keys, problems(shard), shard._first, shard._extensions, shard._offsets, shard._sizes]


@pytest.mark.parametrize("seed", range(12))
def test_many_headers_at_once_are_read_as_one_after_the_other(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path / "mixed.tar"
    mixed_tar(path, rng)
    data = bytearray(path.read_bytes())
    damaged = [bytes(data), bytes(data[: rng.integers(1, len(data))])]
    for _ in range(3):
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(data))
    for number, content in enumerate(damaged):
        path.write_bytes(content)
        run = int(rng.choice([20, 8192]))
        for module in ("tar", "headers"):
            monkeypatch.setattr(f"sslscale.shards.{module}.RUN", run)
        at_once = contents(TarShard(path))
        with monkeypatch.context() as patch:
            patch.setattr(TarShard, "_run", lambda self, tar, position, size: (position, 1))
            assert contents(TarShard(path)) == at_once, (seed, number)


def test_runs_of_headers_are_really_taken(tmp_path, monkeypatch):
    path = tmp_path / "plain.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(100):
            info = tarfile.TarInfo(f"{number:05d}.png")
            info.mtime = 1.5
            tar.addfile(info)
    monkeypatch.setattr("sslscale.shards.tar.check", None)  # what one after the other would call
    assert len(TarShard(path)) == 100
