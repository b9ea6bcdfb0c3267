"""The configuration of a run: one pydantic model a stage. Numbers live in configs/, defaults here.

A field marked `not_identity` may change between two calls of the same stage (how many workers, how often to log):
it does not change what is computed. Everything else is part of the stage's identity.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from sslscale.config.backbones import AnyBackboneConfig, BackboneConfig
from sslscale.config.base import AboveZero, Fraction, Positive, Range, StageConfig, not_identity

Share = Annotated[float, Field(gt=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Names = Annotated[list[str], Field(min_length=1)]

# Errors name a setting without its tags, which are what begins with "=".
Ranks = Annotated[
    Annotated[Positive, Tag("=one")] | Annotated[Range[Positive], Tag("=range")],
    Discriminator(lambda value: "=range" if isinstance(value, list | tuple) else "=one"),
]


class RuntimeConfig(StageConfig):
    """Where work runs. What is computed never depends on it, except through `threads` (equal on every worker)."""

    name: Literal["local", "ray"] = "ray"
    address: str | None = Field(None, description="a Ray cluster's address; none starts one on this machine")
    workers: Positive = Field(2, description="workers of embed, cluster and anomaly")
    threads: Positive = Field(1, description="threads a worker computes with; part of every result's identity")
    max_retries: int = Field(3, ge=0, description="how often an item is tried again when its worker is lost")


class StorageConfig(StageConfig):
    """Copies of remote shards, on every machine."""

    cache: str | None = Field(None, description="their folder, the same on every machine; none: in the run directory")
    cache_gb: float = Field(50.0, gt=0.0, description="above it the copies used longest ago are deleted")


class PackConfig(StageConfig):
    """Writes a source's samples into tar shards."""

    source: str
    path: str | None = Field(None, description="where the source's own files are, for the sources that need it")
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the source, by name")
    output: Annotated[str, not_identity] = Field(description="folder of the shards: one sub-folder a split")
    samples_per_shard: Positive = 4096
    format: Literal["png", "jpeg"] = "png"
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    limit: int | None = Field(None, ge=1, description="at most so many samples a split")
    workers: Annotated[int, not_identity] = Field(2, ge=1)


class AugmentConfig(StageConfig):
    """The recipe of an augmented view; every draw is keyed by (seed, epoch, sample)."""

    size: Positive = Field(32, description="side of the view in pixels")
    crop_scale: Range[Share] = Field((0.2, 1.0), description="share of the area that a crop keeps")
    crop_ratio: Range[AboveZero] = Field((0.75, 4 / 3), description="aspect ratio of a crop")
    flip: Fraction = 0.5
    rotate_degrees: float = Field(0.0, ge=0.0, le=180.0)
    shear_degrees: float = Field(0.0, ge=0.0, le=60.0)
    shift: Fraction = Field(0.0, description="largest shift, as a share of the side")
    brightness: float = Field(0.0, ge=0.0)
    contrast: float = Field(0.0, ge=0.0)
    saturation: float = Field(0.0, ge=0.0)
    hue: float = Field(0.0, ge=0.0, le=0.5)
    jitter_probability: Fraction = 0.8
    grayscale: Fraction = 0.0
    blur: Fraction = Field(0.0, description="probability of a Gaussian blur")
    blur_sigma: Range[AboveZero] = Field((0.1, 2.0), description="standard deviation of the blur in pixels")
    solarize: Fraction = 0.0
    noise: float = Field(0.0, ge=0.0, description="standard deviation of additive Gaussian noise, in [0, 1] units")
    erase: Fraction = Field(0.0, description="probability that a rectangle is erased")
    erase_scale: Range[Fraction] = Field((0.02, 0.33), description="share of the area that is erased")

    @model_validator(mode="after")
    def _room_for_blur(self) -> AugmentConfig:
        if self.blur and self.size == 1:
            raise ValueError("blur needs views of 2 pixels or more a side, and size is 1")
        return self


class OptimizerConfig(StageConfig):
    """The optimizer and its schedules: the rate warms up linearly, then falls to `final_lr` along a cosine."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = Field(1e-3, gt=0.0)
    layer_decay: float = Field(1.0, gt=0.0, le=1.0, description="factor of the rate from a layer to the one below it")
    weight_decay: float = Field(1e-4, ge=0.0, description="of matrices and kernels; vectors do not decay")
    final_weight_decay: float | None = Field(None, ge=0.0, description="what a cosine ends at; none: it is constant")
    trust_coefficient: float = Field(1e-3, gt=0.0, description="of lars")
    momentum: Fraction = 0.9
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    warmup_share: Fraction = Field(0.05, description="share of all steps spent warming up")
    final_lr: float = Field(0.0, ge=0.0, description="the learning rate that the cosine ends at")
    clip_norm: float = Field(0.0, ge=0.0, description="gradient norm to clip at; 0 does not clip")


class CollapseConfig(StageConfig):
    """Stops a run whose features have collapsed: under one of the thresholds at so many evaluations in a row."""

    min_feature_std: Fraction = Field(0.01, description="of unit features, times sqrt(dim): 1 is spread evenly")
    min_rankme: float = Field(1.05, ge=0.0, description="effective rank: 1 is a single direction")
    evaluations: Positive = 2


class ProbeConfig(StageConfig):
    """kNN and linear probes on a held-out labelled dataset, at every evaluation. Training never sees the labels."""

    dataset: str
    k: Positive = 20
    limit: Positive = Field(4096, description="samples used: half as the bank, half as queries")


class PretrainConfig(StageConfig):
    """Data-parallel self-supervised training of one objective."""

    dataset: str = "train"
    objective: dict[str, Any] = Field(
        default_factory=lambda: {"name": "simclr"}, description="name, or module:Class, and the objective's settings"
    )
    backbone: AnyBackboneConfig = Field(default_factory=BackboneConfig)
    init_from: Annotated[str | None, not_identity] = Field(
        None, description="first weights: a run, a backbone/ folder, a file of weights (named by their hash)"
    )
    freeze_backbone: bool = Field(False, description="train the heads only, on the backbone of init_from")
    views: AugmentConfig = Field(default_factory=AugmentConfig)
    load_size: int | None = Field(None, ge=1, description="side that images are resized to when read; none: views.size")
    epochs: float | None = Field(10, gt=0)
    steps: int | None = Field(None, ge=1, description="instead of epochs")
    global_batch: Positive = 256
    micro_batch: Annotated[int | None, not_identity] = Field(
        None, ge=1, description="largest batch of one pass on one rank; none: no accumulation"
    )
    num_streams: Positive = Field(8, description="streams of the shard plan; belongs to the run, not to the cluster")
    shuffle_block: Positive = Field(16384, description="samples shuffled together within a stream")
    batch_norm: Literal["global", "stream"] = Field("global", description="statistics over all ranks, or by stream")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("fp32", description="auto: bf16 where all ranks have it")
    activation_checkpointing: Annotated[bool, not_identity] = Field(
        False, description="keep the inputs of the backbone's blocks only, and compute the rest again in the backward"
    )
    offload_optimizer: Annotated[Literal["none", "cpu"], not_identity] = Field(
        "none", description="cpu: the optimizer's state lies, and steps, in the host's memory"
    )
    threads: Positive = Field(1, description="threads a rank computes with")
    num_workers: Annotated[Ranks, not_identity] = Field(
        2, description="ranks (the world size); [least, most]: as many as the cluster has room for"
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], not_identity] = "auto"
    decode_threads: Annotated[int, not_identity] = Field(1, ge=1)
    prefetch: Annotated[int, not_identity] = Field(2, ge=1, description="batches read ahead")
    log_every: Annotated[int, not_identity] = Field(10, ge=1)
    evaluate_every: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    evaluate_samples: Positive = 1024
    held_out: str | None = Field(
        None, description="dataset whose samples measure, and choose between, clusterings; none: the training set's"
    )
    checkpoint_every: Annotated[int, not_identity] = Field(200, ge=1)
    keep_checkpoints: Annotated[int, not_identity] = Field(2, ge=1, description="the newest ones")
    keep_every: Annotated[int, not_identity] = Field(
        0, ge=0, description="checkpoints at multiples of so many steps are made and kept for ever; 0: none"
    )
    max_bad_steps: int = Field(5, ge=1, description="non-finite steps in a row before the run stops")
    max_restarts: Annotated[int, not_identity] = Field(
        2, ge=0, description="restarts of the group after a lost rank, in a row without a new checkpoint"
    )
    collective_timeout_s: Annotated[float, not_identity] = Field(
        1800.0, gt=0.0, description="a rank that takes longer for a step, an evaluation or a save is lost"
    )
    trace_samples: Annotated[bool, not_identity] = Field(
        False, description="write the keys of every global batch to pretrain/samples.jsonl"
    )
    max_failed_share: Annotated[Fraction, not_identity] = 0.01
    probe: ProbeConfig | None = None
    collapse: Annotated[CollapseConfig | None, not_identity] = Field(default_factory=CollapseConfig)

    @model_validator(mode="after")
    def _one_length(self) -> PretrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps (set the other to null)")
        if self.freeze_backbone and self.init_from is None:
            raise ValueError("freeze_backbone needs init_from: the backbone would stay at random weights")
        if self.global_batch % self.num_streams:
            raise ValueError(f"num_streams ({self.num_streams}) must divide global_batch ({self.global_batch})")
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.precision == "fp16" and self.zero_stage:
            # DeepSpeed's ZeRO clips gradients that are still scaled, and its loss scale never falls after a bad step.
            raise ValueError("precision fp16 needs zero_stage 0; bf16 goes with every stage")
        if not self.world_sizes:
            own = f"num_workers ({self.num_workers})"
            if isinstance(self.num_workers, tuple):
                own = f"a number in num_workers ({list(self.num_workers)})"
            raise ValueError(f"{own} must divide num_streams ({self.num_streams})")
        return self

    @property
    def world_sizes(self) -> list[int]:
        """The numbers of ranks that a run may have, ascending: what `num_workers` allows and divides `num_streams`."""
        least, most = self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)
        return [size for size in range(least, most + 1) if self.num_streams % size == 0]


class EmbedConfig(StageConfig):
    """A backbone over shards, into feature parts."""

    datasets: Names = Field(default_factory=lambda: ["train"])
    backbone: str = Field(
        "pretrain",
        description="pretrain (this run's), a backbone/ folder, a folder of timm, transformers or "
        "sentence-transformers, timm:NAME, a TorchScript file (.pt, .ts), pixels, hog, mean_frame or module:Class",
    )
    output: str = Field(
        "pooled",
        pattern=r"^(pooled|cls|tokens_mean|layer:[1-9][0-9]*)$",
        description="pooled, cls, tokens_mean, or layer:K for the mean over positions after block or stage K",
    )
    pca: int | None = Field(None, ge=1, description="dimensions kept by a PCA; none: no projection")
    pca_rows: Positive = Field(8192, description="samples of the first dataset that the PCA is fitted on")
    part_rows: Positive = Field(2**18, description="target rows of a part")
    batch_size: Positive = 256
    dtype: Literal["fp16", "fp32"] = "fp16"
    normalize: bool = Field(True, description="L2-normalise the features")
    size: int | None = Field(
        None, ge=1, description="side of the images, or the most tokens of a text; none: the backbone's input size"
    )
    channels: Literal[1, 3] | None = Field(None, description="of the images, where neither backbone nor pretrain say")
    autocast: Literal["none", "bf16", "fp16"] = "none"
    compile: bool = Field(False, description="torch.compile the backbone")
    decode_threads: Annotated[int, not_identity] = Field(1, ge=0, description="beside the backbone; 0: in its thread")
    device: Annotated[Literal["auto", "cpu", "cuda"], not_identity] = "auto"
    max_failed_share: Annotated[Fraction, not_identity] = 0.01


class IndexConfig(StageConfig):
    """A FAISS index over the features."""

    datasets: Names | None = Field(None, description="none: every embedded dataset")
    factory: str = Field("auto", description="auto, or any faiss factory string")
    metric: Literal["l2", "cosine"] = "cosine"
    layout: Literal["merged", "on_disk", "sharded"] = Field(
        "merged", description="one index; one that is built and searched from disk; or one a shard, for many workers"
    )
    memory_gb: float | None = Field(None, gt=0, description="memory that the index may take; on disk: to be built in")
    wanted_recall: float = Field(0.95, gt=0, lt=1, description="recall@10 that the search effort is raised to reach")
    nprobe: int | None = Field(None, ge=1, description="instead of the least that reaches wanted_recall")
    train_rows: int | None = Field(None, ge=1, description="rows that the index is trained on; none: 64 a list")
    shard_rows: Positive = Field(2**20, description="rows that a worker indexes at a time; sharded: of a shard")
    recall_queries: Positive = Field(1000, description="queries that recall@10 is measured on")
    device: Annotated[Literal["auto", "cpu", "cuda"], not_identity] = Field("auto", description="of the training")


OneOrSeveral = Annotated[
    Annotated[Positive, Tag("=one")] | Annotated[list[Positive], Field(min_length=2), Tag("=several")],
    Discriminator(lambda value: "=several" if isinstance(value, list) else "=one"),
]


class ClusterConfig(StageConfig):
    """Clusters of the features."""

    datasets: Names | None = Field(None, description="datasets that are fitted and assigned; none: all embedded")
    num_clusters: OneOrSeveral = Field(10, description="several: each is fitted and measured, and the best kept")
    metric: Literal["l2", "cosine"] = "l2"
    init: Literal["auto", "k-means++", "kmeans||", "random"] = Field(
        "auto", description="of k-means; auto: k-means++, and kmeans|| for a thousand clusters and more"
    )
    method: Literal["lloyd", "minibatch", "hierarchical", "hdbscan", "gmm", "spectral", "ward", "objective"] = Field(
        "minibatch",
        description="k-means: minibatch (early iterations on growing samples, rough) or lloyd (plain), "
        "or hierarchical (two levels, for very many clusters); scikit-learn's, where the samples are few; "
        "or objective: the clusters that the pretraining objective gives, as many as it has",
    )
    balanced: bool = Field(
        False, description="hierarchical: clusters spread over what the rows cover, not where rows are many"
    )
    num_init: Positive = Field(5, description="restarts; the lowest objective wins")
    max_iterations: Positive = 50
    tolerance: float = Field(1e-4, ge=0.0, description="relative fall of the objective that ends the iterations")
    silhouette_samples: Positive = 2000
    device: Annotated[Literal["auto", "cpu", "cuda"], not_identity] = Field("auto", description="of flat k-means")

    @model_validator(mode="after")
    def _goes_with_the_method(self) -> ClusterConfig:
        if isinstance(self.num_clusters, list) and self.method not in ("lloyd", "minibatch"):
            raise ValueError(
                "several numbers of clusters are tried by flat k-means only: give one number, or set method=minibatch "
                f"(num_clusters is {self.num_clusters}, method {self.method})"
            )
        if self.balanced and self.method != "hierarchical":
            raise ValueError(f"balanced needs method=hierarchical, and method is {self.method}")
        return self


class ReduceConfig(StageConfig):
    """What compression costs, as a table, and a 2-D map of a sample."""

    datasets: Names | None = Field(None, description="none: every embedded dataset")
    metric: Literal["l2", "cosine"] = "cosine"
    code_bytes: list[Positive] = Field(default_factory=lambda: [16, 32], description="bytes a vector of OPQ+PQ")
    pca_dims: list[Positive] = Field(default_factory=lambda: [32, 64], description="dimensions kept by PCA, as fp32")
    rows: Positive = Field(200_000, description="rows that codes are trained and measured on, at most")
    queries: Positive = Field(1000, description="queries that recall@10 is measured on")
    candidates: Positive = Field(100, description="neighbours by code that are ranked again by the exact distance")
    map: Literal["pca", "umap"] | None = Field("pca", description="umap needs the extra 'maps'; none: no map")
    map_rows: Positive = 5000


class AnomalyConfig(StageConfig):
    """Anomaly scores: the mean distance to the k nearest reference rows, or the pretraining objective's own."""

    datasets: Names | None = Field(None, description="datasets that are scored; none: all embedded")
    reference: Names | None = Field(None, description="datasets that are the normal data; none: the scored ones")
    k: Positive = 10
    metric: Literal["l2", "cosine"] = "cosine"
    method: Literal["auto", "exact", "all_pairs", "objective"] = Field(
        "auto",
        description="all_pairs searches the scored rows in themselves, approximately; auto: where they are many; "
        "objective: the scores that the pretraining objective gives",
    )
    wanted_recall: Fraction = Field(0.95, description="share of the exact neighbours that all_pairs finds")
    normal_labels: list[int] | None = Field(None, description="labels that count as normal, for AUROC only")

    @model_validator(mode="after")
    def _searched_in_themselves(self) -> AnomalyConfig:
        if self.method == "all_pairs" and self.reference not in (None, self.datasets):
            raise ValueError(
                "method=all_pairs searches the scored datasets in themselves: leave reference out, or set method=exact "
                f"(reference is {self.reference})"
            )
        return self


class DedupConfig(StageConfig):
    """Duplicates: the same bytes, and the same picture encoded again."""

    datasets: Names | None = Field(None, description="none: all of the config's")
    features: Literal["thumbnails", "embedded"] = Field(
        "thumbnails", description="what pairs are found by: small grey images, made here, or the features of embed"
    )
    threshold: float | None = Field(
        None, gt=0.0, le=1.0, description="cosine similarity of a pair; none: pairs are compared as pictures"
    )
    k: Positive = Field(10, description="neighbours of each sample that are looked at")
    wanted_recall: Fraction = Field(0.99, description="share of the exact neighbours that are found")
    size: Positive = Field(16, description="side of a thumbnail")


class ReportConfig(StageConfig):
    """One self-contained HTML file."""

    title: str | None = None
    exemplars: Positive = Field(12, description="thumbnails a cluster")
    max_clusters: Positive = Field(50, description="clusters shown with thumbnails, largest first")
    anomalies: Positive = Field(16, description="most anomalous samples shown")
    neighbours: Positive = 5
    fetch_gb: float = Field(8.0, ge=0.0, description="read of remote shards, at most; further samples are not shown")


def _folder_names(datasets: dict[str, str]) -> dict[str, str]:
    for name in datasets:
        if not re.fullmatch(r"[^./\\][^/\\]*", name):
            raise ValueError(
                f"{name!r} cannot be the name of a dataset: its features lie in a folder of that name, so it has no "
                "slash and does not begin with a point"
            )
    return datasets


class RunConfig(StageConfig):
    """A whole run: the stages in order over one run directory."""

    run: str = Field("runs/main", description="the run directory")
    seed: int = Field(0, ge=0, lt=2**31, description="faiss takes no more bits")
    datasets: Annotated[dict[str, str], AfterValidator(_folder_names)] = Field(
        default_factory=dict, description="name -> shards: a folder, file or brace range"
    )
    limit: int | None = Field(None, ge=1, description="use at most so many samples of a dataset")
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    storage: Annotated[StorageConfig, not_identity] = Field(default_factory=StorageConfig)
    pack: PackConfig | None = None
    pretrain: PretrainConfig | None = None
    embed: EmbedConfig = Field(default_factory=EmbedConfig)
    index: IndexConfig | None = Field(default_factory=IndexConfig)
    cluster: ClusterConfig | None = Field(default_factory=ClusterConfig)
    anomaly: AnomalyConfig | None = Field(default_factory=AnomalyConfig)
    reduce: ReduceConfig | None = None
    dedup: DedupConfig | None = None
    report: ReportConfig | None = Field(default_factory=ReportConfig)
    baselines: list[str] = Field(
        default_factory=list, description="backbones (pixels, hog) to cluster with the same code"
    )
