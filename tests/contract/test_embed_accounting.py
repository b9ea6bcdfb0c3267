"""Every sample of a thousand uneven, damaged shards is accounted for, through killed workers and killed drivers."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tars import encode_png, write_tar

from sslscale.config import RunConfig
from sslscale.embed.stage import run_embed
from sslscale.features import FeatureStore
from sslscale.rundir import RunDir, hash_file
from sslscale.runtime.base import make_runtime
from sslscale.shards.dataset import open_shards, write_index

SHARDS, PART_ROWS, DEATHS = 1000, 1024, 5
CUT = (7, 400)  # shards that are truncated

# Pixels that kill their worker: each file in DEATHS is one death, taken after a few batches of a process.
BACKBONE = """
import os, signal
from sslscale.models.handcrafted import Pixels

class Mortal(Pixels):
    batches = 0

    def forward(self, images):
        Mortal.batches += 1
        folder = os.environ["DEATHS"]
        left = sorted(os.listdir(folder))
        if Mortal.batches % 9 == 0 and left:
            os.unlink(os.path.join(folder, left[0]))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Shards of 0 to 4,000 samples, 0.5% of which are no image, and two of which are cut."""
    folder, generator = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    counts = np.where(generator.random(SHARDS) < 0.3, 0, generator.integers(1, 12, SHARDS))
    counts[[11, 600]], counts[list(CUT)] = [4000, 900], 40
    infos, number = [], 0
    for shard, count in enumerate(counts.tolist()):
        path = folder / f"s-{shard:04d}.tar"
        members = []
        for _ in range(count):
            data = encode_png(generator.integers(0, 256, (8, 8), dtype=np.uint8))
            bad = generator.random() < 0.005
            members.append((f"{number:06d}.png", data[:40] if bad else data))
            number += 1
        write_tar(path, members)
        infos.append({"name": path.name, "samples": count, "bytes": path.stat().st_size, "sha256": hash_file(path)})
    write_index(folder, infos)
    for shard in CUT:
        path = folder / f"s-{shard:04d}.tar"
        path.write_bytes(path.read_bytes()[: 20 * 1024 + 300])
    return folder


def settings(corpus, backbone, workers):
    return {
        "datasets": {"train": str(corpus)},
        "runtime": {"name": "local", "workers": workers, "max_retries": DEATHS},
        "embed": {
            "backbone": backbone, "size": 8, "channels": 1, "part_rows": PART_ROWS, "batch_size": 128,
            "max_failed_share": 0.05,
        },
    }  # fmt: skip


def files(run):
    return {file.name: file.read_bytes() for file in sorted((run / "embed/train").glob("part-*"))}


@pytest.fixture(scope="module")
def killed(corpus, tmp_path_factory):
    """A run whose workers were killed five times and whose driver was killed twice, and how many kills there were."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "mortal_backbone.py").write_text(BACKBONE)
    deaths = folder / "deaths"
    deaths.mkdir()
    for number in range(DEATHS):
        (deaths / str(number)).touch()
    (folder / "config.json").write_text(json.dumps(settings(corpus, "mortal_backbone:Mortal", 2)))
    command = [sys.executable, "-m", "sslscale.cli", "embed", "-c", "config.json", "--run", "run", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "DEATHS": str(deaths)}
    done, drivers_killed = folder / "run/embed/train/done", 0
    for parts in (2, 4):
        with subprocess.Popen(
            command, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        ) as driver:
            while driver.poll() is None:
                if done.is_dir() and len(list(done.glob("part-*"))) >= parts:
                    driver.send_signal(signal.SIGKILL)
                    drivers_killed += 1
                    break
                time.sleep(0.005)
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return folder / "run", DEATHS - len(list(deaths.iterdir())), drivers_killed


def test_nothing_is_lost_or_counted_twice(corpus, killed):
    run, workers_killed, drivers_killed = killed
    assert workers_killed == DEATHS and drivers_killed == 2
    result = json.loads((run / "embed/train/result.json").read_text())
    shards = open_shards(str(corpus))
    assert result["samples_in"] == shards.num_samples == result["features_out"] + result["failed"]
    failures = [json.loads(line) for file in (run / "embed/train/failed").iterdir() for line in file.open()]
    assert len(failures) == result["failed"] > 0.004 * shards.num_samples
    assert sum(failure["shard"] in {f"s-{shard:04d}.tar" for shard in CUT} for failure in failures) >= 40
    store = FeatureStore.open(run / "embed/train")
    keys = [key for part in store.parts for key in store.table(part.part, ["key"]).column("key").to_pylist()]
    assert len(set(keys)) == len(keys) == result["features_out"]
    failed = {failure["key"] for failure in failures}
    assert len(failed) == result["failed"] and not failed & set(keys)


def test_the_bytes_are_those_of_a_run_that_was_not_disturbed(corpus, killed, tmp_path):
    with RunDir(tmp_path / "run") as run:
        run_embed(run, RunConfig.model_validate(settings(corpus, "pixels", 1)), make_runtime("local"))
    expected = files(tmp_path / "run")
    assert expected == files(killed[0])
    assert (tmp_path / "run/embed/train/ids.npy").read_bytes() == (killed[0] / "embed/train/ids.npy").read_bytes()


def test_parts_are_near_their_target_size(killed):
    rows = [part.rows for part in FeatureStore.open(killed[0] / "embed/train").parts]
    assert len(rows) > 8 and all(0.93 * PART_ROWS <= count <= PART_ROWS for count in rows[:-1])
