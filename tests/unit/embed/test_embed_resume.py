"""What an embedding that is run again may take over: its projection, its parts, and nothing that is not there."""

import numpy as np
import pytest
from embed_cases import embed, part_files

from sslscale.errors import UserError
from sslscale.rundir import read_json, write_json


def test_a_projection_belongs_to_the_samples_that_it_was_fitted_on(tmp_path, shards, write_shard):
    embed(tmp_path, pca=5)
    fitted = (tmp_path / "run/projection/projection.npy").read_bytes()
    write_shard(shards / "c-0.tar", 40)
    assert embed(tmp_path, pca=5)["generations"] == 2  # what comes later is projected alike
    assert (tmp_path / "run/projection/projection.npy").read_bytes() == fitted
    for limit, changed in ((60, "b-0"), (None, "c-0")):  # of the first generation, and of the second
        if limit is None:
            write_shard(shards / f"{changed}.tar", 41)
            (shards / "shards.json").unlink()
        message = r"projection was made[\s\S]*shards:" if limit else r"embed/train was made[\s\S]*shards:"
        with pytest.raises(UserError, match=message):
            embed(tmp_path, pca=5, limit=limit)
    embed(tmp_path, pca=5, limit=60, overwrite=True)
    assert (tmp_path / "run/projection/projection.npy").read_bytes() != fitted


def test_too_few_samples_of_a_projection_leave_nothing_behind(tmp_path, shards, write_shard):
    with pytest.raises(UserError, match=r"too few samples[\s\S]*more than 30"):
        embed(tmp_path, pca=30, limit=20)
    assert not (tmp_path / "run/projection").exists()
    with pytest.raises(UserError, match="too few samples"):
        embed(tmp_path, pca=50, pca_rows=30)
    assert embed(tmp_path, pca=50, pca_rows=64)["dim"] == 50


def test_samples_that_fail_may_leave_too_few_for_a_projection(tmp_path, shards, monkeypatch):
    monkeypatch.setattr("sslscale.embed.worker.EmbedWorker.sample", lambda self, spans, _=None: np.zeros((0, 64)))
    with pytest.raises(UserError, match="too few samples"):
        embed(tmp_path, pca=5)
    monkeypatch.undo()
    assert embed(tmp_path, pca=6)["dim"] == 6


# ------------------------------------------------------------------ parts


@pytest.mark.parametrize("done", [True, False], ids=["done", "interrupted"])
@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_part_that_is_gone_or_cut_is_embedded_again(tmp_path, shards, suffix, done):
    first = embed(tmp_path)
    before, folder = part_files(tmp_path), tmp_path / "run/embed/train"
    (folder / f"part-00001{suffix}").unlink()
    cut = folder / f"part-00003{suffix}"
    cut.write_bytes(cut.read_bytes()[:-10])
    untouched = (folder / "part-00000.npy").stat().st_mtime_ns
    if not done:
        (folder / "result.json").unlink()
    again = embed(tmp_path)
    assert part_files(tmp_path) == before and again["features_out"] == first["features_out"]
    assert (folder / "part-00000.npy").stat().st_mtime_ns == untouched


def test_a_store_without_its_id_table_gets_it_back(tmp_path, shards):
    embed(tmp_path)
    ids = tmp_path / "run/embed/train/ids.npy"
    before = ids.read_bytes()
    ids.unlink()
    embed(tmp_path)
    assert ids.read_bytes() == before


def test_parts_of_records_without_sizes_are_accepted(tmp_path, shards):
    first = embed(tmp_path)
    for marker in (tmp_path / "run/embed/train/done").iterdir():
        record = read_json(marker)
        write_json(marker, {name: value for name, value in record.items() if not name.endswith("bytes")})
    assert embed(tmp_path) == first
