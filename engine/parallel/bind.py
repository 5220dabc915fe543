"""Makes the parts of a model one: sums behind row-parallel modules, an embedding of which each rank has some rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kvarena.engine.parallel.groups import Group
from kvarena.engine.parallel.shard import Shard


class VocabularyPart(nn.Embedding):
    """The rows of an embedding from `first` on; the other ranks have the others.

    Mixed into the class that the model has for it, which may scale rows (Gemma's does).
    """

    first: int
    group: Group

    def forward(self, input: Tensor) -> Tensor:
        """The rows of any tokens: each rank gives its own, and they are added up."""
        return self.group.sum(self.part(input))

    def part(self, input: Tensor) -> Tensor:
        """This rank's rows, and zeros for the tokens of other ranks."""
        local = input - self.first
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        rows = super().forward(local.masked_fill(elsewhere, 0))
        return rows.masked_fill_(elsewhere[..., None], 0)


def bind(module: nn.Module, shard: Shard, group: Group) -> None:
    """Make a rank's model compute with the others of its stage.

    Args:
        module: the causal language model of the rank's part; changed.
        shard: what it is.
        group: the ranks of its stage.
    """
    base = module.get_submodule(getattr(module, "base_model_prefix", "model"))
    if not shard.layout.is_last:
        # The rows that go on to the next stage are the stream itself.
        base.norm = nn.Identity()
    if group.size == 1:
        return
    for part in shard.cuts.summing_modules(base):
        part.register_forward_hook(lambda _module, _args, output: group.sum(output.contiguous()))
    if shard.layout.is_first:
        embed: Any = module.get_input_embeddings()  # type: ignore[operator]
        own = type(embed)
        kinds = (VocabularyPart,) if own is nn.Embedding else (VocabularyPart, own)
        embed.__class__ = type("VocabularyPart", kinds, {})
        embed.first, embed.group = shard.cuts.first_token, group
