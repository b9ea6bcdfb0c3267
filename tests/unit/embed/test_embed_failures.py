"""A sample that cannot be used costs its own row, with a reason, and never the job."""

import io
import json

import numpy as np
import pytest
from embed_cases import embed
from PIL import Image
from tars import encode_png, write_tar

from sslscale.errors import UserError
from sslscale.features import FeatureStore

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)


def bomb():
    """A BMP whose header claims 100,000 x 100,000 pixels."""
    data = io.BytesIO()
    Image.fromarray(GREY).save(data, "BMP")
    claimed = (100_000).to_bytes(4, "little")
    return data.getvalue()[:18] + claimed + claimed + data.getvalue()[26:]


SAMPLES = [
    ("good.png", encode_png(GREY)),
    ("bomb.bmp", bomb()),
    ("label.cls", b"9223372036854775808"),
    ("label.png", encode_png(GREY)),
    ("frame.0.png", encode_png(GREY)),
    ("frame.1.png", encode_png(GREY)),
    ("caf\udce9.png", encode_png(GREY)),
    ("long.png", encode_png(np.zeros((1, 30_000), np.uint8))),
    ("last.png", encode_png(GREY)),
]


def test_every_sample_is_a_row_or_a_line_with_the_reason(tmp_path):
    write_tar(tmp_path / "shards/a.tar", SAMPLES)
    result = embed(tmp_path, size=100, max_failed_share=1.0)
    assert (result["samples_in"], result["features_out"], result["failed"]) == (7, 3, 4)
    table = FeatureStore.open(tmp_path / "run/embed/train").table(0, ["key"])
    assert table.to_pydict() == {"key": ["good", "label", "last"]}
    [file] = (tmp_path / "run/embed/train/failed").iterdir()
    reasons = {line["key"]: line["reason"] for line in map(json.loads, file.open())}
    assert reasons.keys() == {"bomb", "frame", "caf\\xe9", "long"}
    expected = {"bomb": "cannot be decoded", "frame": "which image", "caf\\xe9": "not UTF-8", "long": "1x30000"}
    assert all(part in reasons[key] for key, part in expected.items())


def test_labels_that_are_no_integers_are_missing_and_counted(tmp_path):
    labels = {"a": b"3", "b": b"cat", "c": b"9223372036854775808", "d": None}
    for key, label in labels.items():
        members = [] if label is None else [(f"{key}.cls", label)]
        write_tar(tmp_path / f"shards/{key}.tar", [*members, (f"{key}.png", encode_png(GREY))])
    result = embed(tmp_path)
    assert (result["features_out"], result["failed"], result["bad_labels"]) == (4, 0, 2)
    store = FeatureStore.open(tmp_path / "run/embed/train")
    assert store.table(0, ["key", "label"]).to_pydict() == {"key": list("abcd"), "label": [3, None, None, None]}
    marker = json.loads((tmp_path / "run/embed/train/done/part-00000").read_text())
    assert marker["bad_labels"] == 2


def test_what_the_user_can_mend_still_ends_the_job(tmp_path, monkeypatch):
    def missing(reader, sample):
        raise UserError("a package is missing")

    monkeypatch.setattr("sslscale.shards.readers.ImageReader.read", missing)
    write_tar(tmp_path / "shards/a.tar", SAMPLES)
    with pytest.raises(UserError, match="a package is missing"):
        embed(tmp_path, max_failed_share=1.0)
