"""Weights of few bits: read from the formats in which checkpoints pack them, and multiplied as they are."""
