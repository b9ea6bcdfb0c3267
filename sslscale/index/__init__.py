"""FAISS indexes over feature stores, and exact search to measure them by."""

from sslscale.index.search import Index

__all__ = ["Index"]
