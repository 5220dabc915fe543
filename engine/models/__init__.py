"""Models: transformers decoder classes, from a local directory or from a bare shape with dummy weights."""

from kvarena.engine.checkpoints.tokenizer import load_tokenizer
from kvarena.engine.models.loader import load_model
from kvarena.engine.models.spec import LoadedModel, ModelSpec

__all__ = ["LoadedModel", "ModelSpec", "load_model", "load_tokenizer"]
