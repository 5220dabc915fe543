"""Structured output through llguidance: JSON schema, regex, choice and grammar.

The front compiles a constraint before the engine sees it, on a thread and under limits; the engine process makes one
matcher per choice. llguidance follows lazily built automata with bounded work per token, so that no regex or schema
can stop a step. A matcher that hits its limit, or finds that nothing can match, ends the request with an error.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np

from engine.errors import RequestError

if TYPE_CHECKING:  # pydantic: the engine's process uses the factory below and nothing of it
    from engine.server.protocol import ResponseFormat, StructuredOutputs

logger = logging.getLogger("kvarena.engine")

MAX_SPEC_CHARS = 65536
MAX_SCHEMA_DEPTH = 64
MAX_CHOICES = 4096
# Between JSON tokens. Bounded: a weak model would else write blanks until max_tokens.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{0,12}"
JSON_OBJECT = '{"type": "object"}'
# Work per step that a regex may cost: the defaults allow a step of 0.7 s, these one of 0.05 s.
_LEXER_FUEL, _STEP_LEXER_FUEL = 200_000, 50_000
_NO_MATCH = ("NoExtension", "NoExtensionBias")

Constraint = tuple[str, str]


def from_response_format(fmt: ResponseFormat | None) -> Constraint | None:
    """The constraint of `response_format`. Raises RequestError."""
    if fmt is None or fmt.type == "text":
        return None
    if fmt.type == "json_object":
        return ("json", JSON_OBJECT)
    if fmt.json_schema is None or fmt.json_schema.schema_ is None:
        raise RequestError("response_format.json_schema.schema is missing", "response_format")
    return ("json", schema_text(fmt.json_schema.schema_, "response_format"))


def from_structured_outputs(spec: StructuredOutputs | None) -> Constraint | None:
    """The constraint of `structured_outputs`. Raises RequestError."""
    if spec is None:
        return None
    asked = {name: getattr(spec, name) for name in ("json_", "regex", "choice", "grammar", "json_object")}
    # An empty schema allows any JSON; an empty text constrains nothing that could be meant.
    given = [name for name, value in asked.items() if value or (name == "json_" and value is not None)]
    if len(given) != 1:
        raise RequestError(
            "structured_outputs must hold exactly one of json, regex, choice, grammar, json_object",
            "structured_outputs",
        )
    kind = given[0]
    if kind == "json_":
        return ("json", schema_text(spec.json_, "structured_outputs"))
    if kind == "json_object":
        return ("json", JSON_OBJECT)
    if kind == "choice":
        choices = spec.choice or []
        if len(choices) > MAX_CHOICES or not all(choices):
            raise RequestError(
                f"structured_outputs.choice must be 1 to {MAX_CHOICES} non-empty strings", "structured_outputs"
            )
        # One terminal: as many rules the parser would follow side by side, and give up above 2,000.
        return ("grammar", "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in choices))
    return (kind, getattr(spec, kind))


def schema_text(schema: Any, param: str) -> str:
    """A JSON schema as text, checked for nesting. A string is taken for JSON text."""
    if isinstance(schema, str):
        if len(schema) > MAX_SPEC_CHARS:
            raise RequestError(f"the schema is longer than {MAX_SPEC_CHARS} characters", param)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError("the schema is not valid JSON", param) from error
    if not isinstance(schema, (dict, bool)):
        raise RequestError("a JSON schema is an object", param)
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise RequestError(f"the schema is nested more than {MAX_SCHEMA_DEPTH} deep", param)
    return json.dumps(schema)


def _depth(value: Any) -> int:
    """Nesting of a JSON value, without recursion."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        node, level = stack.pop()
        deepest = max(deepest, level)
        if level > MAX_SCHEMA_DEPTH:
            return level
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        stack += [(child, level + 1) for child in children]
    return deepest


def _grammar(kind: str, text: str) -> str:
    matcher = llguidance.LLMatcher
    if kind == "json":
        return matcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITESPACE})
    if kind == "regex":
        return matcher.grammar_from_regex(text)
    if "::=" in text:
        # vLLM's and llama.cpp's notation.
        from llguidance.gbnf_to_lark import any_to_lark

        text = any_to_lark(text)
    return matcher.grammar_from_lark(text)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]


class ConstraintFactory:
    """Makes constraints for one tokenizer; the engine process has one, and each front to check with.

    Args:
        tokenizer: a fast `transformers` tokenizer.
        vocab_size: width of the logits.
        eos_token_ids: allowed where the grammar may end.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        import llguidance.hf

        self._eos = sorted(eos_token_ids)
        eos = self._eos or None
        self._num_words = -(-vocab_size // 32)
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos)

    @classmethod
    def make(cls, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> ConstraintFactory | None:
        """A factory, or None (logged) for a model whose tokens cannot be constrained: requests that ask get a 400."""
        reason = ""
        if not tokenizer.is_fast:
            reason = "its tokenizer has no fast form"
        elif not eos_token_ids:
            reason = "it has no end-of-sequence token"
        else:
            try:
                return cls(tokenizer, vocab_size, eos_token_ids)
            except ValueError as error:  # a tokenizer that does not map tokens to bytes
                reason = _line(error)
        logger.warning("structured output is not available with this model: %s", reason)
        return None

    def __call__(self, kind: str, text: str) -> MatcherConstraint:
        """A constraint at its start. Raises RequestError when the grammar cannot be compiled."""
        limits = llguidance.LLParserLimits(initial_lexer_fuel=_LEXER_FUEL, step_lexer_fuel=_STEP_LEXER_FUEL)
        matcher = llguidance.LLMatcher(self._tokenizer, _grammar(kind, text), log_level=0, limits=limits)
        constraint = MatcherConstraint(kind, matcher, self._eos)
        if constraint.failure:
            raise RequestError(constraint.failure, "structured_outputs")
        return constraint

    def check(self, constraint: Constraint, param: str) -> None:
        """Raise RequestError when a constraint is too long, cannot be compiled, or allows no first token.

        Takes milliseconds, a quarter of a second at worst; the library lets go of the interpreter meanwhile.
        """
        kind, text = constraint
        if len(text) > MAX_SPEC_CHARS:
            raise RequestError(f"the {kind} is longer than {MAX_SPEC_CHARS} characters", param)
        try:
            made = self(kind, text)
        except RequestError as error:
            raise RequestError(str(error), param) from error
        except (ValueError, RuntimeError, RecursionError) as error:
            raise RequestError(f"the {kind} cannot be used: {_line(error)}", param) from error
        made.fill(np.zeros(self._num_words, dtype=np.int32))
        if made.failure:
            raise RequestError(made.failure, param)


class MatcherConstraint:
    """A `TokenConstraint` that follows one llguidance matcher."""

    def __init__(self, kind: str, matcher: Any, eos_token_ids: list[int]) -> None:
        self._kind, self._matcher, self._eos = kind, matcher, eos_token_ids

    @property
    def failure(self) -> str:
        """Why the matcher gave up, or an empty string. From then on only the end of the sequence is allowed."""
        if not self._matcher.is_error():
            return ""
        reason = _line(self._matcher.get_error().partition("<state>")[0])
        return f"the {self._kind} cannot be used: {'no text matches it' if reason in _NO_MATCH else reason}"

    def fill(self, bitmask: np.ndarray) -> None:
        """Allowed tokens; only the end of the sequence once the grammar is complete or gave up."""
        if self._matcher.is_stopped():
            bitmask[:] = 0
            for token in self._eos:
                bitmask[token // 32] |= np.int32(np.uint32(1 << (token % 32)))
            return
        self._matcher.unsafe_compute_mask_ptr(bitmask.ctypes.data, bitmask.nbytes)

    def accept(self, token_id: int) -> None:
        """Follow one token."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)
