"""What the losses of the text and video objectives are, against their formulas written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslscale.config import AugmentConfig, TextConfig, VideoMAEConfig
from sslscale.errors import UserError
from sslscale.models.export import build_backbone
from sslscale.objectives import build_objective
from sslscale.objectives.mae import split_mask
from sslscale.objectives.masked_lm import word_loss
from sslscale.objectives.simcse import in_batch
from sslscale.objectives.video_mae import tubelets
from sslscale.shards.text import PAD
from sslscale.views.base import Batch
from sslscale.views.keyed import KeyedRandom
from sslscale.views.text import UNPREDICTED
from sslscale.views.video import ShuffledPieces, augment_clip

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
BERT = TextConfig(kwargs=SMALL, vocab_size=300, max_length=16)
STILL = AugmentConfig(size=16, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)


def random(count):
    return KeyedRandom.of(0, torch.zeros(count, dtype=torch.int64), torch.arange(count))


def test_word_loss_is_the_mean_over_texts_of_their_means():
    states, targets = torch.randn(3, 5, 4), torch.full((3, 5), UNPREDICTED)
    targets[0, 1], targets[1, :4], targets[2, 2:4] = 5, torch.tensor([1, 2, 3, 4]), torch.tensor([0, 6])
    embeddings = nn.Embedding(7, 4)
    loss, _ = word_loss(states, targets, lambda x, weight: x @ weight.T, embeddings)
    per_text = [
        F.cross_entropy(states[i] @ embeddings.weight.T, targets[i], ignore_index=UNPREDICTED) for i in range(3)
    ]
    torch.testing.assert_close(loss, torch.stack(per_text).mean())


def test_a_causal_model_predicts_what_follows_and_never_sees_it():
    config = TextConfig(
        architecture="gpt2", kwargs={"n_embd": 24, "n_layer": 2, "n_head": 2}, vocab_size=300, max_length=8
    )
    torch.manual_seed(0)
    objective = build_objective({"name": "causal_lm"}, build_backbone(config), AugmentConfig()).eval()
    tokens = torch.tensor([[1, 20, 30, 40, 2], [1, 50, 2, PAD, PAD]], dtype=torch.int32)
    before = objective.backbone.tokens(tokens)
    changed = objective.backbone.tokens(tokens.index_fill(1, torch.tensor([3]), 99))
    torch.testing.assert_close(before[0, :3], changed[0, :3])
    assert not torch.allclose(before[0, 3], changed[0, 3])
    logits = objective.head(before, objective.backbone.embeddings.weight)
    first = F.cross_entropy(logits[0, :4], torch.tensor([20, 30, 40, 2]))
    second = F.cross_entropy(logits[1, :2], torch.tensor([50, 2]))
    loss = objective(Batch(objective.make_views(tokens, random(2)), random(2), torch.arange(2)))["loss"]
    torch.testing.assert_close(loss, (first + second) / 2)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("causal_lm", {}, "sees only those before it"),
        ("masked_lm", {"kwargs": {**SMALL, "is_decoder": True}}, "both sides"),
        ("simcse", {"kwargs": {**SMALL, "hidden_dropout_prob": 0.0}}, "would be equal"),
    ],
)
def test_a_model_that_a_text_objective_cannot_train_is_refused(name, changes, message):
    with pytest.raises(UserError, match=message):
        build_objective({"name": name}, build_backbone(BERT.model_copy(update=changes)), AugmentConfig())


def test_simcse_tells_a_text_from_the_others():
    z, other = (F.normalize(torch.randn(4, 6), dim=1) for _ in range(2))
    similar = (z @ other.T / 0.1).exp()
    expected = -(similar.diagonal() / similar.sum(dim=1)).log().mean()
    torch.testing.assert_close(in_batch(z, other, 0.1), expected)


def test_shuffled_pieces_are_whole_and_their_order_is_up_to_reversal():
    clips = torch.arange(8.0)[None, :, None, None, None].expand(200, 8, 1, 16, 16) / 8
    view = ShuffledPieces(STILL, 4)
    made = view(clips, random(200))
    frames = (made["view"][:, :, 0, 8, 8] * 8).round().int()
    assert len(view.orders) == 12 and set(made["order"].tolist()) == set(range(12))
    for row, order in zip(frames, made["order"].tolist(), strict=True):
        pieces = row.view(4, 2)
        assert (pieces[:, 1] == pieces[:, 0] + 1).all()  # within a piece time runs forward
        seen = tuple((pieces[:, 0] // 2).tolist())
        assert seen in (view.orders[order], view.orders[order][::-1])
    assert len({tuple(row.tolist()) for row in frames}) == 24


def test_a_clips_frames_are_augmented_alike():
    recipe = AugmentConfig(size=12, crop_scale=(0.3, 0.8), rotate_degrees=20, brightness=0.4, contrast=0.4)
    image = torch.rand(5, 1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    views = augment_clip(image.expand(5, 4, 1, 16, 16), random(5), recipe)
    assert all(torch.equal(views[:, t], views[:, 0]) for t in range(4))
    assert not torch.allclose(views[0], views[1])


def test_video_mae_hides_whole_tubes_and_predicts_their_pixels():
    config = VideoMAEConfig(kwargs={"patch_size": 4, **SMALL}, channels=1, frames=4, size=16)
    torch.manual_seed(0)
    settings = {"name": "video_mae", "mask_ratio": 0.75, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    objective = build_objective(settings, build_backbone(config), STILL)
    keep = objective._tubes(torch.tensor([[5, 2, 9]]))
    assert keep.tolist() == [[2, 5, 9, 18, 21, 25]]
    clips = torch.rand(2, 4, 1, 16, 16)
    pixels = tubelets(clips, 2, 4)
    assert pixels.shape == (2, 32, 32)
    row, column = 2, 1  # of patches: tubelet 16 + 2 * 4 + 1 is there in the second half of the clip
    cut = clips[:, 2:, :, 8:12, 4:8].permute(0, 1, 3, 4, 2).flatten(1)
    torch.testing.assert_close(pixels[:, 16 + row * 4 + column], cut)
    batch = Batch(objective.make_views(clips, random(2)), random(2), torch.arange(2))
    hidden = objective.backbone.tokens(clips, torch.ones(2, 32, dtype=torch.bool).index_fill(1, keep[0], False))
    assert hidden.shape == (2, 6, 24)
    noise = batch.random.uniform("mask", shape=(16,))
    shown, masked = (objective._tubes(places) for places in split_mask(noise, 0.75))
    target = objective.targets(clips)
    for places, lost in [(shown, 0.0), (masked, 4.0)]:  # it is right everywhere but by 2 at these places
        wrong = target.scatter_add(1, places[:, :, None].expand(-1, -1, 32), torch.full((2, places.shape[1], 32), 2.0))
        objective._decode = lambda tokens, keep, wrong=wrong: wrong
        torch.testing.assert_close(objective(batch)["loss"], torch.tensor(lost))
