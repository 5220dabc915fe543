"""What is done to a joined text as it grows: blanks that its ends lose, blanks before punctuation, the prompt's end.

Each filter gives the part that no further text changes. `holds` says that it may keep something back, `at_start` that
what comes next may lose a blank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from kvarena.engine.server.text.decoders import Strip

# What `clean_up_tokenization` looks for begins with a blank and goes on with these.
_OPEN_END = re.compile(r" [ 'nvr]*\Z")


class StripFilter:
    """Takes blanks off both ends of a text."""

    def __init__(self, strip: Strip) -> None:
        self._content, self._stop, self._left, self._held = strip.content, strip.stop, strip.start, ""
        self.holds = strip.stop > 0

    @property
    def at_start(self) -> bool:
        """Whether the next blank is taken off."""
        return self._left > 0

    def add(self, text: str) -> str:
        """The part of the text so far that stays."""
        while self._left and text:
            if not text.startswith(self._content):
                self._left = 0
                break
            text, self._left = text[1:], self._left - 1
        if not self._stop:
            return text
        text = self._held + text
        num_held = min(self._stop, len(text) - len(text.rstrip(self._content)))
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def end(self) -> str:
        """What is held is what the end loses."""
        self._held = ""
        return ""


class PromptFilter:
    """Takes off a text what it has in common with what the prompt's own text ends in.

    Args:
        ends: the readings of that end; the one that lasts longest counts.
    """

    at_start, holds = False, False

    def __init__(self, ends: Iterable[str]) -> None:
        self._ends = {end for end in ends if end}

    def add(self, text: str) -> str:
        """The text behind the common part."""
        for at, char in enumerate(text):
            if not self._ends:
                return text[at:]
            going_on = {end[1:] for end in self._ends if end[0] == char}
            self._ends = going_on - {""}
            if not going_on:
                return text[at:]
        return ""

    def end(self) -> str:
        """Nothing is held."""
        return ""


class CleanUpFilter:
    """Blanks before punctuation, as `clean_up_tokenization` of transformers takes them out.

    Args:
        clean: that function.
    """

    at_start, holds = False, True

    def __init__(self, clean: Callable[[str], str]) -> None:
        self._clean, self._held = clean, ""

    def add(self, text: str) -> str:
        """Text up to the first blank that something may still be made of."""
        text = self._held + text
        match = _OPEN_END.search(text)
        cut = len(text) if match is None else match.start()
        self._held = text[cut:]
        return self._clean(text[:cut])

    def end(self) -> str:
        """What is held, cleaned."""
        held, self._held = self._held, ""
        return self._clean(held)
