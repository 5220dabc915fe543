"""The tensors of an InternVL checkpoint, parted into language model and tower, under the native classes' names.

    vision_model.*, mlp1.*                 original  -> vision_tower.*, multi_modal_projector.*
    language_model.model.*, .output        original  -> model.*, lm_head
    model.vision_tower.*, ...              native    -> the same without `model.`
    vision_tower.*, language_model.model.* native, as saved before transformers 5

InternLM2 packs queries, keys and values into one matrix, a KV head after the other: its query heads, its key, its
value. Tensors are read from the files when they are asked for, one at a time.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from transformers import InternVLConfig

from kvarena.engine.vision.checkpoint import Part, Parted, Tensors

_TOWER = (
    (r"^vision_model\.", "vision_tower."),
    (r"\.encoder\.layers\.", ".encoder.layer."),
    (r"embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)
_PROJECTOR = {"mlp1.0.": "layer_norm.", "mlp1.1.": "linear_1.", "mlp1.3.": "linear_2."}
_INTERNLM2 = (
    ("tok_embeddings.", "embed_tokens."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
)
_PACKED_TOWER, _PACKED_TEXT = ".attention.qkv.", ".attention.wqkv."


def part_tensors(tensors: Tensors, config: InternVLConfig) -> Parted:
    """Sort tensors by where they belong, whichever format they are of."""
    parted = Parted({}, {})
    for name, tensor in tensors.items():
        plain = name.removeprefix("model.") if name.startswith(("model.vision", "model.multi", "model.lang")) else name
        if plain.startswith(("vision_model.", "vision_tower.")):
            _put_tower(parted.tower, plain, tensor)
        elif plain.startswith("mlp1."):
            place = next((new for old, new in _PROJECTOR.items() if plain.startswith(old)), plain)
            parted.tower["multi_modal_projector." + place + plain.rpartition(".")[2]] = tensor
        elif plain.startswith("multi_modal_projector."):
            parted.tower[plain] = tensor
        elif plain.startswith("language_model."):
            _put_text(parted.text, plain.removeprefix("language_model."), tensor, config, name != plain)
        else:
            parted.text[name] = tensor
    return parted


def _put_tower(into: Tensors, name: str, tensor: Any) -> None:
    for old, new in _TOWER:
        name = re.sub(old, new, name)
    if _PACKED_TOWER not in name:
        into[name] = tensor
        return
    for i, which in enumerate("qkv"):
        into[name.replace(_PACKED_TOWER, f".attention.{which}_proj.")] = Part(
            tensor,
            lambda packed, i=i: packed.chunk(3)[i],  # type: ignore[misc]
        )


def _put_text(into: Tensors, name: str, tensor: Any, config: InternVLConfig, is_bare: bool) -> None:
    """`is_bare`: the name is of the model without its head, as transformers 5 saves it."""
    name = f"model.{name}" if is_bare else re.sub(r"^output\.", "lm_head.", name)
    for old, new in _INTERNLM2:
        name = name.replace(old, new)
    if _PACKED_TEXT not in name:
        into[name] = tensor
        return
    text: Any = config.text_config
    num_kv_heads = text.num_key_value_heads
    group = text.num_attention_heads // num_kv_heads
    for which, heads in (("q", slice(0, group)), ("k", slice(group, group + 1)), ("v", slice(group + 1, group + 2))):

        def cut(packed: Tensor, heads: slice = heads) -> Tensor:
            by_head = packed.view(num_kv_heads, group + 2, -1, *packed.shape[1:])
            return by_head[:, heads].reshape(-1, *packed.shape[1:])

        into[name.replace(_PACKED_TEXT, f".self_attn.{which}_proj.")] = Part(tensor, cut)
