"""The configuration of a run: one pydantic model a stage. Numbers live in configs/, defaults here.

A field marked `not_identity` may change between two calls of the same stage (how many workers, how often to log):
it does not change what is computed. Everything else is part of the stage's identity.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

not_identity = Field(json_schema_extra={"identity": False})

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class StageConfig(BaseModel):
    """Base of every section: unknown keys are refused, and `identity()` names what a result depends on."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True)

    def identity(self) -> dict[str, Any]:
        """The settings that a result depends on, as plain JSON values."""
        skipped = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("identity") is False
        }
        return self.model_dump(mode="json", exclude=skipped)


class RuntimeConfig(StageConfig):
    """Where work runs. What is computed never depends on it, except through `threads` (equal on every worker)."""

    name: Literal["local", "ray"] = "ray"
    address: str | None = Field(None, description="a Ray cluster's address; none starts one on this machine")
    workers: Positive = Field(2, description="workers of embed, cluster and anomaly")
    threads: Positive = Field(1, description="threads a worker computes with; part of every result's identity")
    max_retries: int = Field(3, ge=0, description="how often an item is tried again when its worker is lost")


class PackConfig(StageConfig):
    """Writes a source's samples into tar shards."""

    source: str
    path: str | None = Field(None, description="where the source's own files are, for the sources that need it")
    output: Annotated[str, not_identity] = Field(description="folder of the shards: one sub-folder a split")
    samples_per_shard: Positive = 4096
    format: Literal["png", "jpeg"] = "png"
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    limit: int | None = Field(None, ge=1, description="at most so many samples a split")
    workers: Annotated[int, not_identity] = Field(2, ge=1)


class BackboneConfig(StageConfig):
    """A timm model by name and arguments, randomly initialised."""

    library: Literal["timm"] = "timm"
    architecture: str = "resnet18"
    kwargs: dict[str, Any] = Field(default_factory=dict, description="arguments of timm.create_model")
    stem: Literal["default", "small"] = Field("default", description="small: 3x3 stride-1 first conv and no pool")
    channels: Literal[1, 3] = 3
    mean: list[float] = Field(default_factory=lambda: [0.5])
    std: list[float] = Field(default_factory=lambda: [0.5])


class AugmentConfig(StageConfig):
    """The recipe of an augmented view; every draw is keyed by (seed, epoch, sample)."""

    size: Positive = Field(32, description="side of the view in pixels")
    crop_scale: tuple[Fraction, Fraction] = Field((0.2, 1.0), description="share of the area that a crop keeps")
    crop_ratio: tuple[float, float] = Field((0.75, 4 / 3), description="aspect ratio of a crop")
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
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: Fraction = 0.0
    noise: float = Field(0.0, ge=0.0, description="standard deviation of additive Gaussian noise, in [0, 1] units")
    erase: Fraction = Field(0.0, description="probability that a rectangle is erased")
    erase_scale: tuple[Fraction, Fraction] = (0.02, 0.33)


class OptimizerConfig(StageConfig):
    """The optimizer and its schedules: the rate warms up linearly, then falls to `final_lr` along a cosine."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = Field(1e-3, gt=0.0)
    layer_decay: float = Field(1.0, gt=0.0, le=1.0, description="factor of the rate from a layer to the one below it")
    weight_decay: float = Field(1e-4, ge=0.0, description="of matrices and kernels; vectors do not decay")
    final_weight_decay: float | None = Field(None, ge=0.0, description="what a cosine ends at; none: it is constant")
    trust_coefficient: float = Field(1e-3, gt=0.0, description="of lars")
    momentum: Fraction = 0.9
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
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
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    init_from: Annotated[str | None, not_identity] = Field(
        None, description="first weights: a run, a backbone/ folder, a file of timm's weights (named by their hash)"
    )
    freeze_backbone: bool = Field(False, description="train the heads only, on the backbone of init_from")
    views: AugmentConfig = Field(default_factory=AugmentConfig)
    load_size: int | None = Field(None, ge=1, description="side that images are resized to when read; none: views.size")
    epochs: float | None = Field(10, gt=0)
    steps: int | None = Field(None, ge=1, description="instead of epochs")
    global_batch: Positive = 256
    micro_batch: int | None = Field(
        None, ge=1, description="largest batch of one pass on one rank; none: no accumulation"
    )
    num_streams: Positive = Field(8, description="streams of the shard plan; belongs to the run, not to the cluster")
    shuffle_block: Positive = Field(16384, description="samples shuffled together within a stream")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    threads: Positive = Field(1, description="threads a rank computes with")
    num_workers: Annotated[int, not_identity] = Field(2, ge=1, description="ranks (the world size)")
    device: Annotated[Literal["auto", "cpu", "cuda"], not_identity] = "auto"
    decode_threads: Annotated[int, not_identity] = Field(1, ge=1)
    prefetch: Annotated[int, not_identity] = Field(2, ge=1, description="batches read ahead")
    log_every: Annotated[int, not_identity] = Field(10, ge=1)
    evaluate_every: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    evaluate_samples: Positive = 1024
    checkpoint_every: Annotated[int, not_identity] = Field(200, ge=1)
    keep_checkpoints: Annotated[int, not_identity] = Field(2, ge=1)
    max_bad_steps: int = Field(5, ge=1, description="non-finite steps in a row before the run stops")
    max_restarts: Annotated[int, not_identity] = Field(2, ge=0, description="restarts of the group after a lost rank")
    max_failed_share: Fraction = 0.01
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
        if self.num_streams % self.num_workers:
            raise ValueError(f"num_workers ({self.num_workers}) must divide num_streams ({self.num_streams})")
        return self


class EmbedConfig(StageConfig):
    """A backbone over shards, into feature parts."""

    datasets: list[str] = Field(default_factory=lambda: ["train"], min_length=1)
    backbone: str = Field(
        "pretrain", description="pretrain (this run's), a backbone/ folder, pixels, hog or module:Class"
    )
    part_rows: Positive = Field(2**18, description="target rows of a part")
    batch_size: Positive = 256
    dtype: Literal["fp16", "fp32"] = "fp16"
    normalize: bool = Field(True, description="L2-normalise the features")
    size: int | None = Field(None, ge=1, description="side of the images; none: the backbone's input size")
    decode_threads: Annotated[int, not_identity] = Field(1, ge=1)
    device: Annotated[Literal["auto", "cpu", "cuda"], not_identity] = "auto"
    max_failed_share: Fraction = 0.01


class IndexConfig(StageConfig):
    """A FAISS index over the features."""

    datasets: list[str] | None = Field(None, description="none: every embedded dataset")
    factory: str = Field("auto", description="auto, or any faiss factory string")
    metric: Literal["l2", "cosine"] = "cosine"
    nprobe: int | None = Field(None, ge=1)
    train_rows: Positive = Field(1_000_000, description="rows that the index is trained on, at most")
    recall_queries: Positive = Field(1000, description="queries that recall@10 is measured on")


# A tag names the branch that an error is about: the empty one is the setting itself.
OneOrSeveral = Annotated[
    Annotated[Positive, Tag("")] | Annotated[list[Positive], Field(min_length=2), Tag("several")],
    Discriminator(lambda value: "several" if isinstance(value, list) else ""),
]


class ClusterConfig(StageConfig):
    """Clusters of the features."""

    datasets: list[str] | None = Field(None, description="datasets that are fitted and assigned; none: all embedded")
    num_clusters: OneOrSeveral = Field(10, description="several: each is fitted and measured, and the best kept")
    metric: Literal["l2", "cosine"] = "l2"
    init: Literal["k-means++", "kmeans||", "random"] = "k-means++"
    method: Literal["lloyd", "minibatch", "hierarchical", "hdbscan", "gmm", "spectral", "ward"] = Field(
        "minibatch",
        description="k-means: minibatch (early iterations on growing samples and by projections) or lloyd (all exact), "
        "or hierarchical (two levels, for very many clusters); "
        "or scikit-learn's, where the samples are few",
    )
    num_init: Positive = Field(5, description="restarts; the lowest objective wins")
    max_iterations: Positive = 50
    tolerance: float = Field(1e-4, ge=0.0, description="relative fall of the objective that ends the iterations")
    silhouette_samples: Positive = 2000


class ReduceConfig(StageConfig):
    """What compression costs, as a table, and a 2-D map of a sample."""

    datasets: list[str] | None = Field(None, description="none: every embedded dataset")
    metric: Literal["l2", "cosine"] = "cosine"
    code_bytes: list[int] = Field(default_factory=lambda: [16, 32], description="bytes a vector of OPQ+PQ")
    pca_dims: list[int] = Field(default_factory=lambda: [32, 64], description="dimensions kept by PCA, as fp32")
    rows: Positive = Field(200_000, description="rows that codes are trained and measured on, at most")
    queries: Positive = Field(1000, description="queries that recall@10 is measured on")
    candidates: Positive = Field(100, description="neighbours by code that are ranked again by the exact distance")
    map: Literal["pca", "umap"] | None = Field("pca", description="umap needs the extra 'maps'; none: no map")
    map_rows: Positive = 5000


class AnomalyConfig(StageConfig):
    """kNN anomaly scores: the mean distance to the k nearest reference rows."""

    datasets: list[str] | None = Field(None, description="datasets that are scored; none: all embedded")
    reference: list[str] | None = Field(None, description="datasets that are the normal data; none: the scored ones")
    k: Positive = 10
    metric: Literal["l2", "cosine"] = "cosine"
    normal_labels: list[int] | None = Field(None, description="labels that count as normal, for AUROC only")


class ReportConfig(StageConfig):
    """One self-contained HTML file."""

    title: str | None = None
    exemplars: Positive = Field(12, description="thumbnails a cluster")
    max_clusters: Positive = Field(50, description="clusters shown with thumbnails, largest first")
    anomalies: Positive = Field(16, description="most anomalous samples shown")
    neighbours: Positive = 5


class RunConfig(StageConfig):
    """A whole run: the stages in order over one run directory."""

    run: str = Field("runs/main", description="the run directory")
    seed: int = 0
    datasets: dict[str, str] = Field(default_factory=dict, description="name -> shards: a folder, file or brace range")
    limit: int | None = Field(None, ge=1, description="use at most so many samples of a dataset")
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    pack: PackConfig | None = None
    pretrain: PretrainConfig | None = None
    embed: EmbedConfig = Field(default_factory=EmbedConfig)
    index: IndexConfig | None = Field(default_factory=IndexConfig)
    cluster: ClusterConfig | None = Field(default_factory=ClusterConfig)
    anomaly: AnomalyConfig | None = Field(default_factory=AnomalyConfig)
    reduce: ReduceConfig | None = None
    report: ReportConfig | None = Field(default_factory=ReportConfig)
    baselines: list[str] = Field(
        default_factory=list, description="backbones (pixels, hog) to cluster with the same code"
    )
