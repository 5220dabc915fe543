"""The requests and answers of the OpenAI API, as far as this server honours them.

Unknown keys are accepted. A known parameter that cannot be honoured is a 400, never silence, and so is one of another
server's that would change an answer: see `sampling.py` and `foreign.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator

MAX_MESSAGES = 16384  # and parts of all messages together
MAX_TOOLS = 1024
MAX_LOGIT_BIAS = 4096
MAX_BAD_WORDS = 1024
MAX_NAMED_TOKENS = 128  # of logprob_token_ids
MAX_TOKENS_LISTED = 1 << 20  # of any list of ids: more are refused before they are looked at

Item = TypeVar("Item")
# The first wrong item is the error: a body of millions of them must not hold the event loop up.
Items = Annotated[list[Item], Field(fail_fast=True)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _few(value: Any) -> Any:
    """Refuses a large object before its values are looked at: each wrong one would be an error of its own."""
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"at most {MAX_LOGIT_BIAS} tokens are allowed, not {len(value)}")
    return value


def _asks_nothing(value: Any) -> Any:
    """False asks for no log-probabilities; 0 would ask for those of the chosen tokens."""
    return None if value is False else value


def _whole(value: Any) -> Any:
    """An integer beyond 64 bits comes as a float out of JSON: its error is that it is too large, or too small."""
    if isinstance(value, float) and abs(value) >= 2**63:
        return 2**64 if value > 0 else -(2**64)
    return value


NumLogprobs = Annotated[int | None, BeforeValidator(_asks_nothing)]
LogitBias = Annotated[dict[str, Finite], BeforeValidator(_few)]
TokenId = Annotated[int, Field(ge=0)]
_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _IDS_SCHEMA,
        {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
    ]
}


class Open(BaseModel):
    """Accepts unknown keys."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class StreamOptions(Open):
    """What a stream carries beside the text."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class StructuredOutputs(Open):
    """One of these constrains the output."""

    json_: Any = Field(default=None, alias="json")
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class JsonSchemaFormat(Open):
    """A named JSON schema."""

    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Open):
    """`text`, `json_object` or `json_schema`; `schema` is another place for the schema of both."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")


class SamplingFields(Open):
    """Parameters that both kinds of completion share."""

    model: str | None = None
    temperature: Finite | None = Field(default=None, ge=0, le=2)
    top_p: Finite | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: Finite | None = Field(default=None, ge=0, le=1)
    presence_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    # Beyond these bounds a logit overflows, and a step with it.
    repetition_penalty: Finite | None = Field(default=None, ge=0.01, le=100)
    seed: Annotated[int | None, BeforeValidator(_whole)] = Field(default=None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=0)
    min_tokens: int | None = Field(default=None, ge=0)
    stop: str | Items[str] | None = None
    stop_token_ids: Annotated[Items[TokenId], Field(max_length=MAX_TOKENS_LISTED)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: Annotated[Items[TokenId], Field(max_length=MAX_TOKENS_LISTED)] | None = None
    bad_words: Annotated[Items[str], Field(max_length=MAX_BAD_WORDS)] | None = None
    prompt_logprobs: NumLogprobs = Field(default=None, ge=-1)
    logprob_token_ids: Annotated[Items[TokenId], Field(max_length=MAX_NAMED_TOKENS)] | None = None
    best_of: int | None = Field(default=None, ge=1)
    use_beam_search: bool | None = None
    length_penalty: Finite | None = Field(default=None, ge=-100, le=100)
    early_stopping: bool | Literal["never"] | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = Field(default=None, ge=-(2**31), le=2**31 - 1)
    user: str | None = Field(default=None, max_length=1024)
    cache_salt: str | None = Field(default=None, max_length=1024)
    add_special_tokens: bool | None = None


class CompletionRequest(SamplingFields):
    """`/v1/completions`."""

    # Checked by hand (completions.py): a union of lists is slow to validate and its errors cannot be read.
    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
    echo: bool | None = None
    logprobs: NumLogprobs = Field(default=None, ge=-1)
    suffix: str | None = None


class FunctionDefinition(Open):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @field_validator("parameters")
    @classmethod
    def _describe_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        # Arguments of a call are an object: no text would be a call of anything else.
        kind = "object" if value is None else value.get("type", "object")
        if "object" not in (kind if isinstance(kind, list) else [kind]):
            raise ValueError("must describe an object (type: object): the arguments of a call are one")
        return value


class Tool(Open):
    """A tool; only functions exist."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(Open):
    """The name in a tool choice."""

    name: str


class NamedToolChoice(Open):
    """Forces one function."""

    type: Literal["function"] = "function"
    function: NamedFunction


class Message(Open):
    """A chat message; `content` is a string or a list of parts."""

    role: str
    content: str | Annotated[Items[dict[str, Any] | str], Field(max_length=MAX_MESSAGES)] | None = None
    name: str | None = None
    tool_calls: Annotated[Items[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None


def has_too_many_parts(contents: Iterable[Any]) -> bool:
    """Whether messages of these contents (lists count, whatever they hold) have more parts than a chat may.

    Asked before a part is looked at: a body holds millions of them, and each would cost the event loop a microsecond.
    """
    return sum(len(one) for one in contents if isinstance(one, list)) > MAX_MESSAGES


def _with_few_parts(given: Any) -> Any:
    turns = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    if any(has_too_many_parts(one.get(key) for one in turns) for key in ("content", "tool_calls")):
        raise ValueError(f"at most {MAX_MESSAGES} parts, or calls, are allowed in all messages together")
    return given


Messages = Annotated[Items[Message], Field(min_length=1, max_length=MAX_MESSAGES), BeforeValidator(_with_few_parts)]


class ChatCompletionRequest(SamplingFields):
    """`/v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=-1)
    echo: bool | None = None
    tools: Annotated[Items[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: str | None = Field(default=None, max_length=64)
    thinking_token_budget: int | None = Field(default=None, ge=-1)


class TokenizeRequest(Open):
    """`/tokenize`: a prompt, or chat messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[Items[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None


class DetokenizeRequest(Open):
    """`/detokenize`."""

    model: str | None = None
    tokens: Items[TokenId] = Field(max_length=MAX_TOKENS_LISTED)
    skip_special_tokens: bool | None = None


# Answers: written by hand on the hot path (completions.py, chat.py); these describe them in the OpenAPI document.


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """Part of `Usage`."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class CompletionChoice(Open):
    """One text."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class CompletionResponse(Open):
    """The answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatMessage(Open):
    """The assistant's message."""

    role: str
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(Open):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatCompletionResponse(Open):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(Open):
    """One served name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kvarena"
    root: str
    parent: str | None = None
    max_model_len: int
    permission: list[dict[str, Any]] = Field(default_factory=list)


class ModelList(BaseModel):
    """The answer of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    """The answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    """The answer of `/detokenize`."""

    prompt: str


class VersionResponse(BaseModel):
    """The answer of `/version`."""

    version: str
