"""A compiled grammar, and what follows one token by token."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

# Of masks from one automaton, in seconds of processor time: what it has built meanwhile is given back.
_WORN_SECONDS = 2.0
_NO_MATCH = ("NoExtension", "NoExtensionBias")


def one_line(error: object) -> str:
    """What a library said, for a message of one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class CompiledGrammar:
    """A grammar that any number of choices follow, each from its start."""

    def __init__(self, kind: str, matcher: Any, eos_token_ids: list[int]) -> None:
        self.kind, self.eos = kind, eos_token_ids
        self.seconds = 0.0
        self.has_failed = False
        self._matcher = matcher

    @property
    def is_worn(self) -> bool:
        """Whether the automaton should be built anew for those who come: it is large, or at its limit."""
        return self.has_failed or self.seconds > _WORN_SECONDS

    def start(self) -> MatcherConstraint:
        """A constraint at the grammar's start; takes microseconds."""
        return MatcherConstraint(self, self._matcher.deep_copy())


class MatcherConstraint:
    """A `TokenConstraint` that follows one llguidance matcher. All work is done in `fill`, where it is counted."""

    def __init__(self, grammar: CompiledGrammar, matcher: Any) -> None:
        self._grammar, self._matcher = grammar, matcher
        self._accepted: list[int] = []
        self._broken = ""
        self.num_late = 0

    @property
    def failure(self) -> str:
        """Why the matcher gave up, or an empty string. From then on only the end of the sequence is allowed."""
        reason = self._broken
        if not reason and self._matcher.is_error():
            reason = one_line(self._matcher.get_error().partition("<state>")[0])
        if not reason:
            return ""
        return f"the {self._grammar.kind} cannot be used: {'no text matches it' if reason in _NO_MATCH else reason}"

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow, and nothing was wrong: as of the last `fill`."""
        return not self.failure and self._matcher.is_stopped()

    @property
    def is_free(self) -> bool:
        """Never: a grammar holds the whole text."""
        return False

    def allows(self, token_ids: list[int]) -> bool:
        """Whether these tokens may come next, one after the other."""
        return self._matcher.validate_tokens(token_ids) == len(token_ids) if token_ids else True

    def fill(self, bitmask: np.ndarray) -> None:
        """Allowed tokens; only the end of the sequence once the grammar is complete or gave up."""
        start = time.thread_time()
        try:
            for token in self._accepted:
                if not self._matcher.is_stopped():
                    self._matcher.consume_token(token)
            if not self._broken and not self._matcher.is_stopped():
                self._matcher.unsafe_compute_mask_ptr(bitmask.ctypes.data, bitmask.nbytes)
        except BaseException as error:
            # A panic of the library is a BaseException that can only be told by its name; it must not end a step.
            if type(error).__name__ != "PanicException":
                raise
            self._broken = one_line(error)
        self._accepted.clear()
        self._grammar.seconds += time.thread_time() - start
        if self._broken or self._matcher.is_stopped():
            self._only_end(bitmask)

    def _only_end(self, bitmask: np.ndarray) -> None:
        self._grammar.has_failed = self._grammar.has_failed or bool(self.failure)
        bitmask[:] = 0
        for token in self._grammar.eos:
            bitmask[token // 32] |= np.int32(np.uint32(1 << (token % 32)))

    def accept(self, token_id: int) -> None:
        """Follow one token, before the next mask is made."""
        self._accepted.append(token_id)
