"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour 32x32 images of 10 classes, in its own python or binary format."""

from __future__ import annotations

import _codecs
import hashlib
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from sslscale.errors import UserError
from sslscale.shards.sources import Example, download_folder

_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_PIXELS = 3 * 32 * 32
_AGAIN = "take the folder out of its archive again; without pack.path, delete it, and it is downloaded again"


class CIFAR10:
    """Splits `train` and `test`. `path` is a batches folder of either format, or the folder that holds one."""

    def __init__(self, path: str | None = None) -> None:
        folder = _find(Path(path).expanduser()) if path else _find(_download())
        digest = hashlib.sha256()
        self.data: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for split, names in _BATCHES.items():
            batches = [_read_batch(folder, name) for name in names]
            images = np.concatenate([images for images, _ in batches])  # (N, 32, 32, 3)
            labels = np.concatenate([labels for _, labels in batches])
            self.data[split] = images, labels
            digest.update(images.tobytes() + labels.tobytes())
        self.splits = {split: len(labels) for split, (_, labels) in self.data.items()}
        self.fingerprint = digest.hexdigest()

    def example(self, split: str, index: int) -> Example:
        images, labels = self.data[split]
        return Example(images[index], int(labels[index]))


def _find(path: Path) -> Path:
    for folder in (path, *(path / name for name in _FOLDERS)):
        if (folder / "test_batch").is_file() or (folder / "test_batch.bin").is_file():
            return folder
    raise UserError(
        "no CIFAR-10 batches here", got=str(path), allowed=f"a folder {' or '.join(_FOLDERS)}, or the one that holds it"
    )


def _read_batch(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, 32, 32, 3) and labels (n,) of one batch file."""
    binary = folder / f"{name}.bin"
    try:
        if binary.is_file():  # each row is a label and the three planes
            rows = np.frombuffer(binary.read_bytes(), np.uint8).reshape(-1, 1 + _PIXELS)
            labels, planes = rows[:, 0], rows[:, 1:]
        else:
            batch = _PlainUnpickler(io.BytesIO((folder / name).read_bytes()), encoding="bytes").load()
            labels, planes = np.asarray(batch[b"labels"], np.uint8), np.asarray(batch[b"data"], np.uint8)
        return planes.reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1), labels
    except FileNotFoundError:
        raise UserError("a CIFAR-10 batch is missing", got=str(folder / name), fix=_AGAIN) from None
    except (ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise UserError("a CIFAR-10 batch cannot be read", got=f"{folder / name}: {error}", fix=_AGAIN) from None


# What numpy's pickles name, under its old and its present module.
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_PLAIN = {
    ("_codecs", "encode"): _codecs.encode,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, bytes and numpy arrays of numbers; refuses every other class, so that no code of a file runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"refused: it would run {module}.{name}")
        return _PLAIN[module, name]


def _download() -> Path:
    from torchvision.datasets import CIFAR10 as Torchvision
    from torchvision.datasets.utils import download_and_extract_archive

    root = download_folder("cifar10")
    folder = root / Torchvision.base_folder
    if folder.is_dir():
        return root
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole: a folder that is there says that nothing is to be downloaded.
        with tempfile.TemporaryDirectory(dir=root) as aside:
            download_and_extract_archive(Torchvision.url, str(root), extract_root=aside, md5=Torchvision.tgz_md5)
            (Path(aside) / Torchvision.base_folder).rename(folder)
    except (OSError, RuntimeError) as error:
        raise UserError(
            "CIFAR-10 is not on this machine and could not be downloaded",
            got=error,
            fix=f"point pack.path at a folder {_FOLDERS[0]}",
        ) from None
    return root
