"""What was meant: the known names that are most like one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST = 3
LEAST, WORSE = 0.6, 0.15  # how like the best must be, and how much less like the others may be (SequenceMatcher.ratio)


def near(name: str, known: Iterable[str]) -> list[str]:
    """The known names most like `name`, the best first; none where none is."""
    by_lower: dict[str, str] = {}
    for one in known:
        by_lower.setdefault(one.lower(), one)
    found = difflib.get_close_matches(name.lower(), by_lower, n=MOST, cutoff=LEAST)
    shares = [difflib.SequenceMatcher(None, one, name.lower()).ratio() for one in found]
    return [by_lower[one] for one, share in zip(found, shares, strict=True) if share >= shares[0] - WORSE]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean paged? known: ..." for the end of an error's line."""
    names = list(known)
    found = near(name, names)
    return f"{f'; did you mean {either(found)}?' if found else ';'} known: {', '.join(names)}"


def either(names: Iterable[str]) -> str:
    """a or b or c."""
    return " or ".join(names)
