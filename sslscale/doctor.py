"""`sslscale doctor`: what this machine, its packages and a config's data are like, each with a fix where it is wrong.

Packages are imported in processes of their own: that is what proves them, and none can take the doctor down.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sslscale import storage
from sslscale.config import RunConfig
from sslscale.errors import UserError
from sslscale.runtime.address import cluster_address, unreachable

_IMPORT_SECONDS = 180
_GIGABYTE = 2**30
_SHM_GIGABYTES = 2
_DISK_GIGABYTES = 10
_TOKEN_FIX = (
    "where the head was started with a token (`ray start --head` takes the one that it finds): set RAY_AUTH_MODE=token "
    "and put the head's token in ~/.ray/auth_token"
)


@dataclass(frozen=True)
class Check:
    """One row: `fix` is what to do about a `warn` (works, but) or a `fail` (does not work)."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def run_doctor(config: RunConfig | None = None) -> list[Check]:
    """Every check of this machine, and those of `config`'s run directory, datasets and cluster where it is given."""
    checks = [Check("python", "ok", platform.python_version()), *_packages(), _faiss_build(), _shared_memory()]
    if config is not None:
        folder = storage.local_path(config.run)
        checks += [_disk(folder), _writable(folder), *(_dataset(config, name) for name in config.datasets)]
        address = cluster_address(config.runtime.address)
        if config.runtime.name == "ray" and address is not None:
            checks.append(_cluster(address))
    return checks


# ------------------------------------------------------------------ the machine


_TORCH = """
import json, torch
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "built_for": torch.version.cuda, "devices": devices}))
"""
_OTHER = 'import json, {0}; print(json.dumps({{"version": {0}.__version__}}))'


def _packages() -> list[Check]:
    scripts = {"torch": _TORCH, **{name: _OTHER.format(name) for name in ("deepspeed", "ray", "webdataset", "timm")}}
    with ThreadPoolExecutor(len(scripts)) as pool:
        found = dict(zip(scripts, pool.map(_run_python, scripts.values()), strict=True))
    checks = [_package(name, answer) for name, answer in found.items()]
    return [checks[0], _cuda(found["torch"]), *checks[1:]]


def _run_python(script: str) -> dict[str, Any] | str:
    """What a script prints as JSON on its last line; or why it failed, in one line."""
    command = [sys.executable, "-c", script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {_IMPORT_SECONDS} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def _package(name: str, answer: dict[str, Any] | str) -> Check:
    if isinstance(answer, str):
        return Check(name, "fail", f"cannot be imported: {answer}", f"pip install --force-reinstall {name}")
    return Check(name, "ok", answer["version"])


def _cuda(torch: dict[str, Any] | str) -> Check:
    if isinstance(torch, str):
        return Check("cuda", "fail", "unknown without torch", "repair torch first")
    if torch["devices"]:
        return Check("cuda", "ok", f"CUDA {torch['built_for']}: {', '.join(torch['devices'])}")
    if shutil.which("nvidia-smi") is None:
        return Check("cuda", "ok", "no NVIDIA driver here: the CPU computes")
    built = f"built for CUDA {torch['built_for']}" if torch["built_for"] else "a build without CUDA"
    return Check(
        "cuda",
        "warn",
        f"there is an NVIDIA driver, but torch ({built}) finds no device",
        "install a torch whose CUDA the driver supports (nvidia-smi names it): https://pytorch.org/get-started",
    )


def _faiss_build() -> Check:
    """faiss-cpu and faiss-gpu install the same module: the later one overwrites files of the earlier."""
    builds = sorted(
        f"{name} {distribution.version}"
        for distribution in importlib.metadata.distributions()
        if (name := _name(distribution)).startswith(("faiss-cpu", "faiss-gpu"))
    )
    if len(builds) > 1:
        names = " ".join(build.split()[0] for build in builds)
        return Check(
            "faiss", "fail", f"{' and '.join(builds)}", f"pip uninstall -y {names}, then pip install one of them"
        )
    answer = _run_python(_OTHER.format("faiss"))
    if isinstance(answer, str):
        fix = "pip install 'sslscale[cpu]', or 'sslscale[gpu]' with CUDA"
        return Check("faiss", "fail", f"cannot be imported: {answer}", fix)
    return Check("faiss", "ok", builds[0] if builds else f"{answer['version']}, not installed by pip")


def _name(distribution: importlib.metadata.Distribution) -> str:
    """As pip shows it; empty where an uninstall has left a folder without METADATA."""
    return (distribution.metadata["Name"] or "").lower().replace("_", "-")


def _shared_memory(path: str = "/dev/shm") -> Check:
    if not Path(path).is_dir():
        return Check("shared memory", "ok", f"this system has no {path}")
    size = shutil.disk_usage(path).total / _GIGABYTE
    if size >= _SHM_GIGABYTES:
        return Check("shared memory", "ok", f"{path} holds {size:.1f} GB")
    return Check(
        "shared memory",
        "warn",
        f"{path} holds {size:.2f} GB: Ray's object store falls back to slow files",
        "give the container more: docker run --shm-size=4g, or a Memory emptyDir on Kubernetes",
    )


# ------------------------------------------------------------------ a config


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(_existing(folder)).free / _GIGABYTE
    if free >= _DISK_GIGABYTES:
        return Check("disk", "ok", f"{free:.0f} GB free for {folder}")
    other = "give another --run" if storage.remote_url(folder) is None else "set TMPDIR: this is a working copy"
    return Check("disk", "warn", f"{free:.1f} GB free for {folder}", f"free some space, or {other}")


def _writable(folder: Path) -> Check:
    """Makes a file there and deletes it: nothing stays, neither a folder nor, in a store, an object."""
    row, location = "run directory", storage.shown(folder)
    try:
        if storage.remote_url(folder) is None:
            with tempfile.TemporaryFile(dir=_existing(folder)):
                pass
        else:
            probe = folder / f".doctor-{uuid.uuid4().hex}"
            storage.create(probe, b"")
            storage.remove(probe)
    except Exception as error:
        return _refused(row, location, error, "give another --run, or the store's credentials")
    return Check(row, "ok", f"{location} can be written")


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))


def _dataset(config: RunConfig, name: str) -> Check:
    """Opens the dataset and reads its first sample."""
    from sslscale.shards.cache import ShardCache
    from sslscale.shards.dataset import open_shards
    from sslscale.shards.plan import Span
    from sslscale.shards.stream import Failure, read_spans

    row, location = f"dataset {name}", config.datasets[name]
    try:
        if _to_be_packed(config, location):
            return Check(row, "warn", f"{location} is not packed yet", "sslscale pack, or sslscale run, makes it")
        with tempfile.TemporaryDirectory() as cache:
            shards = open_shards(location, ShardCache(Path(cache), 0))
            holding = [shard for shard, count in enumerate(shards.counts.tolist()) if count]
            if not holding:
                return Check(row, "fail", f"{location} holds no sample", "name other shards")
            first = next(iter(read_spans(shards, [Span(holding[0], 0, 1)])))
    except Exception as error:
        return _refused(row, location, error, "check the location and its credentials")
    if isinstance(first, Failure):
        return Check(
            row, "fail", f"{location}: {first.key}: {first.reason}", "make the shards again, or leave this out"
        )
    return Check(row, "ok", f"{location}: {len(shards.shards):,} shards, {shards.num_samples:,} samples")


def _to_be_packed(config: RunConfig, location: str) -> bool:
    """Whether a dataset is what `pack` makes, and has not made to its end."""
    if config.pack is None:
        return False
    output = storage.local_path(config.pack.output)
    return storage.local_path(location).is_relative_to(output) and storage.size(output / "pack.json") is None


def _refused(row: str, location: str, error: Exception, fix: str) -> Check:
    """For any error: each store has its own for credentials that are missing or wrong, and none ends the doctor."""
    if isinstance(error, UserError):
        return Check(row, "fail", f"{error.what}: {error.got}", error.fix or fix)
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return Check(row, "fail", f"{location}: {reason[0]}", fix)


_JOIN = """
import json, logging, ray
ray.init(address={address!r}, logging_level=logging.ERROR, log_to_driver=False)
print(json.dumps(ray.cluster_resources()))
"""


def _cluster(address: str) -> Check:
    reason = unreachable(address)
    if reason is not None:
        return Check("ray cluster", "fail", f"{address}: {reason}", "start the cluster, or correct runtime.address")
    answer = _run_python(_JOIN.format(address=address))
    if isinstance(answer, str):
        return Check("ray cluster", "fail", f"{address} refuses: {answer}", _TOKEN_FIX)
    resources = {kind: f"{answer.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU")}
    return Check("ray cluster", "ok", f"{address}: {', '.join(resources.values())}")
