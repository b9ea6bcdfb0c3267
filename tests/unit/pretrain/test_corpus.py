"""Passes over a training set, of which some samples cannot be read: what an objective is given of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tars import encode_png, write_tar

from sslscale.corpus import TOOLS
from sslscale.errors import StageError, UserError
from sslscale.models.drop_path import KeyedDropPath
from sslscale.models.norm import gather_batch_norm
from sslscale.pretrain.corpus import TrainingCorpus
from sslscale.runtime.base import compute_threads
from sslscale.shards.dataset import open_shards
from sslscale.shards.loader import TrainLoader
from sslscale.shards.readers import ImageReader

LOST = (5, 300)
COUNT = 600
READER = ImageReader(channels=1, size=4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """600 grey images in two shards, whose value is their id modulo 256; two of them are no images."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, ids in enumerate((range(250), range(250, COUNT))):
        members = []
        for i in ids:
            data = b"no image" if i in LOST else encode_png(np.full((4, 4), i % 256, np.uint8))
            members.append((f"{i:04d}.png", data))
        write_tar(folder / f"train-{shard}.tar", members)
    return folder


def corpus(folder, module=None):
    return TrainingCorpus(
        open_shards(str(folder)),
        module or torch.nn.Identity(),
        TOOLS,
        reader=READER,
        decode_threads=2,
        device=torch.device("cpu"),
        threads=1,
        seed=0,
        feed=lambda: None,
    )


def value(images, random):
    return (images[:, 0, 0, 0] * 255).round()


def test_a_pass_gives_what_can_be_read_in_the_order_of_ids(shards):
    module = torch.nn.Dropout()
    seen = corpus(shards, module)
    for _ in range(2):  # read, and kept
        values = seen.map(lambda images, random: value(images, random) + (1000 if module.training else 0))
        readable = [i for i in range(COUNT) if i not in LOST]
        assert values.tolist() == [i % 256 for i in readable]
    assert module.training
    table = seen.by_id(values)
    assert len(table) == COUNT and table[5] == 0 and table[301] == 301 % 256


def test_draws_are_the_samples_own_and_neighbours_are_ids(shards):
    seen = corpus(shards)
    draws = seen.map(lambda images, random: random.uniform("x"))
    assert len(set(draws.tolist())) > 590 and torch.equal(draws, seen.map(lambda _, random: random.uniform("x")))
    angle = seen.map(lambda images, random: value(images, random) / 255)
    features = torch.stack([angle.cos(), angle.sin()], dim=1)
    found = seen.neighbours(features, 3)
    readable = torch.tensor([i for i in range(COUNT) if i not in LOST])
    assert found.shape == (len(readable), 3) and not (found == readable[:, None]).any()
    assert not set(found.flatten().tolist()) & set(LOST)
    assert found[10].tolist()[:2] == [readable[10] + 256, readable[10] + 512]  # its equals come first
    with pytest.raises(UserError, match="more neighbours"):
        seen.neighbours(features, 598)


def test_centroids_are_those_of_k_means_and_too_many_are_refused(shards):
    seen = corpus(shards)
    features = seen.map(lambda images, random: (value(images, random)[:, None] > 100).float())
    assert sorted(seen.centroids(features, 2).flatten().tolist()) == [0.0, 1.0]
    with pytest.raises(UserError, match="more clusters than samples"):
        seen.centroids(features, 599)


def test_settling_drops_nothing_and_leaves_the_mode_as_it_was(shards):
    class Drops(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = torch.nn.BatchNorm2d(1), KeyedDropPath(0.5)  # not told yet which samples it sees

        def forward(self, x):
            return self.drop(self.norm(x))

    module = Drops()
    corpus(shards).settle(module)
    assert module.training and module.norm.training and module.drop.training
    assert module.norm.running_mean.item() > 0.3
    module.eval()
    before = module.norm.running_mean.clone()
    corpus(shards).settle(module)
    assert torch.equal(module.norm.running_mean, before) and not module.norm.training


def test_batch_norm_is_given_the_statistics_of_what_can_be_read_whatever_it_had(shards):
    norm, seen = torch.nn.BatchNorm2d(1), corpus(shards)
    norm.running_mean.fill_(1000.0)
    seen.settle(norm)
    chunks = [[i % 256 / 255 for i in range(at, min(at + 256, COUNT)) if i not in LOST] for at in (0, 256, 512)]
    expected = 0.0
    for turn in range(40):
        expected = 0.9 * expected + 0.1 * np.mean(chunks[turn % 3])
    assert norm.running_mean.item() == pytest.approx(expected, abs=1e-5)


def test_a_last_chunk_of_one_sample_settles_nothing(tmp_path):
    images = [(f"{i:04d}.png", encode_png(np.full((4, 4), i % 256, np.uint8))) for i in range(257)]
    write_tar(tmp_path / "a.tar", images)
    norm = torch.nn.BatchNorm2d(1)
    corpus(tmp_path).settle(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), norm))
    assert norm.running_mean.item() == pytest.approx(np.mean(np.arange(256) / 255) * (1 - 0.9**20), abs=1e-4)


def test_what_is_no_sample_is_filled_up_in_a_pass_over_texts(tmp_path):
    from sslscale.shards.text import TextReader, train_tokenizer

    texts = [f"word {i}" for i in range(5)]
    train_tokenizer(texts, 60, True, tmp_path / "tokenizer.json")
    write_tar(tmp_path / "a.tar", [(f"{i}.txt", text.encode()) for i, text in enumerate(texts)])
    seen = corpus(tmp_path)
    seen._reader = TextReader(str(tmp_path / "tokenizer.json"), 8)
    found = seen.map(lambda tokens, random: (tokens >= 0).sum(dim=1) + random.integers("x", 1))
    assert len(found) == 5 and (found > 1).all()


def _on_a_rank(rank: int, world_size: int, folder: str, output: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{output}/store", rank=rank, world_size=world_size)
    torch.save(_answers(folder), Path(output) / f"{rank}.pt")
    dist.destroy_process_group()


def _answers(folder: str) -> list[torch.Tensor]:
    seen = corpus(folder)
    features = seen.map(lambda images, random: torch.stack([value(images, random), random.uniform("x")], dim=1))
    norm = gather_batch_norm(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.BatchNorm2d(1)))
    with compute_threads(1):  # by which sums are rounded
        seen.settle(norm)
    return [features, seen.neighbours(features, 4), seen.centroids(features, 3), norm[1].running_var]


def test_two_ranks_are_given_what_one_is(shards, tmp_path):
    mp.spawn(_on_a_rank, args=(2, str(shards), str(tmp_path)), nprocs=2)
    for ours, *theirs in zip(_answers(str(shards)), *(torch.load(tmp_path / f"{r}.pt") for r in range(2)), strict=True):
        assert all(torch.equal(ours, other) for other in theirs)


def test_the_loader_reads_partners_beside_its_batch(shards):
    with TrainLoader(
        open_shards(str(shards)),
        rank=0,
        world_size=1,
        num_streams=2,
        global_batch=8,
        seed=0,
        shuffle_block=64,
        cursors=None,
        reader=READER,
        partners=lambda ids, epochs: (ids * 7 + 3) % 250 + 6,
    ) as loader:
        batch = next(iter(loader))
        with pytest.raises(StageError, match="could be read before"):
            loader._read_partners(torch.tensor([LOST[0]]))
    assert batch.partners[:, 0, 0, 0].tolist() == [(i * 7 + 3) % 250 + 6 for i in batch.ids.tolist()]
