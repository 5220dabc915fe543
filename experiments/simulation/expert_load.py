"""The experts of a model as the simulator needs them."""

from __future__ import annotations

from kvarena.engine.errors import ConfigError
from kvarena.engine.models.sizes import ModelSizes
from kvarena.reports.analysis.experts import ExpertLoad


def expert_load(sizes: ModelSizes, skew: float) -> ExpertLoad | None:
    """How many experts a step reads; None for a dense model.

    Args:
        sizes: of the model.
        skew: of the routing, see `ExpertLoad`.

    Raises:
        ConfigError: the experts are of a kind whose sizes are not known, or a dense model has a skew.
    """
    experts, name = sizes.spec.experts, sizes.spec.name
    if experts is not None:
        return ExpertLoad(experts.num_layers, experts.num_experts, experts.top_k, skew)
    if sizes.num_experts > 1:
        raise ConfigError(
            f"runner.profile cannot tell what model {name!r} reads: its {sizes.num_experts} experts are not stacked "
            "alike in all layers; use a profile that experiment=calibrate measured"
        )
    if skew:
        raise ConfigError(f"runner.expert_skew={skew} is for a model with experts, and {name!r} is dense; leave it out")
    return None
