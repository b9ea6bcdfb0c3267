"""scikit-learn's digits: 1,797 grey 8x8 images of 10 classes, inside its wheel. One split, `train`."""

from __future__ import annotations

import hashlib

import numpy as np
from sklearn.datasets import load_digits

from sslscale.errors import UserError
from sslscale.shards.sources import Example


class Digits:
    def __init__(self, path: str | None = None) -> None:
        if path is not None:
            raise UserError("digits come with scikit-learn and take no path", got=path, fix="leave out pack.path")
        digits = load_digits()
        self.images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8); the values are 0..16
        self.labels = digits.target
        self.splits = {"train": len(self.images)}
        self.fingerprint = hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()

    def example(self, split: str, index: int) -> Example:
        return Example(self.images[index], int(self.labels[index]))
