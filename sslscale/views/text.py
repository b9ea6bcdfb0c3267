"""Views of token ids: spans, deletions and masks, every draw keyed by sample.

B batch, L tokens of the longest text; int (B, L), PAD (-1) beyond a text's end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sslscale.shards.text import PAD
from sslscale.views.keyed import KeyedRandom

UNPREDICTED = -100  # where a target says nothing: torch's own value


def is_word(tokens: Tensor, special: tuple[int, ...]) -> Tensor:
    """bool (B, L): neither PAD nor one of the special ids."""
    return ~torch.isin(tokens, torch.tensor([PAD, *special], device=tokens.device))


def keep_tokens(tokens: Tensor, keep: Tensor) -> Tensor:
    """The tokens where `keep` (B, L), moved together at the front; PAD behind them."""
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    moved = tokens.gather(1, order)
    return moved.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) >= keep.sum(dim=1, keepdim=True), PAD)


def subset(
    tokens: Tensor, random: KeyedRandom, special: tuple[int, ...], span: tuple[float, float], delete: float
) -> Tensor:
    """A contiguous span of a share of each text's words, drawn from `span`, less each word with probability `delete`.

    Special tokens stay, and so does at least one word. Izacard et al. 2022 (Contriever),
    https://arxiv.org/abs/2112.09118, section 3.2: independent cropping and deletion.
    """
    words = is_word(tokens, special)
    count = words.sum(dim=1)
    length = (random.uniform("span/length", *span) * count).ceil().long().clamp(min=1)
    start = (random.uniform("span/start") * (count - length + 1)).long()
    place = words.cumsum(dim=1) - 1
    inside = (place >= start[:, None]) & (place < (start + length)[:, None])
    noise = random.uniform("delete", shape=(tokens.shape[1],)).masked_fill(~(words & inside), -1.0)
    kept = (noise >= delete) | (noise == noise.amax(dim=1, keepdim=True))
    return keep_tokens(tokens, (kept & words & inside) | (~words & (tokens != PAD)))


@dataclass(frozen=True)
class Subsets:
    """`view_1` and `view_2`: independent subsets of each text's words; span=(1, 1) and delete=0 give the text twice."""

    special: tuple[int, ...]
    span: tuple[float, float]
    delete: float

    def __call__(self, tokens: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        views = ("view_1", "view_2")
        return {name: subset(tokens, random.fold(name), self.special, self.span, self.delete) for name in views}


@dataclass(frozen=True)
class Masked:
    """`tokens`, a share of whose words is hidden, and `targets`: their ids there, UNPREDICTED elsewhere.

    Of the hidden words 80% become [MASK], 10% another id and 10% stay (Devlin et al. 2018,
    https://arxiv.org/abs/1810.04805, section 3.1). Each text hides the same share, and at least one word.
    """

    special: tuple[int, ...]
    mask_id: int
    vocab_size: int
    share: float

    def __call__(self, tokens: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        words = is_word(tokens, self.special)
        noise = random.uniform("mask", shape=(tokens.shape[1],)).masked_fill(~words, 2.0)
        count = (self.share * words.sum(dim=1, keepdim=True)).ceil()
        hidden = (noise.argsort(dim=1, stable=True).argsort(dim=1) < count) & words
        fate = random.uniform("fate", shape=(tokens.shape[1],))
        other = random.integers("other", self.vocab_size, (tokens.shape[1],)).to(tokens.dtype)
        shown = torch.where(fate < 0.8, self.mask_id, torch.where(fate < 0.9, other, tokens))
        return {
            "tokens": torch.where(hidden, shown, tokens),
            "targets": torch.where(hidden, tokens, UNPREDICTED).long(),
        }


class Whole:
    """`tokens`: the texts as they are."""

    def __call__(self, tokens: Tensor, random: KeyedRandom) -> dict[str, Tensor]:
        return {"tokens": tokens}
