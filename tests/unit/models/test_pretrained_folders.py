"""Folders that others have trained: a timm hub model, an image model of transformers, and what is neither."""

import json

import pytest
import timm
import torch
from timm.models import save_for_hf

from sslscale.errors import UserError
from sslscale.models.load import find_embedder

VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
PREPROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32},
    "do_rescale": True, "do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3],
}  # fmt: skip


def found(folder, channels=None, size=None, **rest):
    return find_embedder(str(folder), folder, channels=channels, size=size, **rest)


def normalised(images):
    mean, std = (torch.tensor(PREPROCESSOR[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    return (images - mean) / std


# ------------------------------------------------------------------ timm


@pytest.fixture
def timm_folder(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=7, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2
    )
    settings = {"mean": PREPROCESSOR["image_mean"], "std": PREPROCESSOR["image_std"], "input_size": (3, 32, 32)}
    save_for_hf(model, tmp_path / "timm", safe_serialization=True, data_config=settings)
    return model.eval(), tmp_path / "timm"


@torch.no_grad()
def test_a_timm_folder_gives_its_own_features(timm_folder):
    model, folder = timm_folder
    spec, images = found(folder, run_size=8), torch.rand(3, 3, 32, 32)
    embedder = spec.build()
    assert (spec.channels, spec.size, embedder.feature_dim) == (3, 32, 24)
    expected = model.forward_head(model.forward_features(normalised(images)), pre_logits=True)
    torch.testing.assert_close(embedder(images), expected, rtol=1e-5, atol=1e-5)
    grey = found(folder, channels=1)
    assert grey.sha256 != spec.sha256 and grey.build()(images[:, :1]).shape == (3, 24)


def test_a_timm_folder_is_named_by_what_it_computes(timm_folder, tmp_path):
    model, folder = timm_folder
    spec = found(folder)
    with torch.no_grad():
        model.norm.bias += 1
    save_for_hf(model, folder, safe_serialization=True)
    assert found(folder).weights != spec.weights
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no model\.safetensors"):
        found(folder)


# ------------------------------------------------------------------ transformers


def save_transformers(folder, model):
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))


@pytest.mark.parametrize("kind", ["vit", "vit-without-pooler", "dinov2", "resnet"])
@torch.no_grad()
def test_an_image_model_of_transformers_gives_its_own_features(tmp_path, kind):
    import transformers

    torch.manual_seed(0)
    if kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
        model = transformers.ResNetModel(config)
    elif kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**VIT, image_size=32, patch_size=8))
    else:
        config = transformers.ViTConfig(**VIT, image_size=32, patch_size=8)
        model = transformers.ViTModel(config, add_pooling_layer=kind == "vit")
    save_transformers(tmp_path, model)
    spec, images = found(tmp_path, run_size=8), torch.rand(3, 3, 32, 32)
    embedder, theirs = spec.build(), model.eval()(normalised(images), output_hidden_states=True)
    pooled = theirs.last_hidden_state[:, 0] if kind == "vit-without-pooler" else theirs.pooler_output.flatten(1)
    assert (spec.channels, spec.size, embedder.feature_dim) == (3, 32, pooled.shape[1])
    torch.testing.assert_close(embedder(images), pooled, rtol=1e-5, atol=1e-5)
    if kind == "resnet":
        expected = {"layer:1": theirs.hidden_states[1].mean(dim=(2, 3))}
        with pytest.raises(UserError, match="no class token"):
            found(tmp_path, output="cls").build()
    else:
        states = theirs.last_hidden_state
        expected = {"cls": states[:, 0], "tokens_mean": states[:, 1:].mean(dim=1)}
        expected["layer:1"] = theirs.hidden_states[1][:, 1:].mean(dim=1)
    for output, rows in expected.items():
        of_output = found(tmp_path, output=output).build()
        assert of_output.feature_dim == rows.shape[1]
        torch.testing.assert_close(of_output(images), rows, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="no such layer"):
        found(tmp_path, output="layer:9").build()


def test_what_is_no_model_of_images_or_texts_says_what_is_supported(tmp_path):
    import transformers

    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.CLIPConfig(
        text_config={**text, "vocab_size": 99}, vision_config={**text, "image_size": 32, "patch_size": 8}
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"got: *clip[\s\S]*allowed:[\s\S]*timm"):
        found(tmp_path)


def test_an_image_model_without_its_preprocessor_or_at_another_size_is_refused(tmp_path):
    import transformers

    config = transformers.ViTConfig(**VIT, image_size=32, patch_size=8)
    save_transformers(tmp_path, transformers.ViTModel(config))
    with pytest.raises(UserError, match="does not take"):
        found(tmp_path, size=40).build()
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"there is no preprocessor_config\.json"):
        found(tmp_path)
