"""Where a rank stands. Free of torch.

rank = stage * tensor + tensor_rank          tensor = 2, pipeline = 2

stage 0    rank 0   rank 1     layers 0..n/2       the ranks of a stage share its heads and experts' columns
stage 1    rank 2   rank 3     layers n/2..n       a stage hands its rows on to the next, rank by rank
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Layout:
    """How many ranks there are, and which of them this is.

    Attributes:
        tensor: ranks of a stage (tensor parallel).
        pipeline: stages (pipeline parallel).
        rank: this one.
    """

    tensor: int = 1
    pipeline: int = 1
    rank: int = 0

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tensor * self.pipeline

    @property
    def stage(self) -> int:
        """The stage of this rank."""
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        """This rank among those of its stage."""
        return self.rank % self.tensor

    @property
    def is_first(self) -> bool:
        """Whether this rank embeds the tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank computes logits."""
        return self.stage == self.pipeline - 1

    def of(self, rank: int) -> Layout:
        """The same as another rank sees it."""
        return replace(self, rank=rank)

    def rank_of(self, stage: int) -> int:
        """The rank that stands where this one does, in another stage."""
        return stage * self.tensor + self.tensor_rank

    def layers(self, num_layers: int) -> range:
        """The layers of this rank's stage; earlier stages have one more where they do not divide."""
        size, more = divmod(num_layers, self.pipeline)
        first = self.stage * size + min(self.stage, more)
        return range(first, first + size + (self.stage < more))

    def __str__(self) -> str:
        return f"tensor_parallel_size={self.tensor} x pipeline_parallel_size={self.pipeline}"
