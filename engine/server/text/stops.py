"""Stop strings: found across token boundaries, never leaked, nothing held that cannot become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches the text of one choice.

    Holds back only a tail that is a proper prefix of some stop string. The stop string that is complete first ends
    the text; among several complete at the same character, the longest.

    Args:
        stops: non-empty strings.
        include: keep the matched string in the text.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self.stops = sorted(stops, key=len, reverse=True)
        self.include = include
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.matched: str | None = None

    def add(self, text: str) -> str:
        """Take new text; the part that may be shown now. Sets `matched` when a stop string is complete."""
        if not self.stops:
            return text
        text = self._held + text
        best: tuple[int, int, str] | None = None
        for stop in self.stops:
            at = text.find(stop)
            if at >= 0 and (best is None or (at + len(stop), at) < best[:2]):
                best = (at + len(stop), at, stop)
        if best is not None:
            end, start, self.matched = best
            self._held = ""
            return text[: end if self.include else start]
        keep = self._held_length(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def would_match(self, text: str) -> bool:
        """Whether a stop string would be complete with `text`."""
        text = self._held + text
        return any(stop in text for stop in self.stops)

    def flush(self) -> str:
        """What is held, when the text has ended by itself."""
        held, self._held = self._held, ""
        return held

    def _held_length(self, text: str) -> int:
        longest = len(self.stops[0]) - 1
        start = max(0, len(text) - longest)
        for at in range(start, len(text)):
            if text[at] in self._first_chars:
                tail = text[at:]
                if any(len(stop) > len(tail) and stop.startswith(tail) for stop in self.stops):
                    return len(tail)
        return 0
