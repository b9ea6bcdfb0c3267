"""Images in folders: `root/class/*.jpg`, or flat `root/*.jpg` without labels. Files are copied as they are.

Folders called train, val, valid or test right under the root are splits; otherwise everything is the split `train`.
"""

from __future__ import annotations

import os
from pathlib import Path

from sslscale.errors import UserError
from sslscale.rundir import hash_json
from sslscale.shards.sources import Example
from sslscale.shards.tar import IMAGES

_SPLITS = ("train", "val", "valid", "test")


class ImageFolder:
    """Labels number the class folders of all splits, sorted by name; class and path go into the sample's metadata."""

    name, kind = "imagefolder", "images"
    extensions: tuple[str, ...] = IMAGES

    def __init__(self, path: str | None = None) -> None:
        if path is None:
            raise UserError(f"{self.name} needs the folder of the {self.kind}", fix="pack.path=FOLDER")
        self.root = Path(path).expanduser()
        if not self.root.is_dir():
            raise UserError(f"the folder of the {self.kind} does not exist", got=path)
        splits = [name for name in _SPLITS if (self.root / name).is_dir()]
        self.files = {name: self._found(self.root / name) for name in splits} or {"train": self._found(self.root)}
        self.splits = {name: len(files) for name, files in self.files.items()}
        if not any(self.splits.values()):
            allowed = " ".join(f"*.{ending}" for ending in self.extensions)
            raise UserError(f"no {self.kind} here", got=path, allowed=allowed)
        names = {name for files in self.files.values() for name in map(_class_name, files) if name is not None}
        self.classes = {name: label for label, name in enumerate(sorted(names))}
        self.bases = {name: self.root / name if splits else self.root for name in self.files}
        self.fingerprint = hash_json(
            {name: [[f, (self.bases[name] / f).stat().st_size] for f in files] for name, files in self.files.items()}
        )

    def example(self, split: str, index: int) -> Example:
        file = self.files[split][index]
        name = _class_name(file)
        metadata = {"path": file} if name is None else {"path": file, "class": name}
        label = None if name is None else self.classes[name]
        extension = file.rpartition(".")[2].lower()
        return Example((self.bases[split] / file).read_bytes(), label, extension, metadata)

    def _found(self, base: Path) -> list[str]:
        """Paths of the files under `base`, relative to it, sorted."""
        found = [
            (Path(folder) / name).relative_to(base).as_posix()
            for folder, _, names in os.walk(base, followlinks=True)
            for name in names
            if name.rpartition(".")[2].lower() in self.extensions and not name.startswith(".")
        ]
        if len({"/" in file for file in found}) > 1:
            raise UserError(
                f"{self.kind} lie both in class folders and beside them", got=str(base), allowed="one or the other"
            )
        return sorted(found)


def _class_name(file: str) -> str | None:
    return file.partition("/")[0] if "/" in file else None
