"""Whatever can embed, by name: this run's backbone, an exported folder, timm's own weights, TorchScript, pixels, hog,
or a user's own class.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch

from sslscale import storage
from sslscale.config import BackboneConfig
from sslscale.errors import UserError, did_you_mean
from sslscale.models.base import Embedder, Encoder
from sslscale.models.export import load_backbone, read_backbone_meta
from sslscale.models.handcrafted import HANDCRAFTED
from sslscale.models.image import Backbone
from sslscale.models.outputs import Output, project
from sslscale.models.text import hash_pretrained, is_pretrained, load_pretrained
from sslscale.rundir import hash_file, hash_json
from sslscale.shards.readers import Reader

TORCHSCRIPT = (".pt", ".ts", ".torchscript")
_TIMM = "timm:"


@dataclass(frozen=True)
class EmbedderSpec:
    """A recipe that any worker can rebuild."""

    name: str
    """As embed.backbone has it."""
    location: str
    """An exported folder, a TorchScript file, timm:NAME, a name of HANDCRAFTED, or module:Class."""
    channels: int | None
    """Of images; None where there are none."""
    size: int
    """The side of images, or the most tokens of a text."""
    weights: str
    """The hash of the backbone."""
    output: str = "pooled"
    projection: str | None = None
    """A file of `fit_pca`, whose features are those of this output."""
    projection_sha256: str | None = None

    @property
    def as_trained(self) -> bool:
        """The backbone's pooled output, as it is."""
        return self.output == "pooled" and self.projection is None

    @property
    def sha256(self) -> str:
        """Names what it computes."""
        if self.as_trained:
            return self.weights
        return hash_json([self.weights, self.output, self.projection_sha256])

    def projected(self, file: Path) -> EmbedderSpec:
        return replace(self, projection=str(file), projection_sha256=hash_file(file))

    def build(self) -> Embedder:
        """A module with `feature_dim`, in eval mode: inputs as `reader` makes them -> (B, feature_dim).

        Raises UserError where the backbone has no such output.
        """
        embedder = self._backbone()
        if self.output != "pooled":
            if not isinstance(embedder, Encoder):
                raise UserError("only a trained backbone has other outputs", got=self.output, allowed="pooled")
            embedder = Output(embedder, self.output)
        if self.projection is not None:
            embedder = project(embedder, storage.bring(Path(self.projection)))
        return embedder.eval()

    def reader(self, embedder: Embedder) -> Reader:
        """How samples become inputs of what `build` made."""
        return embedder.reader(self.channels, self.size)

    def _backbone(self) -> Embedder:
        folder = Path(self.location)
        if _is_export(folder):
            return load_backbone(folder)
        if self.channels is None:
            return load_pretrained(folder)
        if self.location in HANDCRAFTED:
            return HANDCRAFTED[self.location](self.channels, self.size)
        if self.location.startswith(_TIMM):
            return _pretrained(self.location, self.channels)
        if self.location.endswith(TORCHSCRIPT):
            return TorchScript(self.location, self.channels, self.size)
        return _import(self.location)(self.channels, self.size)


class TorchScript(Embedder):
    """A model that `torch.jit.save` wrote: images in [0, 1] -> (B, D)."""

    def __init__(self, file: str, channels: int, size: int) -> None:
        super().__init__()
        try:
            self.model = torch.jit.load(str(storage.bring(Path(file))), map_location="cpu").eval()
            with torch.inference_mode():
                features = self.model(torch.zeros(2, channels, size, size))
        except (RuntimeError, ValueError) as error:
            raise UserError(
                "the TorchScript model cannot be used", got=f"{file}: {str(error).splitlines()[0]}"
            ) from None
        if not isinstance(features, torch.Tensor) or features.ndim != 2:
            raise UserError("the TorchScript model does not give one row of features an image", got=file)
        self.feature_dim = features.shape[1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


def find_embedder(
    name: str, run: Path, *, channels: int | None, size: int | None, output: str = "pooled"
) -> EmbedderSpec:
    """What `embed.backbone` names. `channels` and `size` are what the run's own inputs are, where it says so."""
    spec = _find(name, run, channels, size)
    return replace(spec, output=output)


def _find(name: str, run: Path, channels: int | None, size: int | None) -> EmbedderSpec:
    if name.startswith(_TIMM):
        backbone = _pretrained(name, channels or 3)
        input_size = size or int(backbone.model.pretrained_cfg["input_size"][-1])  # type: ignore[index]
        return EmbedderSpec(name, name, channels or 3, input_size, _hash_weights(backbone))
    script = storage.local_path(name) if name.endswith(TORCHSCRIPT) else None
    if name in HANDCRAFTED or ":" in name or script is not None:
        if channels is None or size is None:
            raise UserError(f"embed.backbone={name} needs to know the images", fix="set embed.size and embed.channels")
        if script is not None:
            if not storage.bring(script).is_file():
                raise UserError("there is no such file", got=name, fix="give embed.backbone a file of torch.jit.save")
            return EmbedderSpec(name, str(script), channels, size, hash_file(script))
        if ":" in name:
            _import(name)
        return EmbedderSpec(name, name, channels, size, hash_json([name, channels, size]))
    folder = run / "pretrain" / "backbone" if name == "pretrain" else storage.local_path(name)
    if name == "pretrain" or _is_export(folder):
        meta = read_backbone_meta(folder)
        own = size or meta["input_size"]
        return EmbedderSpec(name, str(folder.absolute()), meta["channels"], own, meta["sha256"])
    if is_pretrained(folder):
        weights, max_length = hash_pretrained(folder)
        return EmbedderSpec(name, str(folder.absolute()), None, size or max_length, weights)
    choices = ["pretrain", *HANDCRAFTED]
    raise UserError(
        f"there is no backbone {name!r}{did_you_mean(name, choices)}",
        allowed=f"{', '.join(choices)}, a backbone/ folder, one of transformers or sentence-transformers, timm:NAME, "
        "a TorchScript file, module:Class",
    )


def _is_export(folder: Path) -> bool:
    return storage.bring(folder / "backbone.json").is_file()


def _pretrained(name: str, channels: int) -> Backbone:
    """timm's model with the weights that timm has for it, behind the normalisation that they were trained with."""
    architecture = name.removeprefix(_TIMM)
    known = timm.get_pretrained_cfg(architecture, allow_unregistered=True) if timm.is_model(architecture) else None
    mean, std = ([0.5], [0.5]) if known is None or channels == 1 else (list(known.mean), list(known.std))
    config = BackboneConfig(
        architecture=architecture, kwargs={"pretrained": True}, channels=channels, mean=mean, std=std
    )
    try:
        return Backbone(config)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"timm has no weights of {architecture!r} here", got=str(error).splitlines()[0], fix="load them once online"
        ) from None


def _hash_weights(backbone: Backbone) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(backbone.model.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _import(location: str) -> type[Embedder]:
    module, _, attribute = location.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the backbone {location!r} cannot be imported", got=str(error)) from None
