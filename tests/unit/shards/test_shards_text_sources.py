"""Where texts come from: lines, JSONL and WordNet's own format."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pytest

from sslscale.config import PackConfig
from sslscale.errors import UserError
from sslscale.shards.dataset import open_shards
from sslscale.shards.plan import Span
from sslscale.shards.sources import make_source
from sslscale.shards.stream import read_spans
from sslscale.shards.write import run_pack

RECORDS = [{"body": "a dog", "kind": "animal"}, {"body": "", "kind": "void"}, {"body": "an oak\ntree", "kind": "plant"}]
NOUNS = """  1 This software and database is being provided to you, the LICENSEE,
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived  
00015568 05 n 01 animal 0 001 @ 00004475 n 0000 | a living organism | with a bar  
"""  # noqa: W291


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_json_lines_plain_or_compressed(tmp_path, ending):
    file = tmp_path / f"texts.jsonl{ending}"
    file.write_bytes(COMPRESSIONS[ending]("".join(json.dumps(record) + "\n" for record in RECORDS).encode()))
    source = make_source("text", str(file), {"text": "body", "label": "kind"})
    assert source.splits == {"train": 3}
    for index in (2, 0, 1, 1):  # also backwards
        example = source.example("train", index)
        assert example.data == RECORDS[index]["body"].encode() and example.extension == "txt"
        assert example.metadata == {"class": RECORDS[index]["kind"]}
        assert example.label == ["animal", "plant", "void"].index(RECORDS[index]["kind"])


def test_lines_become_shards_as_they_are(tmp_path):
    (tmp_path / "in").mkdir()
    lines = [b"first", b"", b"caf\xe9", "drei ß".encode()]
    (tmp_path / "in" / "train.txt").write_bytes(b"\r\n".join(lines))
    (tmp_path / "in" / "test.txt").write_bytes(b"other\n")
    output = str(tmp_path / "out")
    packed = run_pack(
        PackConfig(source="text", path=str(tmp_path / "in"), output=output, samples_per_shard=2, workers=1)
    )
    assert {name: split["samples"] for name, split in packed["splits"].items()} == {"test": 1, "train": 4}
    samples = read_spans(open_shards(f"{output}/train"), [Span(0, 0, 2), Span(1, 0, 2)])
    assert [sample.data["txt"] for sample in samples] == lines


def test_wordnets_glosses_and_their_kinds(tmp_path):
    (tmp_path / "data.noun").write_text(NOUNS)
    source = make_source("wordnet", str(tmp_path / "data.noun"))
    first, second = (source.example("train", index) for index in range(2))
    assert (first.data, first.label, first.metadata) == (b"that which is perceived", 0, {"class": "noun.Tops"})
    assert make_source("wordnet", str(tmp_path / "data.noun"), {"every": 2}).splits == {"train": 1}
    assert (second.data, second.label, second.metadata["class"]) == (
        b"a living organism | with a bar",
        2,
        "noun.animal",
    )


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"body": "a"}\n{"body": ', {"text": "body", "label": "kind"}, "line 2"),
        ('{"body": "a"}\n', {}, "no text in 'text'"),
        ('{"body": "a", "kind": 1.5}\n', {"text": "body", "label": "kind"}, "a name or an integer"),
        ('{"body": "a"}\n', {"field": "body"}, "refuses pack.options"),
        ('{"body": "a", "kind": 1}\n', {"text": "body", "label": "kin"}, "no record has .*did you mean 'kind'"),
        ('{"body": "a", "kind": 1}\n\n{"body": "b", "kind": "c"}', {"text": "body", "label": "kind"}, 'line 3: "c"'),
        ('{"body": "a", "kind": 1}\n{"body": "b", "kind": true}', {"text": "body", "label": "kind"}, "one kind"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, content, options, message):
    (tmp_path / "texts.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        make_source("text", str(tmp_path / "texts.jsonl"), options).example("train", 0)


def test_true_and_false_are_labels_and_some_have_none(tmp_path):
    records = [{"text": "a", "kind": True}, {"text": "b", "kind": False}, {"text": "c", "kind": None}, {"text": "d"}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = make_source("text", str(tmp_path / "texts.jsonl"), {"label": "kind"})
    assert [repr(source.example("train", index).label) for index in range(4)] == ["1", "0", "None", "None"]


def test_lines_of_text_have_no_labels(tmp_path):
    (tmp_path / "texts.txt").write_text("a\n")
    with pytest.raises(UserError, match="no record has the field of the labels"):
        make_source("text", str(tmp_path / "texts.txt"), {"label": "kind"})


def test_blank_lines_are_no_records(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n  \r\n{"no": 1}\n\n')
    source = make_source("text", str(tmp_path / "texts.jsonl"))
    assert source.splits == {"train": 3}
    assert [source.example("train", index).data for index in (1, 0)] == [b"b", b"a"]
    with pytest.raises(UserError, match="line 5: no"):  # of the file, not of the records
        source.example("train", 2)


@pytest.mark.parametrize("name", ["X.JSONL", "x.v2.jsonl", "x.Jsonl.GZ"])
def test_the_name_says_what_lines_are(tmp_path, name):
    data = b'{"text": "a"}\n'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("GZ") else data)
    for path in (tmp_path / name, tmp_path):
        source = make_source("text", str(path))
        assert source.example(next(iter(source.splits)), 0).data == b"a"


@pytest.mark.parametrize("name", ["corpus.json", "corpus", "corpus.gz", "corpus.csv"])
def test_a_file_of_another_format_is_not_taken_for_lines(tmp_path, name):
    (tmp_path / name).write_bytes(b'[{"text": "a"}]\n')
    with pytest.raises(UserError, match=r"says what its lines are\n(.*\n)+  fix:.*jq"):
        make_source("text", str(tmp_path / name))


def test_other_files_beside_the_splits_are_counted(tmp_path):
    for name in ("train.txt", "a.json", "b.json", "README", ".hidden"):
        (tmp_path / name).write_text("a\n")
    source = make_source("text", str(tmp_path))
    assert source.splits == {"train": 1} and source.skipped == {"json": 2, "without extension": 1}


def test_which_split_a_line_is_in_is_part_of_the_fingerprint(tmp_path):
    found = set()
    for first, second in (("a\nb\n", "c\n"), ("a\n", "b\nc\n")):
        (tmp_path / "one.txt").write_text(first)
        (tmp_path / "two.txt").write_text(second)
        found.add(make_source("text", str(tmp_path)).fingerprint)
    (tmp_path / "two.txt").rename(tmp_path / "three.txt")
    assert len(found | {make_source("text", str(tmp_path)).fingerprint}) == 3
