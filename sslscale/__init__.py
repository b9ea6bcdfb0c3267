"""sslscale: clusters, anomaly scores and a searchable index from unlabelled shards, by self-supervision.

Importing this package imports nothing heavy (no torch, ray, deepspeed or faiss); each stage imports what it needs.
"""

__version__ = "0.1.0"
