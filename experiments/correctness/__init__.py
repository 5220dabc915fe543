"""Strategies against the oracle on random traces, and a run's tokens against transformers' own generation."""
