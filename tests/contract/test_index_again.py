"""An index that is built elsewhere, or again: by another machine, over more datasets, over other features."""

from __future__ import annotations

import contextlib
import shutil

import numpy as np
import pytest
from index_cases import LOCAL, PART_ROWS, PARTS, build, queries, settings, write_store

from sslscale import storage
from sslscale.errors import UserError
from sslscale.index import Index
from sslscale.index.build import run_index
from sslscale.rundir import RunDir


class OtherMachine:
    """A runtime whose only worker is on another machine: a store is all that it shares with the driver."""

    name = "local"
    device = staticmethod(lambda name: "cpu")

    def __init__(self, home):
        self.home, self.known = home, {}

    @contextlib.contextmanager
    def pool(self, worker, setup, workers, resources=None):
        with self.there():
            self.worker = worker(**setup)
        yield self

    def map(self, method, items, broadcast=None):
        for number, item in enumerate(items):
            with self.there():
                found = getattr(self.worker, method)(item, broadcast)
            yield number, found

    @contextlib.contextmanager
    def there(self):
        """Its disk in place of the driver's, and what its process knows in place of what this one does."""
        ours, theirs, known = self.home.with_name("ours"), self.home.with_name("theirs"), dict(storage._known)
        theirs.mkdir(exist_ok=True)
        self.home.rename(ours)
        theirs.rename(self.home)
        storage._known.clear()
        storage._known.update(self.known)
        try:
            yield
        finally:
            self.known = dict(storage._known)
            storage._known.clear()
            storage._known.update(known)
            self.home.rename(theirs)
            ours.rename(self.home)


@pytest.mark.parametrize("factory", ["Flat", "IVF16,SQfp16"])
def test_shards_that_another_machine_has_built_are_all_in_the_index(s3, tmp_path, factory):
    run, here = RunDir(s3), RunDir(tmp_path / "here")
    write_store(here.path, "train")
    shutil.copytree(here.path / "embed", run.path / "embed")
    storage.publish_tree(run.path)
    result = build(run, runtime=OtherMachine(storage.local_path("s3://bucket")), factory=factory)
    assert result["num_vectors"] == PARTS * PART_ROWS and result["num_deleted"] == 0
    assert storage.names(run.path / "index/main/shards") == [], "what is merged leaves the store"
    ours, _ = Index.open(run).search(queries(), 5)
    build(here, factory=factory)
    np.testing.assert_array_equal(ours, Index.open(here).search(queries(), 5)[0])


def test_a_dataset_that_was_embedded_later_is_searched_too(tmp_path):
    run = RunDir(tmp_path)
    write_store(tmp_path, "train", 2)
    build(run)
    write_store(tmp_path, "val", 1)
    assert build(run)["datasets"] == ["train", "val"]
    index = Index.open(run)
    _, ids = index.search(queries(), 5)
    assert any(key.startswith("val") for key in index.keys(ids.ravel()))


def test_features_that_were_embedded_again_are_indexed_anew_where_it_is_asked_for(tmp_path):
    run = RunDir(tmp_path)
    write_store(tmp_path, "train", 2)
    build(run)
    shutil.rmtree(tmp_path / "embed")
    write_store(tmp_path, "train", 3)
    (tmp_path / "embed/train/features.json").write_text(
        (tmp_path / "embed/train/features.json").read_text().replace('"sha256": "', '"sha256": "0')
    )
    with pytest.raises(UserError, match="from other features") as error:
        build(run)
    assert "--overwrite" in str(error.value)
    result = run_index(run, settings(), LOCAL, overwrite=True)
    assert result["num_vectors"] == 3 * PART_ROWS and result["num_deleted"] == 0
