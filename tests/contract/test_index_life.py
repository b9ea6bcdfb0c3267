"""An index through its life: laid out three ways, filtered, added to, deleted from, compacted, damaged."""

import contextlib
import json
import shutil

import faiss
import numpy as np
import pytest
from index_cases import DIM, LOCAL, PART_ROWS, PARTS, build, queries, write_store

from sslscale.errors import StageError, UserError
from sslscale.features import FeatureStore, open_features
from sslscale.index import Index
from sslscale.index.build import compact_index
from sslscale.index.exact import RowReference, exact_knn
from sslscale.rundir import RunDir

LAYOUTS = ("merged", "on_disk", "sharded")
WITHOUT_GPU = pytest.mark.skipif(faiss.get_num_gpus() > 0, reason="faiss sees a GPU here")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    write_store(path, "train", PARTS - 1)
    write_store(path, "val", 1)
    return path


@pytest.fixture
def run(store, tmp_path):
    shutil.copytree(store, tmp_path / "run")
    return RunDir(tmp_path / "run")


def exact(features, x, k, keep):
    """Row ids of an exact search among the rows that `keep(dataset, part, row)` keeps."""
    ids = [
        (part.number << 32) + np.array([row for row in range(part.rows) if keep(part.dataset, part.part, row)], int)
        for part in features.parts
    ]
    return exact_knn(x, np.full(len(x), -1), RowReference(features, lambda: iter(ids)), k, "l2")[1]


def contents(path):
    """The index's own files, as bytes."""
    found = {file.name: file.read_bytes() for file in path.rglob("*") if file.suffix in (".faiss", ".npy")}
    return found | {"parts.json": (path / "parts.json").read_bytes()}


def test_all_layouts_give_the_same_answers(run):
    answers = {}
    for layout in LAYOUTS:
        shutil.rmtree(run.path / "index", ignore_errors=True)
        result = build(run, layout=layout)
        assert result["num_vectors"] == 4000 and result["recall_at_10"] >= 0.95
        assert len(result["shards"]) == (4 if layout == "sharded" else 1)
        assert (run.path / "index/main/index.faiss").exists() == (layout != "sharded")
        index = Index.open(run)
        distances, ids = index.search(queries(), 10)
        answers[layout] = np.sort(distances, axis=1), np.sort(ids, axis=1), result["nprobe"]
        true = np.linalg.norm(index.features.take(ids.ravel()) - np.repeat(queries(), 10, axis=0), axis=1)
        np.testing.assert_allclose(distances.ravel(), true, rtol=5e-3)
    for layout in LAYOUTS[1:]:
        for found, expected in zip(answers[layout], answers["merged"], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_the_file_opens_with_faiss(run):
    build(run, layout="on_disk")
    index, rows = faiss.read_index(str(run.path / "index/main/index.faiss")), np.load(run.path / "index/main/rows.npy")
    parts = json.loads((run.path / "index/main/parts.json").read_text())
    assert index.ntotal == len(rows) == 4000
    row = open_features(run).take(np.array([2 << 32 | 17])).astype(np.float32)
    found = int(rows[index.search(row, 1)[1][0, 0]])
    assert found == 2 << 32 | 17 and parts[found >> 32]["dataset"] == "train"


@pytest.mark.parametrize("factory", ["PQ8", "OPQ8,PQ8", "PQ4,RFlat", "IVF16,PQ4+4", "IVF16,RaBitQ", "PQ8x4fs", "SQ8"])
def test_strings_of_every_kind_are_built_in_shards_and_searched(run, factory):
    assert build(run, factory=factory)["num_vectors"] == 4000
    index = Index.open(run)
    assert index.delete(["train-0-0"]) == 1
    ids = index.search(queries(), 10)[1]
    assert (ids >= 0).all()
    expected = exact(index.features, queries(), 10, lambda dataset, part, row: row % 100 == 7)
    np.testing.assert_array_equal(index.search(queries(), 10, where="label = 7")[1], expected)


@pytest.mark.parametrize("layout", ["on_disk", "sharded"])
def test_workers_do_not_change_a_byte(run, layout):
    built = {}
    for workers in (1, 2):
        shutil.rmtree(run.path / "index", ignore_errors=True)
        build(run, workers, layout=layout)
        built[workers] = contents(run.path / "index/main")
    assert built[1] == built[2]


class Killed(BaseException):
    pass


class DyingRuntime:
    """Builds in this process, and dies once it has built so many shards."""

    name = "local"
    device = staticmethod(lambda name: "cpu")

    def __init__(self, shards):
        self.shards = shards

    @contextlib.contextmanager
    def pool(self, worker, setup, workers, resources=None):
        self.worker = worker(**setup)
        yield self

    def map(self, method, items, broadcast=None):
        for number, item in enumerate(items):
            if number == self.shards:
                raise Killed
            yield number, getattr(self.worker, method)(item, broadcast)


def test_killed_between_shards_the_same_command_goes_on(run):
    with pytest.raises(Killed):
        build(run, runtime=DyingRuntime(2))
    with pytest.raises(UserError, match="no such index"):
        Index.open(run)
    remaining = DyingRuntime(99)
    built = []
    remaining.map = lambda method, items, broadcast=None: (
        built.append(item.name) or (number, remaining.worker.build(item)) for number, item in enumerate(items)
    )
    build(run, runtime=remaining)
    assert len(built) == 2
    resumed = contents(run.path / "index/main")
    shutil.rmtree(run.path / "index")
    build(run)
    assert contents(run.path / "index/main") == resumed


# ------------------------------------------------------------------ filters


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_filter_that_keeps_one_in_a_hundred_finds_what_an_exact_search_finds(run, layout):
    build(run, layout=layout, nprobe=1)
    index = Index.open(run)
    distances, ids = index.search(queries(), 10, where="label = 7 and split = 'train'")
    expected = exact(index.features, queries(), 10, lambda dataset, part, row: row % 100 == 7 and dataset == "train")
    np.testing.assert_array_equal(ids, expected)
    assert (np.diff(distances, axis=1) >= 0).all()


@pytest.mark.parametrize("layout", ["merged", "sharded"])
def test_a_filter_that_leaves_shards_without_a_row(run, layout):
    build(run, layout=layout, nprobe=16)  # all lists
    index = Index.open(run)
    ids = index.search(queries(), 10, where="dataset = 'val' and label < 50")[1]
    expected = exact(index.features, queries(), 10, lambda dataset, part, row: dataset == "val" and row % 100 < 50)
    np.testing.assert_array_equal(ids, expected)
    with pytest.raises(UserError, match="filter keeps"):
        index.search(queries(), 1, where="label > 100")


def test_workers_search_shards_with_a_filter(run):
    build(run, layout="sharded")
    with Index.open(run, runtime=LOCAL, workers=4) as index:
        found = index.search(queries(), 10, where="label = 7")
        expected = exact(index.features, queries(), 10, lambda dataset, part, row: row % 100 == 7)
        np.testing.assert_array_equal(found[1], expected)
        for theirs, ours in zip(Index.open(run).search(queries(), 10), index.search(queries(), 10), strict=True):
            np.testing.assert_array_equal(theirs, ours)
        with pytest.raises(UserError, match="cannot be changed"):
            index.delete(["train-0-0"])


@pytest.mark.parametrize("factory", ["IVF16,SQfp16", "IVF16,PQ8x4fs,Refine(SQfp16)", "HNSW16", "Flat", "LSH"])
def test_a_filter_that_keeps_much(run, factory):
    build(run, factory=factory)
    index = Index.open(run)
    ids = index.search(queries(), 10, where="label < 60")[1]
    expected = exact(index.features, queries(), 10, lambda dataset, part, row: row % 100 < 60)
    assert ((ids & 0xFFFFFFFF) % 100 < 60).all()
    recall = np.mean([len(np.intersect1d(a, b)) for a, b in zip(ids, expected, strict=True)]) / 10
    assert recall >= 0.9


def store_of_classes(path, dim=DIM):
    """Ten clusters that hardly touch; a row's label is its cluster."""
    generator = np.random.default_rng(3)
    centres = 2 * generator.normal(size=(10, dim))
    labels = generator.integers(0, 10, 6000)
    rows = centres[labels] + generator.normal(size=(6000, dim))
    store = FeatureStore.create(path / "embed/train", dim=dim, dtype="fp16", normalized=False, backbone="b0")
    keys = [str(row) for row in range(6000)]
    store.commit([store.write_part(0, rows, keys, ["s"] * 6000, range(6000), labels.tolist())])
    return rows, labels


@pytest.mark.parametrize("factory", ["IVF256,SQfp16", "RR16,IVF256_HNSW16,PQ8x4fs,RFlat", "HNSW16"])
@pytest.mark.parametrize("where", ["label in (3, 4, 5)", "label < 4 and label != 0", "label != 0"])
def test_a_filter_that_goes_with_the_content_finds_as_much_as_one_that_does_not(tmp_path, factory, where):
    rows, labels = store_of_classes(tmp_path)
    run = RunDir(tmp_path)
    build(run, factory=factory)
    index = Index.open(run)
    x = rows[labels == 0][:60]  # all far from what is kept
    kept = {"label in (3, 4, 5)": (3, 4, 5), "label < 4 and label != 0": (1, 2, 3), "label != 0": range(1, 10)}[where]
    ids = index.search(x, 10, where=where)[1]
    expected = exact(index.features, x, 10, lambda dataset, part, row: labels[row] in kept)
    assert np.isin(labels[ids & 0xFFFFFFFF], kept).all(), "as many as were asked for, all of them kept"
    recall = np.mean([len(np.intersect1d(a, b)) for a, b in zip(ids, expected, strict=True)]) / 10
    assert recall >= 0.9


# ------------------------------------------------------------------ growing and shrinking


def recall_at_10(index, x, keep):
    ids = index.search(x, 10)[1]
    expected = exact(index.features, x, 10, keep)
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(ids, expected, strict=True)]) / 10


@pytest.mark.parametrize(
    ("layout", "factory"),
    [*((layout, "IVF16,SQfp16") for layout in LAYOUTS), ("merged", "HNSW16"), ("merged", "IVF16,PQ8x4fs,RFlat")],
)
def test_add_delete_search_compact(store, tmp_path, layout, factory):
    run = RunDir(tmp_path / "run")
    write_store(run.path, "train", PARTS - 2)
    shutil.copytree(store / "embed" / "val", run.path / "embed" / "val")
    # the effort is fixed where it can be: two tuned indexes may both be good enough and yet differ
    options = {"layout": layout, "factory": factory, "wanted_recall": 0.99, "nprobe": 8}
    before = build(run, **options)
    write_store(run.path, "train", PARTS - 1)  # `val` comes behind it: its part has another number now
    after = build(run, **options)
    assert (before["num_vectors"], after["num_vectors"]) == (3500, 4000)
    assert build(run, **options) == after

    doomed = {f"train-{part}-{row}" for part in range(PARTS - 1) for row in range(3, PART_ROWS, 9)}
    kept = lambda dataset, part, row: dataset == "val" or row % 9 != 3  # noqa: E731
    index = Index.open(run)
    assert index.delete(sorted(doomed)) == len(doomed)
    assert index.delete(["train-0-3"]) == 0  # it is gone already
    assert index.num_vectors == 4000 - len(doomed)

    def check(index):
        assert not doomed & set(index.keys(index.search(queries(), 10)[1].ravel()))
        assert not doomed & set(index.keys(index.search(queries(), 10, where="label != 4")[1].ravel()))
        return recall_at_10(index, queries(), kept)

    deleted = check(index), check(Index.open(run))
    compacted = compact_index(run, LOCAL)
    assert compacted["num_vectors"] == sum(shard["vectors"] for shard in compacted["shards"]) == 4000 - len(doomed)
    assert compacted["num_deleted"] == len(doomed) and compacted["bytes"] < after["bytes"]
    assert compact_index(run, LOCAL) == compacted  # nothing to free
    shrunk = check(Index.open(run))
    Index.open(run).delete(["val-0-0"])
    compact_index(run, LOCAL)
    assert Index.open(run).num_vectors == 3999 - len(doomed)
    assert check(Index.open(run)) > 0.9  # what was deleted first has not come back

    fresh = tmp_path / "fresh"
    shutil.copytree(run.path / "embed", fresh / "embed")
    build(RunDir(fresh), **options)
    Index.open(fresh).delete(sorted(doomed))
    reference = recall_at_10(Index.open(fresh), queries(), kept)
    for recall in (*deleted, shrunk):
        assert recall >= reference - 0.01
    named = {file for shard in compacted["shards"] for file in shard["sizes"]}
    assert len(named) == 2 * len(compacted["shards"])


def test_an_unknown_key_deletes_nothing(run):
    build(run)
    before = (run.path / "index/main/result.json").read_bytes()
    with pytest.raises(UserError, match="no sample with this key"):
        Index.open(run).delete(["train-0-0", "nobody"])
    assert (run.path / "index/main/result.json").read_bytes() == before


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.ones((1, DIM + 1)), {}, "another dimension"),
        (np.ones((1, 1, DIM)), {}, "another dimension"),
        (np.zeros((1, DIM)), {}, "no direction"),
        (np.full((1, DIM), np.inf), {}, "not finite"),
        (np.ones((1, DIM)), {"k": 4001}, "1 to 4000"),
        (np.ones((1, DIM)), {"k": 41, "where": "label = 7"}, "that the filter keeps"),
        (np.ones((1, DIM)), {"where": "label = "}, "malformed"),
        (np.ones((1, DIM)), {"where": "colour = 3"}, "allowed: dataset, split, key"),
    ],
)
def test_wrong_searches(cosine, x, options, message):
    with pytest.raises(UserError, match=message):
        cosine.search(x, **{"k": 10, **options})


@pytest.fixture(scope="module")
def cosine(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("cosine")
    shutil.copytree(store / "embed", path / "embed")
    build(RunDir(path), metric="cosine")
    return Index.open(path)


def test_under_cosine_the_length_of_a_query_does_not_matter(cosine):
    for one, other in zip(cosine.search(queries(), 10), cosine.search(300 * queries(), 10), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("file", ["index.faiss", "rows.npy"])
def test_a_file_that_is_cut_off_is_named(run, file):
    build(run)
    path = run.path / "index/main" / file
    with path.open("r+b") as half:
        half.truncate(path.stat().st_size // 2)
    with pytest.raises(StageError, match=f"{file}: .*bytes"):
        Index.open(run)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"layout": "on_disk", "factory": "HNSW16"}, "cannot lie on disk"),
        ({"layout": "on_disk", "factory": "IVF16,PQ8x4fs"}, "cannot lie on disk"),
        ({"factory": "Flat", "memory_gb": 1e-5}, "does not fit into memory"),
        ({"factory": "IDMap,Flat"}, "row ids are kept beside"),
        ({"factory": "IVF16,FlatDedup"}, "sslscale dedup finds them"),
        ({"factory": "NSG16"}, "use HNSW"),
        ({"layout": "on_disk", "factory": "IVF16,PQ4+4"}, "cannot lie on disk"),
        pytest.param({"device": "cuda"}, "faiss sees no GPU", marks=WITHOUT_GPU),
        ({"factory": "IVF16,PQ7"}, "IVF16,PQ7"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(run, index, message):
    with pytest.raises(UserError, match=message):
        build(run, **index)
    assert not (run.path / "index").exists()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
def test_recall_counts_what_is_as_near(tmp_path, share):
    """Rows that are repeated many times have no ten nearest; an index that finds any of them misses nothing."""
    generator = np.random.default_rng(0)
    kind = {"dim": DIM, "dtype": "fp32", "normalized": False, "backbone": "b0"}
    store = FeatureStore.create(tmp_path / "embed/train", **kind)
    x = generator.normal(size=(3000, DIM)).astype(np.float32)
    x[: round(share * 3000)] = x[-1]
    store.commit([store.write_part(0, x, [str(row) for row in range(3000)], ["s"] * 3000, range(3000))])
    found = build(RunDir(tmp_path), factory="IVF16,PQ16x4fs,Refine(SQfp16)", wanted_recall=0.95)
    assert found["recall_at_10"] >= 0.95 and found["k_factor"] > 1


@pytest.mark.parametrize("factory", ["PQ4,Refine(Flat)", "OPQ4,PQ4,Refine(SQfp16)", "PQ8x4fs,Refine(Flat)"])
def test_codes_without_lists_are_ranked_again_as_far_as_it_takes(run, factory):
    found = build(run, factory=factory, wanted_recall=0.95)
    assert found["recall_at_10"] >= 0.95 and found["k_factor"] > 1
    assert Index.open(run).search(queries(), 10, where="label = 7")[1].shape == (50, 10)


@pytest.mark.parametrize("factory", ["IVF16,RQ2x4", "IVF4,ITQ8,SH", "IVF16,PQ4+4", "PQ4,Refine(Flat)"])
def test_any_index_can_be_deleted_from(run, factory):
    build(run, factory=factory)
    index = Index.open(run)
    index.delete(["train-0-5"])
    assert "train-0-5" not in index.keys(index.search(queries(), 10)[1].ravel())


def test_a_part_that_is_deleted_whole_is_no_empty_block(run):
    build(run, factory="IVF16,RaBitQfs")
    Index.open(run).delete([f"train-0-{row}" for row in range(PART_ROWS)])
    assert compact_index(run, LOCAL)["num_vectors"] == (PARTS - 1) * PART_ROWS


@pytest.mark.parametrize("cut", [True, False])
def test_the_trained_index_is_made_again(run, cut):
    before = build(run)
    (trained,) = (run.path / "index/main").glob("trained-*.faiss")
    if cut:
        with trained.open("r+b") as file:
            file.truncate(100)
    else:
        trained.unlink()
    assert Index.open(run).num_vectors == before["num_vectors"]  # a search does without
    Index.open(run).delete(["train-0-5"])
    with pytest.raises(StageError, match=trained.name):
        compact_index(run, LOCAL)
    assert build(run)["num_vectors"] == before["num_vectors"] - 1
    assert compact_index(run, LOCAL)["num_vectors"] == before["num_vectors"] - 1
