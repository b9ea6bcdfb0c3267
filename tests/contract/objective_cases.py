"""What the contract suite of objectives shares with the ranks that it spawns: one small case per objective."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from sslscale.config import (
    AnyBackboneConfig,
    AugmentConfig,
    BackboneConfig,
    FramesConfig,
    OptimizerConfig,
    PretrainConfig,
    TextConfig,
    VideoMAEConfig,
)
from sslscale.corpus import TOOLS
from sslscale.models.export import build_backbone
from sslscale.objectives import OBJECTIVES, build_objective
from sslscale.objectives.base import Moment, Objective
from sslscale.shards.text import PAD
from sslscale.views.base import Batch
from sslscale.views.keyed import KeyedRandom

GLOBAL_BATCH = 32
SIZE = 24
STEPS = 20
RECIPE = AugmentConfig(size=SIZE, crop_scale=(0.5, 1.0), brightness=0.2, contrast=0.2, shift=0.05)
RESNET = BackboneConfig(
    architecture="resnet18",
    kwargs={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_type": "deep", "stem_width": 4},
    stem="small",
    channels=1,
)
VIT = BackboneConfig(
    architecture="vit_tiny_patch16_224",
    kwargs={"img_size": SIZE, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2},
    channels=1,
)
FRAMES = 8
CLIPS = FramesConfig(**RESNET.model_dump(exclude={"library"}), frames=FRAMES, temporal="gru")
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TUBELETS = VideoMAEConfig(kwargs={"patch_size": 8, **SMALL}, channels=1, frames=FRAMES, size=SIZE)
BERT = TextConfig(kwargs={"hidden_dropout_prob": 0.1, **SMALL}, vocab_size=300, max_length=16)
GPT = TextConfig(
    architecture="gpt2",
    kwargs={"n_embd": 24, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.1, "embd_pdrop": 0.0},
    vocab_size=300,
    max_length=16,
    pooling="last",
)
# Backbones other than RESNET, for what an objective asks for.
BACKBONES: dict[str, AnyBackboneConfig] = {
    "causal_lm": GPT,
    "colorization": RESNET.model_copy(update={"channels": 3}),
    "frame_order": CLIPS,
    "mae": VIT,
    "masked_lm": BERT,
    "simcse": BERT,
    "video_mae": TUBELETS,
}
# K-means of features in fp32 would not be equal to the last digit on one rank and on two.
AT_RANDOM = {"init": "random"}
# Settings that shrink an objective to the size of the test.
SETTINGS: dict[str, dict[str, object]] = {
    "barlow_twins": {"hidden_dim": 64, "output_dim": 32},
    "byol": {"hidden_dim": 64, "output_dim": 32},
    "colorization": {"decoder_width": 16},
    "context_prediction": {"patch_size": 7},
    "csi": {"hidden_dim": 64, "output_dim": 32, "bank_size": 16},
    "deep_svdd": {"output_dim": 8},
    "dino": {
        "hidden_dim": 64,
        "output_dim": 32,
        "num_prototypes": 48,
        "local_crops": 2,
        "centre_momentum": 0.5,
        "freeze_share": 0.0,
    },
    "experts": {"num_clusters": 4, "num_heads": 2, "target_dim": 6, "tasks": 1},
    "frame_order": {"hidden_dim": 32},
    "idec": {"num_clusters": 4, "latent_dim": 4, "decoder_width": 16},
    "iic": {"num_clusters": 4, "num_heads": 2, "over_clusters": 6, **AT_RANDOM},
    "inpainting": {"decoder_width": 16},
    "jigsaw": {"patch_size": 7, "num_permutations": 8, "hidden_dim": 64},
    "mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    "joint": {
        "terms": [
            {
                "objective": {
                    "name": "scan",
                    "num_clusters": 4,
                    "num_heads": 2,
                    "num_neighbours": 5,
                    "entropy_weight": 0.5,
                    **AT_RANDOM,
                }
            },
            {"objective": {"name": "byol", "hidden_dim": 64, "output_dim": 32}, "schedule": [[0.0, 1.0], [1.0, 0.5]]},
        ]
    },
    "moco_v3": {"hidden_dim": 64, "output_dim": 32},
    "scan": {"num_clusters": 4, "num_heads": 2, "num_neighbours": 5, "entropy_weight": 0.5, **AT_RANDOM},
    "sela": {"num_clusters": 4, "num_heads": 2, **AT_RANDOM},
    "simcse": {"hidden_dim": 64, "output_dim": 32, "span": [0.4, 0.8]},
    "simsiam": {"output_dim": 64, "predictor_dim": 32},
    "swav": {
        "hidden_dim": 64,
        "output_dim": 32,
        "num_prototypes": 12,
        "local_crops": 2,
        "queue_batches": 2,
        "queue_start": 0.0,
    },
    "temi": {"num_clusters": 4, "num_heads": 3, "num_neighbours": 5, "momentum": 0.9, **AT_RANDOM},
    "transform_likelihood": {"flip": False, "shift": 0.0, "copies": 3},
    "vicreg": {"hidden_dim": 64, "output_dim": 32},
    "video_mae": {"mask_ratio": 0.75, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
}
# Learning rates other than 3e-3: heads alone are trained faster, and what is hard to learn.
RATES = {"experts": 2e-2, "transform_likelihood": 6e-3}
NAMES = sorted(OBJECTIVES)


class WholeBatch:
    """The corpus whose samples are the global batch."""

    num_samples = GLOBAL_BATCH

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    @torch.no_grad()
    def map(self, function: Callable[[torch.Tensor, KeyedRandom], torch.Tensor]) -> torch.Tensor:
        self.objective.eval()
        ids = torch.arange(GLOBAL_BATCH)
        loaded = inputs(self.objective)
        values = function(loaded, KeyedRandom.of(0, torch.zeros_like(ids), ids))
        self.objective.train()
        return values

    def by_id(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def neighbours(self, features: torch.Tensor, k: int) -> torch.Tensor:
        return torch.from_numpy(TOOLS.neighbours(features.numpy(), slice(0, GLOBAL_BATCH), k))

    def centroids(self, features: torch.Tensor, num_clusters: int, seed: int = 0) -> torch.Tensor:
        return torch.from_numpy(TOOLS.centroids(features.numpy(), num_clusters, seed, 1)).to(features.dtype)

    @torch.no_grad()
    def settle(self, backbone: torch.nn.Module) -> None:
        backbone(inputs(self.objective))


def build(name: str, dtype: torch.dtype = torch.float32, config: AnyBackboneConfig | None = None) -> Objective:
    """The same weights on every call, prepared."""
    torch.manual_seed(0)
    backbone = build_backbone(config or BACKBONES.get(name, RESNET))
    objective = build_objective({"name": name, **SETTINGS.get(name, {})}, backbone, RECIPE)
    for step in (0, STEPS):
        moment = Moment(step, STEPS, STEPS)
        if objective.prepares_at(moment):
            objective.prepare(WholeBatch(objective), moment)
    return objective.to(dtype)


def images(channels: int = 1) -> torch.Tensor:
    """(GLOBAL_BATCH, C, S, S): blobs whose place and shape vary, so that every pretext task has something to learn."""
    generator = torch.Generator().manual_seed(3)
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    centre = torch.rand(GLOBAL_BATCH, 2, 1, 1, generator=generator) - 0.5
    slope = torch.rand(GLOBAL_BATCH, 2, 1, 1, generator=generator) * 6
    distance = (x - centre[:, :1]).square() * slope[:, :1] + (y - centre[:, 1:]).square() * slope[:, 1:]
    tint = torch.tensor([1.0, 0.6, 0.2])[:channels, None, None]
    return torch.exp(-4 * distance) * (0.6 + 0.4 * torch.sin(9 * x + 3 * y)) * tint


def clips(channels: int = 1) -> torch.Tensor:
    """(GLOBAL_BATCH, T, C, S, S): the blobs, going down at a speed of their own."""
    still = images(channels)
    times = range(FRAMES)
    moved = [torch.stack([image.roll(t * (1 + i % 3), dims=1) for t in times]) for i, image in enumerate(still)]
    return torch.stack(moved)


def texts(channels: None = None) -> torch.Tensor:
    """int32 (GLOBAL_BATCH, 16): texts of 2 to 14 words, in which a word's successor is one of a few."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.full((GLOBAL_BATCH, 16), PAD, dtype=torch.int32)
    for row in tokens:
        length = int(torch.randint(2, 15, (), generator=generator))
        steps = torch.randint(1, 4, (length,), generator=generator)
        row[: length + 2] = torch.cat([torch.tensor([1]), 10 + steps.cumsum(0) * 7 % 250, torch.tensor([2])])
    return tokens


INPUTS = {"images": images, "clips": clips, "tokens": texts}


def inputs(objective: Objective) -> torch.Tensor:
    """The global batch, as the objective's backbone takes it."""
    return INPUTS[objective.backbone.OFFERS[0]](objective.backbone.config.channels)


def batch(objective: Objective, start: int, stop: int, epoch: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Samples [start, stop) of the global batch of an epoch, as the loop would make it."""
    ids = torch.arange(start, stop)
    random = KeyedRandom.of(0, torch.full_like(ids, epoch), ids)

    def views_of(which: torch.Tensor, draws: KeyedRandom) -> Batch:
        views = objective.make_views(inputs(objective)[which], draws.fold("views"))
        cast = {name: view.to(dtype) if view.is_floating_point() else view for name, view in views.items()}
        return Batch(cast, draws.fold("objective"), ids)

    partners = objective.partners(ids, random.fold("partners"))
    made = views_of(ids, random)
    return made if partners is None else replace(made, partner=views_of(partners, random.fold("partner")))


def pretrain_config(name: str, **changes: object) -> PretrainConfig:
    values: dict[str, object] = {
        "objective": {"name": name, **SETTINGS.get(name, {})},
        "backbone": BACKBONES.get(name, RESNET),
        "views": RECIPE,
        "global_batch": GLOBAL_BATCH,
        "num_streams": 2,
        "num_workers": 1,
        "optimizer": OptimizerConfig(lr=RATES.get(name, 3e-3), warmup_share=0.1),
    }
    return PretrainConfig(**{**values, **changes})  # type: ignore[arg-type]


def gradients_of_a_rank(rank: int, world_size: int, folder: str) -> None:
    """Every objective's gradient on this rank's share, averaged over ranks as the engine would; rank 0 saves them."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    share = GLOBAL_BATCH // world_size
    saved = {}
    for name in NAMES:
        objective = build(name, torch.float64)
        loss = objective(batch(objective, rank * share, (rank + 1) * share, dtype=torch.float64))["loss"]
        loss.backward()
        gradients = {}
        for key, parameter in objective.named_parameters():
            if parameter.requires_grad:
                total = parameter.grad.clone()
                dist.all_reduce(total)
                gradients[key] = total / world_size
        saved[name] = gradients
    if rank == 0:
        torch.save(saved, Path(folder) / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()
