from __future__ import annotations

import threading
from itertools import islice

import numpy as np
import pytest
import torch

from sslscale.errors import StageError, UserError
from sslscale.shards.dataset import open_shards
from sslscale.shards.decode import decode_image
from sslscale.shards.loader import TrainLoader
from sslscale.shards.plan import Cursor
from sslscale.shards.readers import ImageReader, Reader

READER = ImageReader(channels=1, size=4)
COUNTS = [9, 14, 5]


class Reading(Reader):
    def __init__(self, read):
        self.read = read


def make_loader(folder, rank=0, world_size=1, cursors=None, num_streams=4, **options):
    settings = {"global_batch": 8, "seed": 3, "shuffle_block": 4, "reader": READER, **options}
    return TrainLoader(
        open_shards(str(folder)),
        rank=rank,
        world_size=world_size,
        num_streams=num_streams,
        cursors=cursors,
        **settings,
    )


def steps(folder, world_size, count, cursors=None, **options):
    """Every step's samples as (epoch, id), gathered over ranks into the streams' order; and the cursors after it."""
    batches = []
    for rank in range(world_size):
        with make_loader(folder, rank, world_size, cursors, **options) as loader:
            batches.append(list(islice(loader, count)))
    gathered = []
    for ranks in zip(*batches, strict=True):
        streams, after = {}, {}
        for rank, batch in enumerate(ranks):
            pairs = list(zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True))
            for place, stream in enumerate(range(rank, 4, world_size)):
                streams[stream] = pairs[2 * place : 2 * place + 2]
            after.update(batch.cursors)
        gathered.append(([pair for stream in range(4) for pair in streams[stream]], [after[s] for s in range(4)]))
    return gathered


@pytest.fixture
def damaged(make_shards, write_tar, png):
    """Two of 28 records cannot be used: one is no image, one holds a pickle."""
    folder = make_shards(COUNTS)
    write_tar(
        folder / "train-00002.tar",
        [("a.png", png(23)), ("b.png", b"no image"), ("c.png", png(25)), ("c.pkl", b"x"), ("d.png", png(26)),
         ("e.png", png(27))],
    )  # fmt: skip
    return folder


def test_images_belong_to_their_ids(make_shards):
    with make_loader(make_shards(COUNTS)) as loader:
        batch = next(iter(loader))
    assert batch.inputs.shape == (8, 1, 4, 4)
    assert batch.inputs.dtype == torch.uint8
    assert batch.inputs[:, 0, 0, 0].tolist() == batch.ids.tolist()


@pytest.mark.parametrize("options", [{"decode_threads": 3}, {"prefetch": 0}, {"prefetch": 5}])
def test_global_batches_depend_on_neither_world_size_nor_threads(damaged, options):
    one = steps(damaged, 1, 9)
    assert steps(damaged, 2, 9, **options) == one
    assert steps(damaged, 4, 9, **options) == one


def test_a_run_goes_on_at_another_world_size(damaged):
    whole = steps(damaged, 4, 9)
    first = steps(damaged, 4, 4)
    assert first + steps(damaged, 2, 5, cursors=first[-1][1]) == whole


def test_failures_are_counted_once_an_epoch_and_replaced(damaged):
    with make_loader(damaged, num_streams=1, global_batch=13) as loader:
        batches = list(islice(loader, 4))
    assert [len(batch.ids) for batch in batches] == [13] * 4
    for epoch in range(2):  # 26 good records an epoch
        two = batches[2 * epoch : 2 * epoch + 2]
        ids = [number for batch in two for number in batch.ids.tolist()]
        assert sorted(ids) == sorted(set(range(28)) - {24, 25})
    failed = [(failure.key, failure.reason) for batch in batches for failure in batch.failures]
    assert sorted(key for key, _ in failed) in (["b", "b", "c", "c"], ["b", "c", "c"], ["b", "b", "c"])
    reasons = dict(failed)
    assert "cannot be decoded" in reasons["b"]
    assert "unpickled" in reasons["c"]


def test_a_stream_without_a_good_record_ends_the_run(make_shards):
    with (
        make_loader(make_shards([9]), reader=Reading(lambda sample: decode_image({}, 1, 4))) as loader,
        pytest.raises(StageError, match="a whole epoch failed"),
    ):
        next(iter(loader))


def test_an_unforeseen_exception_reaches_the_consumer(make_shards):
    def broken(sample):
        raise ZeroDivisionError

    with make_loader(make_shards([9]), reader=Reading(broken)) as loader, pytest.raises(ZeroDivisionError):
        next(iter(loader))


def test_images_of_several_sizes_are_refused(make_shards):
    sizes = iter(range(1, 100))
    loader = make_loader(make_shards([9]), reader=Reading(lambda sample: np.zeros((1, next(sizes), 1), np.uint8)))
    with loader, pytest.raises(StageError, match="differ in shape"):
        next(iter(loader))


def test_closing_ends_the_threads(make_shards):
    before = threading.active_count()
    with make_loader(make_shards([9]), decode_threads=2) as loader:
        next(iter(loader))
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_waiting_is_measured(make_shards):
    release = threading.Event()

    def slow(sample):
        release.wait(0.05)
        return np.zeros((1, 1, 1), np.uint8)

    with make_loader(make_shards([9]), reader=Reading(slow)) as loader:
        next(iter(loader))
        assert loader.wait_seconds >= 0.3  # 8 images of 0.05 s


@pytest.mark.parametrize(
    ("sizes", "what"),
    [({"world_size": 3}, "world_size must divide num_streams"), ({"global_batch": 6}, "num_streams must divide"),
     ({"num_streams": 40, "global_batch": 40}, "fewer samples than streams")],
)  # fmt: skip
def test_sizes_that_do_not_divide_are_refused(make_shards, sizes, what):
    with pytest.raises(UserError, match=what):
        make_loader(make_shards([9]), **sizes)


def test_cursors_start_the_streams(make_shards):
    folder = make_shards([16])
    with make_loader(folder, cursors=[Cursor(2, 1)] * 4) as loader:
        batch = next(iter(loader))
    assert batch.epochs.tolist() == [2] * 8
    assert batch.cursors == dict.fromkeys(range(4), Cursor(2, 3))
