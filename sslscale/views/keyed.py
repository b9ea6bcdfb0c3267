"""Random numbers keyed by sample: what is drawn for a sample depends on (seed, epoch, sample, name), never on a rank.

A counter-based generator (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) with the finaliser of
SplitMix64 (Steele et al. 2014) as its bijection, in int64 arithmetic that wraps: the same bits on any device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_ROUNDS = [(np.uint64(30), np.uint64(_MIX_1)), (np.uint64(27), np.uint64(_MIX_2))]
_LAST = np.uint64(31)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit integers in which every input bit reaches every output bit."""
    x = x + _signed(_GOLDEN)
    return _mixed_by_numpy(x) if x.is_cpu else _mixed_by_torch(x)


def _mixed_by_torch(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def _mixed_by_numpy(x: Tensor) -> Tensor:
    """The same in place: of a few hundred numbers, most of the time is what an operation costs, of torch's the most."""
    raw = x.numpy().reshape(-1).view(np.uint64)  # of one dimension, where numpy wraps without a warning
    for bits, factor in _ROUNDS:
        raw ^= raw >> bits
        raw *= factor
    raw ^= raw >> _LAST
    return x


def _salt(name: str) -> int:
    return _signed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))


class KeyedRandom:
    """Draws for a batch of B samples. `keys` is int64 (B,); a draw's name separates it from every other draw."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    @classmethod
    def of(cls, seed: int, epochs: Tensor, ids: Tensor) -> KeyedRandom:
        """From the run's seed and each sample's epoch and id, both int64 (B,)."""
        keys = mix(torch.full_like(ids, _signed(seed)))
        return cls(mix(mix(keys ^ epochs) ^ ids))

    def __len__(self) -> int:
        return len(self.keys)

    def fold(self, name: str) -> KeyedRandom:
        """An independent generator for the same samples, so that two views draw different numbers."""
        return KeyedRandom(mix(self.keys ^ _salt(name)))

    def bits(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform int64 (B, *shape) over all 64 bits."""
        base = mix(self.keys ^ _salt(name))
        counters = torch.arange(math.prod(shape), device=base.device) * _signed(_GOLDEN)
        return mix(base[:, None] + counters).view(len(base), *shape)

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0, shape: Sequence[int] = ()) -> Tensor:
        """float32 (B, *shape), uniform in [low, high)."""
        unit = _shift(self.bits(name, shape), 40).to(torch.float32) * 2.0**-24
        return low + (high - low) * unit

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """float32 (B, *shape), standard normal (Box-Muller)."""
        radius = torch.sqrt(-2.0 * torch.log1p(-self.uniform(name + "/radius", shape=shape)))
        return radius * torch.cos(2.0 * math.pi * self.uniform(name + "/angle", shape=shape))

    def integers(self, name: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """int64 (B, *shape), uniform in [0, high)."""
        return _shift(self.bits(name, shape), 33) * high >> 31

    def flag(self, name: str, probability: float) -> Tensor:
        """bool (B,), true with the given probability."""
        return self.uniform(name) < probability

    def permutation(self, name: str, length: int) -> Tensor:
        """int64 (B, length): a uniform permutation a sample."""
        return self.uniform(name, shape=(length,)).argsort(dim=1, stable=True)
