"""Exported features open with the tools that they are for."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sslscale import storage
from sslscale.cli import app
from sslscale.config import RunConfig, dump_config
from sslscale.errors import UserError
from sslscale.features import FeatureStore
from sslscale.features.distance import prepare
from sslscale.index.export import describe_features, export_features
from sslscale.rundir import RunDir
from sslscale.runtime.base import make_runtime


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    store, records = (
        FeatureStore.create(folder / "embed/train", dim=6, dtype="fp16", normalized=False, backbone="b"),
        [],
    )
    for part, size in enumerate((40, 30)):
        keys = [f"{part}-{row}" for row in range(size)]
        rows = generator.normal(size=(size, 6))
        records.append(store.write_part(part, rows, keys, ["s"] * size, range(size), range(size) if part else None))
    store.commit(records)
    config = RunConfig.model_validate({"runtime": {"name": "local", "workers": 1}})
    (folder / "config.yaml").write_text(dump_config(config))
    return RunDir(folder)


@pytest.fixture(scope="module")
def rows(run):
    store = FeatureStore.open(run.path / "embed/train")
    return np.concatenate([store.open_block(0), store.open_block(1)])


def export(run, output, format):
    return export_features(run, make_runtime("local"), format=format, output=output)


def vectors(table):
    return np.stack(table.column("vector").to_numpy(zero_copy_only=False))


def test_info(run):
    described = describe_features(run)["train"]
    assert described["rows"] == 70 and described["dim"] == 6 and described["parts"] == 2
    assert described["bytes"] == 70 * 6 * 2 and described["columns"] == ["key", "shard", "offset"]


def test_info_reads_no_features_and_no_tables(run, monkeypatch):
    expected = describe_features(run)

    def refuse(*arguments):
        raise AssertionError("a file that grows with the data is read")

    for name in ("open_block", "table"):
        monkeypatch.setattr(FeatureStore, name, refuse)
    assert describe_features(run) == expected


def test_parquet(run, rows, tmp_path):
    paths = export(run, tmp_path, "parquet")
    tables = [pq.read_table(path) for path in paths]
    assert [table.num_rows for table in tables] == [40, 30]
    assert tables[0].schema.field("vector").type.list_size == 6
    np.testing.assert_array_equal(np.concatenate([vectors(table) for table in tables]), rows)


def test_npy(run, rows, tmp_path):
    array, table = export(run, tmp_path, "npy")
    np.testing.assert_array_equal(np.load(array, mmap_mode="r"), rows)
    columns = pq.read_table(table).to_pydict()
    assert columns["key"][41] == "1-1" and columns["label"][39:42] == [None, 0, 1]
    assert pq.ParquetFile(table).num_row_groups == 2  # written part by part


def test_lance(run, rows, tmp_path):
    lance = pytest.importorskip("lance")
    [path] = export(run, tmp_path, "lance")
    table = lance.dataset(str(path)).to_table()
    np.testing.assert_array_equal(vectors(table), rows)
    assert table.column("key").to_pylist()[40] == "1-0"


def test_a_lance_export_that_is_broken_off_leaves_nothing(run, tmp_path, monkeypatch):
    pytest.importorskip("lance")
    table = FeatureStore.table

    def die_at_the_second(store, part, columns=None):
        if part:
            raise RuntimeError("broken off")
        return table(store, part, columns)

    monkeypatch.setattr(FeatureStore, "table", die_at_the_second)
    with pytest.raises(Exception, match="broken off"):  # lance may hand it on as an error of its own
        export(run, tmp_path / "out", "lance")
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.undo()
    assert len(export(run, tmp_path / "out", "lance")) == 1


def test_a_run_that_is_at_work_can_be_exported(run, tmp_path):
    command = ["features", "export", str(run.path), "--output", str(tmp_path / "out"), "--format"]
    with RunDir(run.path):
        assert CliRunner().invoke(app, [*command, "parquet"]).exit_code == 0
        refused = CliRunner().invoke(app, [*command, "viewer"]).exception  # its neighbours go into the run
    assert isinstance(refused, UserError) and len(list((tmp_path / "out").rglob("*.parquet"))) == 2


def test_viewer(run, rows, tmp_path):
    [path] = export(run, tmp_path, "viewer")
    table = pq.read_table(path)
    assert pq.ParquetFile(path).num_row_groups == 2 and table.column("label").to_pylist()[39:42] == [None, 0, 1]
    assert {"id", "vector", "neighbors"} <= set(table.column_names)
    neighbours = table.column("neighbors").to_pylist()
    unit = prepare(rows.astype(np.float32), "cosine")
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -1)
    hits = [row["ids"][0] == best for row, best in zip(neighbours, similarity.argmax(axis=1), strict=True)]
    assert np.mean(hits) >= 0.95
    first = neighbours[50]
    np.testing.assert_allclose(first["distances"], 1 - similarity[50, first["ids"]], atol=1e-5)


def test_what_is_wrong_writes_nothing(run, tmp_path):
    with pytest.raises(UserError, match="did you mean 'parquet'"):
        export(run, tmp_path / "out", "parket")
    with pytest.raises(UserError, match="not embedded"):
        export_features(run, make_runtime("local"), format="npy", output=tmp_path / "out", dataset="tset")
    assert not (tmp_path / "out").exists()
    export(run, tmp_path / "out", "npy")
    before = (tmp_path / "out/train.npy").read_bytes()
    with pytest.raises(UserError, match="at this path already"):
        export(run, tmp_path / "out", "npy")
    assert (tmp_path / "out/train.npy").read_bytes() == before


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_files_go_to_a_store(run, rows, s3, format):
    place = f"{s3}/exported"
    done = CliRunner().invoke(app, ["features", "export", str(run.path), "--output", place, "--format", format])
    assert done.exit_code == 0, done.output
    fs, root = storage.filesystem(place)
    assert sorted(f"s3://{name}" for name in fs.find(root)) == sorted(done.stdout.split())
    if format == "npy":
        with fs.open(f"{root}/train.npy") as file:
            np.testing.assert_array_equal(np.load(file), rows)
    again = CliRunner().invoke(app, ["features", "export", str(run.path), "--output", place, "--format", format])
    assert isinstance(again.exception, UserError) and f"{place}/train" in str(again.exception)
