"""Augmented image views, made in batches on the training device; every draw is keyed by sample (views/keyed.py).

B batch, C channels, H x W input pixels, S the side of a view. Images are float in [0, 1].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.views.keyed import KeyedRandom

_LUMA = (0.299, 0.587, 0.114)
_CROP_TRIES = 10


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> float32 in [0, 1]."""
    return images.to(torch.float32).div_(255.0)


def augment(images: Tensor, random: KeyedRandom, recipe: AugmentConfig, size: int | None = None) -> Tensor:
    """One view of each image: geometry in one resampling, then colour, blur, noise and erasing.

    images: (B, C, H, W) in [0, 1]. Returns (B, C, S, S) with S = `size` or the recipe's.
    """
    views = warp(images, random, recipe, size or recipe.size)
    views = jitter(views, random, recipe)
    if recipe.blur:
        views = _blur(views, random, recipe)
    if recipe.solarize:
        flag = random.flag("solarize", recipe.solarize)[:, None, None, None]
        views = torch.where(flag & (views > 0.5), 1.0 - views, views)
    if recipe.noise:
        views = (views + recipe.noise * random.normal("noise", views.shape[1:])).clamp_(0.0, 1.0)
    if recipe.erase:
        views = _erase(views, random, recipe)
    return views


def warp(images: Tensor, random: KeyedRandom, recipe: AugmentConfig, size: int) -> Tensor:
    """Crop, flip, rotation, shear and shift as one affine map, sampled once: (B, C, H, W) -> (B, C, S, S).

    What lies outside the image is 0. Nothing is blended with that: an edge keeps its brightness.
    """
    width, height = _crop_sides(random, recipe)
    # grid_sample's coordinates run from -1 to 1: a crop of width w may be centred anywhere in [-(1 - w), 1 - w]
    centre_x = random.uniform("crop/x", -1.0, 1.0) * (1.0 - width)
    centre_y = random.uniform("crop/y", -1.0, 1.0) * (1.0 - height)
    if recipe.shift:
        centre_x = centre_x + 2.0 * random.uniform("shift/x", -recipe.shift, recipe.shift)
        centre_y = centre_y + 2.0 * random.uniform("shift/y", -recipe.shift, recipe.shift)
    sign = 1.0 - 2.0 * random.flag("flip", recipe.flip).to(torch.float32)
    angle = torch.deg2rad(random.uniform("rotate", -recipe.rotate_degrees, recipe.rotate_degrees))
    shear = torch.tan(torch.deg2rad(random.uniform("shear", -recipe.shear_degrees, recipe.shear_degrees)))
    cos, sin = torch.cos(angle), torch.sin(angle)
    # output (x, y) -> input: flip and scale to the crop, shear along x, rotate, move to the crop's centre
    theta = torch.stack(
        [
            torch.stack([cos * width * sign, (cos * shear - sin) * height, centre_x], dim=1),
            torch.stack([sin * width * sign, (sin * shear + cos) * height, centre_y], dim=1),
        ],
        dim=1,
    )  # (B, 2, 3)
    grid = F.affine_grid(theta, [len(images), images.shape[1], size, size], align_corners=False)
    inside = (grid.abs() <= 1.0).all(dim=3)[:, None]
    return torch.where(inside, _sampled(images, grid, torch.minimum(width, height)), 0.0)


def _crop_sides(random: KeyedRandom, recipe: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Width and height (B,) of each sample's crop, as shares of the sides, as torchvision's RandomResizedCrop draws:

    area and ratio uniformly (the ratio in its logarithm) until the crop fits; after ten tries the largest that does.
    """
    area = random.uniform("crop/area", *recipe.crop_scale, shape=(_CROP_TRIES,))
    low, high = recipe.crop_ratio
    ratio = torch.exp(random.uniform("crop/ratio", math.log(low), math.log(high), shape=(_CROP_TRIES,)))
    largest = min(max(1.0, low), high)  # the ratio nearest to the whole image's
    fallback = (min(1.0, largest), min(1.0, 1.0 / largest))
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()])  # (2, B, tries)
    fits = (sides <= 1.0).all(dim=0)
    first = fits.to(torch.int8).argmax(dim=1, keepdim=True)
    drawn = sides.gather(2, first.expand(2, -1, -1))[:, :, 0]  # (2, B)
    width, height = torch.where(fits.any(dim=1), drawn, sides.new_tensor(fallback)[:, None])
    return width, height


def _sampled(images: Tensor, grid: Tensor, crop: Tensor) -> Tensor:
    """Bilinear samples of images (B, C, H, W) at `grid` (B, S, S, 2): (B, C, S, S), without aliasing.

    Crops, of which `crop` (B,) is the smaller side as a share of the image's, that have at least twice the view's
    pixels are read from the image at half the size, or a quarter, and so on.
    """
    shrinks = min(images.shape[2:]) / grid.shape[1]
    views = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    for level in range(1, int(math.log2(shrinks)) + 1 if shrinks >= 2 else 1):
        images = F.adaptive_avg_pool2d(images, (images.shape[2] // 2, images.shape[3] // 2))
        smaller = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        views = torch.where((crop * shrinks >= 2**level)[:, None, None, None], smaller, views)
    return views


def jitter(images: Tensor, random: KeyedRandom, recipe: AugmentConfig) -> Tensor:
    """Brightness, contrast, saturation, hue and grey, each by a factor drawn for the sample."""
    on = random.flag("jitter", recipe.jitter_probability).to(torch.float32)

    def factor(name: str, strength: float) -> Tensor:
        return (1.0 + on * random.uniform(name, max(-1.0, -strength), strength))[:, None, None, None]

    if recipe.brightness:
        images = (images * factor("brightness", recipe.brightness)).clamp_(0.0, 1.0)
    if recipe.contrast:
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = torch.lerp(mean, images, factor("contrast", recipe.contrast)).clamp_(0.0, 1.0)
    if images.shape[1] != 3:
        return images
    if recipe.saturation:
        images = torch.lerp(_grey(images), images, factor("saturation", recipe.saturation)).clamp_(0.0, 1.0)
    if recipe.hue:
        images = _rotate_hue(images, 2.0 * math.pi * on * random.uniform("hue", -recipe.hue, recipe.hue))
    if recipe.grayscale:
        flag = random.flag("grayscale", recipe.grayscale)[:, None, None, None]
        images = torch.where(flag, _grey(images), images)
    return images


def _grey(images: Tensor) -> Tensor:
    weights = images.new_tensor(_LUMA)[None, :, None, None]
    return (images * weights).sum(dim=1, keepdim=True).expand_as(images)


def _rotate_hue(images: Tensor, angle: Tensor) -> Tensor:
    """Turns the chroma plane of YIQ by `angle` (B,), in radians; luma stays."""
    to_yiq = images.new_tensor([_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
    cos, sin = torch.cos(angle), torch.sin(angle)
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq  # (B, 3, 3)
    return torch.einsum("bij,bjhw->bihw", matrix, images).clamp_(0.0, 1.0)


def _blur(images: Tensor, random: KeyedRandom, recipe: AugmentConfig) -> Tensor:
    """Gaussian blur with a standard deviation (in pixels) drawn for the sample, on the samples that drew one."""
    batch, channels, height, width = images.shape
    radius = max(1, min(math.ceil(2.0 * recipe.blur_sigma[1]), (min(height, width) - 1) // 2))
    sigma = random.uniform("blur/sigma", *recipe.blur_sigma)[:, None]
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)  # (B, 2 radius + 1)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    flat = F.pad(images, (radius, radius, radius, radius), mode="reflect").reshape(
        1, batch * channels, height + 2 * radius, -1
    )
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=batch * channels)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=batch * channels)
    return torch.where(random.flag("blur", recipe.blur)[:, None, None, None], flat.view_as(images), images)


def _erase(images: Tensor, random: KeyedRandom, recipe: AugmentConfig) -> Tensor:
    """Random erasing (Zhong et al. 2017, https://arxiv.org/abs/1708.04896): a rectangle becomes 0."""
    height, width = images.shape[2:]
    area = random.uniform("erase/area", *recipe.erase_scale)
    ratio = torch.exp(random.uniform("erase/ratio", math.log(0.3), math.log(3.3)))
    half_h = (area * ratio).sqrt().clamp_(max=1.0) / 2
    half_w = (area / ratio).sqrt().clamp_(max=1.0) / 2
    centre_y = half_h + random.uniform("erase/y") * (1 - 2 * half_h)
    centre_x = half_w + random.uniform("erase/x") * (1 - 2 * half_w)
    y = (torch.arange(height, device=images.device) + 0.5) / height
    x = (torch.arange(width, device=images.device) + 0.5) / width
    rows = (y - centre_y[:, None]).abs() < half_h[:, None]  # (B, H)
    columns = (x - centre_x[:, None]).abs() < half_w[:, None]  # (B, W)
    hit = rows[:, :, None] & columns[:, None, :] & random.flag("erase", recipe.erase)[:, None, None]
    return images.masked_fill(hit[:, None], 0.0)


def rotate_quarter(images: Tensor, turns: Tensor) -> Tensor:
    """Turns each square image by `turns` (B,) quarter turns, counter-clockwise."""
    turned = torch.stack([torch.rot90(images, k, dims=(2, 3)) for k in range(4)])
    return turned[turns, torch.arange(len(images), device=images.device)]


def crop_at(images: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """(B, C, H, W) and int64 corners (B,) -> (B, C, size, size), without resampling."""
    steps = torch.arange(size, device=images.device)
    rows = (top[:, None] + steps)[:, None, :, None]
    columns = (left[:, None] + steps)[:, None, None, :]
    batch = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return images[batch, channels, rows, columns]
