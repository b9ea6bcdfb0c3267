"""The feature store, what the consumers of features share, and label-free measures of a representation's health."""

from sslscale.features.sets import FeatureSet, PartRef, open_features, sample_positions
from sslscale.features.store import FeatureStore

__all__ = ["FeatureSet", "FeatureStore", "PartRef", "open_features", "sample_positions"]
