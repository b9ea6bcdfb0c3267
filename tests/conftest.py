"""Fixtures of the whole suite."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3_server import FaultyProxy

    from sslscale.runtime.ray import RayRuntime


@pytest.fixture(scope="session")
def ray_runtime() -> Iterator[RayRuntime]:
    """The suite's one Ray cluster on this machine; any other RayRuntime made in this process uses it too."""
    from sslscale.runtime.ray import RayRuntime

    runtime = RayRuntime()
    runtime.start()
    yield runtime
    runtime.close()


@pytest.fixture(scope="session")
def packed_digits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`packed_digits(200)` packs so many digits into shards of 64; returns their folder."""
    from sslscale.config import PackConfig
    from sslscale.shards.write import run_pack

    def pack(limit: int) -> Path:
        folder = tmp_path_factory.mktemp("data")
        run_pack(PackConfig(source="digits", output=str(folder), samples_per_shard=64, limit=limit, workers=1))
        return folder / "train"

    return pack


@pytest.fixture(scope="session")
def s3_proxy() -> Iterator[FaultyProxy]:
    """The suite's one S3 server, behind a proxy that fails when it is told to."""
    from s3_server import BUCKET, environment, s3_server

    from sslscale.storage import filesystem

    with s3_server() as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(proxy).items():
            patch.setenv(name, value)
        filesystem(f"s3://{BUCKET}")[0].mkdir(BUCKET)
        yield proxy


@pytest.fixture
def s3(s3_proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URL of its own on the S3 server, with working copies below `tmp_path`; no faults yet."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("sslscale.retry._LONGEST_PAUSE_SECONDS", 0.2)
    s3_proxy.fail_until, s3_proxy.cuts = 0.0, 0
    yield f"s3://bucket/{uuid.uuid4().hex[:8]}"
    s3_proxy.fail_until, s3_proxy.cuts = 0.0, 0
