"""The backbones that training may start from: one model a library, told apart by `library`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BeforeValidator, Discriminator, Field, Tag

from sslscale.config.base import AboveZero, Positive, StageConfig
from sslscale.errors import UserError, did_you_mean


class _Views(Protocol):
    size: int


class _TimmConfig(StageConfig):
    architecture: str = "resnet18"
    kwargs: dict[str, Any] = Field(default_factory=dict, description="arguments of timm.create_model")
    stem: Literal["default", "small"] = Field("default", description="small: 3x3 stride-1 first conv and no pool")
    channels: Literal[1, 3] = 3
    mean: list[float] = Field(default_factory=lambda: [0.5])
    std: list[AboveZero] = Field(default_factory=lambda: [0.5])

    @property
    def model_channels(self) -> int:
        """Of the timm model's input."""
        return self.channels

    def input_size(self, views: _Views) -> int:
        """The side of the images that the exported backbone is meant for."""
        return views.size


class BackboneConfig(_TimmConfig):
    """A timm model by name and arguments, randomly initialised."""

    WEIGHTS_FIT: ClassVar[tuple[str, ...]] = ("library", "architecture", "stem", "channels", "mean", "std")
    """What weights of another run were trained behind, and so must be the same."""

    library: Literal["timm"] = "timm"


class FramesConfig(_TimmConfig):
    """A timm model on every frame of a clip, and what makes one feature of the frames' features."""

    WEIGHTS_FIT: ClassVar[tuple[str, ...]] = (*BackboneConfig.WEIGHTS_FIT, "frames", "window", "temporal")

    library: Literal["timm_frames"] = "timm_frames"
    frames: Positive = Field(8, description="frames of a clip, spread evenly over it")
    window: Positive = Field(1, description="frames in a row that the model sees at once, as channels: 2 show motion")
    temporal: Literal["mean", "gru"] = Field("mean", description="mean: their order is lost; gru: its last state")

    @property
    def model_channels(self) -> int:
        return self.window * self.channels


class VideoMAEConfig(StageConfig):
    """transformers' VideoMAE, randomly initialised: a ViT over tubelets of 2 frames by `patch_size` pixels a side."""

    WEIGHTS_FIT: ClassVar[tuple[str, ...]] = ("library", "kwargs", "channels", "mean", "std", "frames", "size")

    library: Literal["videomae"] = "videomae"
    architecture: Literal["videomae"] = "videomae"
    kwargs: dict[str, Any] = Field(default_factory=dict, description="arguments of transformers' VideoMAEConfig")
    channels: Literal[1, 3] = 3
    mean: list[float] = Field(default_factory=lambda: [0.5])
    std: list[AboveZero] = Field(default_factory=lambda: [0.5])
    frames: Positive = Field(16, description="frames of a clip, spread evenly over it")
    size: Positive = Field(224, description="side of a frame in pixels; views.size must be the same")

    def input_size(self, views: _Views) -> int:
        return self.size


class TextConfig(StageConfig):
    """A transformers model by type and arguments, randomly initialised, over a byte-level BPE of the corpus."""

    WEIGHTS_FIT: ClassVar[tuple[str, ...]] = ("library", "architecture", "kwargs", "vocab_size", "pooling")
    channels: ClassVar[None] = None  # of images, which a text has none of

    library: Literal["transformers"] = "transformers"
    architecture: str = Field("bert", description="a model type of transformers, such as bert, modernbert or gpt2")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="arguments of the type's configuration")
    vocab_size: int = Field(8192, ge=260, description="256 bytes, 4 special tokens, and the merges that are trained")
    lowercase: bool = True
    max_length: int = Field(64, ge=3, description="tokens that a text is cut to")
    pooling: Literal["mean", "cls", "last"] = Field("mean", description="over tokens; last suits causal models")
    normalize: bool = Field(False, description="L2-normalise the pooled feature")
    tokenizer_samples: Positive = Field(100_000, description="texts that the BPE is trained on, spread evenly")

    def input_size(self, views: _Views) -> int:
        """The most tokens of a text."""
        return self.max_length


BACKBONES: dict[str, type[StageConfig]] = {
    "timm": BackboneConfig,
    "timm_frames": FramesConfig,
    "videomae": VideoMAEConfig,
    "transformers": TextConfig,
}


def _library(given: Any) -> str:
    return str(given.get("library", "timm") if isinstance(given, dict) else given.library)


def _check_library(given: Any) -> Any:
    """UserError for what names no library: pydantic would speak of tags."""
    if not isinstance(given, dict | StageConfig):
        raise UserError("a backbone is a section of settings", got=repr(given), allowed="architecture=..., library=...")
    if _library(given) not in BACKBONES:
        raise UserError(
            f"unknown library {_library(given)!r}{did_you_mean(_library(given), BACKBONES)}",
            allowed=", ".join(sorted(BACKBONES)),
        )
    return given


AnyBackboneConfig = Annotated[
    Annotated[BackboneConfig, Tag("=timm")]
    | Annotated[FramesConfig, Tag("=timm_frames")]
    | Annotated[VideoMAEConfig, Tag("=videomae")]
    | Annotated[TextConfig, Tag("=transformers")],
    Discriminator(lambda given: f"={_library(given)}"),
    BeforeValidator(_check_library),
]
