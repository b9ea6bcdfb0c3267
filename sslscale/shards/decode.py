"""From a sample's bytes to pixels and labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from sslscale.shards.tar import SampleError


class DecodeError(SampleError):
    """A sample whose members cannot be decoded; `reason` says why."""


def decode_image(sample: dict[str, Any], channels: int, size: int | None) -> np.ndarray:
    """The sample's image as uint8 (C, H, W)."""
    raise NotImplementedError


def label_of(sample: dict[str, Any]) -> int | None:
    """The sample's `.cls`, or None where it has none."""
    raise NotImplementedError
