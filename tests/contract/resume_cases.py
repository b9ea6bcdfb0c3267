"""Runs of the real training loop, by however many ranks, over one small dataset; and what they logged."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sslscale.config import RunConfig, load_config
from sslscale.corpus import TOOLS
from sslscale.pretrain.loop import Trainer
from sslscale.pretrain.ranks import STOP
from sslscale.pretrain.stage import fit_backbone
from sslscale.shards.dataset import open_shards

ROOT = Path(__file__).parents[2]
STEPS, FIRST_STOP, SECOND_STOP = 80, 40, 60
# case -> the settings that differ from the quickstart's; every ZeRO stage, and every kind of slow state
CASES: dict[str, list[str]] = {
    "centre-zero-0": [
        "pretrain.objective={name: dino, hidden_dim: 32, output_dim: 16, num_prototypes: 48, local_crops: 2}",
        "pretrain.zero_stage=0",
    ],
    "queue-zero-1": [
        "pretrain.objective={name: swav, hidden_dim: 32, output_dim: 16, num_prototypes: 12, local_crops: 2, "
        "queue_batches: 2}",
        "pretrain.zero_stage=1",
    ],
    "teacher-zero-2": ["pretrain.objective={name: byol, hidden_dim: 32, output_dim: 16}", "pretrain.zero_stage=2"],
    "stream-zero-1": [  # BatchNorm of each stream's samples, and so passes of some streams
        "pretrain.objective={name: byol, hidden_dim: 32, output_dim: 16}",
        *("pretrain.batch_norm=stream", "pretrain.micro_batch=8", "pretrain.zero_stage=1"),
    ],
    "partners-zero-1": [  # a sum that stays away from 0, where relative errors say nothing, and a rate without chaos
        "pretrain.objective={name: joint, terms: [{objective: {name: scan, num_clusters: 5, num_heads: 2, "
        "num_neighbours: 5, refresh_epochs: 5, self_label_share: 0.3, confidence: 0.3}}, "
        "{objective: {name: simclr, hidden_dim: 32, output_dim: 16}, schedule: [[0, 2], [1, 1]]}]}",
        "pretrain.optimizer.lr=5e-4",
        "pretrain.zero_stage=1",
    ],
    "tables-zero-2": [
        "pretrain.objective={name: joint, terms: [{objective: {name: temi, num_clusters: 5, num_heads: 2, "
        "num_neighbours: 5, refresh_epochs: 4}}, {objective: {name: sela, num_clusters: 5, num_heads: 2}}, "
        "{objective: {name: idec, num_clusters: 5, decoder_width: 8}}, {objective: {name: deep_svdd}}]}",
        "pretrain.zero_stage=2",
    ],
    "text-zero-3": [
        "pretrain.objective={name: masked_lm}",
        "pretrain.backbone={library: transformers, vocab_size: 300, max_length: 16, kwargs: {hidden_size: 16, "
        "num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16, hidden_dropout_prob: 0.1}}",
        "pretrain.zero_stage=3",
    ],
    "clips-zero-2": [
        "pretrain.objective={name: video_mae, decoder_dim: 16, decoder_depth: 1, decoder_heads: 2}",
        "pretrain.backbone={library: videomae, channels: 1, frames: 4, size: 8, kwargs: {patch_size: 4, "
        "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16}}",
        "pretrain.objective.mask_ratio=0.5",
        "pretrain.zero_stage=2",
    ],
    "contrast-zero-3": ["pretrain.objective={name: simclr, hidden_dim: 32, output_dim: 16}", "pretrain.zero_stage=3"],
}


class StoppedTrainer(Trainer):
    """Asked to stop, as the driver would ask, in its step `last`."""

    last = STEPS

    def _stop_asked(self) -> bool:
        if self.rank == 0 and self.state.step + 1 == self.last:
            (self.folder / STOP).touch()
        return super()._stop_asked()


def config(case: str, data: Path) -> RunConfig:
    """The quickstart, small, in fp32, over more than one epoch."""
    return load_config(
        str(ROOT / "configs" / "quickstart.yaml"),
        [
            *(f"datasets.train={data}", "limit=200", "pretrain.epochs=null", f"pretrain.steps={STEPS}"),
            *("pretrain.global_batch=32", "pretrain.num_streams=4", "pretrain.precision=fp32", "pretrain.log_every=1"),
            *("pretrain.trace_samples=true", "pretrain.evaluate_every=0", "pretrain.evaluate_samples=32"),
            "pretrain.optimizer.lr=2e-3",  # rounding grows with the rate, and losses are compared to 1e-5
            *(f"pretrain.checkpoint_every={STEPS - SECOND_STOP}", "pretrain.keep_checkpoints=9"),
            "pretrain.backbone.kwargs={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16], stem_type: deep, stem_width: 4}",
            *CASES[case],
        ],
    )


def start_ranks(work: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """work(rank, world_size, *arguments) in processes forked from one that has done their imports."""
    multiprocessing.set_forkserver_preload(["sslscale.pretrain.loop"])
    mp.start_processes(_launched, (work, world_size, *arguments), nprocs=world_size, start_method="forkserver")


def _launched(rank: int, work: Callable[..., None], world_size: int, *arguments: Any) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}  # as launchers do
    work(rank, world_size, *arguments)


def train_all(rank: int, world_size: int, folder: str, data: str, cases: list[str], last: int = STEPS) -> None:
    """Trains (or goes on training) FOLDER/<case>/pretrain to step `last`, as one of `world_size` ranks."""
    torch.set_num_threads(1)
    if world_size == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store-{last}", rank=rank, world_size=world_size)
    for case in cases:
        train(Path(folder, case), case, Path(data), last)
    dist.barrier()
    dist.destroy_process_group()


def train_and_resume(rank: int, world_size: int, folder: str, data: str, cases: list[str], resumed: str) -> None:
    """Trains FOLDER/<case> to the end, and then again from its second stop, as RESUMED/<case>."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    for case in cases:
        train(Path(folder, case), case, Path(data), STEPS)
        if rank == 0:
            rewind(Path(folder, case), Path(resumed, case), SECOND_STOP)
        train(Path(resumed, case), case, Path(data), STEPS)
    dist.barrier()
    dist.destroy_process_group()


def train(folder: Path, case: str, data: Path, last: int) -> None:
    run = folder / "pretrain"
    dist.barrier()
    run.mkdir(parents=True, exist_ok=True)
    (run / STOP).unlink(missing_ok=True)
    dist.barrier()
    settings = config(case, data)
    assert settings.pretrain is not None
    if dist.get_rank() == 0:
        fit_backbone(run, settings.pretrain, open_shards(str(data)))
    dist.barrier()
    trainer = StoppedTrainer(run, settings, TOOLS)
    trainer.last = last
    assert trainer.train().finished is (last == STEPS)


def rewind(source: Path, target: Path, step: int) -> None:
    """A copy of a finished run as it was at its checkpoint of `step`."""
    shutil.copytree(source, target)
    listing = target / "pretrain" / "checkpoints.json"
    written = json.loads(listing.read_text())
    kept = [entry for entry in written["checkpoints"] if entry["state"]["step"] <= step]
    assert kept[-1]["state"]["step"] == step
    listing.write_text(json.dumps({**written, "checkpoints": kept}))


def logged(run: Path, name: str, value: str) -> dict[int, Any]:
    """step -> the value, of the lines of a log that have it."""
    lines = map(json.loads, (run / "pretrain" / name).read_text().splitlines())
    return {line["step"]: line[value] for line in lines if value in line}


def losses(run: Path) -> dict[int, float]:
    return logged(run, "metrics.jsonl", "loss")


def samples(run: Path) -> dict[int, list[str]]:
    """step -> the sorted keys of its global batch."""
    return logged(run, "samples.jsonl", "keys")
