"""What is wrong with the weights of experts in a checkpoint's files, by their names there.

transformers puts the experts of a layer side by side as it reads them, and where it cannot it names none of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from kvarena.engine.models.packed_loader import ExpertModule, expert_modules


def expert_fault(shape: nn.Module, stored: Mapping[str, Any]) -> str | None:
    """The first fault, for a message that begins with the directory; None: there is none that names and sizes tell.

    Args:
        shape: the model on the meta device.
        stored: the files' tensors, or what stands for them, by name.
    """
    for _, module in expert_modules(shape):
        way = max(module.ways, key=lambda one: sum(f"{part}.weight" in stored for expert in one for part in expert))
        names = [f"{part}.weight" for expert in way for part in expert]
        missing = [name for name in names if name not in stored]
        if len(missing) == len(names):
            continue  # files have the layer's experts in one tensor, or under names of another kind
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            return f" lacks the weights {', '.join(missing[:3])}{more}; copy the model again"
        fault = _misshapen(module, names, stored) or _surplus(module, names[0], stored)
        if fault is not None:
            return fault
    return None


def _misshapen(module: ExpertModule, names: list[str], stored: Mapping[str, Any]) -> str | None:
    wanted = [[module.inner, module.hidden], [module.inner, module.hidden], [module.hidden, module.inner]]
    for place, name in enumerate(names):
        tensor = stored[name]
        found = list(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)
        if found != wanted[place % 3]:
            return (
                f": weight {name} has shape {found} and config.json asks for {wanted[place % 3]}; config.json and "
                "weights do not belong together"
            )
    return None


def _surplus(module: ExpertModule, first: str, stored: Mapping[str, Any]) -> str | None:
    start = re.escape(first[: first.rindex(".0.")])
    for name in stored:
        found = re.match(rf"{start}\.(\d+)\.", name)
        if found is not None and int(found[1]) >= module.num_experts:
            return (
                f" holds the weight {name}, and config.json says that a layer has {module.num_experts} experts; "
                "config.json and weights do not belong together"
            )
    return None
