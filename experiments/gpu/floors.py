"""Floors of a shape, and the requests of the engine benchmark (workload (a) among them)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

from kvarena.engine.checkpoints.packed_settings import MADE
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.settings.compose import load_run
from kvarena.reports.analysis.experts import ExpertLoad

# Of conf/model/NAME-shape.yaml: those of the llama kind.
SHAPES = ("llama-3.1-8b", "qwen3-0.6b")
# Of the same kind, for several cards.
LARGE_SHAPES = ("llama-3.1-70b",)
# And those whose layers have experts.
EXPERT_SHAPES = ("mixtral-8x7b", "qwen3-30b-a3b")
# For checks: one with heads and sizes that every kernel takes.
TINY = (
    "model=path", "model.name=tiny", "model.load_format=dummy",
    "model.shape={model_type:qwen3,hidden_size:64,intermediate_size:96,num_hidden_layers:2,num_attention_heads:4,"
    "num_key_value_heads:2,head_dim:16,vocab_size:512,max_position_embeddings:8192,rms_norm_eps:1e-6,"
    "tie_word_embeddings:true}",
)  # fmt: skip
MAX_MODEL_LEN = 8192


def model_of(name: str) -> tuple[str, ...]:
    """The settings of a model by its name on a benchmark's command line: `demo`, `tiny`, or one of the shapes."""
    if name == "tiny":
        return TINY
    return (f"model={name}" if name == "demo" else f"model={name}-shape",)


def shape_of(name: str) -> dict[str, Any]:
    """The content of its config.json, of one of SHAPES and EXPERT_SHAPES."""
    shape = load_run(model_of(name)).model.shape
    assert shape is not None
    return shape


class Work(NamedTuple):
    """Bytes that one part of a step must move, and operations that it takes. Parts run one after the other."""

    moved: float
    flops: float


class Floor(NamedTuple):
    """What a forward must move and compute, whatever computes it; bf16, or layers of fewer bits.

    Attributes:
        weight_bytes: matrices that any decode step reads: every layer's, and the output head's.
        layer_params: the layers' parameters that a token is multiplied with.
        head_params: and the head's.
        tail_params: those of the last layer's output projection and MLP, which only sampled tokens need.
        kv_bytes_per_token: keys and values of a token in all layers.
        attention_flops: operations per pair of query and key, all layers.
        expert_bytes: of one expert, which a step reads if a token takes it.
        expert_params: and its parameters.
        experts: how many of them that are in a balanced routing; None for a dense shape.
    """

    weight_bytes: int
    layer_params: int
    head_params: int
    tail_params: int
    kv_bytes_per_token: int
    attention_flops: int
    expert_bytes: int = 0
    expert_params: int = 0
    experts: ExpertLoad | None = None

    def decode(self, batch: int, context: float, experts_read: float | None = None) -> dict[str, Work]:
        """The parts of a decode step.

        Args:
            batch: requests.
            context: of each, in the mean.
            experts_read: experts that it read, all layers together; None: as a balanced routing does.
        """
        pairs = batch * context
        return self._products(batch, batch * self.layer_params, batch, batch * self._layers, experts_read) | {
            "attention": Work(pairs * self.kv_bytes_per_token, pairs * self.attention_flops)
        }

    def prefill(self, num_prompts: int, length: int) -> dict[str, Work]:
        """The parts of whole prompts with one token sampled each."""
        tokens = num_prompts * length
        multiplied = tokens * (self.layer_params - self.tail_params) + num_prompts * self.tail_params
        routed = tokens * max(self._layers - 1, 0) + num_prompts
        return self._products(tokens, multiplied, num_prompts, routed, None) | {
            "attention": Work(tokens * self.kv_bytes_per_token, tokens * (length + 1) / 2 * self.attention_flops)
        }

    @property
    def _layers(self) -> int:
        """Those with experts."""
        return 0 if self.experts is None else self.experts.num_layers

    def _products(
        self, num_tokens: int, multiplied: float, num_sampled: int, routed: float, experts_read: float | None
    ) -> dict[str, Work]:
        """Products with weights.

        Args:
            num_tokens: new ones.
            multiplied: parameters of layers times the tokens that each is multiplied with.
            num_sampled: tokens that the head is multiplied with.
            routed: layers with experts times the tokens that each routes.
            experts_read: see `decode`.
        """
        head_bytes = 2 * self.head_params
        parts = {"head": Work(head_bytes, 2 * num_sampled * self.head_params)}
        if self.experts is None:
            return parts | {"layers": Work(self.weight_bytes - head_bytes, 2 * multiplied)}
        if experts_read is None:
            experts_read = self._layers * self.experts.read(num_tokens)
        of_experts = routed * self.experts.top_k * self.expert_params
        return parts | {
            "layers": Work(self.weight_bytes - head_bytes, 2 * (multiplied - of_experts)),
            "experts": Work(experts_read * self.expert_bytes, 2 * of_experts),
        }


# Bytes of a weight of 4 bits: a scale of 16 bits and a zero point for each group of 128.
PACKED_BYTES = (4 + 16 / 128 + 4 / 128) / 8


def floor_of(shape: dict[str, Any], quantization: str | None = None) -> Floor:
    """The floor of a shape of the llama kind, dense or with experts in every layer and none that all tokens share.

    Args:
        shape: the content of its config.json.
        quantization: how the layers' weights are packed; routers and the output head are not.
    """
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    inner = shape.get("moe_intermediate_size", shape["intermediate_size"])
    count, top_k = shape.get("num_local_experts", shape.get("num_experts", 1)), shape.get("num_experts_per_tok", 1)
    experts = None if count == 1 else ExpertLoad(layers, count, top_k)
    heads, kv_heads, head_dim = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    expert = 3 * hidden * inner
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    router = 0 if experts is None else hidden * count
    shared = attention + (expert if experts is None else 0)
    layer = shared + router + (0 if experts is None else top_k * expert)
    head, of_a_weight = (
        hidden * shape["vocab_size"],
        2 if quantization is None else 1 if quantization in MADE else PACKED_BYTES,
    )
    return Floor(
        weight_bytes=int(layers * (of_a_weight * shared + 2 * router) + 2 * head),
        layer_params=layers * layer,
        head_params=head,
        tail_params=hidden * head_dim * heads + layer - attention,
        kv_bytes_per_token=4 * layers * kv_heads * head_dim,
        attention_flops=4 * layers * heads * head_dim,
        expert_bytes=0 if experts is None else int(of_a_weight * expert),
        expert_params=0 if experts is None else expert,
        experts=experts,
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


def fixed_batch(
    num_requests: int,
    length: int,
    max_tokens: int,
    *,
    vocab_size: int,
    name: str = "b",
    sampling: Mapping[str, Any] | None = None,
) -> list[Request]:
    """Equal requests of random tokens, sampled at temperature 0.6; `sampling`: further fields of `SamplingParams`."""
    params: dict[str, Any] = {"temperature": 0.6, "max_tokens": max_tokens, "ignore_eos": True} | dict(sampling or {})
    source = random.Random(1)
    top = min(10000, vocab_size - 1)
    return [
        Request(
            f"{name}{i}",
            [source.randint(0, top) for _ in range(length)],
            SamplingParams(**params),
        )
        for i in range(num_requests)
    ]
