"""The engine process's grammars: compiled on threads, once per text, while the step loop goes on.

A front has tried each of them out (`grammar_checks.py`), so that none takes longer than a known time here.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import socket
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvarena.engine.errors import RequestError
from kvarena.engine.server.engine.grammars import GrammarCompiler, tokenizer_json
from kvarena.engine.server.engine.matchers import CompiledGrammar, one_line
from kvarena.engine.server.engine.steering import SteeredGrammar

logger = logging.getLogger("kvarena.engine")

MAX_COMPILED = 64
_QUICK_SECONDS = 0.1
_LOW_PRIORITY = 10

Grammar = CompiledGrammar | SteeredGrammar
Compile = Callable[[str, str], Grammar]


def make_compiler(tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> GrammarCompiler | None:
    """A compiler, or None (logged) for a model whose tokens cannot be constrained: requests that ask get a 400.

    Args:
        tokenizer: of `transformers`.
        vocab_size: width of the logits.
        eos_token_ids: where a grammar may end, the output does.
    """
    reason = ""
    if not tokenizer.is_fast:
        reason = "its tokenizer has no fast form"
    elif not eos_token_ids:
        reason = "it has no end-of-sequence token"
    else:
        try:
            return GrammarCompiler(tokenizer_json(tokenizer), vocab_size, sorted(eos_token_ids))
        except ValueError as error:  # a tokenizer that does not map tokens to bytes
            reason = one_line(error)
    logger.warning("structured output is not available with this model: %s", reason)
    return None


class Wanted(NamedTuple):
    """A grammar to compile: as `CheckedGrammar`, ordered by the time that it takes."""

    seconds: float
    number: int
    key: str
    kind: str
    grammar: str


@dataclass
class _Shared:
    """What the threads and the loop share; `changed` guards it."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    wanted: list[Wanted] = field(default_factory=list)
    done: deque[tuple[Wanted, Grammar | str]] = field(default_factory=deque)


class CompiledGrammars:
    """Compiled grammars by key. Used by the loop's thread alone.

    Args:
        compile_grammar: compiles (kind, grammar), or raises RequestError.

    Attributes:
        bell: readable when `take_done` has something to give.
    """

    def __init__(self, compile_grammar: Compile) -> None:
        self._compile = compile_grammar
        self._ready: OrderedDict[str, Grammar] = OrderedDict()
        self._under_way: dict[str, Wanted] = {}
        self._shared = _Shared()
        self._numbers = itertools.count()
        self.bell, self._ring = socket.socketpair()
        self.bell.setblocking(False)
        self._threads: list[threading.Thread] = []

    def want(self, key: str, kind: str, grammar: str, seconds: float) -> None:
        """Compile a grammar unless it is there; the quickest come first."""
        ready = self._ready.get(key)
        if ready is not None:
            self._ready.move_to_end(key)
            if not ready.is_worn:
                return
            del self._ready[key]
        if key in self._under_way:
            return
        wanted = Wanted(seconds, next(self._numbers), key, kind, grammar)
        self._under_way[key] = wanted
        if not self._threads:
            self._start_threads()
        with self._shared.changed:
            heapq.heappush(self._shared.wanted, wanted)
            self._shared.changed.notify_all()

    def get(self, key: str) -> Grammar | None:
        """The compiled grammar, if it is there."""
        return self._ready.get(key)

    def is_under_way(self, key: str) -> bool:
        """Whether `take_done` will tell of the grammar."""
        return key in self._under_way

    def drop(self, key: str) -> None:
        """Nobody waits for a grammar any more: it is not compiled, if that has not begun."""
        wanted = self._under_way.get(key)
        if wanted is None:
            return
        with self._shared.changed:
            if wanted in self._shared.wanted:
                self._shared.wanted.remove(wanted)
                heapq.heapify(self._shared.wanted)
                del self._under_way[key]

    def take_done(self) -> list[tuple[str, str]]:
        """Keys of the grammars that are done since the last call, with what was wrong or an empty text."""
        with contextlib.suppress(BlockingIOError):
            self.bell.recv(4096)
        made = []
        while self._shared.done:
            wanted, result = self._shared.done.popleft()
            del self._under_way[wanted.key]
            if isinstance(result, str):
                made.append((wanted.key, result))
                continue
            self._ready[wanted.key] = result
            if len(self._ready) > MAX_COMPILED:
                self._ready.popitem(last=False)
            made.append((wanted.key, ""))
        return made

    def _start_threads(self) -> None:
        # The second one takes quick ones only, so that these never wait for a slow one.
        for most in (float("inf"), _QUICK_SECONDS):
            thread = threading.Thread(target=self._run, args=(most,), name="grammars", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _run(self, most_seconds: float) -> None:
        if hasattr(os, "sched_getaffinity"):  # Linux, where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)
        shared = self._shared
        while True:
            with shared.changed:
                while not shared.wanted or shared.wanted[0].seconds > most_seconds:
                    shared.changed.wait()
                wanted = heapq.heappop(shared.wanted)
            result: Grammar | str
            try:
                result = self._compile(wanted.kind, wanted.grammar)
            except RequestError as error:
                result = str(error)
            # A panic of the library is a BaseException: it is about this grammar, and must not end the thread.
            except BaseException as error:
                result = f"the {wanted.kind} cannot be used: {one_line(error)}"
            shared.done.append((wanted, result))
            self._ring.send(b"\0")
