"""Configuration: `load_config` and the models of every stage."""

from sslscale.config.load import dump_config, load_config, validate
from sslscale.config.models import (
    AnomalyConfig,
    AugmentConfig,
    BackboneConfig,
    ClusterConfig,
    CollapseConfig,
    EmbedConfig,
    IndexConfig,
    OptimizerConfig,
    PackConfig,
    PretrainConfig,
    ReduceConfig,
    ReportConfig,
    RunConfig,
    RuntimeConfig,
    StageConfig,
)

__all__ = [
    "AnomalyConfig",
    "AugmentConfig",
    "BackboneConfig",
    "ClusterConfig",
    "CollapseConfig",
    "EmbedConfig",
    "IndexConfig",
    "OptimizerConfig",
    "PackConfig",
    "PretrainConfig",
    "ReduceConfig",
    "ReportConfig",
    "RunConfig",
    "RuntimeConfig",
    "StageConfig",
    "dump_config",
    "load_config",
    "validate",
]
