"""Text backbones: their export, what a batch may not change, and folders that others have trained."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from sslscale.config import TextConfig
from sslscale.errors import UserError
from sslscale.models.export import export_backbone, load_backbone
from sslscale.models.load import find_embedder
from sslscale.models.text import TextBackbone
from sslscale.shards.text import SPECIAL

TEXTS = ["a dog", "the oak is a tall tree of the north " * 3, "stone", "to sing is to make music with the voice"]
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
BERT = TextConfig(kwargs=SMALL, vocab_size=300, max_length=32)
GPT = TextConfig(
    architecture="gpt2", kwargs={"n_embd": 24, "n_layer": 2, "n_head": 2}, vocab_size=300, max_length=32, pooling="last"
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    TextBackbone.fit(BERT, lambda limit: ({"txt": text.encode()} for text in TEXTS[:limit]), folder)
    return folder


def build(config, fitted):
    torch.manual_seed(0)
    return TextBackbone(config, fitted).eval()


def read(embedder, texts=TEXTS):
    reader = embedder.reader(None, None)
    return reader.collate([reader.read({"txt": text.encode()}) for text in texts])


@pytest.mark.parametrize("config", [BERT, GPT, BERT.model_copy(update={"pooling": "cls"})], ids=["bert", "gpt", "cls"])
@torch.no_grad()
def test_a_feature_does_not_depend_on_the_texts_beside_it(config, fitted):
    backbone = build(config, fitted)
    many = TEXTS * 40  # enough for a batch to be computed in parts by length
    together = backbone(read(backbone, many))
    for index, text in enumerate(TEXTS):
        torch.testing.assert_close(together[index + 4 * 7], backbone(read(backbone, [text]))[0], rtol=1e-4, atol=1e-5)
    tokens = read(backbone, many)
    states, taken = backbone.tokens(tokens), backbone.take(tokens, "cls")
    assert states.shape == (160, tokens.shape[1], 24)
    assert (states[tokens < 0] == 0).all() and torch.equal(states[:, 0], taken)


@pytest.mark.parametrize("config", [BERT, GPT], ids=["bert", "gpt"])
@torch.no_grad()
def test_an_export_loads_with_plain_transformers(config, fitted, tmp_path, monkeypatch):
    import safetensors.torch
    import transformers

    backbone = build(config, fitted)
    export_backbone(backbone, backbone.model.state_dict(), tmp_path, size=config.max_length)
    monkeypatch.chdir(tmp_path)
    meta = json.loads((tmp_path / "backbone.json").read_text())
    names = {"transformers": transformers, "safetensors": safetensors, "meta": meta}
    exec("\n".join(meta["load"]), names)
    assert len(meta["load"]) == 3
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file="tokenizer.json")
    ids = torch.tensor([tokenizer(TEXTS[3])["input_ids"]])
    theirs = names["model"].eval()(input_ids=ids).last_hidden_state[0]
    feature = theirs.mean(dim=0) if config.pooling == "mean" else theirs[-1]
    torch.testing.assert_close(backbone(read(backbone))[3], feature, rtol=1e-5, atol=1e-5)
    again = load_backbone(tmp_path)
    assert torch.equal(again(read(again)), backbone(read(backbone)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not the file"):
        load_backbone(tmp_path)


@torch.no_grad()
def test_a_sentence_transformers_folder_gives_its_own_features(fitted, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from transformers import PreTrainedTokenizerFast

    backbone = build(BERT, fitted)
    backbone.model.save_pretrained(tmp_path / "bert")
    special = dict(zip(("pad_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(fitted / "tokenizer.json"), **special)
    tokenizer.save_pretrained(tmp_path / "bert")
    first = Transformer(str(tmp_path / "bert"), max_seq_length=20)
    theirs = SentenceTransformer(modules=[first, Pooling(24, "mean"), Normalize()], device="cpu")
    theirs.save(str(tmp_path / "sentences"))
    spec = find_embedder(str(tmp_path / "sentences"), tmp_path, channels=None, size=None)
    embedder = spec.build()
    assert spec.size == 20 and spec.reader(embedder).max_length == 20
    expected = theirs.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(embedder(read(embedder)), expected, rtol=0, atol=1e-5)
    plain = find_embedder(str(tmp_path / "bert"), tmp_path, channels=None, size=None)
    assert plain.weights != spec.weights and plain.build().config.pooling == "mean"


def test_the_pooler_that_nothing_trains_is_left_out(fitted, tmp_path):
    backbone = build(BERT, fitted)
    export_backbone(backbone, backbone.model.state_dict(), tmp_path, size=32)
    assert not [name for name in load_file(tmp_path / "backbone.safetensors") if "pooler" in name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "bart-of-berts"}, "no model type"),
        ({"kwargs": {**SMALL, "attention_probs_dropout_prob": 0.1}}, "by rank"),
        ({"kwargs": {**SMALL, "num_attention_heads": 5}}, "refuses these arguments"),
    ],
)
def test_a_backbone_that_cannot_be_built_says_why(changes, message):
    with pytest.raises(UserError, match=message):
        TextBackbone(BERT.model_copy(update=changes))


@pytest.mark.parametrize(
    ("architecture", "room"), [("bert", 512), ("roberta", 511), ("gpt2", 1024), ("distilbert", 512), ("opt", 2048)]
)
def test_texts_longer_than_a_table_of_positions_are_refused(architecture, room):
    kwargs = {"dropout": 0.0} if architecture == "opt" else {}
    with torch.device("meta"):
        TextBackbone(TextConfig(architecture=architecture, max_length=room, kwargs=kwargs))
        with pytest.raises(UserError, match=f"has positions\n.*max_length={room + 1}\n.*at most {room}"):
            TextBackbone(TextConfig(architecture=architecture, max_length=room + 1, kwargs=kwargs))


def test_dropout_that_is_no_module_is_refused():
    with torch.device("meta"), pytest.raises(UserError, match=r"by rank.*\n.*dropout=0.1\n.*kwargs.dropout=0"):
        TextBackbone(TextConfig(architecture="opt", max_length=32))
