"""Numbers as a person reads them. None and NaN print as a dash."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

DASH = "–"


def _digits(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits, thousands separated, never in scientific notation."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def count(value: float | None) -> str:
    """12,345."""
    return DASH if value is None or math.isnan(value) else f"{round(value):,}"


def rate(value: float | None) -> str:
    """Three significant digits: 1,234 or 12.3."""
    return DASH if value is None or math.isnan(value) else _digits(value)


def percent(share: float | None) -> str:
    """A share in [0, 1] as 93.1 %."""
    return DASH if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def seconds(value: float | None) -> str:
    """12.3 µs, 12.3 ms, 1.23 s, 12.3 min."""
    if value is None or math.isnan(value):
        return DASH
    size = abs(value)
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (600.0, 1.0, "s"), (36000.0, 1 / 60, "min")):
        if size < limit:
            return f"{_digits(value * factor)} {unit}"
    return f"{_digits(value / 3600)} h"


def size_bytes(value: float | None) -> str:
    """1.23 GiB."""
    if value is None or math.isnan(value):
        return DASH
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{_digits(value)} {unit}"
        value /= 1024
    return f"{_digits(value)} TiB"


def ratio(value: float | None) -> str:
    """0.82 or 12.3: two decimals, more below 0.1 and next to 1, where they matter."""
    if value is None or math.isnan(value):
        return DASH
    if 0.95 < value < 1.05 and value != 1:
        return f"{value:.3f}"
    return f"{value:.2f}" if 0.1 <= abs(value) < 10 else _digits(value, 2 if abs(value) < 0.1 else 3)


def interval(ends: Sequence[float | None] | None, text: Callable[[float], str] = ratio) -> str:
    """[1.30, 1.38]; a dash where there is none. `text` writes an end."""
    if ends is None:
        return DASH
    known = [end for end in ends if end is not None]
    return f"[{', '.join(map(text, known))}]" if len(known) == 2 else DASH


def scaled_seconds(maximum: float) -> tuple[float, str]:
    """A factor and a unit that make an axis of seconds up to `maximum` readable."""
    if maximum >= 1:
        return 1.0, "s"
    return (1e3, "ms") if maximum >= 1e-3 else (1e6, "µs")
