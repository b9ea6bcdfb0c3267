import hashlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from sslscale.errors import UserError
from sslscale.features import FeatureSet, FeatureStore, open_features, sample_positions
from sslscale.features.store import ROW_GROUP, hash_keys
from sslscale.rundir import RunDir, write_json


def write_store(path, sizes=(5, 3), dim=4, dtype="fp16", backbone="b0", normalized=False, prefix="k", labels=True):
    store = FeatureStore.create(path, dim=dim, dtype=dtype, normalized=normalized, backbone=backbone)
    generator = np.random.default_rng(0)
    records = []
    for part, size in enumerate(sizes):
        keys = [f"{prefix}{part}-{row}" for row in range(size)]
        features = generator.normal(size=(size, dim))
        own = list(range(size)) if labels else None
        records.append(store.write_part(part, features, keys, ["s.tar"] * size, range(size), own))
    store.commit(reversed(records))
    return FeatureStore.open(path)


def test_opens_with_plain_numpy_and_pyarrow(tmp_path):
    store = FeatureStore.create(tmp_path, dim=3, dtype="fp16", normalized=True, backbone="b0")
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    outputs = {"score": np.array([0.5, 1.5], np.float32), "cluster_probs": np.eye(2, dtype=np.float32)}
    store.commit([store.write_part(0, rows, ["a", "b"], ["x.tar"] * 2, [0, 512], [7, None], outputs)])

    array = np.load(tmp_path / "part-00000.npy", mmap_mode="r")
    assert array.dtype == np.float16 and array.flags.c_contiguous
    np.testing.assert_array_equal(array, rows)
    table = pq.read_table(tmp_path / "part-00000.parquet").to_pydict()
    assert table["key"] == ["a", "b"] and table["offset"] == [0, 512] and table["label"] == [7, None]
    assert table["score"] == [0.5, 1.5] and table["cluster_probs"] == [[1.0, 0.0], [0.0, 1.0]]
    record = json.loads((tmp_path / "features.json").read_text())
    assert record["num_rows"] == 2 and record["normalized"] is True and record["backbone"] == "b0"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "features.json", "ids.npy", "part-00000.npy", "part-00000.parquet",
    ]  # fmt: skip


def test_the_same_content_has_the_same_identity_and_other_content_another(tmp_path):
    one = write_store(tmp_path / "one")
    assert write_store(tmp_path / "two").identity == one.identity
    assert write_store(tmp_path / "keys", prefix="q").identity != one.identity
    assert write_store(tmp_path / "backbone", backbone="b1").identity != one.identity
    assert write_store(tmp_path / "rows", sizes=(5, 2)).identity != one.identity


def test_non_finite_rows_never_enter(tmp_path):
    store = FeatureStore.create(tmp_path, dim=1, dtype="fp16", normalized=False, backbone="b0")
    for value in (np.nan, np.inf, 1e6):  # 1e6 overflows fp16
        with pytest.raises(AssertionError), np.errstate(over="ignore"):
            store.write_part(0, np.array([[value]]), ["a"], ["s"], [0])
    assert list(tmp_path.iterdir()) == []


def test_an_uncommitted_store_does_not_exist(tmp_path):
    store = FeatureStore.create(tmp_path, dim=1, dtype="fp32", normalized=False, backbone="b0")
    store.write_part(0, np.ones((1, 1)), ["a"], ["s"], [0])
    with pytest.raises(UserError, match="missing"):
        FeatureStore.open(tmp_path)


def test_look_up_by_key(tmp_path):
    store = write_store(tmp_path, sizes=(ROW_GROUP + 2, 0, 3))
    last = f"k0-{ROW_GROUP + 1}"
    assert store.lookup(["k2-1", last]).tolist() == [2 << 32 | 1, ROW_GROUP + 1]
    assert store.key_of(ROW_GROUP + 1) == last
    with pytest.raises(UserError, match=r"no sample with this key[\s\S]*'nobody'[\s\S]*k0-0"):
        store.lookup(["nobody"])


def test_keys_whose_hashes_begin_alike_are_told_apart(tmp_path, monkeypatch):
    whole = hash_keys
    monkeypatch.setattr("sslscale.features.store.hash_keys", lambda keys: whole(keys) * np.array([[0], [1]], np.uint64))
    store = write_store(tmp_path)
    assert [store.lookup([f"k0-{row}"])[0] for row in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="no sample"):
        store.lookup(["k9-9"])


@pytest.mark.parametrize("sizes", [(700, 0, 90), (0,)])
def test_the_id_table_is_the_same_however_much_of_it_is_sorted_at_a_time(tmp_path, sizes, monkeypatch):
    whole = write_store(tmp_path / "whole", sizes)
    monkeypatch.setattr("sslscale.features.store.SORTED_ROWS", 9)
    pieces = write_store(tmp_path / "pieces", sizes)
    ids = np.load(tmp_path / "whole" / "ids.npy")
    assert ids.dtype == np.uint64 and ids.shape == (3, sum(sizes)) and (np.diff(ids[0].astype(float)) >= 0).all()
    assert (tmp_path / "pieces" / "ids.npy").read_bytes() == (tmp_path / "whole" / "ids.npy").read_bytes()
    assert pieces.identity == whole.identity


def test_an_id_table_that_another_process_has_grown_names_no_part_that_is_not_open(tmp_path):
    opened = write_store(tmp_path, sizes=(5,))
    grown = write_store(tmp_path, sizes=(5, 3))
    assert grown.find("k1-2") == [1 << 32 | 2]
    assert opened.find("k1-2") == [] and opened.find("k0-2") == [2]
    with pytest.raises(UserError, match="no sample with this key"):
        FeatureSet({"train": opened}).lookup("k1-2")


def test_look_up_opens_no_table(tmp_path, monkeypatch):
    store = write_store(tmp_path)
    for part in store.parts:
        (tmp_path / f"part-{part.part:05d}.parquet").unlink()
    assert store.lookup(["k1-2", "k0-4"]).tolist() == [1 << 32 | 2, 4]


def test_a_key_that_shards_repeat_is_refused_by_look_up(tmp_path):
    store = FeatureStore.create(tmp_path, dim=1, dtype="fp32", normalized=False, backbone="b0")
    store.commit([store.write_part(0, np.ones((2, 1)), ["a", "a"], ["s", "t"], [0, 0])])
    assert store.find("a") == [0, 1]
    with pytest.raises(UserError, match="several samples"):
        store.lookup(["a"])


def test_hash_is_blake2b_128():
    digest = bytes.fromhex(hashlib.blake2b(b"a", digest_size=16).hexdigest())
    assert [int(half[0]) for half in hash_keys(["a"])] == [
        int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"),
    ]  # fmt: skip


def test_a_store_of_another_format_is_refused(tmp_path):
    write_store(tmp_path)
    record = json.loads((tmp_path / "features.json").read_text())
    write_json(tmp_path / "features.json", {**record, "format_version": 1})
    with pytest.raises(UserError, match=r"another format[\s\S]*embed again"):
        FeatureStore.open(tmp_path)


def test_labels_are_all_or_nothing(tmp_path):
    assert write_store(tmp_path / "all").labels().tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert write_store(tmp_path / "none", labels=False).labels() is None
    store = FeatureStore.create(tmp_path / "some", dim=1, dtype="fp32", normalized=False, backbone="b0")
    store.commit([store.write_part(0, np.ones((2, 1)), ["a", "b"], ["s"] * 2, [0, 1], [1, None])])
    assert store.labels() is None


def test_a_part_without_rows_lacks_no_label(tmp_path):
    store = FeatureStore.create(tmp_path / "some", dim=1, dtype="fp32", normalized=False, backbone="b0")
    failed = store.write_part(1, np.ones((0, 1)), [], [], [])  # all its samples, and so no column of labels
    store.commit([store.write_part(0, np.ones((2, 1)), ["a", "b"], ["s"] * 2, [0, 1], [1, 3]), failed])
    assert store.labels().tolist() == [1, 3] and store.labels().dtype == np.int64
    assert store.part_labels(1).tolist() == [] and store.part_labels(1).dtype == np.int64


def test_a_set_numbers_parts_consecutively(tmp_path):
    train = write_store(tmp_path / "train", sizes=(5, 3))
    test = write_store(tmp_path / "test", sizes=(2,), prefix="t")
    features = FeatureSet({"train": train, "test": test})
    assert [(part.number, part.dataset, part.part, part.rows) for part in features.parts] == [
        (0, "train", 0, 5), (1, "train", 1, 3), (2, "test", 0, 2),
    ]  # fmt: skip
    ids = features.row_ids(np.array([9, 0, 5]))
    assert ids.tolist() == [2 << 32 | 1, 0, 1 << 32]
    assert features.keys_of(ids) == ["t0-1", "k0-0", "k1-0"]
    assert features.records(ids[:1], ["offset"]) == [{"dataset": "test", "offset": 1}]
    everything = np.concatenate([features.block(part.number) for part in features.parts])
    np.testing.assert_array_equal(features.take(ids), everything[[9, 0, 5]])
    assert features.slices == {"train": slice(0, 8), "test": slice(8, 10)}
    assert features.lookup("t0-1") == 2 << 32 | 1
    reopened = FeatureSet.open(features.paths)
    assert reopened.parts == features.parts and reopened.identity == features.identity


def test_a_key_in_two_datasets_needs_the_dataset(tmp_path):
    store = write_store(tmp_path, sizes=(2,))
    features = FeatureSet({"train": store, "test": store})
    with pytest.raises(UserError, match="several datasets"):
        features.lookup("k0-1")
    assert features.lookup("k0-1", "test") == 1 << 32 | 1
    with pytest.raises(UserError, match="no such dataset"):
        features.lookup("k0-1", "tset")


@pytest.mark.parametrize("change", [{"backbone": "b1"}, {"dim": 5}, {"normalized": True}])
def test_features_of_different_kinds_are_refused(tmp_path, change):
    stores = {"train": write_store(tmp_path / "train"), "test": write_store(tmp_path / "test", **change)}
    with pytest.raises(UserError, match=rf"{next(iter(change))}: train has"):
        FeatureSet(stores)


def test_open_features_names_what_is_embedded(tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(UserError, match="sslscale embed"):
        open_features(run)
    write_store(tmp_path / "embed" / "train", prefix="a")
    write_store(tmp_path / "embed" / "test", prefix="b")
    assert list(open_features(run).stores) == ["test", "train"]
    assert list(open_features(run, ["train"]).stores) == ["train"]
    with pytest.raises(UserError, match="did you mean 'train'"):
        open_features(run, ["trian"])


def test_features_of_an_earlier_backbone_of_the_run_are_refused(tmp_path):
    run, exported = RunDir(tmp_path), tmp_path / "pretrain" / "backbone"
    write_store(tmp_path / "embed" / "train", backbone="b0 and an output")
    result = tmp_path / "embed" / "train" / "result.json"
    made_by = {"name": "pretrain", "weights": "b0", "sha256": "b0 and an output"}
    write_json(result, {"backbone": made_by})
    write_json(exported / "backbone.json", {"sha256": "b0"})
    assert open_features(run).backbone == "b0 and an output"
    write_json(exported / "backbone.json", {"sha256": "b1"})
    with pytest.raises(UserError, match="another backbone"):
        open_features(run)
    write_json(exported / "backbone.json", {"sha256": "b0"})
    write_json(result, {"backbone": {**made_by, "sha256": "b0 and another output"}})
    with pytest.raises(UserError, match="another backbone"):
        open_features(run)
    write_json(result, {"backbone": {**made_by, "name": "pixels"}})
    assert open_features(run).num_rows == 8


def test_sample_positions():
    at = sample_positions(10**9, 1000, seed=0)
    assert len(np.unique(at)) == 1000 and (np.diff(at) > 0).all() and at[-1] < 10**9
    np.testing.assert_array_equal(at, sample_positions(10**9, 1000, seed=0))
    np.testing.assert_array_equal(sample_positions(5, 9, seed=0), np.arange(5))
