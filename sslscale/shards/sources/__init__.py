"""Where samples come from: one file a source, found by name.

A source is any class with the attributes of `Source`; a user's own is named `package.module:Class`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np

from sslscale.errors import UserError, did_you_mean

SOURCES = {
    "digits": "sslscale.shards.sources.digits:Digits",
    "fashion-mnist": "sslscale.shards.sources.fashion_mnist:FashionMNIST",
    "cifar10": "sslscale.shards.sources.cifar10:CIFAR10",
    "imagefolder": "sslscale.shards.sources.imagefolder:ImageFolder",
    "moving-digits": "sslscale.shards.sources.moving_digits:MovingDigits",
    "text": "sslscale.shards.sources.text:Text",
    "video": "sslscale.shards.sources.video:Video",
    "wordnet": "sslscale.shards.sources.wordnet:WordNet",
}


@dataclass(frozen=True)
class Example:
    """One sample of a source.

    `data` is an image, uint8 (H, W) or (H, W, 3), still to be encoded, or a file's bytes with its `extension`.
    """

    data: np.ndarray | bytes
    label: int | None = None
    extension: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """`Source(path, **options)` finds its data (UserError where it cannot); every worker of `pack` makes its own.

    One that passes files over also has `skipped`, what they are -> how many: pack.json and the summary line say so.
    """

    splits: Mapping[str, int]  # name -> number of samples
    fingerprint: str  # changes when the data does

    def example(self, split: str, index: int) -> Example:
        """Sample `index` of a split: the same whenever and wherever it is asked for."""
        ...


def make_source(name: str, path: str | None = None, options: Mapping[str, Any] | None = None) -> Source:
    """The source called `name`, or a user's own `package.module:Class`, on the data at `path`."""
    found, arguments = _find_source(name), options or {}
    try:
        inspect.signature(found).bind(path, **arguments)
    except TypeError as error:
        names = [parameter for parameter in inspect.signature(found).parameters if parameter != "path"]
        raise UserError(
            f"the source {name!r} refuses pack.options", got=str(error), allowed=", ".join(names) or "none"
        ) from None
    return found(path, **arguments)


def _find_source(name: str) -> Callable[..., Source]:
    target = SOURCES.get(name, name)
    module, _, cls = target.partition(":")
    if not cls:
        raise UserError(
            "there is no such source" + did_you_mean(name, SOURCES),
            got=name,
            allowed=f"{', '.join(SOURCES)} or package.module:Class",
        )
    try:
        return getattr(importlib.import_module(module), cls)
    except (ModuleNotFoundError, AttributeError) as error:
        if target != name:
            raise
        raise UserError("a source of your own cannot be imported", got=f"{name}: {error}") from None


def download_folder(name: str) -> Path:
    """Where a source keeps what torchvision downloads."""
    return Path.home() / ".cache" / "sslscale" / name


def extension_of(file: str) -> str:
    """What follows the last dot of a file's name, in small letters; empty where there is none."""
    return PurePath(file).suffix[1:].lower()


def most_first(counts: Mapping[str, int]) -> dict[str, int]:
    """The same counts, the largest first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
