"""Working copies of URLs, against a real S3-protocol server that fails when it is told to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sslscale import storage
from sslscale.errors import StageError, UserError
from sslscale.rundir import Metrics, RunDir, discard, read_json, write_atomic, write_json

if TYPE_CHECKING:
    from s3_server import FaultyProxy


def there(url: str) -> list[str]:
    """The keys below a URL, as another client lists them."""
    fs, root = storage.filesystem(url)
    return sorted(name.removeprefix(f"{root}/") for name in fs.find(root))


def elsewhere(url: str, name: str, data: bytes) -> None:
    """Another machine writes a file; a second later, since the store tells times in seconds."""
    time.sleep(1.1)
    fs, root = storage.filesystem(url)
    fs.pipe_file(f"{root}/{name}", data)


# ------------------------------------------------------------------ paths


def test_a_working_copy_says_which_url_it_is_of(tmp_path: Path) -> None:
    for url in ("s3://bucket/runs/a", "gs://other/x", "hdfs:///user/x"):  # the last one names no host
        assert storage.remote_url(storage.local_path(url)) == url
        assert storage.remote_url(storage.local_path(url) / "embed" / "part-0.npy") == f"{url}/embed/part-0.npy"
        assert RunDir(url).path == storage.local_path(url)
        assert RunDir(RunDir(url).path / "baselines" / "pixels").path == RunDir(f"{url}/baselines/pixels").path
    assert storage.local_path(tmp_path / "run") == tmp_path / "run"
    assert storage.local_path(f"file://{tmp_path}/run") == tmp_path / "run"
    assert storage.remote_url(tmp_path / "run") is None


def test_sizes_are_of_the_files_in_a_folder(tmp_path: Path) -> None:
    write_atomic(tmp_path / "folder" / "part", b"four")
    assert storage.sizes(tmp_path) == storage.sizes(tmp_path / "none") == {}
    assert storage.sizes(tmp_path / "folder") == {"part": 4}


def test_a_local_path_asks_nobody(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from sslscale.rundir import RunDir\n"
        "with RunDir(sys.argv[1]) as run: run.open_stage('embed', 'x', {}, {}).finish({})\n"
        "assert 'fsspec' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=True)


def test_a_protocol_that_nobody_speaks_is_named() -> None:
    with pytest.raises(UserError, match="cannot be opened"):
        storage.filesystem("gopher://bucket/run")


# ------------------------------------------------------------------ there and back


def test_what_is_written_is_there_and_what_is_removed_is_gone(s3: str) -> None:
    run = storage.local_path(s3)
    write_json(run / "a.json", {"a": 1})
    write_atomic(run / "stage" / "done" / "part", "x")
    write_atomic(run / "stage" / "stage.json", "{}")
    assert there(s3) == ["a.json", "stage/done/part", "stage/stage.json"]
    storage.remove(run / "a.json")
    discard(run / "stage")
    assert there(s3) == []
    assert not (run / "stage").exists()
    storage.remove(run / "a.json")


def test_another_machine_sees_the_run(s3: str) -> None:
    run = storage.local_path(s3)
    np.save(_parent(run / "embed" / "train" / "part-00000.npy"), np.arange(10))
    storage.publish(run / "embed" / "train" / "part-00000.npy")
    write_json(run / "embed" / "train" / "features.json", {"rows": 10})
    write_json(run / "embed" / "train" / "done" / "part-00000", {"rows": 10})
    write_json(run / "embed" / "train" / "failed" / "part-00000.jsonl", {"key": "a"})
    np.save(run / "embed" / "train" / "ids.npy", np.arange(10))
    storage.publish(run / "embed" / "train" / "ids.npy")
    _forget(run)
    storage.pull(run)
    assert (run / "embed" / "train" / "done" / "part-00000").is_file(), "what is finished is not made again"
    assert (run / "embed" / "train" / "failed" / "part-00000.jsonl").is_file()
    assert not (run / "embed" / "train" / "ids.npy").exists()
    assert (run / "embed" / "train" / "features.json").is_file()
    assert not (run / "embed" / "train" / "part-00000.npy").exists(), "what grows with the data waits"
    assert np.load(storage.bring(run / "embed" / "train" / "part-00000.npy")).sum() == 45
    assert not storage.bring(run / "embed" / "train" / "part-00001.npy").exists()


def test_a_reader_leaves_alone_what_is_not_published_yet(s3: str) -> None:
    run = storage.local_path(s3)
    write_json(run / "manifest.json", 1)
    unfinished = _parent(run / "embed" / "part-00000.npy")
    unfinished.write_bytes(b"half")
    reading = RunDir.reading(s3)
    assert read_json(reading.path / "manifest.json") == 1
    assert storage.shown(reading.path) == s3
    assert unfinished.read_bytes() == b"half"
    arriving = _parent(reading.path / "index" / ".index.faiss.1.2.tmp")
    arriving.write_bytes(b"half")
    assert RunDir.reading(s3).path == reading.path
    assert arriving.is_file(), "another reader is copying it"


def test_folders_that_other_clients_write_are_no_files(s3: str) -> None:
    fs, root = storage.filesystem(s3)
    for name in ("run/", "run/embed/"):
        fs.call_s3("put_object", Bucket="bucket", Key=f"{root.partition('/')[2]}/{name}", Body=b"")
    run = storage.local_path(s3) / "run"
    write_json(run / "embed" / "checkpoints" / "features.json", 1)
    _forget(run)
    storage.pull(run)
    assert read_json(run / "embed" / "checkpoints" / "features.json") == 1, "also of a dataset with such a name"
    assert storage.names(run) == ["embed"]
    write_atomic(run / "embed" / "part", b"four")
    assert storage.sizes(run / "embed") == {"part": 4} and storage.sizes(run) == storage.sizes(run / "none") == {}


def test_a_file_that_changed_elsewhere_is_fetched_again_and_one_that_is_gone_is_deleted(s3: str) -> None:
    run = storage.local_path(s3)
    write_json(run / "same.json", 1)
    write_json(run / "changed.json", 1)
    write_json(run / "gone" / "a.json", 1)
    kept = (run / "same.json").stat().st_ino
    elsewhere(s3, "changed.json", b"2\n")
    fs, root = storage.filesystem(s3)
    fs.rm_file(f"{root}/gone/a.json")
    assert read_json(run / "changed.json") == 1, "a process sees one version of a file"
    storage.pull(run)
    assert read_json(run / "changed.json") == 2
    assert not (run / "gone").exists()
    assert (run / "same.json").stat().st_ino == kept, "not fetched again"


def test_a_signal_appears_and_is_taken_back(s3: str) -> None:
    path = storage.local_path(s3) / "stop"
    assert not storage.appeared(path, every=0.0)
    elsewhere(s3, "stop", b"x")
    assert not storage.appeared(path, every=60.0)
    assert storage.appeared(path, every=0.0)
    storage.remove(path)
    assert not storage.appeared(path, every=0.0)


def test_a_signal_that_the_remote_has_not_yet_is_kept(s3: str) -> None:
    """A handler makes it here, another thread then publishes it: who waits for it must not take it back between."""
    path = storage.local_path(s3) / "stop"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert storage.appeared(path, every=0.0)
    storage.publish(path)
    assert storage.size(path) == 0


def test_metrics_are_published_now_and_then(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(storage.local_path(s3) / "metrics.jsonl")
    metrics.append(step=1)
    assert there(s3) == []
    monkeypatch.setattr("sslscale.rundir._PUBLISH_SECONDS", 0.0)
    metrics.append(step=2)
    assert there(s3) == ["metrics.jsonl"]


# ------------------------------------------------------------------ the lease


_HOLD = """
import sys, time
from sslscale.rundir import RunDir
with RunDir(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_holds_a_run_on_a_store(s3: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # its own working copy, as on another machine
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, s3], stdout=subprocess.PIPE, text=True, env=environment)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"{s3} is held by pid {holder.pid}"), RunDir(s3):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert there(s3) == [".lease/00000001"]
    with RunDir(s3):
        assert there(s3) == [".lease/00000002"]
    assert there(s3) == []


def test_of_many_one_creates(s3: str, s3_proxy: FaultyProxy) -> None:
    path = storage.local_path(s3) / "number"
    s3_proxy.fail_until, s3_proxy.fail_share = time.monotonic() + 60, 0.4
    assert [storage.create(path, f"{n}".encode()) for n in range(6)] == [True, *[False] * 5]
    s3_proxy.fail_share = 0.2


# ------------------------------------------------------------------ faults


def test_failed_requests_are_sent_again_and_counted(s3: str, s3_proxy: FaultyProxy) -> None:
    run = storage.local_path(s3)
    before, failed = storage.retries(), s3_proxy.failed
    s3_proxy.fail_until = time.monotonic() + 60
    for number in range(20):
        write_json(run / f"{number}.json", number)
    _forget(run)
    storage.pull(run)
    s3_proxy.fail_until = 0.0
    assert [read_json(run / f"{number}.json") for number in range(20)] == list(range(20))
    assert s3_proxy.failed > failed
    assert storage.retries() - before == s3_proxy.failed - failed


def test_a_cut_connection_costs_one_piece(s3: str, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    path = storage.local_path(s3) / "part-00000.npy"
    write_atomic(path, os.urandom(300_000))
    data = path.read_bytes()
    monkeypatch.setattr(storage, "CHUNK_BYTES", 64 * 1024)
    _forget(path.parent)
    before, cut, requests = storage.retries(), s3_proxy.cut, s3_proxy.requests
    s3_proxy.cuts = 1
    assert storage.bring(path).read_bytes() == data
    assert s3_proxy.cut - cut == storage.retries() - before == 1
    assert s3_proxy.requests - requests == 1 + 5 + 1  # what it is, five pieces, one of them twice


def test_a_store_that_stays_away_is_given_up(s3: str, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslscale.retry.PATIENCE_SECONDS", 0.5)
    s3_proxy.fail_until, s3_proxy.fail_share = time.monotonic() + 60, 1.0
    with pytest.raises(StageError, match="has not answered"):
        write_json(storage.local_path(s3) / "a.json", 1)
    s3_proxy.fail_share = 0.2


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _forget(run: Path) -> None:
    """As on a machine that has not seen the run."""
    shutil.rmtree(run)
    storage._known.clear()
