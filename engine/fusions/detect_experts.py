"""Tells blocks of the llama shape by their parts: a gated product, and experts of such products behind a router."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvarena.engine.fusions.experts import Experts
from kvarena.engine.quantization.linear import PackedLinear

# Of a block with experts, as Mixtral, Qwen2-MoE and Qwen3-MoE have them in transformers.
PARTS = {"gate", "experts", "shared_expert", "shared_expert_gate"}


def find_experts(mlp: Any, num_read: Tensor) -> Experts | None:
    """The experts of a block, which share its weights; None where its parts are others.

    Args:
        mlp: the block.
        num_read: see `Experts`.
    """
    parts = {name for name, child in mlp.named_children() if list(child.parameters())}
    if not {"gate", "experts"} <= parts <= PARTS or len(parts) == 3:
        return None
    router, experts = mlp.gate, mlp.experts
    gate_up, down = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
    top_k = getattr(router, "top_k", None)
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or not isinstance(top_k, int):
        return None
    if gate_up.dim() != 3 or down.dim() != 3:
        return None
    if [name for name, _ in router.named_parameters()] != ["weight"] or len(list(experts.parameters())) != 2:
        return None
    gate_up, down = gate_up.detach(), down.detach()
    count, hidden, inner = down.shape
    if gate_up.shape != (count, 2 * inner, hidden) or router.weight.shape != (count, hidden) or not _is_silu(experts):
        return None
    rows = router.weight.detach()
    if "shared_expert" in parts:
        gate = mlp.shared_expert_gate
        if not is_glu(mlp.shared_expert) or type(gate) is not nn.Linear or gate.weight.shape != (1, hidden):
            return None
        if gate.bias is not None:
            return None
        rows = torch.cat((rows, gate.weight.detach()))
    return Experts(rows, gate_up, down, top_k, bool(getattr(router, "norm_topk_prob", True)), num_read)


def is_glu(mlp: nn.Module) -> bool:
    """Whether the module is silu(gate) * up and down, as far as its parts tell."""
    projections = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(is_linear(projection) for projection in projections) and _is_silu(mlp)


def is_linear(module: object) -> bool:
    """Whether the module is a plain linear layer, or one with packed weights, and no class made from them."""
    return type(module) in (nn.Linear, PackedLinear)


def _is_silu(module: nn.Module) -> bool:
    activation = getattr(module, "act_fn", None)
    if not callable(activation):
        return False
    x = torch.linspace(-4, 4, 33)
    return torch.allclose(activation(x), F.silu(x))
