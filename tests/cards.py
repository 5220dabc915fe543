"""Which settings a test tries on a GPU, where each of them compiles kernels of its own."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch


def few_on_a_card(cases: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Parameters of a test: `cases`, of which all but `quick` are slow where there is a GPU."""
    if not torch.cuda.is_available():
        return list(cases)
    return [case if case in quick else pytest.param(*_fields(case), marks=pytest.mark.slow) for case in cases]


def _fields(case: Any) -> tuple[Any, ...]:
    return case if type(case) is tuple else (case,)
