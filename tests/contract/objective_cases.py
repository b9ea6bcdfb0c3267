"""What the contract suite of objectives shares with the ranks that it spawns: one small case per objective."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from sslscale.config import AugmentConfig, BackboneConfig, OptimizerConfig, PretrainConfig
from sslscale.models.image import Backbone
from sslscale.objectives import OBJECTIVES, build_objective
from sslscale.objectives.base import Objective
from sslscale.views.base import Batch
from sslscale.views.keyed import KeyedRandom

GLOBAL_BATCH = 32
SIZE = 24
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
# Backbones other than RESNET, for what an objective asks for.
BACKBONES = {"colorization": RESNET.model_copy(update={"channels": 3}), "mae": VIT}
# Settings that shrink an objective to the size of the test.
SETTINGS: dict[str, dict[str, object]] = {
    "barlow_twins": {"hidden_dim": 64, "output_dim": 32},
    "byol": {"hidden_dim": 64, "output_dim": 32},
    "colorization": {"decoder_width": 16},
    "context_prediction": {"patch_size": 7},
    "dino": {"hidden_dim": 64, "output_dim": 32, "num_prototypes": 48, "local_crops": 2, "centre_momentum": 0.5},
    "inpainting": {"decoder_width": 16},
    "jigsaw": {"patch_size": 7, "num_permutations": 8, "hidden_dim": 64},
    "mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    "moco_v3": {"hidden_dim": 64, "output_dim": 32},
    "simsiam": {"output_dim": 64, "predictor_dim": 32},
    "swav": {
        "hidden_dim": 64,
        "output_dim": 32,
        "num_prototypes": 12,
        "local_crops": 2,
        "queue_batches": 2,
        "queue_start": 0.0,
    },
    "vicreg": {"hidden_dim": 64, "output_dim": 32},
}
NAMES = sorted(OBJECTIVES)


def build(name: str, dtype: torch.dtype = torch.float32) -> Objective:
    """The same weights on every call."""
    torch.manual_seed(0)
    backbone = Backbone(BACKBONES.get(name, RESNET))
    objective = build_objective({"name": name, **SETTINGS.get(name, {})}, backbone, RECIPE)
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


def batch(objective: Objective, start: int, stop: int, epoch: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Samples [start, stop) of the global batch of an epoch, as the loop would make it."""
    ids = torch.arange(start, stop)
    random = KeyedRandom.of(0, torch.full_like(ids, epoch), ids)
    views = objective.views(images(objective.backbone.config.channels)[start:stop], random.fold("views"))
    cast = {name: view.to(dtype) if view.is_floating_point() else view for name, view in views.items()}
    return Batch(cast, random.fold("objective"))


def pretrain_config(name: str, **changes: object) -> PretrainConfig:
    values: dict[str, object] = {
        "objective": {"name": name, **SETTINGS.get(name, {})},
        "backbone": BACKBONES.get(name, RESNET),
        "views": RECIPE,
        "global_batch": GLOBAL_BATCH,
        "num_streams": 2,
        "num_workers": 1,
        "optimizer": OptimizerConfig(lr=3e-3, warmup_share=0.1),
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
