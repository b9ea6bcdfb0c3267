"""Views of token ids: what is kept, what is hidden, and that padding changes nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sslscale.shards.text import PAD
from sslscale.views.keyed import KeyedRandom
from sslscale.views.text import UNPREDICTED, Masked, Subsets, subset

SPECIAL = (0, 1, 2, 3)
LENGTHS = (1, 2, 7, 30)


def texts(copies=50):
    """[CLS], words that count up from 10, [SEP]."""
    rows = [torch.cat([torch.tensor([1]), 10 + torch.arange(n), torch.tensor([2])]) for n in LENGTHS * copies]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD).int()


def random(count, epoch=0):
    return KeyedRandom.of(0, torch.full((count,), epoch), torch.arange(count))


def test_a_subset_is_a_span_between_the_ends():
    tokens = texts()
    views = subset(tokens, random(len(tokens)), SPECIAL, (0.4, 0.6), 0.0)
    shares = []
    for row, view in zip(tokens, views, strict=True):
        words, kept = row[row > 3], view[view > 3]
        assert view[0] == 1 and view[len(kept) + 1] == 2 and (view[len(kept) + 2 :] == PAD).all()
        assert len(kept) and torch.equal(kept, torch.arange(int(kept[0]), int(kept[-1]) + 1))
        if len(words) == 30:
            shares.append(len(kept) / 30)
    assert 0.39 < min(shares) < 0.45 and 0.55 < max(shares) < 0.64


def test_deletion_takes_its_share_and_leaves_a_word():
    tokens = texts()
    views = subset(tokens, random(len(tokens)), SPECIAL, (1.0, 1.0), 0.9)
    assert ((views > 3).sum(dim=1) >= 1).all() and (views[:, 0] == 1).all()
    kept = (views[3::4] > 3).float().sum(dim=1).mean() / 30
    assert 0.07 < kept < 0.14
    made = Subsets(SPECIAL, (1.0, 1.0), 0.5)(tokens, random(len(tokens)))
    assert not torch.equal(made["view_1"], made["view_2"])


def test_masks_hide_a_share_of_each_text_in_the_three_ways():
    tokens = texts(500)
    made = Masked(SPECIAL, 3, 300, 0.15)(tokens, random(len(tokens)))
    hidden = made["targets"] != UNPREDICTED
    assert hidden.sum(dim=1).tolist() == [1, 1, 2, 5] * 500  # ceil(0.15 n)
    assert torch.equal(made["targets"][hidden], tokens[hidden].long()) and (tokens[hidden] > 3).all()
    assert torch.equal(made["tokens"][~hidden], tokens[~hidden])
    shown = made["tokens"][hidden]
    assert 0.77 < (shown == 3).float().mean() < 0.83
    assert 0.08 < (shown == tokens[hidden]).float().mean() < 0.12


def test_padding_changes_no_draw():
    tokens, wide = texts(), F.pad(texts(), (0, 9), value=PAD)
    for view in (Masked(SPECIAL, 3, 300, 0.3), Subsets(SPECIAL, (0.3, 0.9), 0.2)):
        narrow, padded = (view(x, random(len(tokens))) for x in (tokens, wide))
        for name, value in narrow.items():
            assert torch.equal(padded[name][:, : value.shape[1]], value)
