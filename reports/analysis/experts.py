"""How many of a layer's experts a step reads: expected, and the skew of a routing that was measured.

A token takes k of E experts. Where all are alike, n tokens hit E (1 - (1 - k / E)^n) of them. Where some are taken more
often than others, by Zipf's law with exponent s (the i-th in order of use as often as i^-s), they hit fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

MAX_SKEW = 4.0


@dataclass(frozen=True)
class ExpertLoad:
    """The experts of a model, and how unevenly tokens choose among them.

    Attributes:
        num_layers: layers with experts.
        num_experts: of each.
        top_k: experts of a token.
        skew: exponent of the law above; 0 is a balanced routing.
    """

    num_layers: int
    num_experts: int
    top_k: int
    skew: float = 0.0

    @cached_property
    def _missed(self) -> np.ndarray:
        """The probability that a token does not take each expert."""
        weights = np.arange(1, self.num_experts + 1, dtype=np.float64) ** -self.skew
        taken = np.zeros(self.num_experts)
        # A token takes an expert once at most: what is above 1 goes to the others.
        for most in range(self.num_experts):
            taken[:most] = 1.0
            rest = weights[most:]
            taken[most:] = (self.top_k - most) * rest / rest.sum()
            if taken[most] <= 1.0:
                break
        return 1.0 - taken.clip(0.0, 1.0)

    def read(self, num_tokens: int) -> float:
        """Experts of one layer that at least one of `num_tokens` tokens takes, as expected."""
        return float(self.num_experts - (self._missed**num_tokens).sum())


def measured_skew(num_tokens: np.ndarray, num_read: np.ndarray, load: ExpertLoad) -> float:
    """The skew with which as many experts are expected as were read.

    Args:
        num_tokens: of each step.
        num_read: experts of one layer that each step read, in the mean of its layers.
        load: the model's experts, of whatever skew.

    Returns:
        In [0, MAX_SKEW]; 0 where no fewer were read than a balanced routing reads, or nothing can be told, because no
        step had more than one token.
    """
    counts, which = np.unique(num_tokens, return_inverse=True)
    weights = np.bincount(which)

    def surplus(skew: float) -> float:
        skewed = ExpertLoad(load.num_layers, load.num_experts, load.top_k, skew)
        expected = np.array([skewed.read(int(count)) for count in counts])
        return float((expected * weights).sum() - num_read.sum())

    if not counts.size or counts[-1] <= 1 or surplus(0.0) <= 1e-9 * num_read.sum():
        return 0.0
    # Imported here: who reads a profile of experts, as an engine does, solves nothing, and it takes half a second.
    from scipy import optimize

    return MAX_SKEW if surplus(MAX_SKEW) >= 0 else float(optimize.brentq(surplus, 0.0, MAX_SKEW, xtol=1e-4))
