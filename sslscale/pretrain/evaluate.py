"""Evaluations while training: health of the features without any label, and a kNN probe where one is configured."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sslscale.config import RunConfig
from sslscale.errors import UserError
from sslscale.features.health import feature_std, rankme
from sslscale.models.collectives import gather_rows
from sslscale.objectives.base import Objective
from sslscale.shards.dataset import ShardSet, open_shards
from sslscale.shards.decode import DecodeError, decode_image, label_of
from sslscale.shards.plan import Span
from sslscale.shards.stream import Sample, read_spans
from sslscale.views.image import to_float

_BATCH = 256


class Evaluator:
    """Reads its samples once; each evaluation is one pass of the backbone, shared between the ranks."""

    def __init__(self, config: RunConfig, shards: ShardSet, size: int, device: torch.device) -> None:
        assert config.pretrain is not None
        self.config, self.size, self.device = config.pretrain, size, device
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
        """`rankme`, `feature_std` and, with a probe, `knn_accuracy`; the same on every rank."""
        training = objective.training
        objective.eval()
        features = self._features(objective, self.images)
        array = features.cpu().numpy()
        measured = {"rankme": rankme(array), "feature_std": feature_std(array)}
        if self.probe is not None:
            images, labels = self.probe
            measured["knn_accuracy"] = self._knn(self._features(objective, images), labels)
        objective.train(training)
        return measured

    def _features(self, objective: Objective, images: Tensor) -> Tensor:
        """(n, D): each rank embeds an equal share (the last one padded), and all get the whole."""
        rank, world = dist.get_rank(), dist.get_world_size()
        share = -(-len(images) // world)
        mine = images[torch.arange(rank * share, (rank + 1) * share).clamp(max=len(images) - 1)]
        parts = [objective.backbone(to_float(chunk.to(self.device))).float() for chunk in mine.split(_BATCH)]
        return gather_rows(torch.cat(parts))[: len(images)]

    def _knn(self, features: Tensor, labels: Tensor) -> float:
        """Accuracy of a majority vote of the k nearest (cosine) in the even half, over the odd half."""
        assert self.config.probe is not None
        z, labels = F.normalize(features, dim=1), labels.to(features.device)
        nearest = (z[1::2] @ z[::2].T).topk(min(self.config.probe.k, len(z[::2])), dim=1).indices
        votes = F.one_hot(labels[::2][nearest]).sum(dim=1)
        return float((votes.argmax(dim=1) == labels[1::2]).float().mean())
