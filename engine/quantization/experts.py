"""Experts of a mixture whose weights stay packed, in the place of a transformers module of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kvarena.engine.quantization.linear import PackedLinear
from kvarena.engine.quantization.state import PackedSource
from kvarena.engine.quantization.weight import PackedWeight, join

PARTS = ("gate_part", "up_part", "down_part")


class ExpertSources(NamedTuple):
    """An expert's projections in the files."""

    gate: PackedSource
    up: PackedSource
    down: PackedSource


class Stacked(NamedTuple):
    """One projection of all experts: a `PackedWeight`'s fields with the experts in front."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    group_size: int


class PackedExperts(nn.Module):
    """silu(gate) * up and down of each token's experts, added up by the router's weights.

    Until `stack` it has a packed linear layer for each projection of each expert, which a checkpoint's tensors fill.

    Args:
        sources: the experts in their files. Nothing is read.
        activation: of the gate.
    """

    def __init__(self, sources: Sequence[ExpertSources], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.num_experts = len(sources)
        self.act_fn = activation
        for index, expert in enumerate(sources):
            holder = nn.Module()
            for name, source in zip(PARTS, expert, strict=True):
                holder.add_module(name, PackedLinear(source, None))
            self.add_module(str(index), holder)
        self.weight_size = sum(source.entry.num_outputs * source.entry.num_inputs for one in sources for source in one)
        self._stacked: tuple[Stacked, Stacked] | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the stacked weights."""
        found = [part for one in self._stacked or () for part in one if isinstance(part, Tensor)]
        return sum(part.numel() * part.element_size() for part in found)

    def stack(self) -> None:
        """Put the experts' weights side by side; the layers that were filled go."""
        experts = [getattr(self, str(index)) for index in range(self.num_experts)]
        both = [join([_weight(one.gate_part), _weight(one.up_part)]) for one in experts]
        gate_up = [weight for weight in both if weight is not None]
        assert len(gate_up) == len(both), "can_stack lets none through that cannot be joined"
        down = [_weight(one.down_part) for one in experts]
        for index in range(self.num_experts):
            delattr(self, str(index))
        self._stacked = _stack(gate_up), _stack(down)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' answers.

        Args:
            hidden_states: [T, hidden].
            top_k_index: int [T, k].
            top_k_weights: [T, k].
        """
        from kvarena.engine.kernels.gemm.packed_experts import expert_blocks, packed_experts

        assert self._stacked is not None, "stack() comes first"
        gate_up, down = self._stacked
        top_k, num_slots = top_k_index.shape[1], top_k_index.numel()
        if num_slots == 0:
            return torch.zeros_like(hidden_states)
        # Blocks as large as an expert's share of the tokens.
        rows = next(rows for rows in (16, 32, 64) if rows == 64 or num_slots <= rows * self.num_experts)
        blocks = expert_blocks(top_k_index, self.num_experts, rows)
        x = packed_experts(hidden_states, *gate_up, blocks, num_slots=num_slots, top_k=top_k)
        gate, up = x.chunk(2, dim=-1)
        y = packed_experts(self.act_fn(gate) * up, *down, blocks, num_slots=num_slots, top_k=1)
        weighted = y.view(*top_k_index.shape, -1).float() * top_k_weights[..., None].float()
        return weighted.sum(1).to(hidden_states.dtype)


def packed_weights(module: nn.Module) -> int:
    """Weights of a model's packed layers, which are no parameters of it."""
    return sum(part.weight_size for part in module.modules() if isinstance(part, (PackedLinear, PackedExperts)))


def can_stack(sources: Sequence[ExpertSources]) -> bool:
    """Whether all experts are packed in one way: gate and up can be joined, and each with the other experts'."""
    for expert in sources:
        if not all(source.is_even for source in expert):
            return False
        gate, up = (source.inputs.order for source in (expert.gate, expert.up))
        if (gate is None) != (up is None) or (gate is not None and up is not None and not torch.equal(gate, up)):
            return False
    ways = {
        tuple(
            (source.entry.num_outputs, source.entry.num_inputs, source.entry.group_size, source.entry.bits,
             tuple(source.part_names), source.scale_dtype)
            for source in expert
        )
        for expert in sources
    }  # fmt: skip
    gate_way, up_way, _ = next(iter(ways))
    return len(ways) == 1 and gate_way[1:] == up_way[1:]


def _weight(layer: PackedLinear) -> PackedWeight:
    weight = layer.product.weight
    assert weight is not None, "an expert's layers are never settled"
    return weight


def _stack(weights: Sequence[PackedWeight]) -> Stacked:
    first = weights[0]
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    orders = [weight.order for weight in weights if weight.order is not None]
    return Stacked(
        torch.stack([weight.codes for weight in weights]),
        torch.stack([weight.scales for weight in weights]),
        torch.stack(zeros) if zeros else None,
        torch.stack(orders) if orders else None,
        first.group_size,
    )
