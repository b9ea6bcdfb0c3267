"""Several shards into one index file."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from sslscale import storage
from sslscale.features.files import open_npy, replacing
from sslscale.index.factory import inverted_lists, is_streamable, merge
from sslscale.index.shard import OPEN, write_index


def merge_rows(shards: Sequence[Path], vectors: int, output: Path) -> None:
    """Writes the row ids of shards, in order, from file to file."""
    with replacing(output) as temporary:
        rows = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int64, shape=(vectors,))
        start = 0
        for shard in shards:
            own = open_npy(shard)
            rows[start : start + len(own)] = own
            start += len(own)


def merge_files(trained: Path, shards: Sequence[Path], output: Path) -> None:
    """Writes an index of the vectors of `shards`, in order. All start from `trained`.

    Inverted lists go from file to file and need no memory for the vectors; other indexes are merged in memory.
    """
    index = faiss.read_index(str(storage.bring(trained)))
    if is_streamable(index):
        _stream(index, [faiss.read_index(str(storage.bring(shard)), OPEN) for shard in shards], output)
        return
    for shard in shards:
        merge(index, faiss.read_index(str(storage.bring(shard))))
    write_index(index, output)


def _stream(index: faiss.Index, shards: Sequence[faiss.Index], output: Path) -> None:
    """Lists in the format of faiss's `write_index` (impl/index_write.cpp, "ilar"): all sizes, then codes and ids each.

    What stands before them is the empty index as faiss itself writes it.
    """
    own, *theirs = [lists for lists in map(inverted_lists, [index, *shards]) if lists is not None]
    stores = [lists.invlists for lists in theirs]
    sizes = np.array([[store.list_size(number) for number in range(own.nlist)] for store in stores], dtype=np.int64)
    starts = np.cumsum([0, *sizes.sum(axis=1)])
    before = b"ilar" + struct.pack("<QQ", own.nlist, own.code_size)
    index.ntotal = own.ntotal = int(starts[-1])
    empty = faiss.serialize_index(index).tobytes()
    none = before + b"sprs" + struct.pack("<Q", 0)
    assert empty.endswith(none), "faiss writes empty inverted lists in another format"
    with replacing(output) as temporary, temporary.open("wb") as file:
        file.write(empty.removesuffix(none) + before + b"full" + struct.pack("<Q", own.nlist))
        file.write(sizes.sum(axis=0).astype("<u8").tobytes())
        for number in range(own.nlist):
            held = [(stores[at], starts[at], sizes[at, number]) for at in np.flatnonzero(sizes[:, number])]
            for store, _, size in held:
                file.write(_view(store.get_codes(number), size * own.code_size))
            for store, start, size in held:
                file.write(_view(store.get_ids(number), size) + start)


def _view(pointer: object, size: int) -> Any:
    """The memory behind one of faiss's pointers, of `size` items, as an array."""
    return faiss.rev_swig_ptr(pointer, int(size))
