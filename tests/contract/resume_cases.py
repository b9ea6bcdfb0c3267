"""Runs of the real training loop, by however many ranks, over one small dataset; and what they logged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from sslscale.config import RunConfig, load_config
from sslscale.pretrain.loop import Trainer

ROOT = Path(__file__).parents[2]
STEPS, STOP_AT = 12, 5
# case -> the settings that differ from the quickstart's; every ZeRO stage, and every kind of slow state
CASES: dict[str, list[str]] = {
    **{f"zero-{stage}": ["pretrain.objective={name: rotation}", f"pretrain.zero_stage={stage}"] for stage in range(4)},
    "contrast": ["pretrain.objective={name: simclr, hidden_dim: 32, output_dim: 16}"],
    "teacher": [
        "pretrain.objective={name: byol, hidden_dim: 32, output_dim: 16}",
        "pretrain.zero_stage=2",
    ],
    "centre": ["pretrain.objective={name: dino, hidden_dim: 32, output_dim: 16, num_prototypes: 48, local_crops: 2}"],
    "queue": [
        "pretrain.objective={name: swav, hidden_dim: 32, output_dim: 16, num_prototypes: 12, local_crops: 2, "
        "queue_batches: 2}",
    ],
}


def config(case: str, data: Path) -> RunConfig:
    """The quickstart, small, in fp32, over more than one epoch."""
    return load_config(
        str(ROOT / "configs" / "quickstart.yaml"),
        [
            *(f"datasets.train={data}", "limit=200", "pretrain.epochs=null", f"pretrain.steps={STEPS}"),
            *(
                "pretrain.global_batch=32",
                "pretrain.precision=fp32",
                "pretrain.log_every=1",
                "pretrain.evaluate_every=0",
            ),
            *("pretrain.evaluate_samples=32", f"pretrain.checkpoint_every={STOP_AT}", "pretrain.keep_checkpoints=9"),
            "pretrain.backbone.kwargs={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16], stem_type: deep, stem_width: 4}",
            *CASES[case],
        ],
    )


def train_all(rank: int, world_size: int, folder: str, data: str, cases: list[str]) -> None:
    """Trains (or goes on training) FOLDER/<case>/pretrain to the end, as one of `world_size` ranks."""
    torch.set_num_threads(1)
    if world_size == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    for case in cases:
        run = Path(folder, case, "pretrain")
        run.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        assert Trainer(run, config(case, Path(data))).train().finished
    dist.barrier()
    dist.destroy_process_group()


def rewind(source: Path, target: Path) -> None:
    """A copy of a finished run as it was at its first checkpoint."""
    shutil.copytree(source, target)
    listing = target / "pretrain" / "checkpoints.json"
    written = json.loads(listing.read_text())
    assert written["checkpoints"][0]["state"]["step"] == STOP_AT
    listing.write_text(json.dumps({**written, "checkpoints": written["checkpoints"][:1]}))


def losses(run: Path) -> dict[int, float]:
    """step -> loss, as metrics.jsonl has it."""
    lines = map(json.loads, (run / "pretrain" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
