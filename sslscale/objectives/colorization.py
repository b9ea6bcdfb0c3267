"""Colorization (Zhang et al. 2016, https://arxiv.org/abs/1603.08511).

The backbone sees the grey image; a decoder on its features says, at a quarter of the resolution, which colour each
place has: a class q out of the cells of a 10 x 10 lattice over the ab plane of CIE Lab that sRGB reaches. A target is
spread over its five nearest cells by a Gaussian of width 5, Z_q, and rare colours weigh more:

    loss = mean over places of v(Z) * -sum_q Z_q log p_q,    v(Z) = w_q*, q* the cell with the largest Z_q
    w ~ 1 / ((1 - lambda) prior + lambda / Q),    sum_q prior_q w_q = 1

The paper's prior is ImageNet's; here it is a running mean over the training data itself. Its decoder reads a map of
features, ours the pooled ones, so that any backbone will do and what is learnt is in what is exported.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslscale.config import AugmentConfig
from sslscale.config.models import Fraction
from sslscale.errors import UserError
from sslscale.models.collectives import all_reduce_mean
from sslscale.models.heads import image_decoder
from sslscale.models.image import Backbone
from sslscale.objectives.base import Objective, representation_metrics
from sslscale.views.base import Batch
from sslscale.views.crops import Crops
from sslscale.views.lab import rgb_to_lab

_STEP, _NEAREST, _SIGMA = 10, 5, 5.0


class Colorization(Objective):
    """The colours of an image from its grey version."""

    bins: Tensor
    prior: Tensor

    def __init__(
        self,
        backbone: Backbone,
        recipe: AugmentConfig,
        *,
        uniform_share: Fraction = 0.5,
        prior_momentum: Fraction = 0.99,
        decoder_width: int = 64,
    ) -> None:
        super().__init__(backbone, recipe)
        if backbone.config.channels != 3:
            raise UserError(
                "colorization needs colour images",
                got=f"backbone.channels={backbone.config.channels}",
                fix="use the objective inpainting, which learns from grey images in the same way",
            )
        _share_stem(backbone)
        self.uniform_share, self.prior_momentum = uniform_share, prior_momentum
        self.side = max(1, recipe.size // 4)
        bins = reachable_bins()
        self.register_buffer("bins", bins, persistent=False)  # (Q, 2)
        self.register_buffer("prior", torch.full((len(bins),), 1 / len(bins)))
        self._seen: list[Tensor] = []
        self.decoder = image_decoder(backbone.feature_dim, len(bins), self.side, width=decoder_width)
        self.views = Crops({"view": recipe})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = batch["view"]
        features = self.backbone(grey(images))
        logits = self.decoder(features).flatten(2).transpose(1, 2)  # (B, s s, Q)
        target = self.targets(images)
        weight = self.weights()[target.argmax(dim=2)]  # (B, s s)
        self._seen.append(target.mean(dim=(0, 1)))
        log_p = F.log_softmax(logits.to(target.dtype), dim=2)
        return {"loss": -(weight * (target * log_p).sum(dim=2)).mean(), **representation_metrics(features)}

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> soft classes (B, s s, Q)."""
        ab = F.adaptive_avg_pool2d(rgb_to_lab(images)[:, 1:], self.side).flatten(2).transpose(1, 2)  # (B, s s, 2)
        distance = torch.cdist(ab, self.bins.to(ab.dtype), compute_mode="donot_use_mm_for_euclid_dist")
        nearest, index = distance.topk(_NEAREST, dim=2, largest=False)
        return torch.zeros_like(distance).scatter(2, index, F.softmax(-nearest.square() / (2 * _SIGMA**2), dim=2))

    def weights(self) -> Tensor:
        """(Q,): how much a place of each colour counts; 1 on average over the prior."""
        weight = 1 / ((1 - self.uniform_share) * self.prior + self.uniform_share / len(self.prior))
        return weight / (self.prior * weight).sum()

    def after_step(self, progress: float) -> None:
        seen = all_reduce_mean(torch.stack(self._seen).mean(dim=0))
        self.prior.lerp_(seen.to(self.prior.dtype), 1 - self.prior_momentum)
        self._seen.clear()


def grey(images: Tensor) -> Tensor:
    """The mean of the channels, in all three."""
    return images.mean(dim=1, keepdim=True).expand_as(images)


@torch.no_grad()
def _share_stem(backbone: Backbone) -> None:
    """Gives the first convolution the same weights for an image's three channels: on grey ones it computes what it did.

    As the training images are grey, the three stay equal. So the features of a coloured image are those of its grey
    version, and not disturbed by weights for colours that nothing ever trained.
    """
    if len({*backbone.config.mean}) > 1 or len({*backbone.config.std}) > 1:
        raise UserError(
            "colorization trains on grey images, whose channels must stay equal",
            got=f"backbone.mean={backbone.config.mean} backbone.std={backbone.config.std}",
            allowed="one value for all channels",
        )
    stem = next((module for module in backbone.model.modules() if isinstance(module, nn.Conv2d)), None)
    if stem is None or stem.in_channels % 3:
        raise UserError(
            "colorization needs a backbone that starts with a convolution", got=backbone.config.architecture
        )
    images = stem.weight.unflatten(1, (-1, 3))  # one, or a window of frames
    images.copy_(images.mean(dim=2, keepdim=True).expand_as(images))


def reachable_bins() -> Tensor:
    """(Q, 2): centres in the ab plane of the lattice cells that some sRGB colour falls into."""
    levels = np.linspace(0, 1, 52, dtype=np.float32)
    colours = torch.from_numpy(np.array(list(itertools.product(levels, repeat=3)), dtype=np.float32))
    ab = rgb_to_lab(colours[:, :, None, None])[:, 1:, 0, 0].numpy()
    cells = np.unique(np.round(ab / _STEP).astype(np.int64), axis=0)
    return torch.from_numpy((cells * _STEP).astype(np.float32))
