"""An index that others change while it is open, and one that is made again: what was deleted stays deleted."""

from __future__ import annotations

import pytest
from index_cases import LOCAL, PART_ROWS, PARTS, build, queries, write_store

from sslscale.errors import UserError
from sslscale.index import Index
from sslscale.index.build import compact_index
from sslscale.rundir import RunDir

DOOMED = [f"train-1-{row}" for row in range(0, PART_ROWS, 2)]


@pytest.fixture
def run(tmp_path):
    write_store(tmp_path, "train", PARTS - 1)
    return RunDir(tmp_path)


def found(index):
    return set(index.keys(index.search(queries(400), 10)[1].ravel()))


@pytest.mark.parametrize("layout", ["merged", "sharded"])
def test_two_that_have_it_open_delete_what_both_delete(run, layout):
    build(run, layout=layout)
    first, second = Index.open(run), Index.open(run)
    assert first.delete(["train-0-1", "train-0-2"]) == 2
    assert second.delete(["train-0-3"]) == 1
    assert Index.open(run).num_vectors == second.num_vectors == (PARTS - 1) * PART_ROWS - 3
    write_store(run.path, "train", PARTS)
    build(run, layout=layout)
    assert second.delete([f"train-{PARTS - 1}-0"]) == 1, "a part that was added since is known"
    assert Index.open(run).num_vectors == PARTS * PART_ROWS - 4


@pytest.mark.parametrize("layout", ["merged", "sharded"])
def test_who_has_it_open_searches_it_as_it_was(run, layout):
    build(run, layout=layout)
    index = Index.open(run)
    Index.open(run).delete(DOOMED)
    compact_index(run, LOCAL)
    assert set(DOOMED) & found(index)
    assert not set(DOOMED) & found(Index.open(run))


def test_a_sample_that_is_not_indexed_yet_cannot_be_deleted_from_it(run):
    build(run)
    write_store(run.path, "train", PARTS)
    with pytest.raises(UserError, match=f"not indexed yet.*\n.*train-{PARTS - 1}-0"):
        Index.open(run).delete(["train-0-0", f"train-{PARTS - 1}-0"])
    assert Index.open(run).num_vectors == (PARTS - 1) * PART_ROWS


@pytest.mark.parametrize("layout", ["merged", "sharded"])
def test_a_damaged_index_is_made_again_without_what_was_deleted(run, layout):
    build(run, layout=layout)
    Index.open(run).delete(DOOMED)
    broken = sorted((run.path / "index/main").rglob("*.faiss"), key=lambda file: file.name)[0]
    with broken.open("r+b") as file:
        file.truncate(1000)
    result = build(run, layout=layout)
    index = Index.open(run)
    assert result["num_vectors"] == index.num_vectors == (PARTS - 1) * PART_ROWS - len(DOOMED)
    assert not set(DOOMED) & found(index)


def test_another_kind_of_index_in_its_place_knows_what_was_deleted(run, capsys):
    build(run)
    Index.open(run).delete(DOOMED)
    result = build(run, overwrite=True, factory="IVF8,Flat")
    assert result["factory"] == "IVF8,Flat" and result["num_deleted"] == len(DOOMED)
    assert not set(DOOMED) & found(Index.open(run))
    assert "deleted" not in capsys.readouterr().err
    assert not (run.path / "index/.main.deleted.json").exists()


class Killed(BaseException):
    pass


def test_what_was_deleted_outlives_a_kill_while_another_index_takes_its_place(run, monkeypatch):
    build(run)
    Index.open(run).delete(DOOMED)
    with monkeypatch.context() as patch:
        patch.setattr(run, "on_start", lambda folder: (_ for _ in ()).throw(Killed))  # the old index is gone by then
        with pytest.raises(Killed):
            build(run, overwrite=True, factory="IVF8,Flat")
    assert build(run, factory="IVF8,Flat")["num_deleted"] == len(DOOMED)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF16,SQfp16"])
def test_a_shard_that_is_deleted_as_a_whole(run, factory):
    build(run, layout="sharded", factory=factory, shard_rows=PART_ROWS)
    Index.open(run).delete([f"train-0-{row}" for row in range(PART_ROWS)])
    left = (PARTS - 2) * PART_ROWS
    for index in (Index.open(run), compact_index(run, LOCAL) and Index.open(run)):
        assert index.num_vectors == left
        assert not any(key.startswith("train-0-") for key in found(index))
        assert (index.search(queries(), 5, where="label < 50")[1] >= 0).all()
        with pytest.raises(UserError, match="filter keeps"):
            index.search(queries(), 1, where="label > 100")


def test_deletions_of_samples_that_were_embedded_again_are_said_to_be_gone(run, capsys):
    build(run)
    Index.open(run).delete(["train-0-0", "train-1-0"])
    write_store(run.path, "train", 2, generation=1)
    assert build(run, overwrite=True)["num_deleted"] == 0
    assert "2 deleted samples were embedded again" in capsys.readouterr().err
