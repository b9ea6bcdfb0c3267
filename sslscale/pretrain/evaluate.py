"""Evaluations while training: health of the features without any label, and probes where labelled data is given."""

from __future__ import annotations

import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sslscale.config import CollapseConfig, RunConfig
from sslscale.errors import UserError
from sslscale.features.health import alignment, alpha_req, feature_std, lidar, rankme, uniformity
from sslscale.models.collectives import gather_rows
from sslscale.objectives.base import Objective
from sslscale.shards.cache import ShardCache
from sslscale.shards.dataset import ShardSet, open_shards
from sslscale.shards.decode import DecodeError, known_label
from sslscale.shards.readers import Reader
from sslscale.shards.stream import Sample, read_spans, spread_spans
from sslscale.views.base import as_input
from sslscale.views.keyed import KeyedRandom

SUSPICIOUS_SHARE = 0.9
_BATCH = 256
_VIEWED, _VIEWS = 256, 4  # samples whose views are compared, and views of each


def is_healthy(measured: dict[str, float], guard: CollapseConfig) -> bool:
    """Whether an evaluation found the features above both thresholds."""
    return measured["feature_std"] >= guard.min_feature_std and measured["rankme"] >= guard.min_rankme


def warnings_of(measured: dict[str, float], guard: CollapseConfig | None) -> list[str]:
    """What an evaluation says is wrong, for a reader who does not know its numbers."""
    found = []
    if guard is not None and not is_healthy(measured, guard):
        found.append(f"the features have collapsed: feature_std {measured['feature_std']:.4g}")
    if measured.get("largest_cluster", 0.0) > SUSPICIOUS_SHARE:
        found.append(f"one cluster holds {measured['largest_cluster']:.1%} of the evaluated samples")
    return found


class Evaluator:
    """Reads its samples once; each evaluation is one pass of the backbone, shared between the ranks.

    `reader` makes inputs of the size that the exported backbone is given later, too.
    """

    def __init__(self, config: RunConfig, shards: ShardSet, reader: Reader, device: torch.device) -> None:
        assert config.pretrain is not None
        self.config, self.device = config.pretrain, device
        self.reader = reader
        self.inputs, _ = self._read(shards, self.config.evaluate_samples)
        held_out = self.config.held_out
        self.held_out = self.inputs
        if held_out is not None:
            others = open_shards(config.datasets[held_out], ShardCache.of(config))
            self.held_out, _ = self._read(others, self.config.evaluate_samples)
        self.probe: tuple[Tensor, Tensor] | None = None
        if self.config.probe is not None:
            labelled = open_shards(config.datasets[self.config.probe.dataset], ShardCache.of(config))
            self.probe = self._read(labelled, self.config.probe.limit)
            if (self.probe[1] < 0).any():
                raise UserError(
                    "pretrain.probe needs a labelled dataset", got=self.config.probe.dataset, fix="remove the probe"
                )

    def _read(self, shards: ShardSet, limit: int) -> tuple[Tensor, Tensor]:
        """Inputs (n, ...) and labels (n,), -1 where there is none; spread evenly over the dataset."""
        arrays, labels = [], []
        for item in read_spans(shards, spread_spans(shards, limit)):
            with contextlib.suppress(DecodeError):  # counted where it is trained on or embedded
                if isinstance(item, Sample):
                    array = self.reader.read(item.data)
                    label = known_label(item.data)
                    arrays.append(array)
                    labels.append(-1 if label is None else label)
        return self.reader.collate(arrays), torch.tensor(labels)

    @torch.no_grad()
    def evaluate(self, objective: Objective) -> dict[str, float]:
        """The same on every rank: `feature_std` (times sqrt(D): 1 is spread evenly), `rankme`, `alpha_req`,
        `uniformity` of the inputs as they are; `alignment` and `lidar` of augmented views; `knn_accuracy` and
        `linear_accuracy` with a probe; and what the objective itself measures on held-out samples.
        """
        training = objective.training
        objective.eval()
        features = self._features(objective, self.inputs).double().cpu().numpy()
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
            inputs, labels = self.probe
            measured |= probe(self._features(objective, inputs).cpu(), labels, self.config.probe.k)
        measured |= objective.evaluate(*self._held_out_share())
        objective.train(training)
        return {name: value for name, value in measured.items() if math.isfinite(value)}

    def _held_out_share(self) -> tuple[Tensor, KeyedRandom]:
        """This rank's share of the held-out inputs, and their draws, the same ones at every evaluation."""
        world = dist.get_world_size()
        ids = torch.arange(dist.get_rank(), len(self.held_out) // world * world, world)
        inputs = as_input(self.held_out[ids].to(self.device))
        ids = ids.to(self.device)
        return inputs, KeyedRandom.of(0, torch.zeros_like(ids), ids).fold("held out")

    def _views(self, objective: Objective) -> Tensor:
        """(n, q, D): features of q augmented views, the same ones at every evaluation."""
        count = min(_VIEWED, len(self.inputs))
        spread = torch.arange(count) * len(self.inputs) // count  # shards may be in the order of classes
        inputs = as_input(self.inputs[spread].to(self.device))
        ids = torch.arange(len(inputs), device=self.device)
        random = KeyedRandom.of(0, torch.zeros_like(ids), ids).fold("evaluation")
        made = [
            objective.backbone.augmented(inputs, random.fold(f"view_{i}"), self.config.views) for i in range(_VIEWS)
        ]
        return torch.stack([self._features(objective, view) for view in made], dim=1)

    def _features(self, objective: Objective, inputs: Tensor) -> Tensor:
        """(n, ...), as read or as input -> (n, D): each rank embeds an equal share (the last padded)."""
        rank, world = dist.get_rank(), dist.get_world_size()
        share = -(-len(inputs) // world)
        mine = inputs[torch.arange(rank * share, (rank + 1) * share, device=inputs.device).clamp(max=len(inputs) - 1)]
        chunks = (chunk.to(self.device) for chunk in mine.split(_BATCH))
        parts = [objective.backbone(as_input(x)).float() for x in chunks]
        return gather_rows(torch.cat(parts))[: len(inputs)]


def probe(features: Tensor, labels: Tensor, k: int) -> dict[str, float]:
    """Trained on the even half of features (n, D) with labels (n,), accuracy on the odd half.

    `knn_accuracy`: a majority vote of the k nearest by cosine. `linear_accuracy`: ridge regression onto the labels, a
    linear classifier with a closed form.
    """
    from sklearn.linear_model import RidgeClassifier  # two seconds, which only a probe is worth
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    z = F.normalize(features, dim=1)
    nearest = (z[1::2] @ z[::2].T).topk(min(k, len(z[::2])), dim=1).indices
    votes = F.one_hot(labels[::2][nearest]).sum(dim=1)
    array, targets = features.double().numpy(), labels.numpy()
    linear = make_pipeline(StandardScaler(), RidgeClassifier()).fit(array[::2], targets[::2])
    return {
        "knn_accuracy": float((votes.argmax(dim=1) == labels[1::2]).float().mean()),
        "linear_accuracy": float(linear.score(array[1::2], targets[1::2])),
    }
