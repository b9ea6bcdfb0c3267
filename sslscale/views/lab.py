"""CIE L*a*b* (D65, 2 degrees), the space in which distances of colours are roughly those that are seen."""

from __future__ import annotations

import torch
from torch import Tensor

# sRGB (IEC 61966-2-1), linear, to XYZ divided by the D65 white point.
_RGB_TO_XYZ = (
    (0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883),
)


def rgb_to_lab(images: Tensor) -> Tensor:
    """sRGB (B, 3, H, W) in [0, 1] -> L in [0, 100], a and b in about [-110, 110]; same shape."""
    linear = torch.where(images > 0.04045, ((images.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, images / 12.92)
    xyz = torch.einsum("ij,bjhw->bihw", linear.new_tensor(_RGB_TO_XYZ), linear)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
