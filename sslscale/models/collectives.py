"""Differentiable exchange between ranks, for losses and statistics that look across the whole batch.

Convention: every rank's loss is the mean over its own share, and the engine averages gradients over ranks. Then the
backward of a gather or a sum over ranks is the sum over ranks of what flowed back, and the N-rank gradient equals the
1-rank gradient on the same global batch. With one rank everything is the identity.

CPU ranks of one machine exchange small tensors through sockets of their own, once `connect_neighbours` has been called.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import warnings

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


_SMALL = 1 << 20  # bytes, over all ranks; with more, a ring's smaller share for rank 0 begins to count


class Neighbours:
    """Unix sockets from every rank to rank 0, for ranks that are all on one machine.

    gloo hands each of its calls from thread to thread, on a core that computes, which for the few sums of a BatchNorm
    layer is most of what they take; here the rank itself writes and reads (benchmarks/two_ranks.py). A rank that is
    lost closes its socket, and the others raise at once; one that hangs is for their watchdog.
    """

    def __init__(self, peers: list[socket.socket]) -> None:
        self.peers, self.group = peers, dist.group.WORLD

    @classmethod
    def connect(cls) -> Neighbours | None:
        """None on every rank where one of them cannot reach rank 0's socket. All ranks call it."""
        with contextlib.ExitStack() as stack:
            door, path = socket.socket(socket.AF_UNIX), [""]
            if rank() == 0:
                stack.enter_context(door)
                with contextlib.suppress(OSError):
                    # not where TMPDIR says: a socket's path has at most about 100 characters
                    path[0] = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")) + "/ranks"
                    door.bind(path[0])
                    door.listen(world_size())
            dist.broadcast_object_list(path)
            if rank() > 0:
                try:
                    door.connect(path[0])
                    door.sendall(rank().to_bytes(4, "big"))
                except OSError:  # in a container of its own, say
                    path = [""]
            reached = [False] * world_size()
            dist.all_gather_object(reached, path != [""])
            if not all(reached):
                door.close()
                if rank() == 0:
                    warnings.warn(
                        "ranks of this machine share no /tmp: they exchange through gloo, slower", stacklevel=2
                    )
                return None
            if rank() > 0:
                return cls([door])
            came = [door.accept()[0] for _ in range(world_size() - 1)]
        of_rank = {int.from_bytes(_received(peer, 4), "big"): peer for peer in came}
        return cls([of_rank[other] for other in sorted(of_rank)])

    def sum(self, x: Tensor) -> None:
        """Sums contiguous `x` over ranks in place, in the order of the ranks: the same bits on every rank and time."""
        own = _bytes_of(x)
        if rank() > 0:
            self.peers[0].sendall(own)
            _receive(self.peers[0], own)
            return
        theirs = torch.empty_like(x)
        for peer in self.peers:
            _receive(peer, _bytes_of(theirs))
            x += theirs
        for peer in self.peers:
            peer.sendall(own)

    def gather(self, whole: Tensor) -> None:
        """Fills `whole`, of one row a rank, on every rank; each has written its own row."""
        if rank() > 0:
            self.peers[0].sendall(_bytes_of(whole[rank()]))
            _receive(self.peers[0], _bytes_of(whole))
            return
        for row, peer in zip(whole[1:], self.peers, strict=True):
            _receive(peer, _bytes_of(row))
        for peer in self.peers:
            peer.sendall(_bytes_of(whole))


def _bytes_of(x: Tensor) -> memoryview:
    return memoryview(x.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _received(peer: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    _receive(peer, memoryview(data))
    return bytes(data)


def _receive(peer: socket.socket, into: memoryview) -> None:
    while into:  # a signal may end a read early
        count = peer.recv_into(into, flags=socket.MSG_WAITALL)
        if count == 0:
            raise ConnectionError("a rank of this machine is gone, and others wait for its part of a sum")
        into = into[count:]


_neighbours: Neighbours | None = None


def connect_neighbours() -> None:
    """Lets ranks exchange small CPU tensors without gloo, where all are on one machine. All ranks call it."""
    global _neighbours
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    _neighbours = Neighbours.connect() if 1 < here == world_size() and hasattr(socket, "AF_UNIX") else None


def _neighbours_for(x: Tensor) -> Neighbours | None:
    """They, where they are connected and `x` (from every rank) is theirs to exchange."""
    small = x.device.type == "cpu" and x.is_contiguous() and x.nbytes * world_size() <= _SMALL
    return _neighbours if small and _neighbours is not None and _neighbours.group is dist.group.WORLD else None


def all_reduce(x: Tensor) -> None:
    """Sums `x` over ranks, in place."""
    if world_size() == 1:
        return
    if neighbours := _neighbours_for(x):
        neighbours.sum(x)
    else:
        dist.all_reduce(x)


def gather_rows(x: Tensor) -> Tensor:
    """(B, ...) on every rank -> (W B, ...) in rank order, without a gradient."""
    if world_size() == 1:
        return x
    x = x.contiguous()
    whole = x.new_empty((world_size(), *x.shape))
    if neighbours := _neighbours_for(x):
        whole[rank()] = x
        neighbours.gather(whole)
    else:
        dist.all_gather(list(whole), x)
    return whole.flatten(0, 1)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        all_reduce(total)
        return total


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return gather_rows(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        all_reduce(total)
        share = len(total) // world_size()
        return total[rank() * share : (rank() + 1) * share]


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of `x` over ranks, differentiable."""
    return _AllReduceSum.apply(x) if world_size() > 1 else x


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean of `x` over ranks, differentiable."""
    return all_reduce_sum(x) / world_size()


def all_gather(x: Tensor) -> Tensor:
    """(B, ...) on every rank -> (W B, ...) in rank order, differentiable."""
    return _AllGather.apply(x) if world_size() > 1 else x
