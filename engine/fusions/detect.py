"""Finds decoders of the llama shape among transformers' modules, whatever the model is called, and checks the result.

The shape: `model.{embed_tokens, layers, norm, rotary_emb}` and `lm_head`; each layer with
`self_attn.{q,k,v,o}_proj` (a bias or none; RMS norms over a head, `q_norm` and `k_norm`, or none),
`input_layernorm` and `post_attention_layernorm` (RMS), and an `mlp`: silu(gate) * up and down, experts of that kind
with a router (`gate`, `experts`; one that all tokens share behind a gate, or none), or any other module, which then
stays as it is. What the shape cannot tell (an odd multiplier, another order) the check finds: every fused
layer is compared with its module on the same input before it is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvarena.engine.attention.temperature import is_tuned
from kvarena.engine.errors import KvarenaError
from kvarena.engine.fusions.check import Recording, check_decoder, record, turns_by_three
from kvarena.engine.fusions.decoder import FusedDecoder
from kvarena.engine.fusions.detect_experts import find_experts, is_glu, is_linear
from kvarena.engine.fusions.experts import Experts
from kvarena.engine.fusions.layers import (
    AttentionArgs,
    FusedAttention,
    FusedExperts,
    FusedGlu,
    FusedLayer,
    ModuleMlp,
)
from kvarena.engine.fusions.ops import HeadNorms, Heads, Linear, Norm, Ops
from kvarena.engine.fusions.pack import projection
from kvarena.engine.fusions.packed_ops import PackedOps
from kvarena.engine.fusions.reducing_ops import Reducer, ReducingOps
from kvarena.engine.models.spec import LoadedModel
from kvarena.engine.quantization.linear import PackedLinear, PackedProjection


class NotFusable(KvarenaError):
    """The model does not have the shape that the fused path knows; it runs on its transformers modules."""


def fuse(model: LoadedModel, ops: Ops, max_model_len: int, reducer: Reducer | None = None) -> FusedDecoder:
    """Build the fused form of `model`, which shares its weights.

    Args:
        model: bound to the attention hook. Its projections' parameters become views of packed ones. May be a stage's.
        ops: what computes; packed projections have kernels of their own.
        max_model_len: positions of the rotation table.
        reducer: of a model whose row-parallel products are parts of a sum.

    Raises:
        NotFusable: the model has another shape, or a fused layer differs from its module; says where.
    """
    module = model.module
    body = _child(module, "model", "the model")
    layers: Any = _child(body, "layers", "model")
    head = _linear(_child(module, "lm_head", "the model"), "lm_head")
    embedding = _child(body, "embed_tokens", "model")
    if not isinstance(embedding, nn.Embedding):
        raise NotFusable(f"model.embed_tokens is a {type(embedding).__name__}")
    is_last = model.shard is None or model.shard.layout.is_last
    # Looked at before anything is changed.
    for index, layer in enumerate(layers):
        _check_shape(layer, index)
    with torch.no_grad(), torch.device(model.device):
        rotary = _child(body, "rotary_emb", "model")
        rotation = _rotation(rotary, max_model_len)
        recording = record(model, max_model_len)
        num_read = torch.zeros(len(layers), dtype=torch.int32)
        experts = [find_experts(layer.mlp, num_read[index : index + 1]) for index, layer in enumerate(layers)]
        decoder = FusedDecoder(
            embed=_embed(embedding, reducer),
            rotation=rotation,
            layers=tuple(_layer(layer, index, recording, experts[index]) for index, layer in enumerate(layers)),
            norm=_norm(_child(body, "norm", "model"), "model.norm") if is_last else None,
            head=_projection([head], "lm_head") if is_last else None,
            ops=_ops_of(model, ops, reducer),
            num_read=num_read if any(experts) else None,
            axes=_axes(rotary),
        )
        difference = check_decoder(decoder, recording)
        if difference is not None and decoder.num_read is not None:
            # Experts of another kind than their parts tell may still be modules behind fused attention.
            decoder = _without_experts(decoder, layers)
            difference = check_decoder(decoder, recording)
    if difference is not None:
        raise NotFusable(difference)
    if isinstance(decoder.ops, ReducingOps):
        decoder.ops.defers = True
    return decoder


def _embed(embedding: Any, reducer: Reducer | None) -> Callable[[Tensor], Tensor]:
    """The rows of tokens; of an embedding that is shared out, added up as all else is."""
    if reducer is None or not hasattr(embedding, "part"):  # no later stage has tokens to embed
        return functools.partial(F.embedding, weight=embedding.weight.detach())
    return lambda input_ids: reducer.sum(embedding.part(input_ids))


def _ops_of(model: LoadedModel, ops: Ops, reducer: Reducer | None) -> Ops:
    found: Ops = PackedOps(ops) if any(isinstance(part, PackedLinear) for part in model.module.modules()) else ops
    return found if reducer is None else ReducingOps(found, reducer)


def _without_experts(decoder: FusedDecoder, layers: Any) -> FusedDecoder:
    """The decoder with its experts left to the `layers`' own modules."""
    left = (
        replace(fused, mlp=ModuleMlp(fused.mlp.norm, layer.mlp)) if isinstance(fused.mlp, FusedExperts) else fused
        for fused, layer in zip(decoder.layers, layers, strict=True)
    )
    return replace(decoder, layers=tuple(left), num_read=None)


def _layer(layer: nn.Module, index: int, recording: Recording, experts: Experts | None) -> FusedLayer:
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    q, k = attention.q_proj, attention.k_proj
    head_dim = recording.head_dim
    out = attention.o_proj
    post_norm = _norm(layer.post_attention_layernorm, f"layer {index}: post_attention_layernorm")
    return FusedLayer(
        attention=FusedAttention(
            index=index,
            norm=_norm(layer.input_layernorm, f"layer {index}: input_layernorm"),
            qkv=_projection([q, k, attention.v_proj], f"layer {index}: q_proj, k_proj and v_proj"),
            out=_projection([out], f"layer {index}: o_proj"),
            heads=Heads(q.out_features // head_dim, k.out_features // head_dim, head_dim),
            head_norms=_head_norms(attention, head_dim, f"layer {index}.self_attn"),
            args=AttentionArgs(*recording.args[index]),
        ),
        mlp=_mlp(mlp, post_norm, index, experts),
    )


def _mlp(mlp: Any, norm: Norm, index: int, experts: Experts | None) -> FusedGlu | FusedExperts | ModuleMlp:
    if experts is not None:
        shared = getattr(mlp, "shared_expert", None)
        return FusedExperts(norm, experts, None if shared is None else _glu(shared, norm, index))
    return _glu(mlp, norm, index) if is_glu(mlp) else ModuleMlp(norm, mlp)


def _glu(mlp: Any, norm: Norm, index: int) -> FusedGlu:
    gate_up = _projection([mlp.gate_proj, mlp.up_proj], f"layer {index}: gate_proj and up_proj")
    if isinstance(gate_up, PackedProjection):
        gate_up.product.is_gated = True
    return FusedGlu(
        norm=norm,
        gate_up=gate_up,
        down=_projection([mlp.down_proj], f"layer {index}: down_proj"),
    )


def _projection(layers: list[nn.Linear | PackedLinear], where: str) -> Linear | PackedProjection:
    found = projection(layers)
    if found is None:
        raise NotFusable(
            f"{where} are packed in different ways, or each has a kernel of its own already, so they are no one product"
        )
    return found


def _check_shape(layer: nn.Module, index: int) -> None:
    where = f"layer {index}"
    attention = _child(layer, "self_attn", where)
    if is_tuned(attention):
        raise NotFusable(f"{where}.self_attn scales its queries by position")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        _linear(_child(attention, name, f"{where}.self_attn"), f"{where}.self_attn.{name}")
    for name in ("input_layernorm", "post_attention_layernorm"):
        _norm(_child(layer, name, where), f"{where}.{name}")
    _child(layer, "mlp", where)
    known = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    others = [name for name, child in layer.named_children() if name not in known and list(child.parameters())]
    if others:
        raise NotFusable(f"{where} has a module that the llama shape lacks: {others[0]}")


def _head_norms(attention: nn.Module, head_dim: int, where: str) -> HeadNorms | None:
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if norms == [None, None]:
        return None
    q, k = (_norm(norm, f"{where}: query or key norm") for norm in norms)
    if len(q.weight) != head_dim or len(k.weight) != head_dim or q.eps != k.eps:
        raise NotFusable(f"{where} norms queries and keys otherwise than by the head")
    return HeadNorms(q, k)


def _rotation(rotary: nn.Module, num_positions: int) -> Tensor:
    """float32 [positions, rotary_dim]: cosines and sines as the module gives them."""
    positions = torch.arange(num_positions)[None]
    if turns_by_three(rotary):
        positions = positions.expand(3, 1, -1)
    try:
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise NotFusable(f"model.rotary_emb is not called as rotary_emb(x, position_ids): {error}") from error
    half = cos.shape[-1] // 2
    if cos.shape[-1] % 2 or not torch.equal(cos[..., :half], cos[..., half:]):
        raise NotFusable("model.rotary_emb does not pair the halves of a head")
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)


def _axes(rotary: nn.Module) -> Tensor | None:
    """`FusedDecoder.axes`, found by turning along one axis at a time."""
    if not turns_by_three(rotary):
        return None
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.eye(3, dtype=torch.int64)[:, None])
    half = cos.shape[-1] // 2
    return sin[0, :, :half].abs().argmax(0).repeat(2)


def _norm(module: object, where: str) -> Norm:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        raise NotFusable(f"{where} is a {type(module).__name__}, not an RMS norm with a weight and an epsilon")
    if getattr(module, "bias", None) is not None:
        raise NotFusable(f"{where} has a bias, so it is no RMS norm")
    return Norm(weight.detach(), eps)


def _linear(module: nn.Module, where: str) -> nn.Linear | PackedLinear:
    if isinstance(module, (nn.Linear, PackedLinear)) and is_linear(module):
        return module
    raise NotFusable(f"{where} is a {type(module).__name__}, not a plain linear layer")


def _child(module: nn.Module, name: str, where: str) -> nn.Module:
    child = getattr(module, name, None)
    if not isinstance(child, nn.Module):
        raise NotFusable(f"{where} has no module {name}")
    return child
