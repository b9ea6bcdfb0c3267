"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): 60,000 + 10,000 grey 28x28 images of 10 classes, in idx files."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np

from sslscale.errors import UserError
from sslscale.shards.sources import Example, download_folder

_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
          "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}  # fmt: skip
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist

_AGAIN = "put the file there again; without pack.path, delete its folder, and it is downloaded again"


class FashionMNIST:
    """Splits `train` and `test`, from the four idx files, .gz or not, in `path`."""

    def __init__(self, path: str | None = None) -> None:
        folder = Path(path).expanduser() if path else _DEBIAN if _DEBIAN.is_dir() else _download()
        self.data = {
            split: (_read_idx(folder, images), _read_idx(folder, labels)) for split, (images, labels) in _FILES.items()
        }
        self.splits = {split: len(labels) for split, (_, labels) in self.data.items()}
        digest = hashlib.sha256()
        for split, (images, labels) in self.data.items():
            if len(images) != len(labels):
                raise UserError(
                    "the idx files do not match", got=f"{split}: {len(images)} images, {len(labels)} labels"
                )
            digest.update(images.tobytes() + labels.tobytes())
        self.fingerprint = digest.hexdigest()

    def example(self, split: str, index: int) -> Example:
        images, labels = self.data[split]
        return Example(images[index], int(labels[index]))


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """An idx file of bytes: two zeros, 8 (unsigned bytes), the number of dimensions, each as big-endian int32, data."""
    zipped = folder / f"{name}.gz"
    if not zipped.is_file() and not (folder / name).is_file():
        raise UserError(
            "an idx file is missing", got=f"{folder / name}[.gz]", fix="point pack.path at the four idx files"
        )
    file = zipped if zipped.is_file() else folder / name
    try:
        data = gzip.decompress(file.read_bytes()) if file == zipped else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError("an idx file cannot be read", got=f"{file}: {error}", fix=_AGAIN) from None
    dimensions = data[3] if data[:3] == b"\0\0\x08" else 0
    shape = tuple(np.frombuffer(data, ">i4", dimensions, offset=4)) if len(data) >= 4 + 4 * dimensions else ()
    if not shape or len(data) != 4 + 4 * dimensions + np.prod(shape, dtype=np.int64):
        raise UserError("not a whole idx file of bytes", got=str(file), fix=_AGAIN)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _download() -> Path:
    from torchvision.datasets import FashionMNIST as Torchvision

    root = download_folder("fashion-mnist")
    try:
        Torchvision(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            "Fashion-MNIST is not on this machine and could not be downloaded",
            got=error,
            fix="point pack.path at a folder with the four idx files, or install Debian's dataset-fashion-mnist",
        ) from None
    return root / "FashionMNIST" / "raw"
