"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_MESSAGE_CHARS = 1000


class ApiError(Exception):
    """An answer with an error body.

    Args:
        status: HTTP status.
        message: one line for the caller; cut to 1000 characters.
        param: the parameter at fault.
        code: what programs test for, such as `context_length_exceeded`.
        headers: extra response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message = message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 3] + "..."
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        message = self.message.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": _type(self.status), "param": self.param, "code": self.code}}


def _type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 404:
        return "not_found_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def as_messages_error(error: ApiError) -> dict[str, Any]:
    """The body of an error as the Messages API has it."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
             429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip
    other = "api_error" if error.status >= 500 else "invalid_request_error"
    message = error.body()["error"]["message"]
    return {"type": "error", "error": {"type": kinds.get(error.status, other), "message": message}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, param, code)


def unavailable(message: str, code: str, retry_after: int = 1) -> ApiError:
    """503 with Retry-After."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after)})


def ended_by_operator() -> ApiError:
    """503 that clients do not try again: an operator has ended the request."""
    return ApiError(503, "The operator has ended this request.", code="aborted", headers={"x-should-retry": "false"})


def context_overflow(
    limit: int, num_prompt: int, max_tokens: int | None, what: str, *, at_least: bool = False
) -> ApiError:
    """400 in the wording by which clients recognise an overflow of the context.

    Args:
        limit: the context in tokens.
        num_prompt: tokens of the prompt.
        max_tokens: what the caller asked for, or None when the prompt alone is too long.
        what: `messages` or `prompt`.
        at_least: `num_prompt` is a lower bound: the rest was not tokenized.
    """
    if max_tokens is None:
        bound = "at least " if at_least else ""
        detail = f"your {what} resulted in {bound}{num_prompt} tokens. Please reduce the length of the {what}."
    else:
        detail = (
            f"you requested {num_prompt + max_tokens} tokens ({num_prompt} in the {what}, {max_tokens} in the "
            f"completion). Please reduce the length of the {what} or completion."
        )
    message = f"This model's maximum context length is {limit} tokens. However, {detail}"
    return beyond_context(message, what)


def beyond_context(message: str, param: str) -> ApiError:
    """400 with the code by which clients recognise a prompt that is too long.

    The message ends with the code, too: LangChain looks for it in the exception's text, which newer openai clients
    make from the message alone.
    """
    return bad_request(f"{message} (context_length_exceeded)", param, "context_length_exceeded")
