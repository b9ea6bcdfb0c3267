"""Features without training, behind the same interface as a backbone: the baselines of every comparison."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslscale.models.base import Embedder
from sslscale.shards.video import ClipReader


class Pixels(Embedder):
    """The image itself: (B, C, S, S) in [0, 1] -> (B, C S S)."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.feature_dim = channels * size * size

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class MeanFrame(Embedder):
    """The mean over a clip's frames: (B, T, C, S, S) in [0, 1] -> (B, C S S)."""

    frames = 16

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.feature_dim = channels * size * size

    def reader(self, channels: int | None, size: int | None) -> ClipReader:
        assert channels is not None
        return ClipReader(self.frames, channels, size)

    def forward(self, clips: Tensor) -> Tensor:
        return clips.mean(dim=1).flatten(1)


class HOG(Embedder):
    """Histograms of oriented gradients (Dalal & Triggs 2005) of grey images: (B, C, S, S) -> (B, D).

    9 unsigned orientations over cells of `cell` pixels, L2-Hys normalised in blocks of 2 x 2 cells: the definition of
    scikit-image's `hog` (hard binning of the orientation, gradients by central differences, none at the border).
    """

    orientations = 9

    def __init__(self, channels: int, size: int, cell: int | None = None) -> None:
        super().__init__()
        self.cell = cell or max(2, size // 7)
        self.cells = size // self.cell
        self.feature_dim = (self.cells - 1) ** 2 * 4 * self.orientations

    def forward(self, images: Tensor) -> Tensor:
        grey = images.mean(dim=1)
        dy, dx = torch.zeros_like(grey), torch.zeros_like(grey)
        dy[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
        dx[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
        magnitude = torch.hypot(dx, dy)
        degrees = torch.rad2deg(torch.atan2(dy, dx)) % 180.0
        bins = (degrees * (self.orientations / 180.0)).long().clamp_(max=self.orientations - 1)
        side = self.cells * self.cell
        votes = F.one_hot(bins, self.orientations).permute(0, 3, 1, 2) * magnitude[:, None]  # (B, 9, S, S)
        cells = F.avg_pool2d(votes[:, :, :side, :side], self.cell)  # (B, 9, n, n)
        blocks = F.unfold(cells, kernel_size=2)  # (B, 9 * 4, (n - 1)^2)
        blocks = blocks / torch.sqrt(blocks.square().sum(dim=1, keepdim=True) + 1e-10)
        blocks = blocks.clamp(max=0.2)
        blocks = blocks / torch.sqrt(blocks.square().sum(dim=1, keepdim=True) + 1e-10)
        # scikit-image's order: block row, block column, cell row, cell column, orientation
        n = self.cells - 1
        return (
            blocks.view(-1, self.orientations, 4, n * n).permute(0, 3, 2, 1).reshape(len(images), math.prod((n, n, 36)))
        )


HANDCRAFTED: dict[str, type[Pixels] | type[HOG] | type[MeanFrame]] = {
    "pixels": Pixels,
    "hog": HOG,
    "mean_frame": MeanFrame,
}
