from __future__ import annotations

import gzip
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from sslscale.errors import UserError
from sslscale.shards.sources import SOURCES, make_source

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (18, 3, 32, 32), dtype=np.uint8)  # three images in each of the six batches
LABELS = RNG.integers(0, 10, 18)
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


class Touches:
    """Unpickled by pickle.load, this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(params=["python2", "python3", "binary"])
def cifar(request, tmp_path):
    """A folder in one of CIFAR-10's own formats."""
    name = "cifar-10-batches-bin" if request.param == "binary" else "cifar-10-batches-py"
    (tmp_path / name).mkdir()
    for batch, file in enumerate(BATCHES):
        rows = slice(3 * batch, 3 * batch + 3)
        planes, labels = PIXELS[rows].reshape(3, -1), LABELS[rows].tolist()
        if request.param == "binary":
            data = b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, planes, strict=True))
            (tmp_path / name / f"{file}.bin").write_bytes(data)
        else:
            protocol = 2 if request.param == "python2" else 4
            content = {b"batch_label": b"x", b"labels": labels, b"data": planes, b"filenames": [b"a", b"b", b"c"]}
            data = pickle.dumps(content, protocol).replace(b"numpy._core", b"numpy.core") if protocol == 2 else None
            (tmp_path / name / file).write_bytes(data or pickle.dumps(content, protocol))
    return tmp_path / name


@pytest.mark.parametrize("inside", [True, False])
def test_cifar10_in_its_own_formats(cifar, inside):
    source = make_source("cifar10", str(cifar if inside else cifar.parent))
    assert source.splits == {"train": 15, "test": 3}
    for split, index, row in [("train", 0, 0), ("train", 14, 14), ("test", 2, 17)]:
        example = source.example(split, index)
        assert example.label == LABELS[row]
        assert np.array_equal(example.data, PIXELS[row].transpose(1, 2, 0))


@pytest.mark.parametrize("cifar", ["python2"], indirect=True)
def test_a_cifar10_batch_that_would_run_code_is_refused(cifar, tmp_path):
    (cifar / "test_batch").write_bytes(pickle.dumps({b"labels": Touches(tmp_path / "ran"), b"data": []}))
    with pytest.raises(UserError, match=r"refused: it would run .*open"):
        make_source("cifar10", str(cifar))
    assert not (tmp_path / "ran").exists()


def test_cifar10_batches_that_are_missing_or_cut_off(cifar, tmp_path):
    with pytest.raises(UserError, match="no CIFAR-10 batches"):
        make_source("cifar10", str(tmp_path / "none"))
    file = next(cifar.glob("data_batch_3*"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        make_source("cifar10", str(cifar))
    file.unlink()
    with pytest.raises(UserError, match="batch is missing"):
        make_source("cifar10", str(cifar))


@pytest.mark.parametrize("cifar", ["python3"], indirect=True)
def test_a_cifar10_download_that_was_killed_while_unpacking_is_made_again(cifar, tmp_path, monkeypatch):
    def unpack(url, root, extract_root=None, md5=None):
        shutil.copytree(cifar, Path(extract_root or root) / cifar.name)
        if not unpacked:
            unpacked.append(None)
            (Path(extract_root or root) / cifar.name / "test_batch").unlink()
            raise KeyboardInterrupt

    unpacked: list[None] = []
    monkeypatch.setattr("sslscale.shards.sources.cifar10.download_folder", lambda name: tmp_path / "cache")
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", unpack)
    with pytest.raises(KeyboardInterrupt):
        make_source("cifar10")
    assert make_source("cifar10").splits == {"train": 15, "test": 3}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [cifar.name]


def write_idx(path, array, zipped):
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    path = path.with_name(path.name + ".gz") if zipped else path
    path.write_bytes(gzip.compress(data) if zipped else data)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_from_idx_files(tmp_path, zipped):
    images, labels = PIXELS[:5, 0, :28, :28].copy(), LABELS[:5].astype(np.uint8)
    for split in ("train", "t10k"):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte", images, zipped)
        last = write_idx(tmp_path / f"{split}-labels-idx1-ubyte", labels, zipped)
    source = make_source("fashion-mnist", str(tmp_path))
    assert source.splits == {"train": 5, "test": 5}
    assert np.array_equal(source.example("test", 3).data, images[3])
    assert source.example("test", 3).label == labels[3]
    last.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x09abc") if zipped else b"\0\0\x08\x01\0\0\0\x09abc")
    with pytest.raises(UserError, match="not a whole idx file"):
        make_source("fashion-mnist", str(tmp_path))
    last.unlink()
    with pytest.raises(UserError, match="an idx file is missing"):
        make_source("fashion-mnist", str(tmp_path))


@pytest.mark.parametrize("damage", ["cut off", "no gzip", "changed within"])
def test_a_damaged_idx_file_is_named(tmp_path, damage):
    data = gzip.compress(RNG.bytes(1000))
    damaged = {"cut off": data[:500], "no gzip": b"<html>", "changed within": data[:20] + bytes(40) + data[60:]}
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"cannot be read\n  got:     .*train-images-idx3-ubyte\.gz: [^\n]+\n  fix:"):
        make_source("fashion-mnist", str(tmp_path))


def test_digits():
    source = make_source("digits")
    example = source.example("train", 0)
    assert source.splits == {"train": 1797}
    assert (example.data.shape, example.data.dtype, example.data.max()) == ((8, 8), np.uint8, 239)  # 15 of 16
    assert example.label == 0
    with pytest.raises(UserError, match="take no path"):
        make_source("digits", "somewhere")


@pytest.mark.parametrize(
    ("name", "path", "what"),
    [("digit", None, "did you mean 'digits'"), ("no.such:Source", None, "cannot be imported"),
     ("json:NoSuch", None, "cannot be imported"), ("imagefolder", None, "needs the folder"),
     ("imagefolder", "/no/such/folder", "does not exist"), ("imagefolder", "{tmp}", "no images here")],
)  # fmt: skip
def test_wrong_sources(tmp_path, name, path, what):
    with pytest.raises(UserError, match=what):
        make_source(name, path and path.format(tmp=tmp_path))


def test_a_source_of_ones_own_is_named_by_module_and_class():
    assert make_source(SOURCES["digits"]).splits == {"train": 1797}
