"""The device of a stage, by its config's `device`, and whether it multiplies in bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16. A processor without them emulates it, many times slower than it
    computes in fp32.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available():  # torch's own kernels have none
        return False
    # older torch cannot tell, and computes in fp32 then
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
