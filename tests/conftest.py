"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sslscale.runtime.ray import RayRuntime


@pytest.fixture(scope="session")
def ray_runtime() -> Iterator[RayRuntime]:
    """The suite's one Ray cluster on this machine; any other RayRuntime made in this process uses it too."""
    from sslscale.runtime.ray import RayRuntime

    runtime = RayRuntime()
    runtime.start()
    yield runtime
    runtime.close()
