from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sslscale.doctor as doctor
from sslscale import storage
from sslscale.config import RunConfig, load_config
from sslscale.doctor import Check, run_doctor


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each package answers, in place of processes that import them; tests change it."""
    answers: dict[str, Any] = {"torch": {"version": "2.9", "built_for": "13.0", "devices": []}}
    answers |= {name: {"version": "1.2"} for name in ("deepspeed", "ray.init", "ray", "webdataset", "timm", "faiss")}
    monkeypatch.setattr(doctor, "_run_python", lambda script: next(v for k, v in answers.items() if k in script))
    return answers


def rows(config: RunConfig | None = None) -> dict[str, Check]:
    checks = run_doctor(config)
    assert all(bool(check.fix) == (check.status != "ok") for check in checks)
    return {check.name: check for check in checks}


def config_of(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config(None, [f"run={tmp_path / 'runs' / 'a'}", *overrides])


def test_a_sound_machine(packages: dict[str, Any], tmp_path: Path) -> None:
    found = rows(config_of(tmp_path))
    names = (
        "python",
        "torch",
        "cuda",
        "deepspeed",
        "ray",
        "webdataset",
        "faiss",
        "shared memory",
        "disk",
        "run directory",
    )
    assert set(names) <= found.keys()
    assert {found[name].status for name in ("python", "torch", "deepspeed", "ray", "webdataset", "run directory")} == {
        "ok"
    }
    assert found["deepspeed"].detail == "1.2"
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_does_not_import(packages: dict[str, Any]) -> None:
    packages["deepspeed"] = "ImportError: libcudart.so.13: cannot open shared object file"
    packages["torch"] = "ModuleNotFoundError: No module named 'torch'"
    packages["faiss"] = "ModuleNotFoundError: No module named 'faiss'"
    found = rows()
    assert [found[name].status for name in ("torch", "cuda", "deepspeed", "faiss")] == ["fail"] * 4
    assert "libcudart.so.13" in found["deepspeed"].detail
    assert "sslscale[cpu]" in found["faiss"].fix


def test_packages_are_really_imported() -> None:
    assert doctor._run_python("print('noise'); print('{\"version\": \"3\"}')") == {"version": "3"}
    assert (
        doctor._run_python("import nowhere_to_be_found") == "ModuleNotFoundError: No module named 'nowhere_to_be_found'"
    )
    assert doctor._run_python(doctor._OTHER.format("platform")) == {"version": sys.modules["platform"].__version__}


@pytest.mark.parametrize(
    ("installed", "status"),
    [
        ([], "ok"),
        (["faiss-cpu"], "ok"),
        (["faiss-cpu", "faiss_gpu"], "fail"),
        ([None, "faiss-cpu"], "ok"),  # an uninstall left a folder without METADATA
    ],
)
def test_one_build_of_faiss(
    packages: dict[str, Any], monkeypatch: pytest.MonkeyPatch, installed: list[str | None], status: str
) -> None:
    class Distribution:
        version = "1.9"

        def __init__(self, name: str | None) -> None:
            self.metadata = {"Name": name}

    monkeypatch.setattr("importlib.metadata.distributions", lambda: map(Distribution, ["numpy", *installed]))
    check = doctor._faiss_build()
    assert check.status == status
    if status == "fail":
        assert "pip uninstall -y faiss-cpu faiss-gpu" in check.fix


def test_a_driver_without_a_torch_that_fits(packages: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert rows()["cuda"].status == "warn"
    packages["torch"]["devices"] = ["NVIDIA H100"]
    assert rows()["cuda"].detail == "CUDA 13.0: NVIDIA H100"


def test_little_room(packages: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_SHM_GIGABYTES", 2**20)
    monkeypatch.setattr(doctor, "_DISK_GIGABYTES", 2**30)
    found = rows(config_of(tmp_path))
    assert (found["shared memory"].status, found["disk"].status) == ("warn", "warn")


def test_a_run_directory_that_cannot_be_written(packages: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in its place")
    assert rows(config_of(tmp_path))["run directory"].status == "fail"


def test_datasets(packages: dict[str, Any], tmp_path: Path) -> None:
    for name in ("empty", "noise"):
        (tmp_path / name).mkdir()
    (tmp_path / "noise" / "a.tar").write_bytes(b"not a tar" * 200)
    found = rows(
        config_of(
            tmp_path,
            "pack.source=digits",
            f"pack.output={tmp_path / 'digits'}",
            f"datasets.unpacked={tmp_path / 'digits' / 'train'}",
            *(f"datasets.{name}={tmp_path / name}" for name in ("empty", "noise", "missing")),
            "datasets.shell=pipe:cat /etc/passwd",
        )
    )
    assert found["dataset unpacked"].status == "warn"
    assert {found[f"dataset {name}"].status for name in ("empty", "noise", "missing", "shell")} == {"fail"}


def test_a_readable_dataset(packages: dict[str, Any], tmp_path: Path) -> None:
    from sslscale.config import PackConfig
    from sslscale.shards.write import run_pack

    run_pack(PackConfig(source="digits", output=str(tmp_path / "digits"), limit=20, workers=1))
    check = rows(config_of(tmp_path, f"datasets.train={tmp_path / 'digits' / 'train'}"))["dataset train"]
    assert check == Check("dataset train", "ok", f"{tmp_path / 'digits' / 'train'}: 1 shards, 20 samples")


def test_a_dataset_whose_first_shard_is_left_out(packages: dict[str, Any], tmp_path: Path) -> None:
    from sslscale.config import PackConfig
    from sslscale.shards.dataset import open_shards, write_filtered
    from sslscale.shards.write import run_pack

    run_pack(PackConfig(source="digits", output=str(tmp_path), limit=20, samples_per_shard=10, workers=1))
    shards = open_shards(str(tmp_path / "train")).shards
    write_filtered(tmp_path / "second.json", [shards[0].without(range(10)), shards[1]])
    write_filtered(tmp_path / "none.json", [shard.without(range(10)) for shard in shards])
    lists = [f"datasets.{name}={tmp_path / name}.json" for name in ("second", "none")]
    found = rows(config_of(tmp_path, *lists))
    assert (found["dataset second"].status, found["dataset none"].status) == ("ok", "fail")
    assert "holds no sample" in found["dataset none"].detail


def test_what_lies_beside_the_packs_output_is_opened(packages: dict[str, Any], tmp_path: Path) -> None:
    pack = ["pack.source=digits", f"pack.output={tmp_path / 'digits'}"]
    found = rows(config_of(tmp_path, *pack, f"datasets.beside={tmp_path / 'digits-2' / 'train'}"))
    assert found["dataset beside"].status == "fail"


def test_datasets_on_a_store(packages: dict[str, Any], tmp_path: Path, s3: str) -> None:
    from sslscale.config import PackConfig
    from sslscale.shards.write import run_pack

    output = f"{s3}/data"
    config = config_of(
        tmp_path, "pack.source=digits", f"pack.output={output}", f"datasets.train={output}/train", "pack.workers=1"
    )
    assert rows(config)["dataset train"] == Check(
        "dataset train", "warn", f"{output}/train is not packed yet", "sslscale pack, or sslscale run, makes it"
    )
    run_pack(PackConfig(source="digits", output=output, limit=20, workers=1))
    assert rows(config)["dataset train"].status == "ok"
    assert "20 samples" in rows(config)["dataset train"].detail


def test_a_run_on_a_store(packages: dict[str, Any], s3: str) -> None:
    assert rows(load_config(None, [f"run={s3}/run"]))["run directory"] == Check(
        "run directory", "ok", f"{s3}/run can be written"
    )
    fs, _ = storage.filesystem(s3)
    assert fs.find(s3) == []
    elsewhere = rows(load_config(None, ["run=s3://no-such-bucket/run"]))["run directory"]
    assert elsewhere.status == "fail"
    assert "s3://no-such-bucket/run" in elsewhere.detail


def test_without_credentials_the_rows_say_so(packages: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        """Of a store's own kind, as botocore's is."""

    def refuse(*args: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    for name in ("create", "size"):
        monkeypatch.setattr(storage, name, refuse)
    pack = ["pack.source=digits", "pack.output=s3://bucket/data", "datasets.train=s3://bucket/data/train"]
    found = rows(load_config(None, ["run=s3://bucket/run", *pack]))
    for row in ("run directory", "dataset train"):
        assert (found[row].status, "Unable to locate credentials" in found[row].detail) == ("fail", True)


@pytest.fixture
def listener() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_cluster(packages: dict[str, Any], tmp_path: Path, listener: str) -> None:
    packages["ray.init"] = {"CPU": 64.0, "GPU": 8.0}
    assert (
        rows(config_of(tmp_path, f"runtime.address={listener}"))["ray cluster"].detail == f"{listener}: 64 CPUs, 8 GPUs"
    )
    packages["ray.init"] = "ray.exceptions.AuthenticationError: 401"
    refused = rows(config_of(tmp_path, f"runtime.address={listener}"))["ray cluster"]
    assert (refused.status, "RAY_AUTH_MODE=token" in refused.fix) == ("fail", True)
    assert "ray cluster" not in rows(config_of(tmp_path, "runtime.address=local"))
    for address in ("127.0.0.1:1", "nonsense"):
        assert rows(config_of(tmp_path, f"runtime.address={address}"))["ray cluster"].status == "fail"
