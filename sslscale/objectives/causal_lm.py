"""Causal language modelling: each token from those before it (Radford et al. 2018, GPT, section 3.1).

    loss = mean over texts of the mean over its tokens t of -log softmax(E f(h_{t-1}) + b)[t]

with the head of masked_lm. The natural pooling of such a model is `last`: the only state that has seen the whole text.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from sslscale.config import AugmentConfig
from sslscale.errors import UserError
from sslscale.models.text import TextBackbone
from sslscale.objectives.base import Objective, representation_metrics
from sslscale.objectives.masked_lm import WordHead, word_loss
from sslscale.shards.text import PAD
from sslscale.views.base import Batch
from sslscale.views.text import UNPREDICTED, Whole


class CausalLM(Objective):
    """The next token of a text from those before it."""

    takes: ClassVar[str] = "tokens"
    backbone: TextBackbone

    def __init__(self, backbone: TextBackbone, recipe: AugmentConfig) -> None:
        super().__init__(backbone, recipe)
        if not backbone.causal:
            raise UserError(
                "causal_lm needs a model in which a token sees only those before it",
                got=backbone.config.architecture,
                fix="use masked_lm, a model such as gpt2, or backbone.kwargs.is_decoder=true",
            )
        self.head = WordHead(backbone)
        self.views = Whole()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        tokens = batch["tokens"]
        states = self.backbone.tokens(tokens)  # (B, L, D)
        following = F.pad(tokens[:, 1:], (0, 1), value=PAD).long()
        targets = following.masked_fill(following == PAD, UNPREDICTED)
        loss, accuracy = word_loss(states, targets, self.head, self.backbone.embeddings)
        return {"loss": loss, "accuracy": accuracy, **representation_metrics(states.mean(dim=1))}
