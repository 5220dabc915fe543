"""The experts that a forward chose, chosen again in another: so that two forwards can be compared in low precision.

Two experts of a token are often equally good to within rounding. A forward that computes the same in another order then
takes another one, and its logits are others although nothing is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOP_K = (torch.topk, torch.Tensor.topk)


class NoteChoices(TorchFunctionMode):
    """While it is active, what `topk` finds is noted.

    Attributes:
        found: int64 [..., k], in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call it, and note."""
        result = func(*args, **(kwargs or {}))
        if func in _TOP_K:
            self.found.append(result.indices)
        return result


class RepeatChoices(TorchFunctionMode):
    """While it is active, `topk` finds what was noted, call by call, where that has the shape of what is asked.

    Args:
        choices: of `NoteChoices`, or of `side_by_side`.
    """

    def __init__(self, choices: Sequence[Tensor]) -> None:
        super().__init__()
        self._choices = iter(choices)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call it, or repeat."""
        result = func(*args, **(kwargs or {}))
        if func not in _TOP_K:
            return result
        indices = next(self._choices, None)
        if indices is None or indices.shape != result.indices.shape or not _is_along_last(args, kwargs or {}):
            return result
        return torch.return_types.topk((args[0].gather(-1, indices), indices))


def side_by_side(rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The choices of sequences that ran each alone as those of one packed row; none where they are not alike.

    The sequences are of unlike lengths.
    """
    if len({len(row) for row in rows}) != 1:
        return []
    joined = []
    for parts in zip(*rows, strict=True):
        shapes = [part.shape for part in parts]
        tokens = [at for at, sizes in enumerate(zip(*shapes, strict=False)) if len(set(sizes)) > 1]
        # Sequences of unlike lengths differ in the dimension of tokens alone: of groups of experts it is not the last
        # but one.
        if len({len(shape) for shape in shapes}) > 1 or len(tokens) != 1:
            return []
        joined.append(torch.cat(parts, dim=tokens[0]))
    return joined


def _is_along_last(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
    return bool(args) and dim in (-1, args[0].dim() - 1)
