"""The server's settings (config group `server`), validated where they are made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from kvarena.engine.checks import TEXT, TRUTH, Must, Section, integer, is_number, number, one_of
from kvarena.engine.errors import ConfigError
from kvarena.engine.server.shared.kv_events import KVEventsConfig

# Asked for without a key by orchestrators, boards and browsers, as of vLLM's server; `protected_paths` closes them.
# The pages hold no data: their scripts ask for it, with a key.
OPEN_PATHS = frozenset(
    {"/health", "/ready", "/ping", "/metrics", "/version", "/docs", "/openapi.json", "/", "/dashboard"}
)
# Of `enable_admin`; they ask for a key of their own.
ADMIN_PATHS = frozenset({"/reset_prefix_cache", "/pause", "/resume", "/is_paused", "/abort_requests"})
# Ours, and what vLLM calls the same; a test holds them to the classes of `engine/server/forms`.
TOOL_PARSERS = (
    "auto", "none", "channels", "deepseek", "glm", "hermes", "llama", "mistral", "pythonic", "xml",
    "deepseek_v3", "deepseek_v31", "glm45", "glm47", "gptoss", "llama3_json", "llama4_json", "llama4_pythonic", "olmo3",
    "openai", "qwen3_coder", "qwen3_xml",
)  # fmt: skip
REASONING_PARSERS = (
    "auto", "none", "channels", "gemma4", "kimi", "mistral", "seed_oss", "think",
    "deepseek_r1", "deepseek_v3", "ernie45", "glm45", "gptoss", "hunyuan_a13b", "minimax_m2", "nemotron_v3", "olmo3",
    "openai_gptoss", "qwen3", "step3",
)  # fmt: skip


def default_num_fronts() -> int:
    """HTTP processes for this machine: one per four cores that this process may use, from 1 to 4."""
    return max(1, min(4, len(os.sched_getaffinity(0)) // 4))


KEY_VARIABLES = ("KVARENA_API_KEY", "VLLM_API_KEY")
ADMIN_KEY_VARIABLE = "KVARENA_ADMIN_KEY"
COUNT = integer(1)
POSITIVE = Must("a number above 0", lambda value: is_number(value) and value > 0)
FILE = Must("a file that exists", lambda value: TEXT.holds(value) and Path(value).is_file()).or_null
FOLDER = Must("a folder that exists", lambda value: TEXT.holds(value) and Path(value).is_dir()).or_null
PLACE = Must("the path of a folder", lambda value: TEXT.holds(value) and bool(value)).or_null
ROOT_PATH = Must(
    "empty, or a path such as /model without a slash at its end",
    lambda value: value == "" or (TEXT.holds(value) and value.startswith("/") and not value.endswith("/")),
)
PRIORITIES = Must("a list of integers", lambda values: all(integer(-(2**31)).holds(value) for value in values))
HOSTS = Must(
    "host names, such as images.example.com, without scheme, path or *",
    lambda domains: isinstance(domains, tuple) and not any("/" in domain or "*" in domain for domain in domains),
)


@dataclass(frozen=True)
class ServerConfig(Section):
    """How to serve. Sizes in the unit that the name says, times in seconds.

    Attributes:
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        root_path: path under which a proxy shows the server; requests may come with it or without.
        api_keys: accepted bearer keys; empty: no key is asked for.
        api_key_file: a file with accepted keys, one a line.
        enable_admin: serve `ADMIN_PATHS`: pause, resume, end requests, empty the prefix cache.
        admin_keys: keys of these paths, which open no other; empty: `api_keys` do.
        protected_paths: paths of `OPEN_PATHS` that ask for a key as well.
        served_model_names: names that requests may use; empty: the model directory's name. The first is the one shown.
        model_aliases: names that requests may use, too, and that are not listed.
        num_fronts: HTTP processes; by default as many as the cores warrant.
        max_num_queued_requests: requests waiting in the engine beyond which new ones get 503. Under the fair scheduler
            a client with less than an even share of them still gets in.
        max_requests_per_key: requests that an API key may have in an engine; beyond it 429; 0: any number.
        tokens_per_minute_per_key: tokens of prompts and outputs that it may have of an engine a minute; the same.
        least_priority_by_key: smallest (most urgent) priority that each key may ask for, in the order of the keys; keys
            beyond the list have no such bound.
        clients_by: whom the fair scheduler takes for a client: who a request's `user` names, or its API key.
        shutdown_timeout: how long open requests may still run after SIGTERM.
        heartbeat_timeout: an engine or front process silent for so long is taken for frozen.
        ledger: check in every step that the KV pool's slots add up, and when idle that nobody owns any.
        stall_timeout: no step finished for so long while work is queued: `/health` answers 503.
        step_timeout: the same, and the server gives up.
        max_body_mib: largest request body.
        body_timeout: how long a client may take to send its headers, and its body; and to read what waits for it.
        max_n: most choices per request.
        max_logprobs: largest `logprobs` / `top_logprobs` / `prompt_logprobs`; -1: the vocabulary.
        force_include_usage: every event of a stream has its usage so far, whatever its `stream_options` say.
        return_tokens_as_token_ids: name tokens by their ids in log-probabilities, where a request does not say.
        per_request_metrics: tell with an answer how long its parts took.
        max_prompts: most prompts in one completions request.
        allowed_media_domains: hosts whose http(s) URLs may be fetched for images; empty: none.
        allowed_local_media_path: folder whose files may be read for images; None: none.
        max_images: most images in a request's messages; 0: none is taken.
        max_media_mib: most bytes of a request's images together.
        max_image_pixels: most pixels of an image.
        media_timeout: how long fetching a request's images may take.
        max_stream_lag: tokens that a slow reader may lag behind before its request is ended.
        chat_template: path of a jinja file that replaces the tokenizer's template.
        tool_call_parser: how a model writes tool calls.
        strict_tools: calls that a model begins of its own accord are held to their tools' schemas.
        reasoning_parser: how a model writes its thoughts.
        response_store_size: most responses of `/v1/responses` that can be asked for again; 0: none is kept.
        generation_config: take default sampling parameters from the model's generation_config.json.
        cors_origins: origins that browsers may call from; empty: CORS is off.
        ssl_certfile, ssl_keyfile, ssl_keyfile_password, ssl_ca_certs: TLS.
        otlp_endpoint: OpenTelemetry collector (http), or None.
        log_requests: write an access log line per request.
        enable_dashboard: serve the playground at `/`, and `/dashboard`.
        kv_events: how engines publish what their prefix caches hold.
        record: folder into which steps, requests and the KV map are recorded as a run leaves them; None: nothing is.
            Of several engines each has one below it.
        record_mib: of each engine's recording, as it is held; the oldest is dropped.
        record_minutes: from the oldest step that is kept to the latest.
        record_content: `tokens` of prompts and outputs, or `hashes` of their blocks, from which nobody reads them.

    Raises:
        ConfigError: a value out of range; the message names the key.
    """

    section = "server"
    host: str = "127.0.0.1"
    port: Annotated[int, integer(0, 65535)] = 8000
    root_path: Annotated[str, ROOT_PATH] = ""
    api_keys: tuple[str, ...] = ()
    api_key_file: Annotated[str | None, FILE] = None
    enable_admin: Annotated[bool, TRUTH] = False
    admin_keys: tuple[str, ...] = ()
    protected_paths: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ()
    model_aliases: tuple[str, ...] = ()
    num_fronts: Annotated[int, COUNT] = field(default_factory=default_num_fronts)
    max_num_queued_requests: Annotated[int, COUNT] = 2048
    max_requests_per_key: Annotated[int, integer(0)] = 0
    tokens_per_minute_per_key: Annotated[int, integer(0)] = 0
    least_priority_by_key: Annotated[tuple[int, ...], PRIORITIES] = ()
    clients_by: Annotated[str, one_of("user", "key")] = "user"
    shutdown_timeout: Annotated[float, Must("a number of at least 0", number(0).holds)] = 30.0
    heartbeat_timeout: Annotated[float, POSITIVE] = 3.0
    ledger: Annotated[bool, TRUTH] = True
    stall_timeout: Annotated[float, POSITIVE] = 4.0
    step_timeout: Annotated[float, POSITIVE] = 120.0
    max_body_mib: Annotated[float, POSITIVE] = 16.0
    body_timeout: Annotated[float, POSITIVE] = 60.0
    max_n: Annotated[int, COUNT] = 128
    max_logprobs: Annotated[int, integer(-1)] = 20
    force_include_usage: Annotated[bool, TRUTH] = False
    return_tokens_as_token_ids: Annotated[bool, TRUTH] = False
    per_request_metrics: Annotated[bool, TRUTH] = False
    max_prompts: Annotated[int, COUNT] = 1024
    allowed_media_domains: Annotated[tuple[str, ...], HOSTS] = ()
    allowed_local_media_path: Annotated[str | None, FOLDER] = None
    max_images: Annotated[int, integer(0)] = 16
    max_media_mib: Annotated[float, POSITIVE] = 32.0
    max_image_pixels: Annotated[int, COUNT] = 1 << 26
    media_timeout: Annotated[float, POSITIVE] = 5.0
    max_stream_lag: Annotated[int, COUNT] = 4096
    chat_template: Annotated[str | None, FILE] = None
    tool_call_parser: Annotated[str, one_of(*TOOL_PARSERS)] = "auto"
    strict_tools: Annotated[bool, TRUTH] = True
    reasoning_parser: Annotated[str, one_of(*REASONING_PARSERS)] = "auto"
    response_store_size: Annotated[int, integer(0)] = 1024
    generation_config: Annotated[bool, TRUTH] = True
    cors_origins: tuple[str, ...] = ()
    ssl_certfile: Annotated[str | None, FILE] = None
    ssl_keyfile: Annotated[str | None, FILE] = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: Annotated[str | None, FILE] = None
    otlp_endpoint: str | None = None
    log_requests: Annotated[bool, TRUTH] = True
    enable_dashboard: Annotated[bool, TRUTH] = True
    kv_events: KVEventsConfig = field(default_factory=KVEventsConfig)
    record: Annotated[str | None, PLACE] = None
    record_mib: Annotated[float, Must("at least 1", number(1).holds)] = 512.0
    record_minutes: Annotated[float, POSITIVE] = 60.0
    record_content: Annotated[str, one_of("tokens", "hashes")] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("api_keys", "admin_keys"):
            if any(not key or not key.isascii() or not key.isprintable() for key in getattr(self, name)):
                raise ConfigError(f"server.{name} must be non-empty printable ASCII strings")
        if self.admin_keys and not self.enable_admin:
            raise ConfigError("server.admin_keys are for the paths of server.enable_admin=true, which is not set")
        unknown = [path for path in self.protected_paths if path not in OPEN_PATHS]
        if unknown:
            raise ConfigError(
                f"server.protected_paths: {unknown[0]!r} is none of {', '.join(sorted(OPEN_PATHS))}; all else asks "
                "for a key anyhow"
            )
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("server.ssl_certfile and server.ssl_keyfile go together: give both or none")
        for key in ("ssl_keyfile_password", "ssl_ca_certs"):
            if getattr(self, key) is not None and self.ssl_certfile is None:
                raise ConfigError(f"server.{key} is for TLS: give server.ssl_certfile and server.ssl_keyfile too")
        if self.otlp_endpoint is not None and not _is_installed("opentelemetry.exporter.otlp.proto.http"):
            raise ConfigError("server.otlp_endpoint needs the tracing extra: pip install 'kvarena[tracing]'")

    def all_protected_paths(self) -> frozenset[str]:
        """`protected_paths`; who closes the description's page closes the description."""
        return frozenset(self.protected_paths) | ({"/openapi.json"} if "/docs" in self.protected_paths else frozenset())

    def with_keys(self, environment: Mapping[str, str]) -> ServerConfig:
        """With the keys of `api_key_file` and of the environment (`KEY_VARIABLES`) among `api_keys`, and that of
        `ADMIN_KEY_VARIABLE` among `admin_keys`.

        Raises:
            ConfigError: a source of keys holds none, or paths that need a key have none.
        """
        keys = list(self.api_keys)
        if self.api_key_file is not None:
            try:
                lines = [line.strip() for line in Path(self.api_key_file).read_text().splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"server.api_key_file={self.api_key_file} cannot be read: {error}") from None
            found = [line for line in lines if line]
            if not found:
                raise ConfigError(f"server.api_key_file={self.api_key_file} holds no key; write one a line")
            keys += found
        admin_keys = list(self.admin_keys)
        for name in (*KEY_VARIABLES, *([ADMIN_KEY_VARIABLE] if self.enable_admin else [])):
            if name in environment:
                if not environment[name].strip():
                    raise ConfigError(f"the environment variable {name} is set and empty; unset it, or give a key")
                (admin_keys if name == ADMIN_KEY_VARIABLE else keys).append(environment[name].strip())
        if self.protected_paths and not keys:
            raise ConfigError(
                "server.protected_paths asks for a key, and there is none: give --api-key or --api-key-file"
            )
        if self.enable_admin and not (keys or admin_keys):
            raise ConfigError(
                f"server.enable_admin=true needs a key: give server.admin_keys, the variable {ADMIN_KEY_VARIABLE}, or "
                "server.api_keys"
            )
        return replace(self, api_keys=tuple(dict.fromkeys(keys)), admin_keys=tuple(dict.fromkeys(admin_keys)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ServerConfig:
        """Build from a resolved config section; a string stands for a list of one. Raises ConfigError."""
        known = {one.name: one.type for one in fields(cls)}
        made: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise ConfigError(f"unknown key 'server.{key}'; known: {', '.join(sorted(known))}")
            if "tuple" in str(known[key]):
                value = () if value is None else (str(value),) if not isinstance(value, (list, tuple)) else value
                value = tuple(value) if key == "least_priority_by_key" else tuple(str(item) for item in value)
            if key == "num_fronts" and value is None:
                continue
            if key == "kv_events":
                value = KVEventsConfig.read(value)
            made[key] = value
        return cls(**made)


def _is_installed(module: str) -> bool:
    """Whether `module` can be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # one of its parents is missing
        return False
