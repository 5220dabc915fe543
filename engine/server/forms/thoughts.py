"""Thoughts: which tags a model writes around them, and the parser that takes them out of an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from typing_extensions import override

from kvarena.engine.server.forms import channels
from kvarena.engine.server.forms.calls import Parsed, Part, Thought, ToolParser, parts_of
from kvarena.engine.server.forms.texts import overlap

Place = Literal["begun", "possible", "over"]
# By which templates are told to think or not to, and by which how much.
SWITCHES, EFFORT = ("enable_thinking", "thinking"), "reasoning_effort"


@dataclass(frozen=True)
class ThoughtForm:
    """One way to write thoughts.

    Attributes:
        open, close: the tags.
        is_implied: an answer begins with a thought, whether or not it is opened.
    """

    open: str
    close: str
    is_implied: bool = False

    @property
    def forced(self) -> str:
        """What closes a thought whose budget is used up."""
        return self.close

    def place(self, prompt: str) -> Place:
        """Where an answer begins, seen from a thought.

        Args:
            prompt: the end of the prompt, or of the turn that is gone on with.
        """
        end = prompt.rstrip()
        if end.endswith(self.close):
            return "over"
        return "begun" if end.endswith(self.open.rstrip()) or self.is_implied else "possible"


@dataclass(frozen=True)
class ChannelThoughts(ThoughtForm):
    """gpt-oss's: all before the final channel."""

    @property
    @override
    def forced(self) -> str:
        return f"{channels.ENDS[0]}{channels.START}assistant{self.close}"

    @override
    def place(self, prompt: str) -> Place:
        return "begun"


_THINK = ThoughtForm("<think>", "</think>")
CHANNELS = ChannelThoughts("", f"{channels.CHANNEL}final{channels.MESSAGE}")
# By the names of `--reasoning-parser`: ours, and vLLM's for the same.
THOUGHT_FORMS: dict[str, ThoughtForm] = {
    "think": _THINK,
    "mistral": ThoughtForm("[THINK]", "[/THINK]"),
    "seed_oss": ThoughtForm("<seed:think>", "</seed:think>"),
    "kimi": ThoughtForm("◁think▷", "◁/think▷"),
    "gemma4": ThoughtForm("<|channel>thought", "<channel|>"),
    "channels": CHANNELS,
    "deepseek_r1": replace(_THINK, is_implied=True),
}
_TOLD = tuple(THOUGHT_FORMS)[:5]  # by their tags in a template
THOUGHT_FORMS |= dict.fromkeys(
    ("qwen3", "glm45", "deepseek_v3", "hunyuan_a13b", "ernie45", "olmo3", "nemotron_v3", "step3", "minimax_m2"), _THINK
)
THOUGHT_FORMS |= {"openai_gptoss": CHANNELS, "gptoss": CHANNELS}


def template_text(tokenizer: Any) -> str:
    """A tokenizer's chat templates as they are written."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else "\n".join(map(str, template.values()))


def find_thoughts(kind: str, tokenizer: Any) -> ThoughtForm | None:
    """How a model writes thoughts; None: it does not, or they stay text.

    Args:
        kind: as `ServerConfig.reasoning_parser`; `auto` goes by the checkpoint's response template, else by the tags
            in its chat template.
        tokenizer: the model's `transformers` tokenizer.
    """
    if kind != "auto":
        return THOUGHT_FORMS.get(kind)
    shipped = getattr(tokenizer, "response_template", None)
    fields = shipped.get("fields", {}) if isinstance(shipped, dict) else {}
    tags = [fields.get("thinking", {}).get(key) for key in ("open", "close")]
    if all(isinstance(tag, str) and tag for tag in tags):
        return ThoughtForm(*tags)
    template = template_text(tokenizer)
    if f"{channels.CHANNEL}{channels.THOUGHTS}" in template:
        return CHANNELS
    return next((THOUGHT_FORMS[name] for name in _TOLD if THOUGHT_FORMS[name].close in template), None)


def knows(template: str, name: str) -> bool:
    """Whether a template looks at a variable: its name stands there, as no attribute and in no quotes."""
    return re.search(rf"(?<![\w.'\"]){re.escape(name)}(?![\w'\"])", template) is not None


class ThoughtParser(ToolParser):
    """Takes the thought at the beginning of an answer out of it, and gives the rest to another parser.

    White space around a thought belongs to nothing. One that is never closed goes on to the end.

    Args:
        form: the tags.
        place: where the answer begins, from `ThoughtForm.place`.
        parser: of what follows; None: that is text.
    """

    def __init__(self, form: ThoughtForm, place: Place, parser: ToolParser | None) -> None:
        self._form, self._parser, self._held = form, parser, ""
        self._state: Literal["possible", "thought", "blank", "answer"] = (
            "answer" if place == "over" else "thought" if place == "begun" else "possible"
        )
        self._may_repeat = place == "begun"  # the tag that the prompt holds, written once more
        self._has_text = False

    @override
    def runs_on(self, text: str) -> type[str] | None:
        if self._held:
            return None
        if self._state == "answer":
            return str if self._parser is None else self._parser.runs_on(text)
        # Nothing of it can be the closing tag; white space at its end may be the thought's end.
        runs = self._has_text and self._state == "thought" and self._form.close[0] not in text
        return Thought if runs and not text[-1:].isspace() else None

    @override
    def add(self, text: str) -> Parsed:
        if self._state == "answer" and not self._held:
            return self._answer(text)
        if self._has_text and self._state == "thought" and text and self._form.close[0] not in text:
            shown = (self._held + text).rstrip()
            if self._form.close[0] not in self._held:
                self._held = (self._held + text)[len(shown) :]
                return Parsed((Thought(shown),)) if shown else Parsed()
        self._held += text
        return self._read(False)

    @override
    def end(self) -> Parsed:
        made = self._read(True)
        rest = parts_of() if self._parser is None else self._parser.end()
        return parts_of(*made, *rest)

    def _answer(self, text: str) -> Parsed:
        return parts_of(text) if self._parser is None else self._parser.add(text)

    def _read(self, is_end: bool) -> Parsed:
        made: list[Part] = []
        if self._state == "possible" or (self._state == "thought" and self._may_repeat):
            body = self._held.lstrip()
            opening = self._form.open
            if body.startswith(opening):
                self._state, self._held = "thought", body[len(opening) :]
            elif opening.startswith(body) and not is_end:
                return parts_of()
            elif self._state == "possible":
                self._state = "answer"
            self._may_repeat = False
        if self._state == "thought":
            self._think(made, is_end)
        if self._state == "blank":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "answer"
        if self._state == "answer" and self._held:
            held, self._held = self._held, ""
            made += self._answer(held)
        return parts_of(*made)

    def _think(self, made: list[Part], is_end: bool) -> None:
        if not self._has_text:
            self._held = self._held.lstrip()
        at = self._held.find(self._form.close)
        if at >= 0:
            made.append(Thought(self._held[:at].rstrip()))
            self._state, self._held = "blank", self._held[at + len(self._form.close) :]
            return
        size = len(self._held) - (0 if is_end else overlap(self._held, self._form.close))
        # White space waits: it may be the thought's end.
        shown = self._held[:size].rstrip()
        self._has_text = self._has_text or bool(shown)
        made.append(Thought(shown))
        self._held = "" if is_end else self._held[len(shown) :]


class AfterThoughts(ToolParser):
    """A forced call after a model's thoughts: what one parser takes for text is read by another.

    Args:
        parser: tells thoughts from text.
        rest: reads the text.
    """

    def __init__(self, parser: ToolParser, rest: ToolParser) -> None:
        self._parser, self._rest = parser, rest

    @override
    def add(self, text: str) -> Parsed:
        return parts_of(*self._read(self._parser.add(text)))

    @override
    def end(self) -> Parsed:
        return parts_of(*self._read(self._parser.end()), *self._rest.end())

    def _read(self, parsed: Parsed) -> list[Part]:
        made: list[Part] = []
        for part in parsed:
            made += self._rest.add(part) if type(part) is str else [part]
        return made
