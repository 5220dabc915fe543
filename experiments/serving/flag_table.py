"""The flags of `kvarena serve` that have an effect: their names, kinds and help, for parser, help and docs.

Their names and meaning are vLLM's where it has them; those that it has not are marked `ours`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvarena.engine.checkpoints.kinds import QUANTIZATIONS
from kvarena.engine.server.shared.config import REASONING_PARSERS, TOOL_PARSERS
from kvarena.experiments.serving import flag_values

DTYPES = {
    "auto": "auto",
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
EXECUTORS = {"mp": "processes", "ray": "ray"}  # vLLM's names
# How vLLM finds weights in a directory; here what is there is read, safetensors first.
LOAD_FORMATS = {"auto": "auto", "safetensors": "auto", "pt": "auto", "hf": "auto", "dummy": "dummy"}
POLICIES = {"fcfs": "chunked", "priority": "priority"}


@dataclass(frozen=True)
class Flag:
    """A flag with an effect.

    Attributes:
        names: the first is the one that is spoken of.
        group: of the help: `web` or `engine`.
        says: what it does, for the help and the docs.
        ours: vLLM has none of this name.
        options: as of `argparse.ArgumentParser.add_argument`.
    """

    names: tuple[str, ...]
    group: str
    says: str
    ours: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def _flags(group: str, *rows: tuple[str, str, dict[str, Any]]) -> tuple[Flag, ...]:
    """Rows of names, help and options; `ours` among these."""
    return tuple(
        Flag(tuple(names.split()), group, says, bool(options.pop("ours", False)), options)
        for names, says, options in rows
    )


def _value(metavar: str | None = None, kind: Any = None, **more: Any) -> dict[str, Any]:
    given = {"metavar": metavar, "type": kind} | more
    return {key: value for key, value in given.items() if value is not None}


def _switch(**more: Any) -> dict[str, Any]:
    return {"action": argparse.BooleanOptionalAction} | more


WEB = _flags(
    "web",
    (
        "--config",
        "flags as YAML, by their names; those of the command line count more (default: none)",
        _value("FILE"),
    ),
    ("--host", "address to listen on; 0.0.0.0 for all (default: 127.0.0.1)", _value()),
    ("--port", "TCP port; 0: a free one (default: 8000)", _value(kind=int)),
    ("--root-path", "path under which a proxy shows this server (default: none)", _value("PATH")),
    ("--api-key", "accepted keys (default: none; no key is asked for)", _value("KEY", nargs="+")),
    (
        "--api-key-file",
        "accepted keys, one a line; also: the variables KVARENA_API_KEY and VLLM_API_KEY",
        _value("FILE", ours=True),
    ),
    (
        "--enable-admin",
        "serve /pause, /resume, /is_paused, /abort_requests and /reset_prefix_cache (default: off)",
        _switch(ours=True),
    ),
    (
        "--admin-key",
        "keys of these paths alone; also: the variable KVARENA_ADMIN_KEY (default: --api-key)",
        _value("KEY", nargs="+", ours=True),
    ),
    (
        "--protect",
        "ask for a key on these too: /metrics /version /docs /health ...",
        _value("PATH", nargs="+", ours=True),
    ),
    (
        "--served-model-name",
        "names of the model (default: the directory's, and the path as given)",
        _value("NAME", nargs="+"),
    ),
    (
        "--api-server-count --num-fronts",
        "HTTP processes (default: one per four cores, at most 4)",
        _value("N", int),
    ),
    (
        "--max-num-queued-requests --max-num-queued-reqs",
        "requests that may wait; beyond it: 503 (default: 2048)",
        _value("N", int),
    ),
    (
        "--max-requests-per-key",
        "requests that an API key may have in an engine; beyond it: 429 (default: 0, any number)",
        _value("N", int, ours=True),
    ),
    (
        "--tokens-per-minute-per-key",
        "tokens of prompts and outputs that an API key may have of an engine (default: 0, any number)",
        _value("TOKENS", flag_values.tokens, ours=True),
    ),
    (
        "--least-priority-by-key",
        "most urgent priority of each API key, in the order of the keys (default: none)",
        _value("N", int, nargs="+", ours=True),
    ),
    (
        "--clients-by",
        "whom --scheduler fair takes for a client: user, as requests name it, or key (default: user)",
        _value(choices=("user", "key"), ours=True),
    ),
    ("--shutdown-timeout", "seconds for open requests after SIGTERM (default: 30.0)", _value("S", float)),
    ("--allowed-origins", "CORS origins, a JSON list (default: none)", _value("JSON", json.loads)),
    ("--allowed-media-domains", "hosts of images to fetch (default: none)", _value("HOST", nargs="+")),
    ("--allowed-local-media-path", "folder from which images may be read (default: none)", _value("DIR")),
    (
        "--limit-mm-per-prompt",
        "most images of a request, such as '{\"image\": 4}' or image=4 (default: 16)",
        _value("JSON", flag_values.images),
    ),
    ("--chat-template", "a jinja file (default: the model's own)", _value("FILE")),
    (
        "--tool-call-parser",
        "how calls of tools are written in an answer: hermes, llama, mistral, deepseek, glm, pythonic, xml, channels, "
        "... or none (default: auto, as the chat template says)",
        _value("NAME", choices=TOOL_PARSERS),
    ),
    (
        "--strict-tools",
        "hold calls that a model begins of its own accord to their tools' schemas (default: on)",
        _switch(ours=True),
    ),
    (
        "--reasoning-parser",
        "how thoughts are written in an answer: think, deepseek_r1, channels, ... or none (default: auto, as the chat "
        "template says)",
        _value("NAME", choices=REASONING_PARSERS),
    ),
    (
        "--response-store-size",
        "responses of /v1/responses that can be asked for again; 0: none is kept (default: 1024)",
        _value("N", int, ours=True),
    ),
    (
        "--generation-config",
        "default sampling: the model's generation_config.json, or vllm: none of it (default: auto)",
        _value(choices=("auto", "vllm")),
    ),
    ("--max-logprobs", "most log-probabilities of a token; -1: the vocabulary (default: 20)", _value("N", int)),
    (
        "--enable-force-include-usage",
        "every event of a stream has its usage so far, whatever is asked for (default: off)",
        _switch(),
    ),
    (
        "--return-tokens-as-token-ids",
        "name tokens by their ids in log-probabilities, where a request does not say",
        _switch(),
    ),
    ("--enable-per-request-metrics", "tell with an answer how long its parts took", _switch()),
    ("--otlp-traces-endpoint", "OpenTelemetry collector (default: none)", _value("URL")),
    (
        "--disable-access-log --disable-uvicorn-access-log --disable-log-requests",
        "log no line for each request",
        _switch(),
    ),
    (
        "--uvicorn-log-level",
        "warning, error and critical: as --disable-access-log; info, debug and trace log no more than there is",
        _value(choices=(*flag_values.QUIET_LEVELS, "info", "debug", "trace")),
    ),
    (
        "--kv-events-config",
        "publish what the prefix cache holds: '{\"enable_kv_cache_events\": true}' (default: not)",
        _value("JSON"),
    ),
    (
        "--record",
        "record steps, requests and the KV map into this folder, as a run leaves them, for reports and replays "
        "(default: not)",
        _value("DIR", ours=True),
    ),
    (
        "--record-mib",
        "MiB of a recording, as it is held; the oldest is dropped (default: 512)",
        _value("MIB", float, ours=True),
    ),
    ("--record-minutes", "minutes that a recording spans at most (default: 60)", _value("MIN", float, ours=True)),
    (
        "--record-content",
        "tokens of prompts and outputs, or hashes of their blocks, from which nobody reads them (default: tokens)",
        _value(choices=("tokens", "hashes"), ours=True),
    ),
    ("--ssl-certfile", "certificate for HTTPS (default: plain HTTP)", _value("FILE")),
    ("--ssl-keyfile", "its private key", _value("FILE")),
    ("--ssl-keyfile-password", "of the private key", _value("TEXT", ours=True)),
    ("--ssl-ca-certs", "certificates of those who sign clients' certificates", _value("FILE")),
)

ENGINE = _flags(
    "engine",
    ("--allocator", "one of `kvarena list allocators` (default: paged_prefix)", _value("NAME", ours=True)),
    ("--scheduler", "one of `kvarena list schedulers` (default: chunked)", _value("NAME", ours=True)),
    (
        "--scheduling-policy",
        "fcfs: --scheduler chunked; priority: --scheduler priority (default: fcfs)",
        _value(choices=tuple(POLICIES)),
    ),
    (
        "--enable-chunked-prefill",
        "take prompts in parts, as --scheduler chunked, fair, priority and sjf do; --no-...: --scheduler continuous "
        "(default: on)",
        _switch(),
    ),
    (
        "--tokenizer",
        "the same as MODEL: the tokenizer is the model's own, and any other is refused",
        _value("DIR"),
    ),
    (
        "--revision",
        "branch, tag or commit of a model that is given by its name; of a folder: no effect (default: the hub's)",
        _value("NAME"),
    ),
    (
        "--download-dir",
        "folder into which a model that is given by its name is downloaded (default: its library's cache)",
        _value("DIR"),
    ),
    ("--trust-remote-code", "run code that the model directory brings along", _switch()),
    ("--dtype", "of weights and KV; auto: as the checkpoint says", _value(choices=tuple(DTYPES), default="auto")),
    (
        "--load-format",
        "dummy: random weights; any other: the checkpoint's files, safetensors first (default: auto)",
        _value(choices=tuple(LOAD_FORMATS)),
    ),
    ("--device", "auto: the GPU where there is one (default: auto)", _value(choices=("auto", "cpu", "cuda"))),
    ("--gpu-memory-utilization", "share of the GPU's memory (default: 0.9)", _value("SHARE", float)),
    (
        "--max-model-len",
        "longest prompt + output; 4K is 4096, 32k is 32000 (default: auto, what model and memory allow)",
        _value("TOKENS", flag_values.length),
    ),
    ("--max-num-seqs", "most requests that run at once (default: 256)", _value("N", int)),
    (
        "--max-num-batched-tokens",
        "most new tokens in one step (default: 16384, under static and continuous 2048, or --max-num-seqs where that "
        "is more); while requests decode, chunks of prompts are as small as their pace asks for",
        _value("TOKENS", flag_values.tokens),
    ),
    ("--block-size", "slots per block of the KV pool, 1 to 256 (default: 16)", _value("SLOTS", int)),
    (
        "--num-gpu-blocks-override",
        "blocks of the KV pool (default: what --gpu-memory-utilization leaves)",
        _value("N", int),
    ),
    ("--kv-cache-memory-gib", "the same as a size", _value("GIB", float, ours=True)),
    (
        "--kv-cache-memory-bytes",
        "the same in bytes; 24G are 24 GiB",
        _value("BYTES", flag_values.gib_of_bytes, dest="kv_cache_memory_gib"),
    ),
    (
        "--swap-space",
        "GiB of host memory for the KV of preempted requests (default: 0; they are recomputed)",
        _value("GIB", float),
    ),
    (
        "--kv-offloading-size",
        "GiB of each rank's host memory for what the prefix cache evicts; --swap-space is a share of it (default: 0)",
        _value("GIB", float),
    ),
    (
        "--enable-prefix-caching",
        "share the KV of equal beginnings (default: on, as --allocator paged_prefix does)",
        _switch(),
    ),
    ("--async-scheduling", "plan a step while the last one runs (default: on)", _switch()),
    ("--tensor-parallel-size -tp", "devices that share each layer (default: 1)", _value("N", int)),
    ("--pipeline-parallel-size -pp", "stages of layers, a device each (default: 1)", _value("N", int)),
    (
        "--distributed-executor-backend",
        "the other ranks are processes of this machine (mp) or Ray's actors (default: mp)",
        _value(choices=tuple(EXECUTORS)),
    ),
    (
        "--data-parallel-size -dp",
        "engines behind the same port, each with the whole model (default: 1)",
        _value("N", int, default=1),
    ),
    (
        "--router",
        "which engine gets a request: prefix_affinity, least_kv, ... (default: prefix_affinity)",
        _value("NAME", ours=True),
    ),
    (
        "--quantization -q",
        f"insist on weights that are quantised so: {', '.join(QUANTIZATIONS)} (awq_marlin and gptq_marlin are awq and "
        "gptq); int8 and fp8 are made of plain weights at load (default: as the checkpoint says)",
        _value("NAME", flag_values.quantization, choices=("none", *QUANTIZATIONS)),
    ),
    ("--enforce-eager", "no CUDA graphs (default: graphs on a GPU)", _switch()),
    ("--seed", "random streams of requests that have no seed of their own (default: 0)", _value(kind=int)),
    (
        "--set",
        "any key of the config (kvarena run --help shows them)",
        _value("KEY=VALUE", action="append", default=[], ours=True),
    ),
)

FLAGS = WEB + ENGINE
