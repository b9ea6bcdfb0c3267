"""The embed stage without a pretrained backbone: a corpus that grows, other outputs, projections, wrong settings."""

import hashlib
import json

import numpy as np
import pytest
import torch
from embed_cases import embed, part_files

from sslscale.config import BackboneConfig
from sslscale.errors import UserError
from sslscale.features import FeatureStore, open_features
from sslscale.models.export import export_backbone
from sslscale.models.image import Backbone
from sslscale.rundir import RunDir
from sslscale.shards.dataset import open_shards
from sslscale.shards.plan import Span
from sslscale.shards.stream import Sample, read_spans


def test_shards_that_come_later_are_embedded_alone(tmp_path, shards, write_shard):
    assert embed(tmp_path)["parts"] == 4
    before = part_files(tmp_path)
    write_shard(shards / "a-0.tar", 40)  # sorts first: the order of the names does not matter
    write_shard(shards / "c-0.tar", 5)
    grown = embed(tmp_path)
    assert grown["generations"] == 2 and grown["parts"] == 6 and grown["features_out"] == grown["samples_in"] == 165
    after = part_files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 4
    store = FeatureStore.open(tmp_path / "run/embed/train")
    assert [part.rows for part in store.parts] == [32, 32, 32, 24, 32, 13]
    assert store.lookup(["b-0-00000", "a-0-00000", "c-0-00004"]).tolist() == [0, 4 << 32, (5 << 32) + 12]
    assert embed(tmp_path) == grown
    write_shard(shards / "d-0.tar", 1)
    assert embed(tmp_path)["generations"] == 3 and part_files(tmp_path).items() > after.items()


def test_a_growth_that_is_interrupted_leaves_the_store_as_it_was(tmp_path, shards, write_shard, monkeypatch):
    embed(tmp_path)
    identity = FeatureStore.open(tmp_path / "run/embed/train").identity
    write_shard(shards / "c-0.tar", 80)
    finish_part = "sslscale.rundir.Stage.finish_part"
    commit, made = __import__("sslscale.rundir", fromlist=["Stage"]).Stage.finish_part, []

    def die_at_the_second(stage, part, record, failures=()):
        if made:
            raise KeyboardInterrupt
        made.append(part)
        commit(stage, part, record, failures)

    monkeypatch.setattr(finish_part, die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path)
    monkeypatch.setattr(finish_part, commit)
    assert FeatureStore.open(tmp_path / "run/embed/train").identity == identity
    write_shard(shards / "d-0.tar", 3)
    result = embed(tmp_path)
    assert result["features_out"] == 203 and made == ["part-00004"]


@pytest.mark.parametrize("change", ["replaced", "gone", "limit"])
def test_a_corpus_that_changed_is_refused(tmp_path, shards, write_shard, change):
    embed(tmp_path)
    before = part_files(tmp_path)
    if change == "replaced":
        write_shard(shards / "b-0.tar", 71)
        (shards / "shards.json").unlink()
    elif change == "gone":
        (shards / "b-1.tar").unlink()
        (shards / "shards.json").unlink()
    names = {"replaced": r"b-0\.tar", "gone": r"b-1\.tar", "limit": r"b-0\.tar, b-2\.tar"}
    with pytest.raises(UserError, match=rf"other settings[\s\S]*shards:.*\(changed or gone: {names[change]}\)"):
        embed(tmp_path, limit=60 if change == "limit" else None)
    assert part_files(tmp_path) == before
    assert embed(tmp_path, overwrite=True, limit=60 if change == "limit" else None)["generations"] == 1


def test_the_table_holds_the_hash_of_the_image(tmp_path, shards):
    embed(tmp_path)
    table = FeatureStore.open(tmp_path / "run/embed/train").table(0, ["key", "sha256"]).to_pylist()
    [sample] = read_spans(open_shards(str(shards)), [Span(0, 3, 4)])
    assert isinstance(sample, Sample)
    assert table[3] == {"key": sample.key, "sha256": hashlib.sha256(sample.data["png"]).digest()}


def test_decoding_beside_or_in_the_thread_of_the_backbone_gives_the_same_bytes(tmp_path, shards):
    files = []
    for threads in (0, 3):
        embed(tmp_path, decode_threads=threads)
        files.append(part_files(tmp_path))
        (tmp_path / "run").rename(tmp_path / f"run-{threads}")
    assert files[0] == files[1]


# ------------------------------------------------------------------ what becomes the feature


@pytest.fixture
def vit(tmp_path):
    config = BackboneConfig(
        architecture="vit_tiny_patch16_224",
        kwargs={"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2},
        channels=1,
    )
    torch.manual_seed(0)
    backbone = Backbone(config).eval()
    export_backbone(backbone, backbone.model.state_dict(), tmp_path / "vit", size=8)
    return backbone


def images(shards):
    spans = [Span(0, 0, 70), Span(2, 0, 50)]
    from sslscale.shards.decode import decode_image

    found = [decode_image(sample.data, 1, 8) for sample in read_spans(open_shards(str(shards)), spans)]
    return torch.from_numpy(np.stack(found)).float() / 255


@pytest.mark.parametrize("output", ["pooled", "cls", "tokens_mean", "layer:2", "layer:3"])
def test_outputs_of_a_vit(tmp_path, shards, vit, output):
    result = embed(tmp_path, backbone=str(tmp_path / "vit"), output=output, normalize=False)
    with torch.inference_mode():
        x = images(shards)
        tokens = vit.tokens(x)
        [layer] = vit.model.forward_intermediates(vit.normalise(x), indices=[1], intermediates_only=True)
        expected = {
            "pooled": vit(x),
            "cls": tokens[:, 0],
            "tokens_mean": tokens[:, 1:].mean(dim=1),
            "layer:2": layer.mean(dim=(2, 3)),
        }
    store = FeatureStore.open(tmp_path / "run/embed/train")
    rows = np.concatenate([store.open_block(part.part) for part in store.parts])
    if output in expected:
        np.testing.assert_allclose(rows, expected[output], atol=1e-5)
    assert (store.backbone == result["backbone"]["weights"]) == (output == "pooled")
    assert rows.std() > 0.01


def test_a_projection_is_fitted_once_for_all_datasets(tmp_path, shards):
    result = embed(tmp_path, pca=5, datasets=["train", "test"], normalize=False)
    assert result["dim"] == 5
    features = open_features(RunDir(tmp_path / "run"))  # the two are comparable
    rows = np.concatenate([features.block(part.number) for part in features.parts if part.dataset == "train"])
    x = images(shards).flatten(1).numpy().astype(np.float64)
    expected = (x - x.mean(axis=0)) @ np.linalg.svd(x - x.mean(axis=0))[2][:5].T
    signs = np.sign((rows * expected).sum(axis=0))
    np.testing.assert_allclose(rows, expected * signs, atol=1e-4)
    record = json.loads((tmp_path / "run/projection/result.json").read_text())
    assert record["dim"] == 5 and record["of"] == 64 and record["rows"] == 120


def test_a_compiled_backbone_embeds_the_same(tmp_path, shards, vit, monkeypatch):
    embed(tmp_path, backbone=str(tmp_path / "vit"))
    exact = FeatureStore.open(tmp_path / "run/embed/train").open_block(0)
    (tmp_path / "run").rename(tmp_path / "exact")
    calls, compile = [], torch.nn.Module.compile

    def without_a_compiler(self):
        calls.append(type(self).__name__)
        compile(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_a_compiler)
    embed(tmp_path, backbone=str(tmp_path / "vit"), compile=True)
    assert calls == ["Backbone"]
    rows = FeatureStore.open(tmp_path / "run/embed/train").open_block(0)
    np.testing.assert_allclose(rows, exact, atol=1e-5)


def test_autocast_is_a_setting(tmp_path, shards, vit):
    embed(tmp_path, backbone=str(tmp_path / "vit"))
    exact = FeatureStore.open(tmp_path / "run/embed/train").open_block(0)
    (tmp_path / "run").rename(tmp_path / "exact")
    embed(tmp_path, backbone=str(tmp_path / "vit"), autocast="bf16")
    rows = FeatureStore.open(tmp_path / "run/embed/train").open_block(0)
    assert 0 < np.abs(rows - exact).max() < 0.05


class Halves(torch.nn.Module):
    def forward(self, x):
        return torch.stack([x[:, :, :4].mean(dim=(1, 2, 3)), x[:, :, 4:].mean(dim=(1, 2, 3))], dim=1)


def test_a_torchscript_file_embeds(tmp_path, shards):
    torch.jit.save(torch.jit.script(Halves()), str(tmp_path / "halves.pt"))
    result = embed(tmp_path, backbone=str(tmp_path / "halves.pt"), normalize=False)
    assert result["dim"] == 2
    rows = FeatureStore.open(tmp_path / "run/embed/train").open_block(0)
    np.testing.assert_allclose(rows, Halves()(images(shards))[:32], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "pixels", "output": "cls"}, "only a trained backbone has other outputs"),
        ({"backbone": "vit", "output": "layer:4"}, "layer:1 to layer:3"),
        ({"backbone": "resnet", "output": "cls"}, "a ViT only"),
        ({"backbone": "pixels", "pca": 64}, "1 to 63"),
        ({"backbone": "nothing.pt"}, "no such file"),
        ({"backbone": "broken.pt"}, "cannot be used"),
        ({"backbone": "timm:vit_tinny"}, "did you mean"),
        ({"backbone": "pixels", "channels": None}, "embed.channels"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(tmp_path, shards, vit, settings, message):
    (tmp_path / "broken.pt").write_bytes(b"not a model")
    config = BackboneConfig(architecture="resnet10t", channels=1)
    if settings["backbone"] == "resnet":
        model = Backbone(config)
        export_backbone(model, model.model.state_dict(), tmp_path / "resnet", size=8)
    local = tmp_path / settings["backbone"]
    if local.exists() or local.suffix == ".pt":
        settings = {**settings, "backbone": str(local)}
    with pytest.raises(UserError, match=message):
        embed(tmp_path, **settings)
    assert not (tmp_path / "run").exists()
