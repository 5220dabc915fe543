"""A rank's share of a model: a smaller model of the same class, made of slices of the weights.

How each tensor is cut among the ranks of a stage: cuts.py. A stage of a pipeline has some of the layers; its embedding
is the one that it needs, or none.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from kvarena.engine.errors import ConfigError, ModelError
from kvarena.engine.parallel.cuts import Cuts
from kvarena.engine.parallel.layout import Layout

TENSOR, PIPELINE = "parallel.tensor_parallel_size", "parallel.pipeline_parallel_size"
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
# Rows of an embedding that stands where none is needed: the probe's tokens.
_STAND_IN = 64

Tensors = dict[str, Any]


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
            if (fault := self.cuts.fault) is not None:
                raise ConfigError(
                    f"{TENSOR}={tensor} is not available for {self.name!r} (model type {self.config.model_type!r}): "
                    f"{fault}; use 1"
                )
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

    @cached_property
    def cuts(self) -> Cuts:
        """What this rank has of each tensor."""
        return Cuts.of(self.layout, self.config, self.num_kv_heads)

    @property
    def layers(self) -> range:
        """This rank's layers."""
        return self.layout.layers(self.config.num_hidden_layers)

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
            config.vocab_size = self.cuts.width
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
            if full is None or self.cuts.part_shape(name, full) != tuple(tensor.shape):
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
            (named(name), stored[named(name)].get_shape(), self.cuts.whole_shape(name, expected))
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
                    mine[local] = self.cuts.cut(name, stored)
                elif layer >= self.config.num_hidden_layers:
                    mine[name] = stored
            else:
                mine[name] = self.cuts.cut(name, stored)
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
        return local, *self.cuts.slices(name, shape)

    def _with_embedding(self, mine: Tensors, tensors: Mapping[str, Any]) -> Tensors:
        """A stage's model is tied: its one embedding is the whole model's, its head, or a stand-in."""
        embed = next((name for name in tensors if name.endswith("embed_tokens.weight")), None)
        head = next((name for name in tensors if name.endswith("lm_head.weight")), embed)
        if embed is None or head is None:
            raise ModelError(f"{self.name} lacks the weights embed_tokens.weight; copy the model again")
        if head != embed:
            mine.pop(head)
        if self.layout.is_last:
            mine[embed] = self.cuts.cut(head, tensors[head])
        elif not self.layout.is_first:
            rows = min(_STAND_IN, self.cuts.width)
            mine[embed] = torch.linspace(-1, 1, rows * self.config.hidden_size).view(rows, -1)
        return mine


def _choices(*counts: int) -> str:
    """Sizes that divide all of `counts`, for an error."""
    sizes = [size for size in range(1, min(counts) + 1) if all(count % size == 0 for count in counts)]
    return " or ".join(map(str, sizes[:6]))
