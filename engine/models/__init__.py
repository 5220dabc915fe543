"""Models: transformers decoder classes, from a local directory or from a bare shape with dummy weights."""

from engine.checkpoints.tokenizer import load_tokenizer
from engine.models.loader import load_model
from engine.models.spec import LoadedModel, ModelSpec

__all__ = ["LoadedModel", "ModelSpec", "load_model", "load_tokenizer"]
