"""The device of a stage, by its config's `device`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sslscale.errors import StageError

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> torch.device:
    """auto takes CUDA where there is one; StageError for "cuda" where there is none."""
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise StageError(
            "device=cuda was asked for and torch sees no CUDA device", fix="run `sslscale doctor`, or device=cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())
