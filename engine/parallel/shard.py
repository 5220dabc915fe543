"""A rank's share of a model: a smaller model of the same class, made of slices of the weights.

    q, k, v, gate, up    by rows: a rank's heads, its columns of the hidden layer           `colwise`
    o, down              by columns: each rank's product is a part of the sum               `rowwise`
    experts              each cut like gate, up and down; all ranks have all of them
    embedding, logits    by rows: a rank's part of the vocabulary, padded to equal parts
    norms, routers       whole

Which tensor is cut how is transformers' `base_model_tp_plan`. Key and value heads that are fewer than ranks stand on
several of them. A stage of a pipeline has some of the layers; its embedding is the one that it needs, or none.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from kvarena.engine.errors import ConfigError, ModelError
from kvarena.engine.parallel.layout import Layout

TENSOR, PIPELINE = "parallel.tensor_parallel_size", "parallel.pipeline_parallel_size"
_COLUMNS, _ROWS, _PAIRS, _EXPERTS, _WHOLE = (
    "colwise", "rowwise", "packed_colwise", "moe_tp_experts", "replicated_with_grad_allreduce",
)  # fmt: skip
_STYLES = {_COLUMNS, _ROWS, _PAIRS, _EXPERTS, _WHOLE}
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
_EXPERT = re.compile(r"(layers\.\*\.mlp\.experts)\.\*\.(w1|w3|gate_proj|up_proj|w2|down_proj)")
_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
# Rows of an embedding that stands where none is needed: the probe's tokens.
_STAND_IN = 64

Tensors = dict[str, Any]


class Cut:
    """A slice of a stored tensor, read when it is asked for."""

    def __init__(self, stored: Any, cut: Callable[[Any], Tensor]) -> None:
        self._stored, self._cut = stored, cut

    def __getitem__(self, index: Any) -> Tensor:
        return self._cut(self._stored)[index]


@dataclass(frozen=True)
class Shard:
    """What a rank has of a model.

    Attributes:
        layout: where the rank stands.
        config: of the whole model.
        name: how error messages call it.
    """

    layout: Layout
    config: Any
    name: str

    def __post_init__(self) -> None:
        tensor = self.layout.tensor
        if tensor > 1:
            self._check_plan()
            heads, kv_heads = self.num_heads, self.num_kv_heads
            self._divide("attention heads", heads)
            if kv_heads % tensor and tensor % kv_heads:
                raise ConfigError(
                    f"{TENSOR}={tensor} neither divides the {kv_heads} KV heads of {self.name!r} nor is a multiple of "
                    f"them; use {_choices(heads, kv_heads)}"
                )
            for field in _WIDTHS:
                if isinstance(width := getattr(self.config, field, None), int):
                    self._divide(f"{field} of", width)
        layers = self.config.num_hidden_layers
        if self.layout.pipeline > layers:
            raise ConfigError(
                f"{PIPELINE}={self.layout.pipeline} is more than the {layers} layers of {self.name!r}; use at most that"
            )
        if self.layout.pipeline > 1 and not getattr(self.config, "base_model_pp_plan", None):
            raise ConfigError(
                f"{PIPELINE}={self.layout.pipeline} is not available for {self.name!r}: transformers says for no model "
                f"of type {self.config.model_type!r} how it is parted into stages; use 1"
            )

    def check_depth(self, num_levels: int) -> None:
        """See that the first stage has the layers behind which features of images are added to the stream.

        Raises:
            ConfigError: it has fewer.
        """
        if num_levels > len(self.layers):
            raise ConfigError(
                f"{PIPELINE}={self.layout.pipeline} leaves the first stage {len(self.layers)} layers of {self.name!r}, "
                f"which adds features of images behind {num_levels}; lower it"
            )

    @property
    def num_heads(self) -> int:
        """Query heads of the whole model."""
        return int(self.config.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the whole model."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.num_heads)

    @property
    def vocab_size(self) -> int:
        """Width of the whole model's logits."""
        return int(self.config.vocab_size)

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

    @property
    def layers(self) -> range:
        """This rank's layers."""
        return self.layout.layers(self.config.num_hidden_layers)

    @property
    def _plan(self) -> dict[str, str]:
        plan = getattr(self.config, "base_model_tp_plan", None) or {}
        # Embedding and head are cut the same way in every model, whatever the plan says of tied ones.
        return {key: style for key, style in plan.items() if key.startswith("layers.")}

    def _check_plan(self) -> None:
        unknown = sorted(set(self._plan.values()) - _STYLES)
        if not self._plan or unknown:
            why = (
                f"transformers' plan for it has {unknown[0]!r}, which is not among the ways of this version"
                if unknown
                else "transformers says for no model of this type how it is cut"
            )
            raise ConfigError(
                f"{TENSOR}={self.layout.tensor} is not available for {self.name!r} (model type "
                f"{self.config.model_type!r}): {why}; use 1"
            )

    def _divide(self, what: str, count: int) -> None:
        if count % self.layout.tensor:
            raise ConfigError(
                f"{TENSOR}={self.layout.tensor} does not divide the {what} {count} of {self.name!r}"
                if what.endswith(" of")
                else f"{TENSOR}={self.layout.tensor} does not divide the {count} {what} of {self.name!r}; use "
                f"{_choices(count, self.num_kv_heads)}"
            )

    def local_config(self) -> PretrainedConfig:
        """The config of this rank's part, as of a model of its own."""
        config, layout = copy.deepcopy(self.config), self.layout
        if layout.tensor > 1:
            head_dim = getattr(config, "head_dim", None)
            config.head_dim = head_dim or config.hidden_size // self.num_heads
            config.num_key_value_heads = max(1, self.num_kv_heads // layout.tensor)
            config.num_attention_heads = self.num_heads // layout.tensor
            for field in _WIDTHS:
                if isinstance(width := getattr(config, field, None), int):
                    setattr(config, field, width // layout.tensor)
            config.vocab_size = self.width
        if layout.pipeline > 1:
            whole = config.num_hidden_layers
            for field, value in list(vars(config).items()):
                if isinstance(value, list) and len(value) == whole:
                    setattr(config, field, value[self.layers.start : self.layers.stop])
            config.num_hidden_layers = len(self.layers)
            config.tie_word_embeddings = True
            if not (layout.is_first or layout.is_last):
                config.vocab_size = min(_STAND_IN, config.vocab_size)
        # No rank need have the row of the padding token.
        config.pad_token_id = None
        return config

    def check(self, whole: nn.Module, part: nn.Module) -> None:
        """See that the classes make of the two configs what the plan says; both are on the meta device.

        Raises:
            ConfigError: names a tensor that does not.
        """
        sizes = {name: tuple(tensor.shape) for name, tensor in whole.named_parameters()}
        for name, tensor in part.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                continue
            full = sizes.get(self._in_whole(name))
            if full is None or self._cut_shape(name, full) != tuple(tensor.shape):
                what = (
                    f"a stage would have {self._in_whole(name)} {list(tensor.shape)}, and the whole has none"
                    if full is None
                    else f"{self._in_whole(name)} {list(full)} would be {list(tensor.shape)}, which is no part of it "
                    "by transformers' plan"
                )
                raise ConfigError(
                    f"{TENSOR if self.layout.tensor > 1 else PIPELINE}={self._size} is not available for "
                    f"{self.name!r} ({type(whole).__name__}): {what}; use 1"
                )

    @property
    def _size(self) -> int:
        return self.layout.tensor if self.layout.tensor > 1 else self.layout.pipeline

    def _in_whole(self, name: str) -> str:
        return _LAYER.sub(lambda found: f"{found[1]}layers.{int(found[2]) + self.layers.start}.", name)

    def report_in_whole(self, info: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
        """transformers' report of a part's loading by the names and shapes in the files.

        Args:
            info: the report; layers count from the stage's first, and shapes are the part's.
            stored: the files' tensors by name.
        """

        def named(name: str) -> str:
            found = _LAYER.search(name)
            # Layers behind the model's last one kept their name.
            return name if found is not None and int(found[2]) >= len(self.layers) else self._in_whole(name)

        mismatched = [
            (named(name), stored[named(name)].get_shape(), self._whole_shape(name, expected))
            if self.layout.tensor > 1 and hasattr(stored.get(named(name)), "get_shape")
            else (named(name), found, expected)
            for name, found, expected in info["mismatched_keys"]
        ]
        return {key: [named(name) for name in info[key]] for key in ("missing_keys", "unexpected_keys")} | {
            "mismatched_keys": mismatched
        }

    def cut(self, tensors: Mapping[str, Any]) -> Tensors:
        """This rank's tensors under the names of its own model: each something that `[...]` reads.

        Args:
            tensors: the checkpoint's by name, each read by indexing it.

        Raises:
            ModelError: an embedding is missing.
        """
        mine: Tensors = {}
        for name, stored in tensors.items():
            found = _LAYER.search(name)
            if found is not None and "lm_head" not in name:
                layer = int(found[2])
                # What lies behind the last layer (MTP) stays under its name, for the loader to judge.
                if layer in self.layers:
                    local = _LAYER.sub(lambda one: f"{one[1]}layers.{int(one[2]) - self.layers.start}.", name)
                    mine[local] = self._cut(name, stored)
                elif layer >= self.config.num_hidden_layers:
                    mine[name] = stored
            else:
                mine[name] = self._cut(name, stored)
        return self._with_embedding(mine, tensors) if self.layout.pipeline > 1 else mine

    def layer_part(self, name: str, shape: Sequence[int]) -> tuple[str, slice, slice] | None:
        """What this rank has of a linear layer's weight.

        Args:
            name: of the layer in the files.
            shape: [N, K] of its weight.

        Returns:
            The layer's name in this rank's model, its outputs and its inputs; None: it is none of this stage's layers.
        """
        found = _LAYER.search(name)
        if found is None or int(found[2]) not in self.layers:
            return None
        local = _LAYER.sub(lambda one: f"{one[1]}layers.{int(one[2]) - self.layers.start}.", name)
        outputs, inputs = slice(0, shape[0]), slice(0, shape[1])
        kind = self._style(f"{name}.weight")
        if kind == _COLUMNS:
            outputs = _share(shape[0], *self._part(f"{name}.weight"))
        elif kind == _ROWS:
            inputs = _share(shape[1], self.layout.tensor_rank, self.layout.tensor)
        return local, outputs, inputs

    def _with_embedding(self, mine: Tensors, tensors: Mapping[str, Any]) -> Tensors:
        """A stage's model is tied: its one embedding is the whole model's, its head, or a stand-in."""
        embed = next((name for name in tensors if name.endswith("embed_tokens.weight")), None)
        head = next((name for name in tensors if name.endswith("lm_head.weight")), embed)
        if embed is None or head is None:
            raise ModelError(f"{self.name} lacks the weights embed_tokens.weight; copy the model again")
        if head != embed:
            mine.pop(head)
        if self.layout.is_last:
            mine[embed] = self._cut(head, tensors[head])
        elif not self.layout.is_first:
            rows = min(_STAND_IN, self.width)
            mine[embed] = torch.linspace(-1, 1, rows * self.config.hidden_size).view(rows, -1)
        return mine

    def _cut(self, name: str, stored: Any) -> Any:
        """This rank's part of the stored tensor `name`."""
        if self.layout.tensor == 1:
            return stored
        kind, tail = self._style(name), name.rpartition(".")[2]
        rank = self.layout.tensor_rank
        if kind == "vocabulary":
            return Cut(stored, self._vocabulary)
        if kind == _COLUMNS:
            part, parts = self._part(name)
            return Cut(stored, lambda whole: whole[_share(_rows(whole), part, parts)])
        if kind == _ROWS and tail == "bias":
            # It is added once.
            return stored if rank == 0 else Cut(stored, lambda whole: torch.zeros_like(whole[...]))
        if kind == _ROWS:
            return Cut(stored, self._columns)
        if kind == _PAIRS:
            return Cut(stored, self._halves)
        return stored

    def _cut_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this rank's part of a parameter of the whole model."""
        sizes, tensor = list(shape), self.layout.tensor
        kind, is_bias = self._style(name), name.endswith("bias")
        if kind == _COLUMNS:
            sizes[0] //= self._part(name)[1]
        elif kind == _ROWS and not is_bias:
            sizes[-1] //= tensor
        elif kind == _PAIRS:
            sizes[1] //= tensor
        return tuple(sizes)

    def _whole_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a parameter of the whole model, by its part's: `_cut_shape` the other way."""
        sizes, tensor = list(shape), self.layout.tensor
        kind, is_bias = self._style(name), name.endswith("bias")
        if kind == "vocabulary":
            sizes[0] = self.vocab_size
        elif kind == _COLUMNS:
            sizes[0] *= self._part(name)[1]
        elif kind == _ROWS and not is_bias:
            sizes[-1] *= tensor
        elif kind == _PAIRS:
            sizes[1] *= tensor
        return tuple(sizes)

    def _style(self, name: str) -> str:
        """How a tensor is cut, by its name in the files or in the model."""
        if self.layout.tensor == 1:
            return _WHOLE
        if "embed_tokens." in name or "lm_head." in name:
            return "vocabulary"
        at = name.find("layers.")
        key = re.sub(r"\.\d+", ".*", name[max(at, 0) :]).replace(".block_sparse_moe.", ".mlp.")
        key = re.sub(r"\.(weight|bias)$", "", key)
        style = self._plan.get(key)
        if style is None and (expert := _EXPERT.fullmatch(key)) is not None:
            is_down = expert[2] in ("w2", "down_proj")
            style = self._plan.get(f"{expert[1]}.{'down_proj' if is_down else 'gate_up_proj'}")
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

    def summing_modules(self, base: nn.Module) -> list[nn.Module]:
        """The modules of a rank's model whose outputs are parts of a sum."""
        found = []
        for name, module in base.named_modules():
            style = self._plan.get(re.sub(r"\.\d+", ".*", name))
            if style == _EXPERTS or (style == _ROWS and not any(True for _ in module.children())):
                found.append(module)
        return found


def _choices(*counts: int) -> str:
    """Sizes that divide all of `counts`, for an error."""
    sizes = [size for size in range(1, min(counts) + 1) if all(count % size == 0 for count in counts)]
    return " or ".join(map(str, sizes[:6]))


def _shape(stored: Any) -> tuple[int, ...]:
    """Of something that indexing reads; what does not say is read."""
    if isinstance(stored, Tensor):
        return tuple(stored.shape)
    return tuple(stored.get_shape()) if hasattr(stored, "get_shape") else tuple(stored[...].shape)


def _rows(stored: Any) -> int:
    return _shape(stored)[0]


def _share(size: int, part: int, parts: int) -> slice:
    """Part `part` of `parts` equal ones."""
    return slice(size * part // parts, size * (part + 1) // parts)
