"""Grammars of structured output: llguidance's form of a JSON schema, regex, choice or grammar, and what follows one.

Three processes use this and nothing else of structured output: the worker that tries a grammar out
(`grammar_worker.py`), the engine's, and a test's. llguidance follows lazily built automata with bounded work per token;
copies of one matcher share its automaton, so that a text which many choices follow is built once.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import llguidance
import numpy as np

from kvarena.engine.errors import RequestError
from kvarena.engine.server.engine.matchers import CompiledGrammar, one_line
from kvarena.engine.server.engine.steering import STEERED, SteeredGrammar, compile_steered

# Between JSON tokens. Bounded: a weak model would else write blanks until max_tokens.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{0,12}"
# Work per token that a grammar may cost: the library's defaults allow 0.7 s, these some milliseconds.
_LEXER_FUEL, _STEP_LEXER_FUEL = 200_000, 50_000
# 300 optional properties need rows of 1,200. An ambiguous grammar's items cost up to 12 us each: 20,000 are 0.25 s.
_MAX_ITEMS_IN_ROW, _STEP_MAX_ITEMS = 2000, 5_000
_MAX_LEXER_STATES = 50_000
# A grammar may force one text without end (r: /a+/ r), which the library would write out before a step goes on: it
# counts parser items there, and no bytes. Of several such lines the last holds. Texts of schemas and regular
# expressions end.
_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
# A GBNF escape of a character that stands for itself, behind an even number of backslashes.
_ESCAPE = re.compile(r"(?<!\\)((?:\\\\)*)\\u((?!00[0-7])(?![dD][89a-fA-F])[0-9a-fA-F]{4})")


def to_grammar(kind: str, text: str) -> str:
    """llguidance's form of a constraint.

    Args:
        kind: `json` (a schema's text), `regex`, `choice` (Lark) or `grammar` (Lark, or GBNF as llama.cpp and vLLM
            know it).
        text: the constraint.

    Raises:
        Exception: whatever the library raises at a mistake; its GBNF reader has no error class of its own.
    """
    matcher = llguidance.LLMatcher
    if kind == "json":
        return matcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITESPACE})
    if kind == STEERED:
        spec = json.loads(text)
        if spec["then"] is not None:
            inner, rest = spec["then"]
            spec["then"] = [inner, to_grammar(inner, rest)]
        return json.dumps(spec)
    if kind == "regex":
        return matcher.grammar_from_regex(text)
    if kind == "grammar" and "::=" in text:
        from llguidance.gbnf_to_lark import any_to_lark

        # The library writes \\u00e9 back as \\ue9, which it then cannot read.
        text = any_to_lark(_ESCAPE.sub(lambda found: found[1] + chr(int(found[2], 16)), text))
    return matcher.grammar_from_lark(text + _NO_FORCING if kind == "grammar" else text)


def tokenizer_json(tokenizer: Any) -> str:
    """A fast `transformers` tokenizer as the text from which `GrammarTokenizer` is made, without that library."""
    backend = copy.copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return backend.to_str()


class GrammarCompiler:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: from `tokenizer_json`.
        vocab_size: width of the logits.
        eos_token_ids: allowed where the grammar may end; at least one.

    Raises:
        ValueError: the tokenizer does not map its tokens to bytes.
    """

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: list[int]) -> None:
        self.eos = sorted(eos_token_ids)
        self._num_words = -(-vocab_size // 32)
        self.tokenizer = llguidance.LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=self.eos)

    def __call__(self, kind: str, grammar: str) -> CompiledGrammar | SteeredGrammar:
        """Compile what `to_grammar` made of a constraint; lets go of the interpreter meanwhile.

        Raises:
            RequestError: the grammar cannot be compiled.
        """
        return (
            compile_steered(grammar, self.whole, self.tokenizer, self.eos)
            if kind == STEERED
            else self.whole(kind, grammar)
        )

    def whole(self, kind: str, grammar: str) -> CompiledGrammar:
        """Compile a constraint that holds a whole text. Raises RequestError."""
        limits = llguidance.LLParserLimits(
            max_items_in_row=_MAX_ITEMS_IN_ROW,
            initial_lexer_fuel=_LEXER_FUEL,
            step_lexer_fuel=_STEP_LEXER_FUEL,
            step_max_items=_STEP_MAX_ITEMS,
            max_lexer_states=_MAX_LEXER_STATES,
        )
        matcher = llguidance.LLMatcher(self.tokenizer, grammar, log_level=0, limits=limits)
        compiled = CompiledGrammar(kind, matcher, self.eos)
        failure = compiled.start().failure
        if failure:
            raise RequestError(failure)
        return compiled

    def try_out(self, kind: str, text: str) -> str:
        """The grammar of a constraint, once it has been compiled and allows a first token.

        Raises:
            RequestError: it cannot be used; the message is for the caller.
        """
        try:
            grammar = to_grammar(kind, text)
        except MemoryError:
            raise
        # Anything: the readers of schemas and GBNF raise whatever their own faults lead to.
        except Exception as error:
            raise RequestError(f"the {kind} cannot be used: {one_line(error)}") from error
        first = self(kind, grammar).start()
        first.fill(np.zeros(self._num_words, dtype=np.int32))
        if first.failure:
            raise RequestError(first.failure)
        return grammar
