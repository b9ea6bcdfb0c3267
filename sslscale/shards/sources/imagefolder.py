"""Images in folders: `root/class/*.jpg`, or flat `root/*.jpg` without labels. Files are copied as they are.

Folders called train, val, valid, validation or test right under the root are splits, and so is `unlabeled`, whose
samples have no labels; where there are none, everything is the split `train`.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from sslscale.errors import StageError, UserError
from sslscale.rundir import hash_json
from sslscale.shards.sources import Example, extension_of, most_first
from sslscale.shards.tar import IMAGES

_UNLABELED = "unlabeled"
_SPLITS = ("train", "val", "valid", "validation", "test", _UNLABELED)
_OF_ARCHIVERS = "__MACOSX"  # holds a twin of every file, with its name and not its pixels
_NAMED = 5  # of many files or folders, so many are named


class ImageFolder:
    """Labels number the class folders of all splits, sorted by name; class and path go into the sample's metadata.

    `splits` names the folders that are splits: only they are read. `splits=[]` says that there are none, for a root in
    which `train` is a class. `skipped` counts what was found and not taken, by extension; what is hidden is not looked
    at. Raises UserError where images would be left out unsaid, and where a file cannot be read or a link leads nowhere:
    a disk that is not mounted would otherwise make a smaller corpus.
    """

    name, kind = "imagefolder", "images"
    extensions: Mapping[str, str] = {**{name: name for name in IMAGES}, "jfif": "jpg"}  # of a file -> in a shard

    def __init__(self, path: str | None = None, *, splits: Sequence[str] | None = None) -> None:
        if path is None:
            raise UserError(f"{self.name} needs the folder of the {self.kind}", fix="pack.path=FOLDER")
        self.root = Path(path).expanduser()
        if not self.root.is_dir():
            raise UserError(f"the folder of the {self.kind} does not exist", got=path)
        self.bases = _split_folders(self.root, splits) or {"train": self.root}
        found = {name: _walk(base, self.extensions) for name, base in self.bases.items()}
        beside = _Found()
        if splits is None and self.root not in self.bases.values():
            beside = _walk(self.root, self.extensions, leave_out=self.bases)
        self._refuse_what_is_amiss(found, beside)
        self.skipped = most_first(sum((each.skipped for each in (*found.values(), beside)), Counter()))
        if not any(each.files for each in found.values()):
            others = ", ".join(f"{count} {extension}" for extension, count in self.skipped.items())
            allowed = " ".join(f"*.{extension}" for extension in self.extensions)
            raise UserError(f"no {self.kind} here", got=f"{path}: {others or 'no files'}", allowed=allowed)
        self.files = {name: sorted(each.files) for name, each in found.items()}
        self.splits = {name: len(files) for name, files in self.files.items()}
        names = {_class_name(split, file) for split, files in self.files.items() for file in files}
        self.classes = {name: label for label, name in enumerate(sorted(name for name in names if name is not None))}
        self.fingerprint = _fingerprint(found)

    def example(self, split: str, index: int) -> Example:
        """Raises StageError where the file cannot be read, or not any more."""
        file = self.files[split][index]
        name = _class_name(split, file)
        metadata = {"path": file} if name is None else {"path": file, "class": name}
        label = None if name is None else self.classes[name]
        try:
            data = (self.bases[split] / file).read_bytes()
        except OSError as error:
            raise StageError(
                f"one of the {self.kind} cannot be read",
                got=f"{self.bases[split] / file}: {error.strerror}",
                fix="run the same command again once it can: what is finished is kept",
            ) from None
        return Example(data, label, self.extensions[extension_of(file)], metadata)

    def _refuse_what_is_amiss(self, found: Mapping[str, _Found], beside: _Found) -> None:
        amiss = [path for each in (*found.values(), beside) for path in each.amiss]
        if amiss:
            raise UserError(
                f"{len(amiss)} links lead nowhere, or files or folders cannot be read",
                got=_some(amiss),
                fix="mend or delete them (find FOLDER -xtype l lists the links)",
            )
        if beside.files:
            splits = ",".join(self.bases)
            raise UserError(
                f"{self.kind} lie beside the folders of the splits ({splits})",
                got=_some(sorted({file.partition("/")[0] for file in beside.files})),
                fix=f"move them, or name the folders that are splits: pack.options.splits=[{splits}] leaves the others "
                "out, [] makes every folder a class",
            )
        for split, each in found.items():
            flat = sorted(file for file in each.files if "/" not in file)
            if flat and len(flat) < len(each.files) and split != _UNLABELED:
                within = min(file for file in each.files if "/" in file)
                raise UserError(
                    f"{self.kind} lie both in class folders and beside them",
                    got=f"{self.bases[split]}: {within}, but {_some(flat)}",
                    fix="move them into class folders, or all out of them (then there are no labels)",
                )


@dataclass
class _Found:
    """What lies under a folder."""

    files: dict[str, tuple[int, int]] = field(default_factory=dict)  # path relative to it -> bytes, time in ns
    skipped: Counter[str] = field(default_factory=Counter)
    amiss: list[str] = field(default_factory=list)


def _split_folders(root: Path, named: Sequence[str] | None) -> dict[str, Path]:
    """Split -> its folder: those that are named, or else those that are called like splits."""
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not _is_hidden(entry.name))
    if named is None:
        return {name: root / name for name in _SPLITS if name in folders}
    if isinstance(named, str) or not set(map(str, named)) <= set(folders):
        raise UserError(
            "pack.options.splits is a list of folders right under pack.path",
            got=named,
            allowed=", ".join(folders) or "no folders are there",
        )
    return {str(name): root / str(name) for name in named}


def _walk(base: Path, extensions: Collection[str], leave_out: Collection[str] = ()) -> _Found:
    """The files under `base`, without its folders `leave_out`. No folder is met twice, whatever links lead to it."""
    found, inside = _Found(), base.resolve()
    visited = {_number(base)}
    for folder, folders, names in os.walk(base, followlinks=True, onerror=lambda error: found.amiss.append(str(error))):
        here = Path(folder)
        looked_at = [here / name for name in sorted(folders) if not _is_hidden(name)]
        folders.clear()
        for path in looked_at:
            if here == base and path.name in leave_out:
                continue
            number = _number(path)
            if number in visited or (path.is_symlink() and _is_met_anyway(path.resolve(), inside)):
                found.skipped["folder linked again"] += 1
                continue
            visited.add(number)
            folders.append(path.name)
        for name in sorted(names):
            if not _is_hidden(name):
                _add_file(found, here / name, base, extensions)
    return found


def _number(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_met_anyway(target: Path, inside: Path) -> bool:
    """Whether a link's target is a folder that is walked under its own name, and so of the class that it lies in."""
    return target.is_relative_to(inside) and not any(map(_is_hidden, target.relative_to(inside).parts))


def _add_file(found: _Found, path: Path, base: Path, extensions: Collection[str]) -> None:
    try:
        status = path.stat()
    except OSError as error:  # whatever its name: it may be the link to a folder of images
        found.amiss.append(f"{path}: {error.strerror}")
        return
    extension = extension_of(path.name)
    if extension not in extensions:
        found.skipped[extension or "without extension"] += 1
    elif not stat.S_ISREG(status.st_mode) or not os.access(path, os.R_OK):
        found.amiss.append(f"{path}: cannot be read")
    else:
        found.files[path.relative_to(base).as_posix()] = status.st_size, status.st_mtime_ns


def _fingerprint(found: Mapping[str, _Found]) -> str:
    """Names, sizes and times, as rsync compares, for reading every byte would cost as much as packing.

    In words, so that the error about other data says what has changed: a copy that did not keep the times
    (`cp -r`, not `cp -a`) has as many files and bytes, and a later time.
    """
    statuses = [status for each in found.values() for status in each.files.values()]
    newest = datetime.fromtimestamp(max(time for _, time in statuses) // 10**9, UTC)
    digest = hash_json({name: sorted(each.files.items()) for name, each in found.items()})
    size = sum(size for size, _ in statuses)
    return f"{len(statuses)} files, {size} bytes, newest of {newest:%Y-%m-%d %H:%M:%S} UTC, {digest}"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == _OF_ARCHIVERS


def _some(names: Sequence[str]) -> str:
    """The first few of many names, and how many more there are."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _class_name(split: str, file: str) -> str | None:
    return file.partition("/")[0] if "/" in file and split != _UNLABELED else None
