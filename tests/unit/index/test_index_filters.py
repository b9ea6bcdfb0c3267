import numpy as np
import pyarrow as pa
import pytest

from sslscale.errors import UserError
from sslscale.features import FeatureSet, FeatureStore
from sslscale.index.filters import Condition, Filter

TABLE = pa.table(
    {
        "key": ["a", "b", "c'c", "d"],
        "label": pa.array([1, 3, None, 5], pa.int64()),
        "score": [0.5, -1.0, 2.0, 1e3],
        "good": [True, False, True, None],
    }
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("label >= 3", "bd"),
        ("label = 1 or label == 5", "ad"),
        ("label != 1", "bd"),  # as in SQL, what is missing is neither equal nor different
        ("label <> 1 and score < 0", "b"),
        ("not label = 1", "bd"),
        ("label is null", "c"),
        ("label IS NOT NULL", "abd"),
        ("label in (1, 3)", "ab"),
        ("label not in (1, 3)", "d"),
        ("label in (1.5, 3.0, 1e300, 99999999999999999999)", "b"),
        ("label < 99999999999999999999", "abd"),
        ("key = 'c''c'", "c"),
        ('key in ("a", "d")', "ad"),
        ("good = true", "ac"),
        ("score > -1.5 and score <= .5", "ab"),
        ("score >= 1e3", "d"),
        ("label = 1 or label = 3 and score > 0", "a"),  # and binds closer
        ("(label = 1 or label = 3) and score > 0", "a"),
        ("(label = 1 or label = 3) and not (score > 0)", "b"),
    ],
)
def test_conditions(text, rows):
    mask = Condition(text).mask(TABLE)
    assert mask.dtype == bool
    assert "".join(np.array(list("abcd"))[mask]) == rows


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", ">>>"),
        ("label >=", "label >=>>>"),
        ("label 3", "label >>>3"),
        ("label = 3 and", "and>>>"),
        ("label = x", "= >>>x"),
        ("(label = 3", "3>>>"),
        ("label = 3) ", "3>>>)"),
        ("label in 3", "in >>>3"),
        ("label = 'open", "= >>>'open"),
        ("label; drop", "label>>>;"),
        ("not", "not>>>"),
        ("label is 3", "is >>>3"),
        ("label not = 3", "not >>>="),
    ],
)
def test_what_is_malformed_is_shown_with_its_place(text, place):
    with pytest.raises(UserError, match="malformed") as error:
        Condition(text)
    assert place in str(error.value)


@pytest.fixture
def features(tmp_path):
    stores = {}
    for name, labels in (("test", None), ("train", [0, None, 2])):
        store = FeatureStore.create(tmp_path / name, dim=2, dtype="fp32", normalized=False, backbone="b")
        keys = [f"{name}-{row}" for row in range(3)]
        extra = {"quality": np.array([0.1, 0.5, 0.9]), "probs": np.zeros((3, 4))} if name == "train" else {}
        store.commit([store.write_part(0, np.ones((3, 2)), keys, ["s"] * 3, range(3), labels, extra)])
        stores[name] = store
    return FeatureSet(stores)


@pytest.mark.parametrize(
    ("text", "test", "train"),
    [
        ("dataset = 'train'", [0, 0, 0], [1, 1, 1]),
        ("split in ('test', 'val')", [1, 1, 1], [0, 0, 0]),
        ("label >= 0", [0, 0, 0], [1, 0, 1]),  # a column that only some parts have
        ("quality > 0.3 and offset < 2", [0, 0, 0], [0, 1, 0]),
        ("quality is null", [1, 1, 1], [0, 0, 0]),
        ("key != 'test-1' and shard = 's'", [1, 0, 1], [1, 1, 1]),
    ],
)
def test_columns_of_the_parts(features, text, test, train):
    condition = Filter(text, features)
    assert [condition.mask(part).tolist() for part in features.parts] == [test, train]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labl = 3", "did you mean 'label'"),
        ("labl = 3", "allowed: dataset, split, key, shard, offset, label, quality, probs"),
        ("label = 'three'", "label is int64, the value is 'three'"),
        ("key = 3", "key is string"),
        ("key in ('a', 3)", "key is string"),
        ("probs = 3", "column of vectors"),
    ],
)
def test_wrong_columns_and_types(features, text, message):
    with pytest.raises(UserError) as error:
        Filter(text, features)
    assert message in str(error.value)
