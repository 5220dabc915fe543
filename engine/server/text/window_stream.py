"""The text of tokenizers whose decoder has no known form: the last tokens are decoded again at each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from typing_extensions import override

from kvarena.engine.server.text.streams import BROKEN, TextStream

_WINDOW_TOKENS = 32
_MAX_HELD_TOKENS = 16


class WindowStream(TextStream):
    """Decodes the last tokens again and takes what is new. For tokenizers whose text is not a join of pieces.

    Args:
        decode: text of tokens.
        filters: see `TextStream`.
        context: tokens before the stream's own.
    """

    def __init__(self, decode: Callable[[list[int]], str], filters: Sequence[Any], context: Sequence[int] = ()) -> None:
        super().__init__(frozenset(), filters)
        self._decode = decode
        self._window = list(context)[-_WINDOW_TOKENS:]
        self._is_begun = len(context) > 0
        whole = decode(self._window) if context else ""
        self._shown = whole[: _num_stable(whole)]
        self._num_held = 0

    @override
    def copy(self) -> TextStream:
        made = super().copy()
        assert isinstance(made, WindowStream)
        made._window = list(self._window)
        return made

    @property
    @override
    def at_start(self) -> bool:
        return not self._is_begun

    @property
    @override
    def _holds(self) -> bool:
        return self._num_held > 0

    @property
    @override
    def _is_whole(self) -> bool:
        return not self.rest.endswith(BROKEN)

    @override
    def _raw(self, token_ids: Sequence[int]) -> str:
        return "".join([self._add_one(token) for token in token_ids])

    def _add_one(self, token: int) -> str:
        self._window.append(token)
        self._is_begun = True
        self._num_held += 1
        whole = self._decode(self._window)
        end = _num_stable(whole)
        if self._num_held >= _MAX_HELD_TOKENS:
            end = len(whole)
        elif end <= len(self._shown) or not whole.startswith(self._shown):
            return ""
        new = whole[len(self._shown) : end]
        self._shown, self._num_held = whole[:end], 0
        self._shorten(whole[end:])
        return new

    def _shorten(self, held: str) -> None:
        """Forget old tokens, when the others decode to the same end without them."""
        if len(self._window) <= 2 * _WINDOW_TOKENS:
            return
        window = self._window[-_WINDOW_TOKENS:]
        whole = self._decode(window)
        if whole.endswith(held):
            self._window, self._shown = window, whole[: len(whole) - len(held)]

    @property
    def rest(self) -> str:
        """What is held of the window's text."""
        whole = self._decode(self._window) if self._window else ""
        return whole[len(self._shown) :]

    @override
    def _raw_end(self) -> str:
        rest = self.rest
        self._shown += rest
        return rest


def _num_stable(text: str) -> int:
    """Characters of a text that further tokens do not change."""
    return len(text.rstrip(BROKEN + " "))
