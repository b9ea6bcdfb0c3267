"""Texts as token ids: what a tokenizer of the corpus gives, and what cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sslscale.shards.decode import DecodeError
from sslscale.shards.text import PAD, SPECIAL, TextReader, load_tokenizer, train_tokenizer

CORPUS = [f"the {adjective} {noun} of the house" for adjective in ("red", "old", "tall") for noun in ("door", "roof")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(CORPUS, 300, True, file)
    return str(file)


def test_a_tokenizer_is_of_its_corpus_and_writes_any_text(tokenizer, tmp_path):
    loaded = load_tokenizer(tokenizer, 64)
    assert [loaded.id_to_token(i) for i in range(4)] == list(SPECIAL)
    assert loaded.get_vocab_size() <= 300
    common, rare = (loaded.encode(text).ids for text in ("The HOUSE", "Ωμέγα 漢"))
    assert len(common) == 4 and common[0] == 1 and common[-1] == 2  # [CLS] the house [SEP]
    assert loaded.decode(rare).strip() == "ωμέγα 漢"
    train_tokenizer(CORPUS, 300, True, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == open(tokenizer).read()  # noqa: PTH123, SIM115


def test_a_batch_is_as_long_as_its_longest_text(tokenizer):
    reader = TextReader(tokenizer, max_length=6)
    rows = [reader.read({"txt": text.encode()}) for text in ("the house", " ".join(["roof"] * 50))]
    assert [len(row) for row in rows] == [4, 6] and rows[1][-1] == 2  # cut, and still ended
    batch = reader.collate(rows, size=8)
    assert batch.shape == (2, 6) and batch.dtype == torch.int32
    assert (batch[0, 4:] == PAD).all() and np.array_equal(batch[1].numpy(), rows[1])


def test_of_a_long_document_only_the_beginning_counts(tokenizer):
    reader = TextReader(tokenizer, max_length=16)
    long = ("the old roof " * 800_000).encode()  # 10 MB
    assert np.array_equal(reader.read({"txt": long}), reader.read({"txt": long[:1024]}))


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ({"txt": b"caf\xe9 noir"}, "the .txt is not UTF-8: byte 3 is 0xe9"),
        ({"txt": b""}, "the .txt is empty"),
        ({"txt": b" \n\t"}, "the .txt is empty"),
        ({"__key__": "a", "png": b"x", "cls": b"1"}, "no text among the members: png cls"),
    ],
)
def test_a_text_that_cannot_be_read_says_why(tokenizer, sample, reason):
    with pytest.raises(DecodeError) as error:
        TextReader(tokenizer, 16).read(sample)
    assert error.value.reason == reason
