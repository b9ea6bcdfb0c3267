"""What embeds, by name: whose input size counts, what layout its images have, and what names it."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from embed_cases import all_rows, embed

from sslscale.config import AugmentConfig, BackboneConfig, TextConfig
from sslscale.embed.worker import EmbedWorker
from sslscale.errors import UserError
from sslscale.models.export import export_backbone
from sslscale.models.image import Backbone
from sslscale.models.load import find_embedder
from sslscale.models.text import TextBackbone
from sslscale.objectives import build_objective
from sslscale.objectives.export import export_objective
from sslscale.shards.dataset import open_shards

TRAINED = {"backbone": {"architecture": "resnet10t", "channels": 1}, "views": {"size": 8}}


def export_vit(folder, size):
    kwargs = {"img_size": size, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}
    backbone = Backbone(BackboneConfig(architecture="vit_tiny_patch16_224", kwargs=kwargs, channels=1))
    export_backbone(backbone, backbone.model.state_dict(), folder, size=size)


def test_a_backbone_is_given_images_of_its_own_size_whatever_the_run_trains_on(tmp_path, shards):
    export_vit(tmp_path / "at-12:30", 16)  # a path may hold a colon, as module:Class does
    result = embed(tmp_path, backbone=str(tmp_path / "at-12:30"), size=None, channels=None, pretrain=TRAINED)
    assert result["backbone"]["size"] == 16 and result["features_out"] == 120


def test_what_has_no_size_of_its_own_takes_that_of_the_run(tmp_path, shards):
    assert embed(tmp_path, size=None, channels=None, pretrain=TRAINED)["dim"] == 64
    torch.jit.save(torch.jit.script(torch.nn.Flatten()), str(tmp_path / "flat.pt"))
    spec = find_embedder(str(tmp_path / "flat.pt"), tmp_path, channels=1, size=None, run_size=8)
    assert spec.size == 8 and spec.build().feature_dim == 64
    assert find_embedder(str(tmp_path / "flat.pt"), tmp_path, channels=1, size=4, run_size=8).size == 4


def test_timms_own_weights_are_given_the_size_that_they_were_trained_at(tmp_path, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **rest: create(name, **rest))
    spec = find_embedder("timm:resnet10t", tmp_path, channels=None, size=None, run_size=8)
    assert spec.size == timm.get_pretrained_cfg("resnet10t").input_size[-1] and spec.channels == 3
    assert find_embedder("timm:resnet10t", tmp_path, channels=1, size=64, run_size=8).size == 64


def test_a_text_model_is_not_cut_to_the_texts_that_the_run_trains_on(tmp_path):
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = TextConfig(kwargs=small, vocab_size=300, max_length=32)
    TextBackbone.fit(config, lambda limit: [{"txt": b"a tree of the north"}], tmp_path)
    backbone = TextBackbone(config, tmp_path)
    export_backbone(backbone, backbone.model.state_dict(), tmp_path / "text", size=32)
    spec = find_embedder(str(tmp_path / "text"), tmp_path, channels=None, size=None, run_size=8)
    assert spec.size == 32 and spec.reader(spec.build()).max_length == 32


def test_a_size_that_a_vit_does_not_take_is_refused_before_anything_is_written(tmp_path, shards):
    export_vit(tmp_path / "vit", 16)
    with pytest.raises(UserError, match="images of one size"):
        embed(tmp_path, backbone=str(tmp_path / "vit"), size=8)
    assert not (tmp_path / "run").exists()


def test_an_objective_computes_with_the_backbone_that_embeds(tmp_path, shards):
    torch.manual_seed(0)
    recipe, config = AugmentConfig(size=8), {"name": "deep_svdd"}
    objective = build_objective(config, Backbone(BackboneConfig(architecture="resnet10t", channels=1)), recipe).eval()
    backbone = objective.backbone
    sha256 = export_backbone(backbone, backbone.model.state_dict(), tmp_path / "backbone", size=8)
    export_objective(objective, recipe, objective.state_dict(), tmp_path / "objective", backbone=sha256)
    spec = find_embedder(str(tmp_path / "backbone"), tmp_path, channels=None, size=None)

    def worker(spec):
        return EmbedWorker(
            store=str(tmp_path / "store"), shards=open_shards(str(shards)), spec=spec, batch_size=16, dtype="fp32",
            objective=str(tmp_path / "objective"), normalize=False, decode_threads=0, device="cpu",
        )  # fmt: skip

    pooled, layer = worker(spec), worker(replace(spec, output="layer:2"))
    assert pooled.objective.backbone is pooled.backbone  # so that compiling it compiles what runs
    arrays = list(np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8))
    found, of_layer = pooled._forward(arrays), layer._forward(arrays)
    with torch.no_grad():
        expected = objective.outputs(torch.from_numpy(np.stack(arrays)) / 255)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)
    np.testing.assert_allclose(of_layer["score"], expected["score"], atol=1e-5)
    assert of_layer["features"].shape == (5, spec.build().model.feature_info[1]["num_chs"])


# ------------------------------------------------------------------ models of the user's own


class Viewed(torch.nn.Module):
    def forward(self, x):
        return x.view(x.shape[0], -1)[:, ::7]


USERS = """
import torch
from sslscale.models.base import Embedder

class Viewed(Embedder):
    def __init__(self, channels, size):
        super().__init__()
        self.feature_dim = len(range(0, channels * size * size, 7))

    def forward(self, x):
        return x.view(x.shape[0], -1)[:, ::7]

class Weighted(Embedder):
    def __init__(self, channels, size):
        super().__init__()
        self.linear = torch.nn.Linear(channels * size * size, 3)
        self.linear.load_state_dict(torch.load(WEIGHTS))
        self.feature_dim = 3

    def forward(self, x):
        return self.linear(x.flatten(1))

class Random(Embedder):
    feature_dim = 3

    def __init__(self, channels, size):
        super().__init__()
        self.linear = torch.nn.Linear(channels * size * size, 3)

    def forward(self, x):
        return self.linear(x.flatten(1))
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    """`users(source)` writes users_model.py and takes care that it is imported anew, as in another process."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(source=USERS):
        (tmp_path / "users_model.py").write_text(f"WEIGHTS = {str(tmp_path / 'w.pt')!r}\n{source}")
        monkeypatch.delitem(sys.modules, "users_model", raising=False)

    write()
    return write


def save_weights(tmp_path, seed):
    torch.manual_seed(seed)
    torch.save(torch.nn.Linear(64, 3).state_dict(), tmp_path / "w.pt")


def test_models_of_the_users_own_are_given_contiguous_images(tmp_path, shards, users):
    torch.jit.save(torch.jit.script(Viewed()), str(tmp_path / "viewed.pt"))
    rows = []
    for name in ("users_model:Viewed", str(tmp_path / "viewed.pt")):
        embed(tmp_path, backbone=name, channels=3, normalize=False, overwrite=True)
        rows.append(all_rows(tmp_path))
    embed(tmp_path, channels=3, normalize=False, overwrite=True)
    for found in rows:
        np.testing.assert_array_equal(found, all_rows(tmp_path)[:, ::7])


def test_a_class_is_named_by_its_weights_and_its_source_too(tmp_path, shards, users):
    save_weights(tmp_path, 0)
    first = embed(tmp_path, backbone="users_model:Weighted")
    users()
    assert embed(tmp_path, backbone="users_model:Weighted") == first
    save_weights(tmp_path, 1)
    with pytest.raises(UserError, match=r"other settings[\s\S]*backbone:"):
        embed(tmp_path, backbone="users_model:Weighted")
    save_weights(tmp_path, 0)
    users(USERS.replace("self.linear(x.flatten(1))", "-self.linear(x.flatten(1))"))
    with pytest.raises(UserError, match=r"other settings[\s\S]*backbone:"):
        embed(tmp_path, backbone="users_model:Weighted")


def test_a_class_that_is_another_each_time_it_is_built_is_refused(tmp_path, shards, users):
    with pytest.raises(UserError, match="not the one that was named"):
        embed(tmp_path, backbone="users_model:Random")
    assert not (tmp_path / "run").exists()
