"""Configuration: `load_config` and the models of every stage."""

from sslscale.config.backbones import AnyBackboneConfig, BackboneConfig, FramesConfig, TextConfig, VideoMAEConfig
from sslscale.config.base import StageConfig
from sslscale.config.load import dump_config, load_config, validate
from sslscale.config.models import (
    AnomalyConfig,
    AugmentConfig,
    ClusterConfig,
    CollapseConfig,
    DedupConfig,
    EmbedConfig,
    IndexConfig,
    OptimizerConfig,
    PackConfig,
    PretrainConfig,
    ReduceConfig,
    ReportConfig,
    RunConfig,
    RuntimeConfig,
    StorageConfig,
)

__all__ = [
    "AnomalyConfig",
    "AnyBackboneConfig",
    "AugmentConfig",
    "BackboneConfig",
    "ClusterConfig",
    "CollapseConfig",
    "DedupConfig",
    "EmbedConfig",
    "FramesConfig",
    "IndexConfig",
    "OptimizerConfig",
    "PackConfig",
    "PretrainConfig",
    "ReduceConfig",
    "ReportConfig",
    "RunConfig",
    "RuntimeConfig",
    "StageConfig",
    "StorageConfig",
    "TextConfig",
    "VideoMAEConfig",
    "dump_config",
    "load_config",
    "validate",
]
