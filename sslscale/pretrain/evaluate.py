"""Evaluations while training: health of the features without any label, and probes where labelled data is given."""

from __future__ import annotations

import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from sslscale.config import CollapseConfig, RunConfig
from sslscale.errors import UserError
from sslscale.features.health import alignment, alpha_req, feature_std, lidar, rankme, uniformity
from sslscale.models.collectives import gather_rows
from sslscale.objectives.base import Objective
from sslscale.shards.dataset import ShardSet, open_shards
from sslscale.shards.decode import DecodeError, decode_image, label_of
from sslscale.shards.plan import Span
from sslscale.shards.stream import Sample, read_spans
from sslscale.views.image import augment, to_float
from sslscale.views.keyed import KeyedRandom

_BATCH = 256
_VIEWED, _VIEWS = 256, 4  # samples whose views are compared, and views of each


def is_healthy(measured: dict[str, float], guard: CollapseConfig) -> bool:
    """Whether an evaluation found the features above both thresholds."""
    return measured["feature_std"] >= guard.min_feature_std and measured["rankme"] >= guard.min_rankme


class Evaluator:
    """Reads its samples once; each evaluation is one pass of the backbone, shared between the ranks."""

    def __init__(self, config: RunConfig, shards: ShardSet, device: torch.device) -> None:
        assert config.pretrain is not None
        self.config, self.device = config.pretrain, device
        self.size = config.pretrain.views.size  # what the exported backbone is given later, too
        self.channels = config.pretrain.backbone.channels
        self.images, _ = self._read(shards, self.config.evaluate_samples)
        self.probe: tuple[Tensor, Tensor] | None = None
        if self.config.probe is not None:
            labelled = open_shards(config.datasets[self.config.probe.dataset])
            self.probe = self._read(labelled, self.config.probe.limit)
            if (self.probe[1] < 0).any():
                raise UserError(
                    "pretrain.probe needs a labelled dataset", got=self.config.probe.dataset, fix="remove the probe"
                )

    def _read(self, shards: ShardSet, limit: int) -> tuple[Tensor, Tensor]:
        """uint8 images (n, C, S, S) and labels (n,), -1 where there is none; spread evenly over the dataset."""
        stride = max(1, shards.num_samples // limit)
        wanted = (Span(shard, r, r + 1) for shard, count in enumerate(shards.counts) for r in range(count))
        spans = [span for i, span in enumerate(wanted) if i % stride == 0][:limit]
        images, labels = [], []
        for item in read_spans(shards, spans):
            with contextlib.suppress(DecodeError):  # counted where it is trained on or embedded
                if isinstance(item, Sample):
                    image = decode_image(item.data, channels=self.channels, size=self.size)
                    label = label_of(item.data)
                    images.append(torch.from_numpy(image))
                    labels.append(-1 if label is None else label)
        return torch.stack(images), torch.tensor(labels)

    @torch.no_grad()
    def evaluate(self, objective: Objective) -> dict[str, float]:
        """The same on every rank: `feature_std` (times sqrt(D): 1 is spread evenly), `rankme`, `alpha_req`,
        `uniformity` of still images; `alignment` and `lidar` of augmented views; `knn_accuracy` and
        `linear_accuracy` with a probe.
        """
        training = objective.training
        objective.eval()
        features = self._features(objective, self.images).double().cpu().numpy()
        views = self._views(objective).double().cpu().numpy()  # (n, q, D)
        measured = {
            "feature_std": feature_std(features) * features.shape[1] ** 0.5,
            "rankme": rankme(features),
            "uniformity": uniformity(features),
            "alpha_req": alpha_req(features),
            "alignment": alignment(views[:, 0], views[:, 1]),
            "lidar": lidar(views),
        }
        if self.probe is not None:
            assert self.config.probe is not None
            images, labels = self.probe
            measured |= probe(self._features(objective, images).cpu(), labels, self.config.probe.k)
        objective.train(training)
        return {name: value for name, value in measured.items() if math.isfinite(value)}

    def _views(self, objective: Objective) -> Tensor:
        """(n, q, D): features of q augmented views, the same ones at every evaluation."""
        images = to_float(self.images[:_VIEWED])
        ids = torch.arange(len(images))
        random = KeyedRandom.of(0, torch.zeros_like(ids), ids).fold("evaluation")
        made = [augment(images, random.fold(f"view_{i}"), self.config.views) for i in range(_VIEWS)]
        return torch.stack([self._features(objective, view) for view in made], dim=1)

    def _features(self, objective: Objective, images: Tensor) -> Tensor:
        """(n, C, S, S), bytes or in [0, 1] -> (n, D): each rank embeds an equal share (the last padded)."""
        rank, world = dist.get_rank(), dist.get_world_size()
        share = -(-len(images) // world)
        mine = images[torch.arange(rank * share, (rank + 1) * share).clamp(max=len(images) - 1)]
        chunks = (chunk.to(self.device) for chunk in mine.split(_BATCH))
        parts = [objective.backbone(to_float(x) if x.dtype == torch.uint8 else x).float() for x in chunks]
        return gather_rows(torch.cat(parts))[: len(images)]


def probe(features: Tensor, labels: Tensor, k: int) -> dict[str, float]:
    """Trained on the even half of features (n, D) with labels (n,), accuracy on the odd half.

    `knn_accuracy`: a majority vote of the k nearest by cosine. `linear_accuracy`: ridge regression onto the labels, a
    linear classifier with a closed form.
    """
    z = F.normalize(features, dim=1)
    nearest = (z[1::2] @ z[::2].T).topk(min(k, len(z[::2])), dim=1).indices
    votes = F.one_hot(labels[::2][nearest]).sum(dim=1)
    array, targets = features.double().numpy(), labels.numpy()
    linear = make_pipeline(StandardScaler(), RidgeClassifier()).fit(array[::2], targets[::2])
    return {
        "knn_accuracy": float((votes.argmax(dim=1) == labels[1::2]).float().mean()),
        "linear_accuracy": float(linear.score(array[1::2], targets[1::2])),
    }
