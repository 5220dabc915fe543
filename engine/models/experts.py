"""A model's experts: how many there are, and how many of them a forward of its modules reads."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from kvarena.engine.errors import ModelError

TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")

_COUNT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class ExpertSizes(NamedTuple):
    """Experts of a model whose layers have equally many.

    Attributes:
        num_layers: layers with experts.
        num_experts: of each, without one that all tokens share.
        top_k: experts of a token.
        num_weights: of one expert.
    """

    num_layers: int
    num_experts: int
    top_k: int
    num_weights: int


def expert_sizes(module: nn.Module, text: PretrainedConfig) -> ExpertSizes | None:
    """The sizes of a module's experts; None for a dense model, and where they are not stacked alike in all layers."""
    found = _stacked_experts(module)
    top_k = next((k for name in TOP_K_FIELDS if isinstance(k := getattr(text, name, None), int)), None)
    sizes = {(count, sum(p.numel() for p in experts.parameters(recurse=False)) // count) for experts, count in found}
    if len(sizes) != 1 or top_k is None:
        return None
    [(num_experts, num_weights)] = sizes
    return ExpertSizes(len(found), num_experts, top_k, num_weights)


def _stacked_experts(module: nn.Module) -> list[tuple[nn.Module, int]]:
    """The modules whose own parameters are those of all experts of a layer, and how many these are."""
    found = []
    for child in module.modules():
        own = [parameter for parameter in child.parameters(recurse=False) if parameter.dim() == 3]
        if own and len(own[0]) == getattr(child, "num_experts", None):
            found.append((child, len(own[0])))
    return found


def check_top_k(text: PretrainedConfig) -> None:
    """See that a token takes some of the experts, as far as the config tells.

    Raises:
        ModelError: it takes none of them, or more than there are.
    """
    counts = (count for name in _COUNT_FIELDS if isinstance(count := getattr(text, name, None), int))
    count = next(counts, None)
    for name in TOP_K_FIELDS:
        top_k = getattr(text, name, None)
        if count and isinstance(top_k, int) and not 1 <= top_k <= count:
            raise ModelError(f"{name}={top_k} of a config with {count} experts is not in [1, {count}]")


class ExpertsRead:
    """Notes which experts the modules of a forward are given, which costs a forward nothing.

    Args:
        module: of a model with stacked experts; watched from now on.
    """

    def __init__(self, module: nn.Module) -> None:
        self._chosen: dict[int, Tensor] = {}
        found = _stacked_experts(module)
        self._num_experts = max(count for _, count in found)
        for place, (experts, _) in enumerate(found):
            experts.register_forward_pre_hook(partial(self._note, place), with_kwargs=True)

    def _note(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        # How transformers calls them: experts(hidden_states, top_k_index, top_k_weights).
        chosen = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
        if isinstance(chosen, Tensor) and not chosen.is_floating_point():
            self._chosen[place] = chosen

    def total(self) -> Tensor | None:
        """Int64 [], on the device: experts that had a token in the last forward, all layers together.

        None where the experts are called in another way, which tells nothing.
        """
        chosen, self._chosen = self._chosen, {}
        if not chosen:
            return None
        rows = [ids.flatten() for ids in chosen.values()]
        if len({len(row) for row in rows}) == 1:
            return self._count(torch.stack(rows))
        return torch.stack([self._count(row[None]) for row in rows]).sum()

    def _count(self, rows: Tensor) -> Tensor:
        """Int64 []: different experts in each of `rows` [layers, n], added up."""
        # Behind the last expert: what is no expert's.
        read = torch.zeros(len(rows), self._num_experts + 1, dtype=torch.int64, device=rows.device)
        return read.scatter_(1, rows.long().clamp(0, self._num_experts), 1)[:, :-1].sum()
