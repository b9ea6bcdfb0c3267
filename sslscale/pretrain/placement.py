"""What ranks compute on: decided once for all of them, before any is placed."""

from __future__ import annotations

import sys
from collections.abc import Callable

from sslscale.config import PretrainConfig
from sslscale.errors import UserError
from sslscale.runtime.base import Runtime


def rank_device(config: PretrainConfig, runtime: Runtime, count_gpus: Callable[[], int], *, grows: bool) -> str:
    """cuda where each of the least number of ranks has a GPU of its own, else cpu. `grows`: more GPUs may yet come.

    Where there are GPUs, but fewer than ranks: a cluster that grows is asked for more by `cuda`, and `auto` is a
    UserError, since GPUs that are paid for would stand idle. On this machine alone `auto` takes the CPUs and says so,
    and `cuda`, which would wait for ever, is the UserError.
    """
    if runtime.device(config.device) == "cpu":
        return "cpu"
    there, least = count_gpus(), config.world_sizes[0]
    if there >= least or (config.device == "cuda" and grows):
        return "cuda"
    fewer = max((ranks for ranks in range(1, there + 1) if config.num_streams % ranks == 0), default=1)
    if config.device == "auto" and not grows:
        say = f"pretrain: {least} ranks train on the CPUs: GPUs here: {there} (pretrain.num_workers={fewer} takes GPUs)"
        print(say, file=sys.stderr, flush=True)
        return "cpu"
    raise UserError(
        "pretrain: there are fewer GPUs than ranks",
        got=f"GPUs: {there}, ranks: {least}",
        allowed=f"pretrain.num_workers={fewer}, or pretrain.device=cpu"
        + (", or pretrain.device=cuda, which waits for nodes that have them" if grows else ""),
    )
