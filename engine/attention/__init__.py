"""Attention over the KV pool: the metadata of a step, the backends, and the hook into transformers models."""
