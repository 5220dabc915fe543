"""Parameters of other servers and endpoints: what would change an answer there is never ignored here.

A body may hold keys that this server does not know: labels, metadata, hints to caches. Those of the tables below change
what other servers answer (vLLM, SGLang, TGI, llama.cpp, Ollama, TensorRT-LLM, LMDeploy, text-generation-webui, the
APIs of OpenAI, Anthropic and Mistral), and so does a known key that is spelled otherwise (`topP`) or belongs to another
endpoint. With a value that asks for nothing they are taken, with any other they are a 400.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from kvarena.engine.server.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    FunctionDefinition,
    JsonSchemaFormat,
    Message,
    NamedToolChoice,
    Open,
    ResponseFormat,
    StructuredOutputs,
    TokenizeRequest,
)
from kvarena.engine.server.shared.errors import bad_request

_TOP = "top-level keys of the body"
_THINKING = "chat_template_kwargs"
# What takes their place here.
REPLACED = {
    "guided_json": "structured_outputs.json", "guided_json_object": "structured_outputs.json_object",
    "guided_regex": "structured_outputs.regex", "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "guided_decoding": "structured_outputs", "regex": "structured_outputs.regex", "pattern": "structured_outputs.regex",
    "ebnf": "structured_outputs.grammar", "gbnf": "structured_outputs.grammar", "lark": "structured_outputs.grammar",
    "grammar": "structured_outputs.grammar", "grammar_string": "structured_outputs.grammar",
    "json_schema": "response_format", "schema": "response_format", "format": "response_format",
    "json_mode": "response_format", "choices": "structured_outputs.choice",
    "functions": "tools", "function_call": "tool_choice",
    "max_new_tokens": "max_tokens", "max_output_tokens": "max_tokens", "max_tokens_to_sample": "max_tokens",
    "max_length": "max_tokens", "max_gen_len": "max_tokens", "max_gen_toks": "max_tokens", "n_predict": "max_tokens",
    "num_predict": "max_tokens", "min_new_tokens": "min_tokens", "min_length": "min_tokens",
    "stop_sequences": "stop", "stop_strings": "stop", "stopping_strings": "stop", "stop_words": "stop",
    "stop_words_list": "stop", "until": "stop", "stop_ids": "stop_token_ids", "eos_token_id": "stop_token_ids",
    "no_stop_trim": "include_stop_str_in_output", "ban_eos_token": "ignore_eos", "return_full_text": "echo",
    "random_seed": "seed", "sampler_seed": "seed", "temp": "temperature", "do_sample": "temperature",
    "repeat_penalty": "repetition_penalty", "rep_pen": "repetition_penalty", "logits_bias": "logit_bias",
    "num_beams": "use_beam_search with n", "beam_size": "use_beam_search with n",
    "beam_width": "use_beam_search with n",
    "num_return_sequences": "n", "best_of_n": "n", "top_logprobs_num": "top_logprobs", "n_probs": "logprobs",
    "return_logprob": "logprobs", "return_logprobs": "logprobs", "output_scores": "logprobs",
    "input_ids": "prompt", "inputs": "prompt", "input": "prompt or messages", "system": "messages",
    "instructions": "messages", "system_prompt": "messages", "system_instruction": "messages",
    "extra_body": _TOP, "extra_args": _TOP, "sampling_params": _TOP, "parameters": _TOP, "options": _TOP,
    "generation_config": _TOP, "vllm_xargs": _TOP, "nvext": _TOP,
    "thinking": _THINKING, "think": _THINKING, "reasoning": _THINKING,
    "safe_prompt": "messages", "extra_key": "cache_salt",
    "truncate": "truncate_prompt_tokens", "prompt_truncate_len": "truncate_prompt_tokens",
    "add_bos_token": "add_special_tokens", "add_special": "add_special_tokens", "with_pieces": "return_token_strs",
    "disable_parallel_tool_use": "parallel_tool_calls", "prefill": "continue_final_message",
    "response_prefix": "continue_final_message",
}  # fmt: skip
# Nothing takes their place. A number is the value that switches them off.
_NUMBERS: dict[str, tuple[float, ...]] = {
    "beam_search_diversity_rate": (0,), "beam_size": (1,), "beam_width": (1,), "best_of_sequences": (1,),
    "cfg_scale": (1,), "diversity_penalty": (0,), "dry_multiplier": (0,), "dynatemp_max": (0,), "dynatemp_min": (0,),
    "dynatemp_range": (0,), "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,), "guidance_scale": (1,),
    "logprob_start_len": (-1,),
    "max_time": (), "max_tokens_second": (0,), "min_keep": (0,), "mirostat": (0,), "mirostat_mode": (0,),
    "n_discard": (0,), "n_indent": (0,), "n_keep": (0,), "no_repeat_ngram_size": (0,), "nsigma": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,), "num_ctx": (), "num_keep": (0,), "penalty_alpha": (0,), "repetition_ngram_size": (0,),
    "repetition_ngram_threshold": (0,), "skew": (0,), "smoothing_factor": (0,), "t_max_predict_ms": (0, -1),
    "tfs": (1,), "tfs_z": (1,), "top_a": (0,),
    "top_n_sigma": (0, -1), "top_n_tokens": (0,),
    "top_p_decay": (1,), "top_p_min": (0,), "typ_p": (1,), "typical": (1,), "typical_p": (1,), "xtc_probability": (0,),
}  # fmt: skip
_WORDS = """
    adapter adapter_id adapter_name allowed_tools assistant_model audio audio_data background banned_strings
    banned_tokens bad_words_ids bad_words_list begin_suppress_tokens bootstrap_host bootstrap_port bootstrap_room
    character constraints container context custom_logit_processor custom_params custom_token_bans data_parallel_rank
    decoder_input_details details detokenize disaggregated_params documents dynamic_temperature
    ec_transfer_params embedding_bias end_id exclude_input_from_output exponential_decay_length_penalty flat_logprobs
    force_words_ids forced_bos_token_id forced_eos_token_id grammar_lazy grammar_triggers guardrails
    guided_decoding_backend guided_whitespace_pattern image_data images input_embeds
    instruction_template instruction_template_str kv_transfer_params logit_bias_exp logits_processors
    lookahead_config lora lora_id lora_name lora_path lora_request mcp_servers media_io_kwargs
    mm_processor_kwargs modalities models moderation negative_prompt pad_id plugins post_sampling_probs preset
    previous_response_id prompt_embeds prompt_ignore_length prompt_mode provider quad_sampling raw raw_output
    remove_invalid_values renormalize_logits repetition_detection response_json_schema return_context_logits
    return_generation_logits return_hidden_states return_meta_info return_routed_experts return_text_in_logprobs
    return_tokens route safety_settings sampler_order sampler_priority sampler_seq samplers
    separate_reasoning sequence_bias session_params skip_reading_prefix_cache stop_regex stop_token_strs structural_tag
    suppress_tokens temperature_last template token_ban token_ids_logprob top_p_reset_ids transforms truncation
    verbosity video_data watermark web_search_options
"""
_OTHERS = frozenset(_WORDS.split())
# Other values that ask for what this server does anyway.
_SAME: dict[str, tuple[Any, ...]] = {
    "detokenize": (True,), "do_sample": (True,), "exclude_input_from_output": (True,), "include_reasoning": (True,),
    "add_bos_token": (True,), "add_special": (True,), "modalities": (["text"],), "truncation": ("disabled",),
    "verbosity": ("medium",), "num_return_sequences": (1,), "best_of_n": (1,),
    "n_probs": (0,), "top_logprobs_num": (0,), "repeat_penalty": (1,), "rep_pen": (1,), "min_length": (0,),
    "min_new_tokens": (0,), "top_logprobs": (0,), "separate_reasoning": (True,),
}  # fmt: skip
# Where False is a wish of its own.
_FALSE_COUNTS = frozenset((
    "add_bos_token", "add_special", "detokenize", "do_sample", "enable_thinking", "include_reasoning", "reasoning",
    "parse_special", "think", "thinking",
))  # fmt: skip
# What becomes of a prompt; `/tokenize` makes nothing else.
_OF_PROMPTS = frozenset((
    "add_bos_token", "add_special", "documents", "enable_thinking", "extra_body", "extra_args", "functions", "images",
    "input", "inputs", "instructions", "mm_processor_kwargs", "options", "parameters", "prompt_embeds",
    "prompt_truncate_len", "reasoning", "reasoning_effort", "system", "system_prompt", "template", "think", "thinking",
    "truncate", "truncation", "with_pieces", "content", "text", "parse_special",
))  # fmt: skip
# Nested objects with other names for what they hold; what takes their place, or an empty text.
_NESTED: dict[type[BaseModel], dict[str, str]] = {
    Message: {"prefix": "continue_final_message", "partial": "continue_final_message", "function_call": "tool_calls"},
    FunctionDefinition: dict.fromkeys(
        ("input_schema", "json_schema", "schema", "parameters_json_schema", "args_schema", "properties"), "parameters"
    ),
    NamedToolChoice: {"disable_parallel_tool_use": "parallel_tool_calls"},
}
# Objects of which every key counts.
_CLOSED = (ResponseFormat, JsonSchemaFormat, StructuredOutputs)
_ENDPOINTS = (CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_MAX_KEY_CHARS = 100


def check_foreign(body: Open) -> None:
    """400 for a key of a body, or of an object in it, that would change an answer elsewhere."""
    for where, part in _parts(body):
        for key, value in (part.model_extra or {}).items():
            if len(key) > _MAX_KEY_CHARS:
                continue
            name = _HUMP.sub("_", key).replace("-", "_").lower()
            reason = None if _asks_nothing(name, value) else _reason(part, name)
            if reason is not None:
                place = f"{where}.{key}" if where else key
                raise bad_request(f"{place} {reason}", where.split(".")[0].split("[")[0] or key)


def _parts(body: Open) -> Iterator[tuple[str, Open]]:
    """The body and the objects in it that this server knows, with their places."""
    pending: list[tuple[str, Open]] = [("", body)]
    while pending:
        where, part = pending.pop()
        yield where, part
        for name in part.model_fields_set:
            value = getattr(part, name, None)
            inner = f"{where}.{name}" if where else name
            if isinstance(value, Open):
                pending.append((inner, value))
            elif isinstance(value, list):
                pending += [(f"{inner}[{i}]", one) for i, one in enumerate(value) if isinstance(one, Open)]


def _reason(part: Open, name: str) -> str | None:
    """Why a key of an object is refused, or None."""
    kind = type(part)
    own = _names(kind)
    if name in own:
        return f"is spelled {name} on this server"
    if kind in _CLOSED:
        return f"is not supported by this server; known there: {', '.join(sorted(own))}"
    if kind not in _ENDPOINTS:
        instead = _NESTED.get(kind, {}).get(name)
        return None if instead is None else _refused(instead)
    if kind is DetokenizeRequest or (kind is TokenizeRequest and name not in _OF_PROMPTS):
        return None
    if kind is not TokenizeRequest and any(name in _names(other) for other in _ENDPOINTS[:2]):
        return "is no parameter of this endpoint"
    if name in REPLACED:
        return _refused(REPLACED[name])
    return _refused("") if kind is TokenizeRequest or name in _OTHERS or name in _NUMBERS else None


def _refused(instead: str) -> str:
    return f"is not supported by this server; use {instead}" if instead else "is not supported by this server"


@functools.cache
def _names(kind: type[BaseModel]) -> frozenset[str]:
    """The keys that a model knows."""
    return frozenset(one.alias or name for name, one in kind.model_fields.items())


def _asks_nothing(name: str, value: Any) -> bool:
    if value is None or (isinstance(value, (str, list, dict)) and not value):
        return True
    if value is False:
        return name not in _FALSE_COUNTS
    harmless = (*_NUMBERS.get(name, ()), *_SAME.get(name, ()))
    # True is 1 for Python, and False 0.
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless)
