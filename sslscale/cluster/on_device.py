"""The inner loops of k-means (see kernels.py) on a GPU, over rows that stay in its memory while they fit.

The scores of a tile of rows and a tile of centroids are compared and dropped before the next: they fit the GPU's cache,
and N x K of them never exist. Rows are added up in the order of their labels by a segmented sum, not by atomic
additions: the same bits every time, and exact sums of fp16 rows, as on a CPU. Products are fp32, without TF32
(float64 for rows of float64); which of two centroids that lie equally near is found may differ from the CPU's answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from sslscale.cluster.kernels import Pass, Totals, nested_sample

BLOCK_ROWS = 2**16  # that are prepared and added up at once
TILE_ROWS, TILE_CENTROIDS = 8192, 2048  # of the scores that are held at once: 64 MiB
KEEP_SHARE = 0.6  # of the GPU's free memory, for rows


class DeviceKernels:
    """`accumulate` and `assign` on one device. Rows that come with a name are kept there, while there is room."""

    def __init__(self, device: torch.device, keep_bytes: int | None = None) -> None:
        self.device = device
        if keep_bytes is None:
            keep_bytes = int(KEEP_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0
        self._room = keep_bytes
        self._kept: dict[Hashable, Tensor] = {}

    def accumulate(
        self,
        rows: np.ndarray,
        metric: str,
        wanted: Pass,
        weights: np.ndarray | None = None,
        seed: int | Sequence[int] = 0,
        name: Hashable = None,
    ) -> Totals:
        """As kernels.accumulate, of rows (n, D)."""
        here, totals = self._bring(rows, name), Totals.zero(wanted.centroids)
        w = None if weights is None else torch.from_numpy(np.asarray(weights)).to(self.device)
        for share in np.unique(wanted.shares):
            sample = nested_sample(len(rows), share, seed)
            at = None if isinstance(sample, slice) else torch.from_numpy(sample).to(self.device)
            restarts = np.flatnonzero(wanted.shares == share).tolist()
            finders = {r: _Nearest(wanted.centroids[r], rows.dtype, self.device) for r in restarts}
            sums = {restart: self._zeros(*wanted.centroids.shape[1:]) for restart in restarts}
            counts = {restart: self._zeros(wanted.centroids.shape[1]) for restart in restarts}
            squares = self._zeros()
            for start in range(0, len(here) if at is None else len(at), BLOCK_ROWS):
                block = slice(start, start + BLOCK_ROWS) if at is None else at[start : start + BLOCK_ROWS]
                x = _prepare(here[block], metric)
                x64 = x.double()
                own = self._zeros(len(x)) + 1 if w is None else w[block].double()
                squares += own @ x64.square().sum(dim=1)
                x64 *= own[:, None]
                for restart, find in finders.items():
                    _add(find(x), x64, own, sums[restart], counts[restart])
            for restart in restarts:
                totals.sums[restart] = sums[restart].cpu().numpy()
                totals.counts[restart] = counts[restart].cpu().numpy()
                totals.squares[restart] = float(squares)
        return totals

    def assign(
        self, rows: np.ndarray, metric: str, centroids: np.ndarray, name: Hashable = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Labels int32 (n,) and squared L2 distances float64 (n,) of rows (n, D)."""
        kept, find = self._keep(rows, name), _Nearest(centroids, rows.dtype, self.device)
        labels, squared = np.empty(len(rows), dtype=np.int32), np.empty(len(rows))
        exact = torch.from_numpy(np.asarray(centroids)).to(self.device, torch.float64)
        for start in range(0, len(rows), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            x = _prepare(self._copy(rows[block]) if kept is None else kept[block], metric)
            own = find(x)
            labels[block] = own.cpu().numpy()
            squared[block] = (x.double() - exact[own]).square().sum(dim=1).cpu().numpy()
        return labels, squared

    def find_labels(
        self,
        rows: np.ndarray,
        metric: str,
        wanted: Pass,
        restart: int,
        sample: np.ndarray | slice,
        name: Hashable = None,
    ) -> tuple[np.ndarray, float]:
        """As ranges.find_labels."""
        here, find = self._bring(rows, name), _Nearest(wanted.centroids[restart], rows.dtype, self.device)
        if not isinstance(sample, slice):
            here = here[torch.from_numpy(sample).to(self.device)]
        labels, square = np.empty(len(here), dtype=np.int32), self._zeros()
        for start in range(0, len(here), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            x = _prepare(here[block], metric)
            labels[block] = find(x).cpu().numpy()
            square += x.double().square().sum()
        return labels, float(square)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def _bring(self, rows: np.ndarray, name: Hashable) -> Tensor:
        kept = self._keep(rows, name)
        return self._copy(rows) if kept is None else kept

    def _keep(self, rows: np.ndarray, name: Hashable) -> Tensor | None:
        """The rows of that name, from now on; None for rows without a name, or where there is no room for them."""
        if name is not None and name not in self._kept and rows.nbytes <= self._room:
            self._kept[name] = self._copy(rows)
            self._room -= rows.nbytes
        return self._kept.get(name)

    def _copy(self, rows: np.ndarray) -> Tensor:
        return torch.tensor(rows, device=self.device)  # not from_numpy: a memory map is read-only


class _Nearest:
    """The nearest of centroids (K, D) to each row of a dtype, in fp32 or float64; see kernels.NearestCentroid."""

    def __init__(self, centroids: np.ndarray, rows: np.dtype, device: torch.device) -> None:
        self.dtype = torch.float64 if rows == np.float64 else torch.float32
        c = torch.from_numpy(np.asarray(centroids)).to(device, torch.float64)
        self.mean = c.mean(dim=0).to(self.dtype)
        c = c - self.mean
        self.table = (-2 * c.T).to(self.dtype).contiguous()  # (D, K)
        self.norms = c.square().sum(dim=1).to(self.dtype)  # (K,)

    def __call__(self, x: Tensor) -> Tensor:
        """Labels int64 (n,) of prepared rows (n, D). Ties go to the lowest index, where the product gives them so."""
        x = x - self.mean
        labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for begin in range(0, len(x), TILE_ROWS):
            rows = slice(begin, begin + TILE_ROWS)
            best = torch.full((len(x[rows]),), torch.inf, dtype=self.dtype, device=x.device)
            for start in range(0, self.table.shape[1], TILE_CENTROIDS):
                tile = slice(start, start + TILE_CENTROIDS)
                score, nearest = torch.addmm(self.norms[tile], x[rows], self.table[:, tile]).min(dim=1)
                closer = score < best
                labels[rows] = torch.where(closer, nearest + start, labels[rows])
                best = torch.where(closer, score, best)
        return labels


def _prepare(rows: Tensor, metric: str) -> Tensor:
    """features.distance.prepare, on the device."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if metric == "l2":
        return rows
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1)


def _add(labels: Tensor, weighted: Tensor, weights: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Adds rows (n, D) to the sums (K, D) of their labels, and their weights (n,) to the counts (K,)."""
    order = labels.argsort(stable=True)
    present, lengths = torch.unique_consecutive(labels[order], return_counts=True)
    columns = torch.cat([weighted, weights[:, None]], dim=1)[order]
    added = torch.segment_reduce(columns, "sum", lengths=lengths, axis=0, unsafe=True)
    sums.index_add_(0, present, added[:, :-1])  # no label twice: nothing is added in an order of chance
    counts.index_add_(0, present, added[:, -1])
