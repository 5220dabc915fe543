"""A layer's experts as a fused operation: what it needs, and the reference in plain torch.

x -> router -> the top k experts of each token -> sort by expert
  -> silu(gate) * up of each pair, grouped -> down, grouped -> times the router's weight -> summed by token
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Experts(NamedTuple):
    """Experts of one layer, of which each token takes `top_k` (Shazeer et al., 2017).

    Attributes:
        router: [E, H], or [E + 1, H]: the last row is the gate of a shared expert.
        gate_up: [E, 2 * I, H], the gates' rows first.
        down: [E, H, I].
        top_k: experts of a token.
        renormalize: a token's weights, softmax over all experts, are made to add up to 1.
        num_read: int32 [1], written by each forward: experts that had a token.
    """

    router: Tensor
    gate_up: Tensor
    down: Tensor
    top_k: int
    renormalize: bool
    num_read: Tensor

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return len(self.gate_up)

    def settled(self, x: Tensor) -> Tensor:
        """Bool [T]: whose choice of experts rounding cannot change, as `x` [T, H] is."""
        logits = (x @ self.router[: self.num_experts].t()).float()
        if self.top_k == self.num_experts:
            return torch.ones(len(x), dtype=torch.bool, device=x.device)
        best = logits.topk(self.top_k + 1).values
        rounding = 4 * torch.finfo(x.dtype).eps * logits.abs().amax(-1)
        return best[:, -2] - best[:, -1] > rounding


def add_experts(residual: Tensor, x: Tensor, experts: Experts, slots: Tensor | None, first_slot: int) -> Tensor | None:
    """See `kvarena.engine.fusions.ops.Ops.experts`, of which `x` is the normed stream. By torch's grouped product."""
    count, top_k = experts.num_experts, experts.top_k
    logits = F.linear(x, experts.router)
    weights, ids = logits[:, :count].float().softmax(-1).topk(top_k)
    if experts.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    if slots is not None:
        ids = ids.masked_fill((slots < first_slot)[:, None], count)
    by_expert, order = ids.flatten().sort(stable=True)
    num_pairs = torch.zeros(count + 1, dtype=torch.int32, device=x.device)
    num_pairs.scatter_add_(0, by_expert, torch.ones_like(by_expert, dtype=torch.int32))
    experts.num_read.copy_((num_pairs[:count] > 0).sum())
    ends = num_pairs[:count].cumsum(0, dtype=torch.int32)
    gate, up = F.grouped_mm(x[order // top_k], experts.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    pairs = F.grouped_mm(F.silu(gate) * up, experts.down.transpose(1, 2), offs=ends)
    # Behind the last expert's pairs nobody wrote.
    pairs = (pairs * weights.flatten()[order][:, None]).masked_fill((by_expert == count)[:, None], 0)
    spread = torch.empty_like(pairs).index_copy_(0, order, pairs)
    residual.add_(spread.view(len(x), top_k, -1).sum(1).to(residual.dtype))
    return logits[:, count].float().sigmoid() if logits.shape[1] > count else None
