"""The model's tokenizer as a front uses it: texts and chats to token ids, tokens back to text."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import orjson

from kvarena.engine.checkpoints.directory import read_json
from kvarena.engine.checkpoints.tokenizer import load_tokenizer
from kvarena.engine.errors import ModelError, RequestError
from kvarena.engine.importing import importing
from kvarena.engine.request import SamplingParams
from kvarena.engine.server.shared.errors import ApiError, bad_request, context_overflow
from kvarena.engine.server.text.detokenizer import Detokenizer
from kvarena.engine.server.text.streams import TextStream

# Longer texts are tokenized on a thread, in the one call of the library that lets go of the interpreter meanwhile.
_INLINE_CHARS = 8192
# Of a text that may be beyond the context, so many are tokenized at a time, and others take their turn between two.
_PIECE_CHARS = 32_768
# A text of at most so many characters for each token of the context is tokenized as a whole: the work is bounded.
_CHARS_PER_TOKEN = 8
# Of a text that need not fit the context: one that is only counted, or of which only the end is kept.
MAX_CHARS = 1 << 22
MAX_TOOLS_BYTES = 1 << 20
IMAGE_PARTS = ("image_url", "image", "input_image")  # types of a message's part
Made = TypeVar("Made")
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


class TokenizerService:
    """Loads a model directory's tokenizer.

    Args:
        path: the model directory.
        trust_remote_code: allow tokenizer code that ships with the model.
        chat_template: a jinja file that replaces the tokenizer's template.

    Raises:
        ModelError: there is no tokenizer in `path`, or a broken one.
    """

    def __init__(self, path: str, trust_remote_code: bool = False, chat_template: str | None = None) -> None:
        # Most of what the tokenizer needs is imported by loading it.
        with importing():
            tokenizer: Any = load_tokenizer(path, trust_remote_code)
        self.tokenizer = tokenizer
        if chat_template is not None:
            self.tokenizer.chat_template = Path(chat_template).read_text()
        self.detokenizer = Detokenizer(self.tokenizer)
        self._backend = getattr(self.tokenizer, "backend_tokenizer", None)
        # Apart: nobody waits for texts that are much longer than his own, nor prompts for texts that are only counted.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._long_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize-long")
        self._counting_thread = ThreadPoolExecutor(1, thread_name_prefix="count")

    async def encode(self, text: str, add_special_tokens: bool, max_tokens: int, what: str = "prompt") -> list[int]:
        """Token ids of a prompt.

        Args:
            text: what to tokenize.
            add_special_tokens: as the tokenizer's own flag (a leading BOS and the like).
            max_tokens: the context. A text that is far beyond it is refused as soon as that is known: the work is
                bounded by what could be admitted, not by what was sent.
            what: `prompt` or `messages`, for the error.

        Raises:
            ApiError: it cannot fit, or cannot be tokenized.
        """
        if len(text) > max(_PIECE_CHARS, _CHARS_PER_TOKEN * max_tokens):
            await self._refuse_oversize(text, max_tokens, what)
        return await self._encode_beside(self._long_thread, text, add_special_tokens)

    async def _refuse_oversize(self, text: str, max_tokens: int, what: str) -> None:
        """Raise ApiError when the text's pieces have twice the tokens that fit.

        Twice, since a cut between two pieces may change the tokens beside it. Each piece queues anew, so that texts
        share the thread evenly.
        """
        num_tokens = 0
        for start in range(0, len(text), _PIECE_CHARS):
            piece = text[start : start + _PIECE_CHARS]
            num_tokens += len(await self._off_loop(self._long_thread, functools.partial(self._encode, piece, False)))
            if num_tokens > 2 * max_tokens:
                raise context_overflow(max_tokens, max_tokens + 1, None, what, at_least=True)

    async def _encode_beside(self, thread: ThreadPoolExecutor, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids, computed here for a short text, on the common thread for a longer one, else on `thread`."""
        if len(text) <= _INLINE_CHARS:
            return self._encode(text, add_special_tokens)
        lane = self._thread if len(text) <= _PIECE_CHARS else thread
        return await self._off_loop(lane, functools.partial(self._encode, text, add_special_tokens))

    async def encode_any(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text that may be longer than the context. Raises ApiError above MAX_CHARS."""
        if len(text) > MAX_CHARS:
            raise bad_request(f"the text is longer than {MAX_CHARS} characters", "prompt")
        return await self._encode_beside(self._counting_thread, text, add_special_tokens)

    async def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        """The text of tokens."""
        work = functools.partial(self.detokenizer.text, tokens, skip_special_tokens=skip_special_tokens)
        return work() if len(tokens) <= _INLINE_CHARS else await self._off_loop(self._counting_thread, work)

    async def begin(self, tokens: list[int], skip_special_tokens: bool) -> tuple[str, TextStream]:
        """A prompt's text and the stream of what follows."""
        work = functools.partial(self.detokenizer.begin, tokens, skip_special_tokens)
        return work() if len(tokens) <= _INLINE_CHARS else await self._off_loop(self._counting_thread, work)

    async def _off_loop(self, thread: ThreadPoolExecutor, work: Callable[[], Made]) -> Made:
        return await asyncio.get_running_loop().run_in_executor(thread, work)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            if self._backend is not None:
                # The raw tokenizer changes no state, so the event loop and the threads may use it at once. `encode`
                # keeps the interpreter's lock: every stream would wait for a long text.
                if len(text) > _INLINE_CHARS:
                    return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
                return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, ValueError, UnicodeError) as error:
            raise bad_request(f"the text cannot be tokenized: {error}", "prompt") from error

    def num_tokens(self, text: str) -> int:
        """Tokens of a text, without those that a prompt begins with."""
        return len(self._encode(text, False))

    def render_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, **flags: Any) -> str:
        """The chat template's text for `messages`.

        Raises:
            ApiError: 400 when the model has no template, or the template refuses the messages.
        """
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **flags)
        except Exception as error:
            # Any error of the template is about the messages: roles that must alternate, a missing field.
            if not getattr(self.tokenizer, "chat_template", None):
                raise bad_request(
                    "this model has no chat template; use /v1/completions, or start the server with --chat-template",
                    "messages",
                ) from error
            text = " ".join(str(error).split())[:300]
            raise bad_request(f"the model's chat template refused the messages: {text}", "messages") from error


def generation_defaults(path: str) -> dict[str, float]:
    """Sampling parameters that the model directory's generation_config.json recommends.

    Raises:
        ModelError: the file is no JSON object, or a value is out of range.
    """
    file = Path(path) / "generation_config.json"
    if not file.is_file():
        return {}
    values = read_json(file)
    made = {key: values[key] for key in _SAMPLING_KEYS if values.get(key) is not None}
    remedy = "correct it, or start with --generation-config vllm"
    for key, value in made.items():
        whole = key in ("top_k", "max_new_tokens")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ModelError(f"{file}: {key}={value!r} must be a{' whole' if whole else ''} number; {remedy}")
    try:
        checked = {key: value for key, value in made.items() if key != "max_new_tokens"}
        SamplingParams(
            **(checked | {"top_k": max(0, made.get("top_k", 0)), "max_tokens": made.get("max_new_tokens", 1)})
        )
    except RequestError as error:
        raise ModelError(f"{file}: {str(error).replace('max_tokens', 'max_new_tokens')}; {remedy}") from error
    return made


def shallow(model: Any) -> dict[str, Any]:
    """A model's fields and unknown keys as they were given, without those that are None."""
    return {name: value for name, value in model if value is not None}


def given_tools(tools: list[Any]) -> list[dict[str, Any]]:
    """Tools as the caller wrote them."""
    return [shallow(tool) | {"function": shallow(tool.function)} for tool in tools]


def template_tools(tools: list[Any]) -> list[dict[str, Any]]:
    """Tools as templates expect them. Raises a 400 when they are too large together."""
    made = given_tools(tools)
    if len(orjson.dumps(made)) > MAX_TOOLS_BYTES:
        raise bad_request(f"tools are larger than {MAX_TOOLS_BYTES} bytes together", "tools")
    return made


def template_messages(messages: list[Any], keeps_images: bool = False) -> list[dict[str, Any]]:
    """Messages as templates expect them: text parts joined, past tool calls' arguments as objects.

    With `keeps_images` a message that holds images is a list of its parts, in order.

    Raises:
        ApiError: a part that is no text, or arguments that are not JSON.
    """
    made = []
    for i, message in enumerate(messages):
        entry = shallow(message)
        content = message.content
        if isinstance(content, list):
            if keeps_images and any(_is_image(part) for part in content):
                entry["content"] = [
                    {"type": "image"} if _is_image(part) else {"type": "text", "text": _part_text(part, i)}
                    for part in content
                ]
            else:
                entry["content"] = "\n".join(_part_text(part, i) for part in content)
        elif content is None:
            entry["content"] = ""
        if message.tool_calls is not None:
            entry["tool_calls"] = [_tool_call(call, i) for call in message.tool_calls]
        made.append(entry)
    return made


def _is_image(part: dict[str, Any] | str) -> bool:
    return isinstance(part, dict) and part.get("type") in IMAGE_PARTS


def _part_text(part: dict[str, Any] | str, index: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type")
    if kind in ("text", "input_text", "refusal"):
        text = part.get("text", part.get("refusal"))
        if isinstance(text, str):
            return text
    raise bad_request(f"messages[{index}].content holds a part of type {str(kind)[:50]!r} without text", "messages")


def _tool_call(call: dict[str, Any], index: int) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request(f"messages[{index}].tool_calls holds a call without a function name", "messages")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"messages[{index}].tool_calls: arguments are not valid JSON", "messages") from error
    return {**call, "function": {**function, "arguments": arguments}}
