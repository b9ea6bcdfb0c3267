"""Alignment and uniformity on the sphere (Wang and Isola 2020, https://arxiv.org/abs/2005.10242).

loss = mean_i |z_i - z'_i|^2 + weight log mean_{i < j} exp(-2 |z_i - z_j|^2),    z, z' projected views of unit length
"""

import torch
import torch.nn.functional as F

from sslscale.models.heads import mlp
from sslscale.objectives.base import Objective, gathered, representation_metrics
from sslscale.views.crops import Crops


class AlignUniform(Objective):
    needs_whole_batch = True

    def __init__(self, backbone, recipe, *, weight: float = 1.0, output_dim: int = 64):
        super().__init__(backbone, recipe)
        self.weight = weight
        self.projector = mlp(backbone.feature_dim, 256, output_dim)
        self.views = Crops({"view_1": recipe, "view_2": recipe})

    def forward(self, batch):
        features = self.backbone(torch.cat([batch["view_1"], batch["view_2"]]))
        z_1, z_2 = (gathered(F.normalize(z, dim=1)) for z in self.projector(features).chunk(2))
        alignment = (z_1 - z_2).square().sum(dim=1).mean()
        uniformity = torch.pdist(z_1).square().mul(-2).exp().mean().log()
        return {"loss": alignment + self.weight * uniformity, **representation_metrics(features)}
