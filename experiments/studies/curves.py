"""A curve over load, and where it crosses a limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Curve(NamedTuple):
    """y over a rising x."""

    x: Sequence[float]
    y: Sequence[float]


def highest_below(curve: Curve, limit: float) -> float | None:
    """Where the curve first rises above `limit`, linear between its points.

    Returns:
        x; None if it starts above the limit or never rises above it, so that the crossing was not seen.
    """
    above = np.flatnonzero(np.asarray(curve.y) > limit)
    if not len(above) or above[0] == 0:
        return None
    after = int(above[0])
    before = after - 1
    share = (limit - curve.y[before]) / (curve.y[after] - curve.y[before])
    return float(curve.x[before] + share * (curve.x[after] - curve.x[before]))
