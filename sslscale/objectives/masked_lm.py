"""Masked language modelling (Devlin et al. 2018, BERT, https://arxiv.org/abs/1810.04805, section 3.1).

A share of each text's words is hidden, and predicted from the others on both sides:

    loss = mean over texts of the mean over its hidden words w of -log softmax(E f(h_w) + b)[w]

with h_w the last layer's state there, f a dense layer with GELU and LayerNorm, and E the input embeddings (tied). A
text is the unit, as everywhere here: the loss does not depend on how a batch is cut into ranks and passes.

B texts, L tokens, M hidden words of the batch, V the size of the vocabulary.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.errors import UserError
from sslscale.models.text import TextBackbone
from sslscale.objectives.base import Objective, full_precision, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.text import UNPREDICTED, Masked


class MaskedLM(Objective):
    """The hidden words of a text from the visible ones."""

    takes: ClassVar[str] = "tokens"
    backbone: TextBackbone

    def __init__(
        self, backbone: TextBackbone, recipe: AugmentConfig, *, mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    ) -> None:
        super().__init__(backbone, recipe)
        if backbone.causal:
            raise UserError(
                "masked_lm needs a model that sees both sides of a word",
                got=backbone.config.architecture,
                fix="use causal_lm, or a model such as bert",
            )
        self.head = WordHead(backbone)
        self.views = Masked(backbone.special_ids, backbone.mask_id, backbone.config.vocab_size, mask_share)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        states = self.backbone.tokens(batch["tokens"])  # (B, L, D)
        loss, accuracy = word_loss(states, batch["targets"], self.head, self.backbone.embeddings)
        return {"loss": loss, "accuracy": accuracy, **representation_metrics(states.mean(dim=1))}


class WordHead(nn.Module):
    """States (M, D) and embeddings (V, E) -> logits (M, V)."""

    def __init__(self, backbone: TextBackbone) -> None:
        super().__init__()
        width = backbone.embeddings.embedding_dim
        self.transform = nn.Sequential(nn.Linear(backbone.feature_dim, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(backbone.config.vocab_size))

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        return F.linear(self.transform(states), embeddings, self.bias)


def word_loss(states: Tensor, targets: Tensor, head: WordHead, embeddings: Any) -> tuple[Tensor, Tensor]:
    """The loss over (B, L) targets, UNPREDICTED where there is none, and the share of the words that are found."""
    place = targets != UNPREDICTED
    logits, words = head(states[place], embeddings.weight), targets[place]  # (M, V), (M,)
    share = (place / place.sum(dim=1, keepdim=True))[place] / len(targets)  # (M,): of a word in the loss
    return _weighted_cross_entropy(logits, words, share), (logits.argmax(dim=1) == words).float().mean()


@full_precision
def _weighted_cross_entropy(logits: Tensor, targets: Tensor, share: Tensor) -> Tensor:
    return (F.cross_entropy(logits, targets, reduction="none") * share).sum()
