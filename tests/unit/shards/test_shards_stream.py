from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from sslscale.errors import UserError
from sslscale.shards.dataset import open_shards
from sslscale.shards.plan import Cursor, Span
from sslscale.shards.stream import Failure, Sample, StreamReader, read_spans
from sslscale.shards.tar import MAX_OPEN

COUNTS = [7, 11, 3]


def drawn(reader: StreamReader, count: int) -> list[tuple[int, int]]:
    return [(sample.epoch, sample.id) for sample in (reader.next() for _ in range(count))]


def test_spans_are_read_in_order(make_shards):
    samples = list(read_spans(open_shards(str(make_shards(COUNTS))), [Span(1, 2, 4), Span(0, 6, 7)]))
    assert [(s.key, s.shard, s.record, s.id) for s in samples] == [
        ("s0009", 1, 2, 9),
        ("s0010", 1, 3, 10),
        ("s0006", 0, 6, 6),
    ]
    assert samples[0].data["cls"] == b"0"


def test_each_epoch_of_the_streams_is_every_sample_once_in_another_order(make_shards):
    shards = open_shards(str(make_shards(COUNTS)))
    readers = [StreamReader(shards, stream, 2, 5, 4, Cursor()) for stream in range(2)]
    epochs: dict[int, list[int]] = {}
    for reader in readers:
        for epoch, number in drawn(reader, 3 * len(reader)):
            epochs.setdefault(epoch, []).append(number)
    assert [sorted(numbers) for numbers in epochs.values()] == [list(range(21))] * 3
    assert epochs[0] != epochs[1]
    assert [reader.cursor for reader in readers] == [Cursor(3, 0)] * 2


@pytest.mark.parametrize("stop", range(25))
def test_a_stream_resumed_at_any_cursor_goes_on_as_if_it_had_not_stopped(make_shards, stop):
    shards = open_shards(str(make_shards(COUNTS)))
    whole = StreamReader(shards, 1, 2, 5, 4, Cursor())
    before, after = drawn(whole, stop), drawn(whole, 12)
    first = StreamReader(shards, 1, 2, 5, 4, Cursor())
    assert drawn(first, stop) == before
    assert drawn(StreamReader(shards, 1, 2, 5, 4, first.cursor), 12) == after


def test_what_a_truncated_shard_lost_comes_out_as_failures(make_shards):
    folder = make_shards(COUNTS)
    shards = open_shards(str(folder))
    path = folder / "train-00001.tar"
    path.write_bytes(path.read_bytes()[: 4 * 2048 + 1024 + 540])  # four records, and half of the fifth
    results = list(read_spans(shards, [Span(1, 0, 11)]))
    assert [type(result) for result in results] == [Sample] * 4 + [Failure] * 7
    assert results[4].key == "s0011"
    assert results[5].key == "train-00001.tar#5"
    assert all("truncated" in result.reason for result in results[4:])


def test_a_shard_that_is_deleted_meanwhile_costs_its_own_records(make_shards):
    folder = make_shards(COUNTS)
    shards = open_shards(str(folder))
    (folder / "train-00001.tar").unlink()
    results = list(read_spans(shards, [Span(0, 6, 7), Span(1, 0, 11), Span(2, 0, 3)]))
    assert [type(result) for result in results] == [Sample] + [Failure] * 11 + [Sample] * 3
    assert {result.reason for result in results[1:12]} == {"the shard cannot be opened: No such file or directory"}


def test_a_promise_that_a_whole_shard_does_not_keep_is_a_failure(make_shards, write_tar):
    folder = make_shards(COUNTS)
    shards = open_shards(str(folder))
    write_tar(folder / "train-00002.tar", [("only.png", b"x")])
    results = list(read_spans(shards, [Span(2, 0, 3)]))
    assert [result.key for result in results] == ["only", "train-00002.tar#1", "train-00002.tar#2"]
    assert results[1].reason.startswith("missing: shards.json promises it")


def test_fewer_samples_than_streams_is_refused(make_shards):
    with pytest.raises(UserError, match="fewer samples than streams"):
        StreamReader(open_shards(str(make_shards([3]))), 0, 4, 0, 8, Cursor())


def test_streams_share_open_shards_and_let_them_go(make_shards):
    shards = open_shards(str(make_shards([4, 4])))
    readers = [StreamReader(shards, stream, 2, 0, 4, Cursor()) for stream in range(2)]
    tickets = [reader.draw() for reader in readers for _ in range(2)]
    assert len({id(ticket.tar) for ticket in tickets}) <= 2
    del readers, tickets
    assert not list(islice(shards._open.values(), 1))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files where Linux lists them")
def test_many_small_shards_do_not_hold_many_files(make_shards):
    shards = open_shards(str(make_shards([1] * (MAX_OPEN + 70))))
    before = len(list(Path("/proc/self/fd").iterdir()))
    tars = [shards.open(shard) for shard in range(len(shards.shards))]
    assert [tar.read(0)["__key__"] for tar in tars] == [f"s{shard:04d}" for shard in range(len(tars))]
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= MAX_OPEN
