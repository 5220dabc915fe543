"""Floors of a shape, and the requests of the engine benchmark (workload (a) among them)."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.settings.compose import load_run

# Of conf/model/NAME-shape.yaml: those of the llama kind.
SHAPES = ("llama-3.1-8b", "qwen3-0.6b")
# For checks: one with heads and sizes that every kernel takes.
TINY = (
    "model=path", "model.name=tiny", "model.load_format=dummy",
    "model.shape={model_type:qwen3,hidden_size:64,intermediate_size:96,num_hidden_layers:2,num_attention_heads:4,"
    "num_key_value_heads:2,head_dim:16,vocab_size:512,max_position_embeddings:8192,rms_norm_eps:1e-6,"
    "tie_word_embeddings:true}",
)  # fmt: skip
MAX_MODEL_LEN = 8192


def model_of(name: str) -> tuple[str, ...]:
    """The settings of a model by its name on a benchmark's command line: `demo`, `tiny`, or one of SHAPES."""
    if name == "tiny":
        return TINY
    return (f"model={name}" if name == "demo" else f"model={name}-shape",)


def shape_of(name: str) -> dict[str, Any]:
    """The content of its config.json, of one of SHAPES."""
    shape = load_run(model_of(name)).model.shape
    assert shape is not None
    return shape


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
