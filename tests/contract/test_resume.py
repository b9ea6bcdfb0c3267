"""Stopped on two ranks, continued on one, then on four: the same samples, the same losses."""

import itertools

import numpy as np
import pytest
import torch.distributed as dist
from resume_cases import (
    CASES,
    FIRST_STOP,
    SECOND_STOP,
    STEPS,
    losses,
    rewind,
    samples,
    start_ranks,
    train_all,
    train_and_resume,
)
from sklearn.datasets import load_digits
from tars import encode_png, write_tar

from sslscale.errors import StageError
from sslscale.shards.sources.moving_digits import encode_mp4

NAMES = list(CASES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """200 digits, each as an image, in words, and as a clip in which it goes right."""
    folder = tmp_path_factory.mktemp("data")
    digits = load_digits()
    members = []
    for number, (image, label) in enumerate(zip(digits.images[:200], digits.target, strict=False)):
        pixels = (image * 15).astype(np.uint8)
        words = f"{number} is {'odd' if label % 2 else 'even'} and shows {label} with {int(image.sum())} of ink"
        clip = encode_mp4(np.stack([np.roll(pixels.repeat(2, 0).repeat(2, 1), 2 * t, axis=1) for t in range(4)]))
        files = {"png": encode_png(pixels), "txt": words.encode(), "mp4": clip}
        members += [(f"{number:06d}.{extension}", content) for extension, content in files.items()]
    for shard in range(4):
        write_tar(folder / f"{shard}.tar", members[150 * shard : 150 * (shard + 1)])
    return folder


@pytest.fixture(scope="module")
def on_two_ranks(data, tmp_path_factory):
    """Every case, uninterrupted on two ranks; and stopped on two ranks and continued on two."""
    whole, resumed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("resumed")
    start_ranks(train_and_resume, 2, str(whole), str(data), NAMES, str(resumed))
    return whole, resumed


@pytest.fixture(scope="module")
def whole(on_two_ranks):
    return on_two_ranks[0]


@pytest.fixture(scope="module")
def resumed(on_two_ranks):
    return on_two_ranks[1]


@pytest.fixture(scope="module")
def resized(whole, data, tmp_path_factory):
    """Every case, stopped on two ranks, continued on one, stopped, and continued on four."""
    folder = tmp_path_factory.mktemp("resized")
    for case in NAMES:
        rewind(whole / case, folder / case, FIRST_STOP)
    train_all(0, 1, str(folder), str(data), NAMES, SECOND_STOP)
    start_ranks(train_all, 4, str(folder), str(data), NAMES)
    return folder


@pytest.mark.parametrize("case", NAMES)
def test_the_same_number_of_ranks_goes_on_bit_for_bit(case, whole, resumed):
    assert losses(resumed / case) == losses(whole / case)
    weights = "pretrain/backbone/backbone.safetensors"
    assert (resumed / case / weights).read_bytes() == (whole / case / weights).read_bytes()


@pytest.mark.parametrize("case", NAMES)
def test_other_numbers_of_ranks_go_on_with_the_same_samples(case, whole, resized):
    batches = samples(resized / case)
    assert batches == samples(whole / case)
    assert list(batches) == list(range(1, STEPS + 1)) and {len(keys) for keys in batches.values()} == {32}
    first_epoch = list(itertools.chain.from_iterable(batches.values()))[:192]
    assert len(set(first_epoch)) == 192  # of 200: a stream of 50 ends within its seventh batch of 8


@pytest.mark.parametrize("case", NAMES)
def test_other_numbers_of_ranks_go_on_with_the_same_losses(case, whole, resized):
    expected, ours = losses(whole / case), losses(resized / case)
    assert list(ours) == list(range(1, STEPS + 1))
    for step, loss in ours.items():
        assert loss == pytest.approx(expected[step], rel=1e-5), step


def test_an_optimizer_that_cannot_be_resized_is_refused(data, whole, tmp_path, monkeypatch):
    rewind(whole / "queue-zero-1", tmp_path / "sgd", FIRST_STOP)
    monkeypatch.setitem(CASES, "sgd", [*CASES["queue-zero-1"], "pretrain.optimizer.name=sgd"])
    with pytest.raises(StageError, match="only AdamW"):
        train_all(0, 1, str(tmp_path), str(data), ["sgd"])
    dist.destroy_process_group()
