"""Model shapes, workload (a) and floors of the engine benchmark."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from kvarena.engine.request import Request, SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 8192,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    # For a try-out without a GPU.
    "tiny": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
}
MAX_MODEL_LEN = 8192


class Floor(NamedTuple):
    """What a forward must move and compute, whatever computes it; bf16.

    Attributes:
        weight_bytes: matrices that a decode step reads: every layer's, and the output head's.
        layer_params: of these, the layers' parameters.
        head_params: and the head's.
        tail_params: those of the last layer's output projection and MLP, which only sampled tokens need.
        kv_bytes_per_token: keys and values of a token in all layers.
        attention_flops: operations per pair of query and key, all layers.
    """

    weight_bytes: int
    layer_params: int
    head_params: int
    tail_params: int
    kv_bytes_per_token: int
    attention_flops: int

    def decode(self, batch: int, context: float) -> tuple[float, float]:
        """Bytes and operations of a decode step."""
        moved = self.weight_bytes + batch * context * self.kv_bytes_per_token
        flops = 2 * batch * (self.layer_params + self.head_params) + batch * context * self.attention_flops
        return moved, flops

    def prefill(self, num_prompts: int, length: int) -> tuple[float, float]:
        """Bytes and operations of whole prompts with one token sampled each."""
        tokens = num_prompts * length
        moved = self.weight_bytes + tokens * self.kv_bytes_per_token
        flops = 2 * (
            tokens * (self.layer_params - self.tail_params) + num_prompts * (self.tail_params + self.head_params)
        )
        return moved, flops + tokens * (length + 1) / 2 * self.attention_flops


def floor_of(shape: dict[str, Any]) -> Floor:
    """The floor of a dense shape of the llama kind."""
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads, kv_heads, head_dim = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    head = hidden * shape["vocab_size"]
    return Floor(
        weight_bytes=2 * (layers * layer + head),
        layer_params=layers * layer,
        head_params=head,
        tail_params=hidden * head_dim * heads + 3 * hidden * inner,
        kv_bytes_per_token=4 * layers * kv_heads * head_dim,
        attention_flops=4 * layers * heads * head_dim,
    )


def offline_workload(num_requests: int = 256, longest: int = 1024) -> list[Request]:
    """Workload (a) of the comparison: random prompts and lengths, all at once, end-of-sequence ignored."""
    source = random.Random(0)
    prompts = [[source.randint(0, 10000) for _ in range(source.randint(100, longest))] for _ in range(num_requests)]
    lengths = [source.randint(100, longest) for _ in range(num_requests)]
    return [
        Request(f"a{i}", prompt, SamplingParams(temperature=0.6, max_tokens=length, ignore_eos=True))
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def fixed_batch(num_requests: int, length: int, max_tokens: int, *, vocab_size: int, name: str = "b") -> list[Request]:
    """Equal requests of random tokens, sampled at temperature 0.6."""
    source = random.Random(1)
    top = min(10000, vocab_size - 1)
    return [
        Request(
            f"{name}{i}",
            [source.randint(0, top) for _ in range(length)],
            SamplingParams(temperature=0.6, max_tokens=max_tokens, ignore_eos=True),
        )
        for i in range(num_requests)
    ]
