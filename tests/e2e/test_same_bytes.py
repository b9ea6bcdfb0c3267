"""Given one exported backbone, the runtime and the number of workers change nothing."""

import shutil

import pytest
from conftest import small_run

STAGES = ("embed", "cluster", "anomaly")


def outputs(run):
    """Every array that the stages wrote, by its path in the run."""
    folders = [run / "embed" / "train", *(run / stage / "main" for stage in STAGES[1:])]
    return {str(p.relative_to(run)): p.read_bytes() for folder in folders for p in sorted(folder.rglob("*.npy"))}


@pytest.mark.ray
def test_local_and_ray_with_one_and_two_workers_give_the_same_bytes(trained, tmp_path, cli, ray_runtime):
    expected = outputs(trained / "run")  # on Ray, with 2 workers
    assert {name.split("/")[0] for name in expected} == set(STAGES) and len(expected) > 12
    for runtime, workers in (("local", 1), ("local", 2), ("ray", 1)):
        run = tmp_path / f"{runtime}-{workers}"
        shutil.copytree(
            trained / "run" / "pretrain", run / "pretrain", ignore=shutil.ignore_patterns("checkpoints", "ray")
        )
        arguments = [*small_run(trained), "--run", str(run), "--runtime", runtime, f"runtime.workers={workers}"]
        for stage in STAGES:
            outcome = cli(stage, *arguments)
            assert outcome.code == 0, outcome.err
        ours = outputs(run)
        assert ours.keys() == expected.keys()
        assert [name for name in ours if ours[name] != expected[name]] == []
