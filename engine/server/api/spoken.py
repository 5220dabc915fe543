"""How this model's answers are read, and what of them is held: thoughts, calls, and the grammar of the rest."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from kvarena.engine.errors import RequestError
from kvarena.engine.server.api.protocol import ChatCompletionRequest, NamedToolChoice
from kvarena.engine.server.api.structured import Constraint
from kvarena.engine.server.api.turn import Reading
from kvarena.engine.server.forms.calls import ListParser, NamedParser, ToolParser
from kvarena.engine.server.forms.channels import ChannelForm, ChannelParser
from kvarena.engine.server.forms.finding import (
    ToolForm,
    find_form,
    prompt_end,
    special_tokens,
    with_special_tokens,
)
from kvarena.engine.server.forms.registry import Held
from kvarena.engine.server.forms.texts import HiddenTokens
from kvarena.engine.server.forms.thoughts import AfterThoughts, ChannelThoughts, Place, ThoughtParser, find_thoughts
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.text.tokenization import TokenizerService, given_tools

logger = logging.getLogger("kvarena.front")

STEERED = "steered"  # the kind of a constraint that holds parts alone (`engine/steering.py`)


class Spoken:
    """What is known of a model's answers.

    Args:
        tokenizer: its templates tell the forms.
        config: which forms the operator insists on, and whether calls are held.

    Raises:
        ModelError: the tokenizer ships a response template that cannot be used.
    """

    def __init__(self, tokenizer: TokenizerService, config: ServerConfig) -> None:
        inner = tokenizer.tokenizer
        self._tokenizer = tokenizer
        self._tools = find_form(config.tool_call_parser, inner)
        self._thoughts = find_thoughts(config.reasoning_parser, inner)
        self._strict = config.strict_tools
        self._has_channels = isinstance(self._thoughts, ChannelThoughts)
        self._channels = with_special_tokens(ChannelForm(), inner) if self._has_channels else ToolForm(None)
        special = special_tokens(inner)
        tags = () if self._thoughts is None else (self._thoughts.open, self._thoughts.close)
        self._tags = {tag: special[tag] for tag in tags if tag in special}
        self._thought_end = None if self._thoughts is None or self._has_channels else self._one_token()
        # Grammars of tools that could not be compiled, by the text that asked for them.
        self._lost: set[str] = set()

    def _one_token(self) -> int | None:
        """The token that ends a thought, if one does."""
        assert self._thoughts is not None
        ids = self._tokenizer.tokenizer.encode(self._thoughts.close, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else None

    # What is read

    def kept(self, req: ChatCompletionRequest) -> frozenset[int]:
        """Special tokens that the parsers must see."""
        kept = frozenset(self._tags.values()) | self._channels.kept
        return kept | self._tools.kept if calls_freely(req) else kept

    def reading(self, req: ChatCompletionRequest, prompt: list[int]) -> Reading:
        """How an answer is read; `prompt` is the chat's token ids."""
        detokenizer = self._tokenizer.detokenizer
        make = self._parsers(req, self._end_of(prompt), self._place(req, prompt))
        return Reading(make, detokenizer, self._tokenizer.num_tokens, self._thought_end)

    def _end_of(self, prompt: list[int]) -> str:
        return prompt_end(prompt, self._tokenizer.detokenizer)

    def _place(self, req: ChatCompletionRequest, prompt: list[int]) -> Place | None:
        """Where the answer begins, seen from a thought; None: the model has none."""
        form = self._thoughts
        if form is None:
            return None
        last = req.messages[-1]
        if req.continue_final_message and last.role == "assistant" and isinstance(last.content, str):
            # It goes on within the turn: after a thought that the turn holds, or within it.
            is_open = last.content.rfind(form.open) > last.content.rfind(form.close)
            return "begun" if form.open and is_open else "over"
        return form.place(self._end_of(prompt))

    def _parsers(self, req: ChatCompletionRequest, end: str, place: Place | None) -> Callable[[], ToolParser | None]:
        choice, names = req.tool_choice, frozenset(tool.function.name for tool in req.tools or ())
        hides = req.skip_special_tokens is not False
        # A response template looks for the thought that the prompt begins; here it is taken out before.
        inner = "" if place == "begun" else end

        def of_calls() -> ToolParser | None:
            if isinstance(choice, NamedToolChoice):
                return NamedParser(choice.function.name)
            if choice == "required":
                return ListParser(names)
            if not calls_freely(req):
                return None
            parallel = req.parallel_tool_calls is not False
            return self._tools.parser(given_tools(req.tools or []), inner, parallel=parallel, hides=hides)

        def of_answer() -> ToolParser | None:
            if self._has_channels:
                is_forced = isinstance(choice, NamedToolChoice) or choice == "required"
                made: ToolParser = ChannelParser(names if calls_freely(req) else frozenset())
                rest = of_calls() if is_forced else None
                return made if rest is None else AfterThoughts(made, rest)
            calls = of_calls()
            if self._thoughts is None or place is None or place == "over":
                return calls
            made = ThoughtParser(self._thoughts, place, calls)
            return HiddenTokens(made, tuple(self._tags)) if hides and self._tags and calls is None else made

        return of_answer

    # What is held

    def steered(self, req: ChatCompletionRequest, prompt: list[int], whole: Constraint | None) -> Constraint | None:
        """The constraint of an answer, given that of what follows the thought."""
        place, budget = self._place(req, prompt), req.thinking_token_budget
        budget = None if budget is None or budget < 0 else budget
        held = self._held(req) if whole is None else []
        thinks = place in ("begun", "possible") and (whole is not None or held or budget is not None)
        if not thinks and not held:
            return whole
        thought: dict[str, Any] | None = None
        if thinks:
            assert self._thoughts is not None
            form = self._thoughts
            thought = {"open": form.open, "close": form.close, "forced": form.forced}
            thought |= {"has_begun": place == "begun", "budget": budget}
        spec = {"thought": thought, "then": whole, "held": held}
        return STEERED, json.dumps(spec)

    def _held(self, req: ChatCompletionRequest) -> list[Held]:
        if not self._strict or not calls_freely(req) or self._tools.form is None:
            return []
        held = self._tools.form.held(given_tools(req.tools or []))
        return [] if json.dumps(held) in self._lost else held

    def lose(self, constraint: Constraint, error: RequestError) -> bool:
        """Calls of these tools cannot be held: they are only read. False when something else cannot be."""
        held = json.loads(constraint[1])["held"] if constraint[0] == STEERED else []
        if not held:
            return False
        logger.warning("calls of a request's tools are not held to their schemas: %s", error)
        if len(self._lost) < 1024:
            self._lost.add(json.dumps(held))
            return True
        return False


def calls_freely(req: ChatCompletionRequest) -> bool:
    """Whether the model may call tools of its own accord."""
    return bool(req.tools) and req.tool_choice in (None, "auto")
