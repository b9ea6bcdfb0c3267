"""launch/: every manifest against the schemas of what reads it, every script against shellcheck and bash."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

LAUNCH = Path(__file__).parents[2] / "launch"
FIELDS = json.loads((Path(__file__).parent / "kuberay_fields.json").read_text())
MANIFESTS = sorted(LAUNCH.glob("kuberay-*.yaml"))
KUBERNETES = "1.30"


def complaints(manifest: dict[str, Any]) -> list[str]:
    """What KubeRay, or Kubernetes for the pods in it, would not take."""
    found = [error.message for error in jsonschema.Draft202012Validator(FIELDS).iter_errors(manifest)]
    for template in templates(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        try:
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(error.message)
    return found


def templates(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    yield from (group["template"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]])


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_kuberay_takes_the_manifest(path: Path) -> None:
    assert complaints(yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_pod_has_room_for_working_copies_and_the_cluster_asks_for_a_token(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    for template in templates(manifest):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            [name] = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/tmp"]
            assert volumes[name]["emptyDir"]["sizeLimit"] == "500Gi"
    assert manifest["spec"].get("rayClusterSpec", manifest["spec"])["authOptions"] == {"mode": "token"}


def test_a_misspelt_field_is_found_wherever_it_stands() -> None:
    manifest = yaml.safe_load(MANIFESTS[0].read_text())
    for spoil in (
        lambda m: m["spec"].update(rayversion="2.60.0"),
        lambda m: m["spec"]["workerGroupSpecs"][0].pop("groupName"),
        lambda m: m["spec"]["workerGroupSpecs"][0]["rayStartParams"].update({"num-cpus": 4}),
        lambda m: m["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(imagePull="Always"),
    ):
        spoilt = copy.deepcopy(manifest)
        spoil(spoilt)
        assert len(complaints(spoilt)) == 1


def test_ray_up_takes_the_cluster() -> None:
    """What `ray up` does with the file before it asks a cloud for anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((LAUNCH / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    config["available_node_types"]["gpu"]["min_worker"] = 2
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config))


def test_the_cluster_of_ray_up_takes_sslscale_and_asks_for_a_token() -> None:
    """Its image has a Python that sslscale takes; every machine has an image of its own, files enough and the token."""
    config = yaml.safe_load((LAUNCH / "ray-cluster.yaml").read_text())
    project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())["project"]
    ray, python = re.fullmatch(r"rayproject/ray:([\d.]+)-py3(\d+)-gpu", config["docker"]["image"]).groups()
    assert SpecifierSet(project["requires-python"]).contains(f"3.{python}")
    [required] = [one for one in map(Requirement, project["dependencies"]) if one.name == "ray"]
    assert required.specifier.contains(ray)
    images = [node["node_config"].get("ImageId") for node in config["available_node_types"].values()]
    assert images == ["AMI", "AMI"], "without one, Ray takes an old one of its own"
    [token] = config["file_mounts"]
    assert config["file_mounts"][token] == "~/.ray/auth_token"
    assert {"-e RAY_AUTH_MODE=token", f"-e RAY_AUTH_TOKEN_PATH={token}"} <= set(config["docker"]["run_options"])
    starts = [config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]]
    assert all(start.startswith("ulimit -n 65536; ray start ") for start in starts)


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sbatch")), ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert shellcheck is not None
    for command in (["bash", "-n"], [shellcheck, "--shell=bash", "--severity=style"]):
        done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
