"""Anomaly scores from features: the distance to the nearest neighbours."""

from sslscale.anomaly.knn import KNNAnomaly

__all__ = ["KNNAnomaly"]
