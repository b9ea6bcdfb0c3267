"""Whatever can embed, by name: this run's backbone, an exported folder, a folder of timm or transformers, timm's own
weights, TorchScript, pixels, hog, or a user's own class.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from torch import nn

from sslscale import storage
from sslscale.config import BackboneConfig
from sslscale.errors import UserError, did_you_mean
from sslscale.models.base import Embedder, Encoder
from sslscale.models.export import load_backbone, read_backbone_meta
from sslscale.models.folders import describe_pretrained, is_pretrained, load_folder, timm_normalisation
from sslscale.models.handcrafted import HANDCRAFTED
from sslscale.models.image import Backbone
from sslscale.models.outputs import Output, project
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
    """A folder, a TorchScript file, timm:NAME, a name of HANDCRAFTED, or module:Class."""
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
        if isinstance(embedder, Encoder):
            embedder.check_size(self.size)
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
        if _is_folder(self.location):
            folder = Path(self.location)
            return load_backbone(folder) if _is_export(folder) else load_folder(folder, self.channels)
        assert self.channels is not None
        if self.location in HANDCRAFTED:
            return HANDCRAFTED[self.location](self.channels, self.size)
        if self.location.startswith(_TIMM):
            return _pretrained(self.location, self.channels)
        if self.location.endswith(TORCHSCRIPT):
            return TorchScript(self.location, self.channels, self.size)
        embedder = _import(self.location)(self.channels, self.size)
        if _hash_class(embedder, self.location, self.channels, self.size) != self.weights:
            raise UserError(
                "the backbone is not the one that was named: its weights or its source are others by now",
                got=self.location,
                fix="embed again with --overwrite; weights that it draws at random need a seed of their own",
            )
        return embedder


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
    name: str,
    run: Path,
    *,
    channels: int | None,
    size: int | None,
    run_size: int | None = None,
    output: str = "pooled",
) -> EmbedderSpec:
    """What `embed.backbone` names.

    `channels` are those of the run's images, where it says so. `size` goes before the backbone's own, and `run_size`,
    that of the run's training, is for what has none of its own.
    """
    spec = _find(name, run, channels, size, run_size)
    return replace(spec, output=output)


def _find(name: str, run: Path, channels: int | None, size: int | None, run_size: int | None) -> EmbedderSpec:
    if name.startswith(_TIMM):
        backbone = _pretrained(name, channels or 3)
        input_size = size or int(backbone.model.pretrained_cfg["input_size"][-1])  # type: ignore[index]
        return EmbedderSpec(name, name, channels or 3, input_size, _hash_weights(backbone.model))
    if not _is_folder(name):
        size = size or run_size
        script = storage.local_path(name) if name.endswith(TORCHSCRIPT) else None
        if channels is None or size is None:
            raise UserError(f"embed.backbone={name} needs to know the images", fix="set embed.size and embed.channels")
        if script is not None:
            if not storage.bring(script).is_file():
                raise UserError("there is no such file", got=name, fix="give embed.backbone a file of torch.jit.save")
            return EmbedderSpec(name, str(script), channels, size, hash_file(script))
        if ":" in name:
            weights = _hash_class(_import(name)(channels, size), name, channels, size)
            return EmbedderSpec(name, name, channels, size, weights)
        return EmbedderSpec(name, name, channels, size, hash_json([name, channels, size]))
    folder = run / "pretrain" / "backbone" if name == "pretrain" else storage.local_path(name)
    if name == "pretrain" or _is_export(folder):
        meta = read_backbone_meta(folder)
        own = size or meta["input_size"]
        return EmbedderSpec(name, str(folder.absolute()), meta["channels"], own, meta["sha256"])
    if is_pretrained(folder):
        channels, own, weights = describe_pretrained(folder, channels)
        return EmbedderSpec(name, str(folder.absolute()), channels, size or own, weights)
    choices = ["pretrain", *HANDCRAFTED]
    raise UserError(
        f"there is no backbone {name!r}{did_you_mean(name, choices)}",
        allowed=f"{', '.join(choices)}, a backbone/ folder, one of timm, transformers or sentence-transformers, "
        "timm:NAME, a TorchScript file, module:Class",
    )


def _is_folder(name: str) -> bool:
    """Whether it is none of the names that stand for something else; the colon of a URL or a path makes no class."""
    is_class = ":" in name and "://" not in name and not name.startswith(("/", "."))  # timm: among them
    return not (name in HANDCRAFTED or name.endswith(TORCHSCRIPT) or is_class)


def _is_export(folder: Path) -> bool:
    return storage.bring(folder / "backbone.json").is_file()


def _pretrained(name: str, channels: int) -> Backbone:
    """timm's model with the weights that timm has for it, behind the normalisation that they were trained with."""
    architecture = name.removeprefix(_TIMM)
    known = timm.get_pretrained_cfg(architecture, allow_unregistered=True) if timm.is_model(architecture) else None
    normalisation = {} if known is None else timm_normalisation(known.mean, known.std, channels)
    config = BackboneConfig(architecture=architecture, kwargs={"pretrained": True}, channels=channels, **normalisation)
    try:
        return Backbone(config)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"timm has no weights of {architecture!r} here", got=str(error).splitlines()[0], fix="load them once online"
        ) from None


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        data = value.cpu().contiguous().flatten().view(torch.uint8)  # numpy knows no bfloat16
        digest.update(name.encode() + data.numpy().tobytes())
    return digest.hexdigest()


def _hash_class(embedder: object, location: str, channels: int, size: int) -> str:
    """Names what a user's class computes: its weights as built, and the modules that name it and that it is from."""
    modules = (location.partition(":")[0], type(embedder).__module__)
    files = [Path(getattr(sys.modules[module], "__file__", None) or "") for module in modules]
    weights = _hash_weights(embedder) if isinstance(embedder, nn.Module) else None
    return hash_json([location, channels, size, weights, *(hash_file(file) for file in files if file.is_file())])


def _import(location: str) -> type[Embedder]:
    module, _, attribute = location.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the backbone {location!r} cannot be imported", got=str(error)) from None
