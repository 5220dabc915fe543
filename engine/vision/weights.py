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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import InternVLConfig

from kvarena.engine.checkpoints.directory import read_config
from kvarena.engine.checkpoints.packed import PackedCheckpoint, packed_checkpoint
from kvarena.engine.quantization.state import PackedSource, PackedTensors, RenamedTensors, open_tensors

Tensors = dict[str, Any]
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


class Parted(NamedTuple):
    """A checkpoint's tensors by name; those that no rule knows are with the language model's, under their own names."""

    text: Tensors
    tower: Tensors


class Part:
    """A piece of a matrix that holds several, cut out when it is read.

    Args:
        whole: the matrix, read by `[...]`.
        cut: its rows (or what is as long as they are many) -> those of the piece.
    """

    def __init__(self, whole: Any, cut: Callable[[Tensor], Tensor]) -> None:
        self.whole = whole
        self.cut = cut

    def __getitem__(self, index: Any) -> Tensor:
        return self.cut(self.whole[...])[index]


def part_checkpoint(directory: Path, config: InternVLConfig, device: torch.device) -> Parted:
    """The tensors of a checkpoint's files, each as something that `[...]` reads; packed ones are dequantised then.

    Args:
        directory: of the files.
        config: of the whole model.
        device: where packed ones are converted.

    Raises:
        ModelError: the files are not there, or a packed tensor is broken.
    """
    return part_tensors(_open(directory, device), config)


def packed_text(text: Tensors, checkpoint: PackedCheckpoint) -> PackedTensors:
    """A language model's tensors with those that are packed as layers of their own: of InternLM2's `wqkv` the rows.

    Args:
        text: `Parted.text` of a packed checkpoint.
        checkpoint: the same.
    """
    plain: Tensors = {}
    packed: dict[str, PackedSource] = {}
    for name, value in text.items():
        whole = value.whole if isinstance(value, Part) else value
        layer = name.removesuffix(".weight")
        if not isinstance(whole, PackedSource):
            plain[name] = value
        elif isinstance(value, Part):
            packed[layer] = whole.rows_as(layer, value.cut(torch.arange(whole.entry.num_outputs)))
        else:
            packed[layer] = whole.rows_as(layer, None)
    return RenamedTensors(checkpoint, plain, packed)


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


def _open(directory: Path, device: torch.device) -> Tensors:
    packed = packed_checkpoint(directory, read_config(directory))
    if packed is not None:
        return PackedTensors(packed, torch.float32, device).state()
    return open_tensors(directory)
