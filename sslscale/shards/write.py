"""`pack`: a source's samples into tar shards, in parallel, byte-identical for the same input."""

from __future__ import annotations

from typing import Any

from sslscale.config.models import PackConfig


def run_pack(config: PackConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes `<output>/<split>/<split>-00000.tar` ..., their shards.json and `<output>/pack.json`."""
    raise NotImplementedError
