"""Searching with what was not indexed: images, vectors and whole shards; and the verbs that change an index."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from tars import encode_png, write_tar

from sslscale.config import RunConfig
from sslscale.embed.stage import run_embed
from sslscale.errors import UserError
from sslscale.index import Index, query
from sslscale.index.build import run_index
from sslscale.index.query import run_search, search_shards
from sslscale.rundir import RunDir
from sslscale.runtime.base import make_runtime

COUNT, LOCAL = 40, make_runtime("local")


def png(number, noise=0):
    generator = np.random.default_rng(number)
    pixels = generator.integers(0, 200, (8, 8)) + np.random.default_rng([number, 1]).integers(0, noise + 1, (8, 8))
    return encode_png(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`run/` with an index of 40 images, `queries/` with noisy copies of five and one that is broken."""
    path = tmp_path_factory.mktemp("queries")
    for dataset, numbers in (("train", range(30)), ("test", range(30, COUNT))):
        members = [(f"k{number:02d}.{kind}", data) for number in numbers
                   for kind, data in (("png", png(number)), ("cls", str(number % 3).encode()))]  # fmt: skip
        write_tar(path / dataset / "a.tar", members)
    noisy = [(f"q{number}.png", png(number, noise=20)) for number in (3, 14, 15, 31, 39)]
    write_tar(path / "queries" / "a.tar", [*noisy, ("q-broken.png", b"not an image")])
    config = RunConfig.model_validate(
        {
            "datasets": {name: str(path / name) for name in ("train", "test")},
            "embed": {"datasets": ["train", "test"], "backbone": "pixels", "size": 8, "channels": 1, "pca": 12},
            "runtime": {"name": "local", "workers": 1},
        }
    )
    with RunDir(path / "run") as run:
        run_embed(run, config, LOCAL)
        run_index(run, config, LOCAL)
    return path


def test_an_image_is_embedded_as_the_indexed_ones_were(folder):
    (folder / "query.PNG").write_bytes(png(14, noise=20))
    (folder / "query").write_bytes(png(14, noise=20))
    assert run_search(RunDir(folder / "run"), query=folder / "query", k=1)[0]["key"] == "k14"
    found = run_search(RunDir(folder / "run"), query=folder / "query.PNG", k=3)
    assert found[0]["key"] == "k14" and len(found) == 3
    assert found[0]["query"] == "query.PNG" and found[0]["dataset"] == "train"
    assert 0 < found[0]["distance"] < 0.1 < found[1]["distance"]
    elsewhere = run_search(RunDir(folder / "run"), query=folder / "query.PNG", k=3, where="split = 'test'")
    assert {row["dataset"] for row in elsewhere} == {"test"}


def test_a_key_that_the_filter_leaves_out_still_finds_all_that_it_keeps(folder):
    found = run_search(RunDir(folder / "run"), key="k07", k=10, where="split = 'test'")
    assert {row["dataset"] for row in found} == {"test"} and len(found) == 10
    with pytest.raises(UserError, match=r"beside the query\n.* 10\n.* 9"):
        run_search(RunDir(folder / "run"), key="k31", k=10, where="split = 'test'")


def test_vectors_of_a_file(folder):
    index = Index.open(folder / "run")
    rows = index.features.take(np.array([index.features.lookup(key) for key in ("k05", "k33")]))
    np.save(folder / "vectors.npy", rows)
    found = run_search(RunDir(folder / "run"), query=folder / "vectors.npy", k=2)
    assert [(row["query"], row["key"]) for row in found if row["distance"] < 1e-4] == [(0, "k05"), (1, "k33")]


@pytest.mark.parametrize("name", ["local", "ray"])
def test_shards_of_queries(folder, tmp_path, name, monkeypatch):
    output, before = tmp_path / "found.parquet", sorted((folder / "run").iterdir())
    runtime, seen = make_runtime("local"), []
    runtime.name = name  # the workers of Ray may be on other machines: they share the run's location only
    original = query._embedded
    monkeypatch.setattr(query, "_embedded", lambda *args: seen.append(Path(args[3])) or original(*args))
    counted = search_shards(RunDir(folder / "run"), runtime, queries=str(folder / "queries"), output=output, k=4)
    assert (folder / "run" in seen[0].parents) == (name == "ray") and not seen[0].exists()
    assert sorted((folder / "run").iterdir()) == before
    assert (counted["queries"], counted["failed"]) == (5, 1)
    rows = pq.read_table(output).to_pylist()
    assert len(rows) == 20 and [row["rank"] for row in rows[:4]] == [0, 1, 2, 3]
    nearest = {row["query"]: row["key"] for row in rows if row["rank"] == 0}
    assert nearest == {"q3": "k03", "q14": "k14", "q15": "k15", "q31": "k31", "q39": "k39"}


def test_a_filter_that_cannot_be_used_is_refused_before_the_queries_are_embedded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(query, "_embedded", lambda *args: pytest.fail("they were embedded"))
    for where, message in (("labl = 1", "label"), ("key = 'k01'", "filter keeps")):
        with pytest.raises(UserError, match=message):
            search_shards(
                RunDir(folder / "run"), LOCAL, queries=str(folder / "queries"), output=tmp_path / "x", k=4, where=where
            )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either a key or a file"),
        ({"key": "k01", "query": "vectors.npy"}, "either a key or a file"),
        ({"key": "nobody"}, "no sample with this key"),
        ({"key": "k01", "k": 40}, "1 to 39"),
        ({"query": "missing.png"}, "no such file"),
        ({"query": "broken.png"}, "cannot be read"),
        ({"query": "broken.npy"}, "cannot be read"),
        ({"query": "words.npy"}, "no table of floats"),
        ({"query": "narrow.npy"}, "another dimension"),
    ],
)
def test_wrong_queries(folder, given, message):
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "broken.npy").write_bytes(b"not an array")
    np.save(folder / "words.npy", np.array(["a", "b"]))
    np.save(folder / "narrow.npy", np.ones((2, 3)))
    given = {name: folder / value if name == "query" else value for name, value in given.items()}
    with pytest.raises(UserError, match=message):
        run_search(RunDir(folder / "run"), **given)


def test_copies_of_remote_queries_are_where_the_run_keeps_its_own(folder, tmp_path, monkeypatch):
    seen = []
    original = query.embed_dataset
    monkeypatch.setattr(
        query, "embed_dataset", lambda run, config, *more: seen.append(config) or original(run, config, *more)
    )
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(folder / "run", tmp_path / "run")
    kept = yaml.safe_load((run / "config.yaml").read_text()) if (run / "config.yaml").is_file() else {}
    (run / "config.yaml").write_text(yaml.safe_dump({**kept, "storage": {"cache": "/somewhere", "cache_gb": 3.0}}))
    search_shards(RunDir(run), LOCAL, queries=str(folder / "queries"), output=tmp_path / "found.parquet", k=2)
    assert (seen[0].storage.cache, seen[0].storage.cache_gb) == ("/somewhere", 3.0)
    assert not (tmp_path / "runs").exists() and not seen[0].run.endswith("runs/main")


def test_the_verbs(folder, tmp_path, monkeypatch, capsys):
    from sslscale.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sslscale", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr()
        return 0, capsys.readouterr()

    def keys(*arguments):
        code, printed = call("search", folder / "run", *arguments, "--name", "verbs", "--json")
        assert code == 0, printed.err
        return [row["key"] for row in json.loads(printed.out)]

    with RunDir(folder / "run") as run:
        settings = {"index": {"factory": "Flat"}, "runtime": {"name": "local", "workers": 1}}
        run_index(run, RunConfig.model_validate(settings), LOCAL, name="verbs")
    near = keys("--key", "k07", "--k", 5)
    (tmp_path / "doomed").write_text(f"{near[0]}\n{near[2]}\n")
    code, printed = call("delete", folder / "run", "--keys", tmp_path / "doomed", "--name", "verbs")
    assert code == 0 and printed.out.startswith("2 deleted")
    assert keys("--key", "k07", "--k", 3) == [near[1], *near[3:]]
    code, printed = call("compact", folder / "run", "--name", "verbs", "--json")
    assert code == 0 and json.loads(printed.out)["num_vectors"] == COUNT - 2
    assert keys("--key", "k07", "--k", 3) == [near[1], *near[3:]]
    for arguments, code in [
        (("search", folder / "run", "--key", "k07", "--where", "label >"), 2),
        (("search", folder / "run", "--key", "k07", "--name", "absent"), 2),
        (("delete", folder / "run", "--keys", tmp_path / "absent"), 2),
        (("delete", tmp_path / "no-run", "--keys", tmp_path / "doomed"), 2),
    ]:
        ended, printed = call(*arguments)
        assert ended == code and "Traceback" not in printed.err
    assert not (tmp_path / "no-run").exists()
    rows = folder / "run" / "index" / "verbs" / "rows.npy"
    current = next(rows.parent.glob("index*.faiss"))
    current.write_bytes(current.read_bytes()[:100])
    ended, printed = call("search", folder / "run", "--key", "k07", "--name", "verbs")
    assert ended == 1 and "cut off" in printed.err and "fix:" in printed.err
