"""Duplicates: samples with the same bytes, and the same picture encoded again."""
