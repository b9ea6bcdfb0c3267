"""Smaller vectors: what each way of compressing them keeps, and maps in two dimensions."""
