"""Attention over the pool: decode and prefill."""
