"""How the tensors of a model are cut among the ranks of a stage, by transformers' `base_model_tp_plan`.

    q, k, v, gate, up    by rows: a rank's heads, its columns of the hidden layer           `colwise`
    o, down              by columns: each rank's product is a part of the sum               `rowwise`
    experts              each cut like gate, up and down; all ranks have all of them
    embedding, logits    by rows: a rank's part of the vocabulary, padded to equal parts
    norms, routers       whole

Key and value heads that are fewer than ranks stand on several of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvarena.engine.parallel.layout import Layout

_COLUMNS, _ROWS, _PAIRS, _EXPERTS, _WHOLE = (
    "colwise", "rowwise", "packed_colwise", "moe_tp_experts", "replicated_with_grad_allreduce",
)  # fmt: skip
_VOCABULARY = "vocabulary"
_STYLES = {_COLUMNS, _ROWS, _PAIRS, _EXPERTS, _WHOLE}
_EXPERT = re.compile(r"(layers\.\*\.mlp\.experts)\.\*\.(w1|w3|gate_proj|up_proj|w2|down_proj)")


class Cut:
    """A slice of a stored tensor, read when it is asked for."""

    def __init__(self, stored: Any, cut: Callable[[Any], Tensor]) -> None:
        self._stored, self._cut = stored, cut

    def __getitem__(self, index: Any) -> Tensor:
        return self._cut(self._stored)[index]


@dataclass(frozen=True)
class Cuts:
    """What a rank has of each tensor. Names are those in the files or in the model.

    Attributes:
        layout: where the rank stands.
        plan: transformers' style of each layer's tensors; layers are `*`.
        num_kv_heads, vocab_size: of the whole model.
    """

    layout: Layout
    plan: dict[str, str]
    num_kv_heads: int
    vocab_size: int

    @classmethod
    def of(cls, layout: Layout, config: Any, num_kv_heads: int) -> Cuts:
        """Those of a model with this config."""
        plan = getattr(config, "base_model_tp_plan", None) or {}
        # Embedding and head are cut the same way in every model, whatever the plan says of tied ones.
        layers = {key: style for key, style in plan.items() if key.startswith("layers.")}
        return cls(layout, layers, num_kv_heads, int(config.vocab_size))

    @property
    def fault(self) -> str | None:
        """Why a model cannot be cut so; None: it can."""
        if unknown := sorted(set(self.plan.values()) - _STYLES):
            return f"transformers' plan for it has {unknown[0]!r}, which is not among the ways of this version"
        return None if self.plan else "transformers says for no model of this type how it is cut"

    @property
    def width(self) -> int:
        """Logits of a rank: equal parts, the last of them padded."""
        return -(-self.vocab_size // self.layout.tensor)

    @property
    def first_token(self) -> int:
        """The first token of this rank's part of the vocabulary."""
        return self.layout.tensor_rank * self.width

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank's part; the rest of `width` is padding."""
        return max(0, min(self.width, self.vocab_size - self.first_token))

    def cut(self, name: str, stored: Any) -> Any:
        """This rank's part of the stored tensor `name`: something that `[...]` reads."""
        if self.layout.tensor == 1:
            return stored
        kind, tail = self._style(name), name.rpartition(".")[2]
        if kind == _VOCABULARY:
            return Cut(stored, self._vocabulary)
        if kind == _COLUMNS:
            part, parts = self._part(name)
            return Cut(stored, lambda whole: whole[_share(_shape(whole)[0], part, parts)])
        if kind == _ROWS and tail == "bias":
            # It is added once.
            return stored if self.layout.tensor_rank == 0 else Cut(stored, lambda whole: torch.zeros_like(whole[...]))
        if kind == _ROWS:
            return Cut(stored, self._columns)
        if kind == _PAIRS:
            return Cut(stored, self._halves)
        return stored

    def slices(self, name: str, shape: Sequence[int]) -> tuple[slice, slice]:
        """The outputs and the inputs that this rank has of a linear layer; `shape` is [N, K] of its weight."""
        outputs, inputs = slice(0, shape[0]), slice(0, shape[1])
        kind = self._style(f"{name}.weight")
        if kind == _COLUMNS:
            outputs = _share(shape[0], *self._part(f"{name}.weight"))
        elif kind == _ROWS:
            inputs = _share(shape[1], self.layout.tensor_rank, self.layout.tensor)
        return outputs, inputs

    def part_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of this rank's part of a layer's parameter of the whole model."""
        sizes = list(shape)
        if (found := self._axis(name)) is not None:
            axis, parts = found
            sizes[axis] //= parts
        return tuple(sizes)

    def whole_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a parameter of the whole model, by that of this rank's part."""
        sizes = list(shape)
        if self._style(name) == _VOCABULARY:
            sizes[0] = self.vocab_size
        elif (found := self._axis(name)) is not None:
            axis, parts = found
            sizes[axis] *= parts
        return tuple(sizes)

    def summing_modules(self, base: nn.Module) -> list[nn.Module]:
        """The modules of a rank's model whose outputs are parts of a sum."""
        found = []
        for name, module in base.named_modules():
            style = self.plan.get(re.sub(r"\.\d+", ".*", name))
            if style == _EXPERTS or (style == _ROWS and not any(True for _ in module.children())):
                found.append(module)
        return found

    def _axis(self, name: str) -> tuple[int, int] | None:
        """Along which axis a layer's parameter is cut, into how many parts; None: it is whole."""
        kind = self._style(name)
        if kind == _COLUMNS:
            return 0, self._part(name)[1]
        if kind == _ROWS and not name.endswith("bias"):
            return -1, self.layout.tensor
        return (1, self.layout.tensor) if kind == _PAIRS else None

    def _style(self, name: str) -> str:
        if self.layout.tensor == 1:
            return _WHOLE
        if "embed_tokens." in name or "lm_head." in name:
            return _VOCABULARY
        at = name.find("layers.")
        key = re.sub(r"\.\d+", ".*", name[max(at, 0) :]).replace(".block_sparse_moe.", ".mlp.")
        key = re.sub(r"\.(weight|bias)$", "", key)
        style = self.plan.get(key)
        if style is None and (expert := _EXPERT.fullmatch(key)) is not None:
            is_down = expert[2] in ("w2", "down_proj")
            style = self.plan.get(f"{expert[1]}.{'down_proj' if is_down else 'gate_up_proj'}")
            return _COLUMNS if style == _PAIRS else style or _WHOLE
        return style or _WHOLE

    def _part(self, name: str) -> tuple[int, int]:
        """Which part of how many a rank has of a tensor that is cut by rows."""
        rank, tensor = self.layout.tensor_rank, self.layout.tensor
        if re.search(r"\.[kv]_proj\.", name) and self.num_kv_heads < tensor:
            return rank * self.num_kv_heads // tensor, self.num_kv_heads
        return rank, tensor

    def _vocabulary(self, whole: Any) -> Tensor:
        part = whole[self.first_token : self.first_token + self.num_tokens]
        missing = self.width - len(part)
        return part if not missing else torch.cat([part, part.new_zeros(missing, *part.shape[1:])])

    def _columns(self, whole: Any) -> Tensor:
        shape = _shape(whole)
        share = _share(shape[-1], self.layout.tensor_rank, self.layout.tensor)
        return (whole[:, share] if len(shape) == 2 else whole[:, :, share]).contiguous()

    def _halves(self, whole: Any) -> Tensor:
        half = _shape(whole)[1] // 2
        share = _share(half, self.layout.tensor_rank, self.layout.tensor)
        second = slice(half + share.start, half + share.stop)
        return torch.cat([whole[:, share], whole[:, second]], dim=1)


def _shape(stored: Any) -> tuple[int, ...]:
    """Of something that indexing reads; what does not say is read."""
    if isinstance(stored, Tensor):
        return tuple(stored.shape)
    return tuple(stored.get_shape()) if hasattr(stored, "get_shape") else tuple(stored[...].shape)


def _share(size: int, part: int, parts: int) -> slice:
    """Part `part` of `parts` equal ones."""
    return slice(size * part // parts, size * (part + 1) // parts)
