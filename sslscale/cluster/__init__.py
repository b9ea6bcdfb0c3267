"""Clusters: k-means on arrays and over feature stores, and what a clustering is worth with and without labels."""

from sslscale.cluster.kmeans import KMeans

__all__ = ["KMeans"]
