"""Stochastic depth and dropout that draw by sample, whatever the rank."""

from __future__ import annotations

from timm.layers import DropPath
from torch import Tensor, nn

from sslscale.views.keyed import KeyedRandom


class Keyed:
    """Mixin of what draws by sample, for rows that are views of the batch's B samples, one view after another.

    A draw depends on (seed, epoch, sample, layer, view): a run that is resumed, on any number of ranks, and a block
    that is computed again in the backward pass drop the same.
    """

    name: str
    random: KeyedRandom


class KeyedDropPath(Keyed, DropPath):
    """timm's stochastic depth (Huang et al. 2016, https://arxiv.org/abs/1603.09382) on (V B, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        views = len(x) // len(self.random)
        draws = self.random.uniform(f"{self.name}/{views}", shape=(views,))  # (B, V)
        kept = (draws.T.reshape(-1) >= self.drop_prob).to(x.dtype)
        return x * (kept / (1.0 - self.drop_prob)).view(-1, *[1] * (x.dim() - 1))


class KeyedDropout(Keyed, nn.Dropout):
    """torch's dropout with one mask a text, the same at each of its tokens, on (B, L, D).

    Gal & Ghahramani 2016, https://arxiv.org/abs/1512.05287: so a draw does not depend on what a text is padded to, and
    there are few of them.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        kept = (self.random.uniform(self.name, shape=(x.shape[-1],)) >= self.p).to(x.dtype)  # (B, D)
        return x * (kept / (1.0 - self.p))[:, None]


_KEYED: dict[type, type] = {DropPath: KeyedDropPath, nn.Dropout: KeyedDropout}


def key_drops(model: nn.Module, *kinds: type) -> None:
    """Makes every module of these kinds (DropPath, nn.Dropout) draw by sample, in place."""
    for name, module in model.named_modules():
        if type(module) in kinds:
            module.__class__ = _KEYED[type(module)]
            module.name = name


def drops(model: nn.Module) -> bool:
    """Whether anything in the model draws by sample while it trains."""
    return any(
        isinstance(module, Keyed) and getattr(module, "drop_prob", 0) + getattr(module, "p", 0) > 0
        for module in model.modules()
    )


def draw_from(model: nn.Module, random: KeyedRandom) -> None:
    """Says which samples the next pass is made of."""
    for module in model.modules():
        if isinstance(module, Keyed):
            module.random = random
