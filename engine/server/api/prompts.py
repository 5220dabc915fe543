"""From a request to the token ids that the engine gets."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from kvarena.engine.server.api.completions import read_prompts
from kvarena.engine.server.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    NamedToolChoice,
    SamplingFields,
    TokenizeRequest,
)
from kvarena.engine.server.api.thinking import adapt_message, template_flags
from kvarena.engine.server.forms.thoughts import template_text
from kvarena.engine.server.shared.errors import bad_request
from kvarena.engine.server.text.image_tokens import ChatPrompt, ImageTokens
from kvarena.engine.server.text.streams import TextStream
from kvarena.engine.server.text.tokenization import TokenizerService, template_messages, template_tools

# What `apply_chat_template` would take for itself, and what has a parameter of its own.
_RESERVED = (
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "kwargs", "max_length",
    "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "self", "tokenize",
    "tokenizer_kwargs", "tools", "truncation",
)  # fmt: skip


class Prompts:
    """Tokenizes prompts and chats.

    Args:
        tokenizer: the model's.
        max_model_len: longest prompt + output, in tokens.
        images: what the model's prompts have around an image; None: it reads text only.
    """

    def __init__(self, tokenizer: TokenizerService, max_model_len: int, images: ImageTokens | None = None) -> None:
        self._tokenizer, self._max_model_len, self._images = tokenizer, max_model_len, images
        self._template = template_text(tokenizer.tokenizer)

    async def begin(
        self, ids: list[int], req: SamplingFields, kept: frozenset[int] = frozenset()
    ) -> tuple[str, TextStream]:
        """The text of a prompt for `echo`, as far as nothing that follows can change it, else an empty one; and the
        stream of what follows, in which `kept` special tokens stay.
        """
        skips = req.skip_special_tokens is not False
        if isinstance(req, CompletionRequest) and req.echo:
            return await self._tokenizer.begin(ids, skips)
        return "", self._tokenizer.detokenizer.keeping(kept).stream(skips, ids)

    async def of_completion(self, req: CompletionRequest, vocab_size: int, max_prompts: int) -> list[list[int]]:
        """Token ids of a completion's prompts. Raises ApiError."""
        made = []
        for prompt in read_prompts(req.prompt, max_prompts, vocab_size):
            ids = (
                await self._encode(prompt, req.add_special_tokens is not False, req)
                if isinstance(prompt, str)
                else prompt
            )
            if not ids:
                raise bad_request("prompt is empty after tokenization", "prompt")
            made.append(self._truncate(ids, req))
            await asyncio.sleep(0)  # hundreds of prompts: open streams and `/health` go on between two
        return made

    async def _encode(self, text: str, special: bool, req: SamplingFields, what: str = "prompt") -> list[int]:
        if getattr(req, "truncate_prompt_tokens", None) is not None:
            return await self._tokenizer.encode_any(text, special)
        return await self._tokenizer.encode(text, special, self._max_model_len, what)

    def _truncate(self, ids: list[int], req: Any) -> list[int]:
        """The last `truncate_prompt_tokens` of a prompt, or the first ones. Raises ApiError."""
        keep = getattr(req, "truncate_prompt_tokens", None)
        if keep is None:
            return ids
        if keep == 0:
            raise bad_request(
                "truncate_prompt_tokens must be at least 1, or -1 for the context", "truncate_prompt_tokens"
            )
        if keep == -1:
            asked = getattr(req, "max_completion_tokens", None) or getattr(req, "max_tokens", None)
            keep = max(1, self._max_model_len - (asked or 1))
        return ids[:keep] if getattr(req, "truncation_side", None) == "right" else ids[-keep:]

    async def barred(self, req: SamplingFields) -> tuple[tuple[int, ...], ...]:
        """Token ids of `bad_words`, each as it stands at a text's beginning and behind a blank. Raises ApiError."""
        made: list[tuple[int, ...]] = []
        for word in req.bad_words or ():
            plain = word.lstrip()
            if not plain:
                raise bad_request("bad_words holds a word without characters; leave it out", "bad_words")
            forms = (plain, " " + plain)
            made += [
                tuple(await self._tokenizer.encode(text, False, self._max_model_len, "bad_words")) for text in forms
            ]
        return tuple(ids for ids in dict.fromkeys(made) if ids)

    async def of_text(self, req: TokenizeRequest) -> list[int]:
        """Token ids of a text that is only counted: beyond the context, too. Raises ApiError."""
        for name in ("tools", "chat_template", "chat_template_kwargs", "continue_final_message"):
            if getattr(req, name):
                raise bad_request(f"{name} goes with messages", name)
        ids = await self._tokenizer.encode_any(req.prompt or "", req.add_special_tokens is not False)
        return self._truncate(ids, req)

    async def of_chat(self, req: Any, num_tokens: Sequence[int] = ()) -> ChatPrompt:
        """Token ids of a chat, and where its images stand, which take `num_tokens` each. Raises ApiError."""
        if getattr(req, "chat_template", None) is not None:
            raise bad_request("a chat_template in the request is not allowed on this server", "chat_template")
        if req.continue_final_message and req.add_generation_prompt:
            raise bad_request(
                "continue_final_message and add_generation_prompt exclude each other", "add_generation_prompt"
            )
        tools = None
        if req.tools and getattr(req, "tool_choice", None) != "none":
            tools = template_tools(req.tools)
        flags = dict(req.chat_template_kwargs or {})
        for key in _RESERVED:
            if key in flags:
                raise bad_request(f"chat_template_kwargs may not hold {key!r}", "chat_template_kwargs")
        flags = template_flags(req, self._template, flags)
        going_on = bool(req.continue_final_message)
        flags["add_generation_prompt"] = (
            not going_on if req.add_generation_prompt is None else req.add_generation_prompt
        )
        flags["continue_final_message"] = going_on
        messages = template_messages(req.messages, keeps_images=bool(num_tokens))
        for message in messages:
            adapt_message(message, self._template)
        text = self._tokenizer.render_chat(messages, tools, **flags)
        ids = await self._encode(text, bool(req.add_special_tokens), req, "messages")
        if not ids:
            raise bad_request("the messages are empty after the chat template", "messages")
        if not num_tokens or self._images is None:
            return ChatPrompt(self._truncate(ids, req), [])
        if getattr(req, "truncate_prompt_tokens", None) is not None:
            raise bad_request("truncate_prompt_tokens does not go with images", "truncate_prompt_tokens")
        return self._images.expand(ids, num_tokens)


def check_chat(req: ChatCompletionRequest) -> None:
    """400 for combinations that make no sense."""
    if req.top_logprobs and not req.logprobs:
        raise bad_request("top_logprobs needs logprobs=true", "top_logprobs")
    if req.max_tokens == 0 or req.max_completion_tokens == 0:
        raise bad_request("max_tokens must be at least 1", "max_tokens")
    if None not in (req.max_tokens, req.max_completion_tokens) and req.max_tokens != req.max_completion_tokens:
        raise bad_request("max_tokens and max_completion_tokens differ; leave one out", "max_completion_tokens")
    forced = isinstance(req.tool_choice, NamedToolChoice) or req.tool_choice == "required"
    if forced and not req.tools:
        raise bad_request("tool_choice needs tools", "tool_choice")
