"""launch/: every manifest against the schemas of what reads it, every script against shellcheck and bash."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

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


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sbatch")), ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert shellcheck is not None
    for command in (["bash", "-n"], [shellcheck, "--shell=bash", "--severity=style"]):
        done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
