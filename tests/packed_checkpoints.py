"""Checkpoints with packed weights in the formats of their makers, and the same model with the weights dequantised.

Packers and quantisers here are written from the formats' definitions, not from the readers under test: a value a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # bits 4 i of an int32 hold column ORDER[i]
SEQUENTIAL = tuple(range(8))
PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3",
    "wqkv", "wo",
)  # fmt: skip


def pack_words(codes: Tensor, order: tuple[int, ...] = SEQUENTIAL, bits: int = 4) -> Tensor:
    """Integers [R, C] -> int32 [R, C * bits / 32]."""
    per_word = 32 // bits
    groups = codes.to(torch.int64).view(codes.shape[0], -1, per_word)[..., list(order[:per_word])]
    words = sum(groups[..., i] << (bits * i) for i in range(per_word))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


class Quantised(NamedTuple):
    """A weight [N, K] in few bits: codes [K, N], zero points and scales [G, N], the group of each input, the weight."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor
    weight: Tensor


def quantise(weight: Tensor, group_size: int, *, symmetric: bool = False, act_order: bool = False) -> Quantised:
    """Round a weight [N, K] to 4 bits in groups of inputs."""
    num_inputs = weight.shape[1]
    group_size = num_inputs if group_size == -1 else group_size
    order = torch.randperm(num_inputs) if act_order else torch.arange(num_inputs)
    groups = torch.empty_like(order)
    groups[order] = torch.arange(num_inputs) // group_size
    values = weight.t().float()  # [K, N]
    scales, zeros = [], []
    for group in range(int(groups.max()) + 1):
        own = values[groups == group]
        if symmetric:
            scale, zero = own.abs().amax(0) / 7, torch.full((weight.shape[0],), 8)
        else:
            low, high = own.amin(0).clamp(max=0), own.amax(0).clamp(min=0)
            scale = (high - low).clamp(min=1e-5) / 15
            zero = (-low / scale).round().clamp(0, 15).long()
        scales.append(scale.half())
        zeros.append(zero)
    scale, zero = torch.stack(scales), torch.stack(zeros)
    codes = (values / scale[groups].float() + zero[groups]).round().clamp(0, 15).long()
    return Quantised(codes, zero, scale, groups, ((codes - zero[groups]).double() * scale[groups].double()).t())


def awq_tensors(q: Quantised) -> dict[str, Tensor]:
    return {"qweight": pack_words(q.codes, AWQ_ORDER), "qzeros": pack_words(q.zeros, AWQ_ORDER), "scales": q.scales}


def gptq_tensors(q: Quantised, *, version: int = 1) -> dict[str, Tensor]:
    stored = (q.zeros - 1) % 16 if version == 1 else q.zeros
    return {
        "qweight": pack_words(q.codes.t()).t().contiguous(), "qzeros": pack_words(stored), "scales": q.scales,
        "g_idx": q.groups.int(),
    }  # fmt: skip


def compressed_tensors(q: Quantised, *, symmetric: bool, act_order: bool) -> dict[str, Tensor]:
    """pack-quantized: codes are stored moved up by 8, as they are here anyway."""
    shape = torch.tensor(q.weight.shape)
    found = {"weight_packed": pack_words(q.codes.t()), "weight_scale": q.scales.t().contiguous(), "weight_shape": shape}
    if not symmetric:
        found["weight_zero_point"] = pack_words(q.zeros).t().contiguous()
    return found | ({"weight_g_idx": q.groups.int()} if act_order else {})


def settings(kind: str, group_size: int, *, symmetric: bool, act_order: bool) -> dict[str, Any]:
    """`quantization_config` as the maker's library writes it."""
    if kind == "awq":
        return {
            "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": ["gate"],
        }  # fmt: skip
    if kind.startswith("gptq"):
        layout = "gptq_v2" if kind == "gptq_v2" else "gptq"
        return {
            "quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": act_order, "sym": symmetric,
            "checkpoint_format": layout, "damp_percent": 0.01, "true_sequential": True,
        }  # fmt: skip
    weights = {
        "num_bits": 4, "type": "int", "symmetric": symmetric, "group_size": group_size, "strategy": "group",
        "actorder": "group" if act_order else None,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "quantization_status": "compressed",
    }  # fmt: skip


def pack_state(
    state: dict[str, Tensor], kind: str, group_size: int, *, symmetric: bool = False, act_order: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict with its projections packed, and the same with them dequantised, in float32."""
    packed, plain = {}, {}
    orders: dict[str, int] = {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if layer == name or layer.rpartition(".")[2] not in PROJECTIONS:
            packed[name] = tensor.half() if tensor.is_floating_point() else tensor
            plain[name] = packed[name].float()
            continue
        # Layers of one input share their order, as they share what it was found from.
        parent = layer.rpartition(".")[0]
        torch.manual_seed(orders.setdefault(f"{parent} {tensor.shape[1]}", len(orders)))
        q = quantise(tensor, group_size, symmetric=symmetric, act_order=act_order)
        if kind == "awq":
            parts = awq_tensors(q)
        elif kind.startswith("gptq"):
            parts = gptq_tensors(q, version=2 if kind == "gptq_v2" else 1)
        else:
            parts = compressed_tensors(q, symmetric=symmetric, act_order=act_order)
        packed |= {f"{layer}.{part}": value.contiguous() for part, value in parts.items()}
        plain[name] = q.weight.float()
    return packed, plain


def write_packed(
    directory: Path, kind: str, family: str = "llama", group_size: int = 32, *, symmetric: bool = False,
    act_order: bool = False, where: str = "config.json", **overrides: Any,
) -> tuple[Path, Path]:  # fmt: skip
    """A small random checkpoint of `family` packed, and beside it the same model dequantised, in float32.

    Args:
        kind: awq, gptq, gptq_v2 or compressed-tensors.
        where: config.json, or the file beside it that holds the settings.
    """
    plain_dir = write_checkpoint(directory / "plain", family, **overrides)
    state = load_file(plain_dir / "model.safetensors")
    packed, plain = pack_state(state, kind, group_size, symmetric=symmetric, act_order=act_order)
    save_file(plain, plain_dir / "model.safetensors", metadata={"format": "pt"})
    packed_dir = directory / "packed"
    packed_dir.mkdir()
    save_file(packed, packed_dir / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain_dir / "config.json").read_text()) | {"dtype": "float16"}
    said = settings(kind, group_size, symmetric=symmetric, act_order=act_order)
    if where == "config.json":
        config["quantization_config"] = said
    elif where == "quant_config.json":
        said = {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"}
    else:
        said.pop("quant_method")
    (packed_dir / "config.json").write_text(json.dumps(config))
    if where != "config.json":
        (packed_dir / where).write_text(json.dumps(said))
    return packed_dir, plain_dir
