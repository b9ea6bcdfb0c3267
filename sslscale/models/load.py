"""Whatever can embed, by name: this run's backbone, an exported folder, pixels, hog, or a user's own class."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from sslscale.errors import UserError, did_you_mean
from sslscale.models.base import Embedder
from sslscale.models.handcrafted import HANDCRAFTED
from sslscale.models.image import load_backbone, read_backbone_meta
from sslscale.rundir import hash_json


@dataclass(frozen=True)
class EmbedderSpec:
    """A recipe that any worker can rebuild; `sha256` names what it computes."""

    name: str
    """As embed.backbone has it."""
    location: str
    """An exported folder, a name of HANDCRAFTED, or module:Class."""
    channels: int
    size: int
    sha256: str

    def build(self) -> Embedder:
        """A module with `feature_dim`: images (B, channels, size, size) in [0, 1] -> (B, feature_dim), in eval mode."""
        if self.location in HANDCRAFTED:
            return HANDCRAFTED[self.location](self.channels, self.size).eval()
        if ":" in self.location:
            return _import(self.location)(self.channels, self.size).eval()
        return load_backbone(Path(self.location))


def find_embedder(name: str, run: Path, *, channels: int | None, size: int | None) -> EmbedderSpec:
    """What `embed.backbone` names. `channels` and `size` are what the run's own images are, where it says so."""
    if name in HANDCRAFTED or ":" in name:
        if ":" in name:
            _import(name)
        if channels is None or size is None:
            raise UserError(
                f"embed.backbone={name} needs to know the images", fix="set embed.size, and a pretrain section"
            )
        return EmbedderSpec(name, name, channels, size, hash_json([name, channels, size]))
    folder = run / "pretrain" / "backbone" if name == "pretrain" else Path(name)
    if name != "pretrain" and not folder.is_dir():
        choices = ["pretrain", *HANDCRAFTED]
        raise UserError(
            f"there is no backbone {name!r}{did_you_mean(name, choices)}",
            allowed=f"{', '.join(choices)}, an exported backbone/ folder, or module:Class",
        )
    meta = read_backbone_meta(folder)
    return EmbedderSpec(name, str(folder.absolute()), meta["channels"], size or meta["input_size"], meta["sha256"])


def _import(location: str) -> type[Embedder]:
    module, _, attribute = location.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the backbone {location!r} cannot be imported", got=str(error)) from None
