"""The flags of `kvarena serve`: vLLM's names, with vLLM's meaning, as overrides of the config.

Dashes and underscores mean the same. What has no flag is reached by `--set key=value`, any key of the config.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from kvarena.engine.checkpoints.kinds import QUANTIZATIONS
from kvarena.engine.errors import ConfigError
from kvarena.engine.server.shared.config import REASONING_PARSERS, TOOL_PARSERS
from kvarena.experiments.serving.words import FLAGS
from kvarena.reports.reading.options import Options

DTYPES = {
    "auto": "auto",
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
# They own regions, which are not swapped, and never take a request's slots away.
ALLOCATORS_WITHOUT_SWAP = ("contiguous", "orca_max", "orca_oracle", "orca_pow2", "virtual")
SCHEDULERS_WITHOUT_SWAP = ("static",)
# They size their chunks by what steps take (conf/base/chunks.yaml), so that the budget is for idle moments.
SCHEDULERS_IN_CHUNKS, IN_CHUNKS_TOKENS = ("chunked", "fair", "priority", "sjf"), 16384
EXECUTORS = {"mp": "processes", "ray": "ray"}  # vLLM's names
NULL = object()  # a setting's null, where None means that no flag was given
_SIZES = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20}


class _Parser(Options):
    """Raises where it cannot read a command line: what gives flags may be Python code (kvarena.LLM)."""

    def error(self, message: str) -> NoReturn:
        """A flag is unknown or its value cannot be read."""
        raise ConfigError(self.said(message))


def _tokens(text: str) -> int:
    """A number of tokens; 4k is 4000, 4K is 4096."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 4096 or 4K")
    return int(float(match[1]) * _SIZES.get(match[2], 1))


def _images(text: str) -> int:
    """Most images of a request, in vLLM's forms; of what is not read, as a video, there may be none."""
    try:
        given = json.loads(text)
    except ValueError:
        given = dict(pair.partition("=")[::2] for pair in text.split(","))
    if isinstance(given, int):
        given = {"image": given}
    try:
        limits = {str(kind): int(most) for kind, most in given.items()}
    except (AttributeError, TypeError, ValueError):
        limits = {}
    others = sorted(kind for kind, most in limits.items() if kind != "image" and most)
    if others:
        raise argparse.ArgumentTypeError(f"{text!r} allows {others[0]}, and images are the only media")
    if limits.get("image", -1) < 0:
        raise argparse.ArgumentTypeError(f'{text!r} is no limit such as {{"image": 4}} or image=4')
    return limits["image"]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kvarena serve", description="Serve a model over the OpenAI API.")
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a local model directory (default: the demo model)")
    add("--model", dest="model_flag", metavar="MODEL", help=argparse.SUPPRESS)
    _add_web(parser.add_argument_group("web").add_argument)
    _add_engine(parser.add_argument_group("engine").add_argument)
    return parser


def _add_web(add: Callable[..., Any]) -> None:
    add("--host", help="address to listen on; 0.0.0.0 for all (default: 127.0.0.1)")
    add("--port", type=int, help="TCP port; 0: a free one (default: 8000)")
    add("--api-key", nargs="+", metavar="KEY", help="accepted keys (default: none; no key is asked for)")
    add("--api-key-file", metavar="FILE", help="accepted keys, one a line; also: the variable KVARENA_API_KEY")
    add("--protect", nargs="+", metavar="PATH", help="ask for a key on these too: /metrics /version /docs /health ...")
    add("--served-model-name", nargs="+", metavar="NAME", help="names of the model (default: the directory's)")
    add(
        "--api-server-count",
        "--num-fronts",
        type=int,
        metavar="N",
        help="HTTP processes (default: one per four cores, at most 4)",
    )
    add(
        "--max-num-queued-requests",
        "--max-num-queued-reqs",
        type=int,
        metavar="N",
        help="requests that may wait; beyond it: 503 (default: 2048)",
    )
    add("--shutdown-timeout", type=float, metavar="S", help="seconds for open requests after SIGTERM (default: 30.0)")
    add("--allowed-origins", type=json.loads, metavar="JSON", help="CORS origins, a JSON list (default: none)")
    add("--allowed-media-domains", nargs="+", metavar="HOST", help="hosts of images to fetch (default: none)")
    add("--allowed-local-media-path", metavar="DIR", help="folder from which images may be read (default: none)")
    add(
        "--limit-mm-per-prompt",
        type=_images,
        metavar="JSON",
        help="most images of a request, such as '{\"image\": 4}' or image=4 (default: 16)",
    )
    add("--chat-template", metavar="FILE", help="a jinja file (default: the model's own)")
    add(
        "--tool-call-parser",
        choices=TOOL_PARSERS,
        metavar="NAME",
        help="how calls of tools are written in an answer: hermes, llama, mistral, deepseek, glm, pythonic, xml, "
        "channels, ... or none (default: auto, as the chat template says)",
    )
    add(
        "--strict-tools",
        action=argparse.BooleanOptionalAction,
        help="hold calls that a model begins of its own accord to their tools' schemas (default: on)",
    )
    add(
        "--reasoning-parser",
        choices=REASONING_PARSERS,
        metavar="NAME",
        help="how thoughts are written in an answer: think, deepseek_r1, channels, ... or none (default: auto, as the "
        "chat template says)",
    )
    add(
        "--response-store-size",
        type=int,
        metavar="N",
        help="responses of /v1/responses that can be asked for again; 0: none is kept (default: 1024)",
    )
    add(
        "--generation-config",
        choices=("auto", "vllm"),
        help="default sampling: the model's generation_config.json, or vllm: none of it (default: auto)",
    )
    add("--max-logprobs", type=int, metavar="N", help="most log-probabilities of a token (default: 20)")
    add("--otlp-traces-endpoint", metavar="URL", help="OpenTelemetry collector (default: none)")
    add("--disable-access-log", "--disable-log-requests", action="store_true", help="log no line for each request")
    add(
        "--kv-events-config",
        metavar="JSON",
        help="publish what the prefix cache holds: '{\"enable_kv_cache_events\": true}' (default: not)",
    )
    add("--ssl-certfile", metavar="FILE", help="certificate for HTTPS (default: plain HTTP)")
    add("--ssl-keyfile", metavar="FILE", help="its private key")
    add("--ssl-keyfile-password", metavar="TEXT", help="of the private key")
    add("--ssl-ca-certs", metavar="FILE", help="certificates of those who sign clients' certificates")


def _add_engine(add: Callable[..., Any]) -> None:
    add("--allocator", metavar="NAME", help="one of `kvarena list allocators` (default: paged_prefix)")
    add("--scheduler", metavar="NAME", help="one of `kvarena list schedulers` (default: chunked)")
    add("--trust-remote-code", action="store_true", help="run code that the model directory brings along")
    add("--dtype", choices=tuple(DTYPES), default="auto", help="of weights and KV; auto: as the checkpoint says")
    add("--load-format", choices=("auto", "dummy"), help="auto: the checkpoint; dummy: random weights (default: auto)")
    add("--device", choices=("auto", "cpu", "cuda"), help="auto: the GPU where there is one (default: auto)")
    add("--gpu-memory-utilization", type=float, metavar="SHARE", help="share of the GPU's memory (default: 0.9)")
    add(
        "--max-model-len",
        type=_tokens,
        metavar="TOKENS",
        help="longest prompt + output; 4K is 4096 (default: what model and memory allow)",
    )
    add("--max-num-seqs", type=int, metavar="N", help="most requests that run at once (default: 256)")
    add(
        "--max-num-batched-tokens",
        type=_tokens,
        metavar="TOKENS",
        help="most new tokens in one step (default: 16384, under static and continuous 2048, or --max-num-seqs where "
        "that is more); while requests decode, chunks of prompts are as small as their pace asks for",
    )
    add("--block-size", type=int, metavar="SLOTS", help="slots per block of the KV pool, 1 to 256 (default: 16)")
    add(
        "--num-gpu-blocks-override",
        type=int,
        metavar="N",
        help="blocks of the KV pool (default: what --gpu-memory-utilization leaves)",
    )
    add("--kv-cache-memory-gib", type=float, metavar="GIB", help="the same as a size")
    add(
        "--swap-space",
        type=float,
        metavar="GIB",
        help="host memory for the KV of preempted requests (default: 0; they are recomputed)",
    )
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="share the KV of equal beginnings (default: on, as --allocator paged_prefix does)",
    )
    add(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        help="plan a step while the last one runs (default: on)",
    )
    add("--tensor-parallel-size", "-tp", type=int, metavar="N", help="devices that share each layer (default: 1)")
    add("--pipeline-parallel-size", "-pp", type=int, metavar="N", help="stages of layers, a device each (default: 1)")
    add(
        "--distributed-executor-backend",
        choices=tuple(EXECUTORS),
        help="the other ranks are processes of this machine (mp) or Ray's actors (default: mp)",
    )
    add(
        "--data-parallel-size",
        "-dp",
        type=int,
        default=1,
        metavar="N",
        help="engines behind the same port, each with the whole model (default: 1)",
    )
    add(
        "--router",
        metavar="NAME",
        help="which engine gets a request: prefix_affinity, least_kv, ... (default: prefix_affinity)",
    )
    add(
        "--quantization",
        "-q",
        choices=("none", *QUANTIZATIONS),
        metavar="NAME",
        help=f"insist on weights that are quantised so: {', '.join(QUANTIZATIONS)}; int8 and fp8 are made of plain "
        "weights at load (default: as the checkpoint says)",
    )
    add("--enforce-eager", action="store_true", help="no CUDA graphs (default: graphs on a GPU)")
    add("--seed", type=int, help="random streams of requests that have no seed of their own (default: 0)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of the config (kvarena run --help shows them)",
    )


def parse_flags(args: Sequence[str]) -> argparse.Namespace:
    """Read the command line. Raises ConfigError on an unknown flag or a value of the wrong kind."""
    spelled = [
        "--" + arg[2:].partition("=")[0].replace("_", "-") + arg[2 + len(arg[2:].partition("=")[0]) :]
        if arg.startswith("--")
        else arg
        for arg in args
    ]
    return _parser().parse_args(spelled)


def overrides_of(flags: argparse.Namespace) -> list[str]:
    """The config overrides that the flags stand for.

    Raises:
        ConfigError: flags that exclude each other, or that this engine cannot honour.
    """
    _check(flags)
    allocator = flags.allocator or ("paged" if flags.enable_prefix_caching is False else "paged_prefix")
    made = ["mode=serve", f"allocator={allocator}", f"scheduler={flags.scheduler or 'chunked'}"]
    if flags.data_parallel_size > 1:
        made += [f"router={flags.router or 'prefix_affinity'}", f"router.num_replicas={flags.data_parallel_size}"]
    model = flags.model or flags.model_flag
    # A flag is called as its setting is spoken of, and sets it to what was given ...
    values = {
        key: getattr(flags, flag.removeprefix("--").replace("-", "_"))
        for key, flag in FLAGS.items()
        if flag not in ("MODEL", "--swap-space", "--disable-access-log")
    }
    # ... but for these, and for what no flag or more than one decides.
    values |= {
        "model.path": model,
        "model.trust_remote_code": flags.trust_remote_code or None,
        "model.quantization": None if flags.quantization == "none" else flags.quantization,
        "engine.dtype": DTYPES[flags.dtype],
        "engine.overlap": flags.async_scheduling is not False,
        "scheduler.max_num_batched_tokens": _budget(flags),
        # What the model allows, and below what the memory allows, unless a flag says otherwise: for the demo, too.
        "engine.max_model_len": NULL if flags.max_model_len is None else flags.max_model_len,
        "kv_cache.num_slots": NULL,
        "runner.graphs": False if flags.enforce_eager else None,
        "parallel.executor": EXECUTORS.get(flags.distributed_executor_backend or ""),
        "server.generation_config": None if flags.generation_config is None else flags.generation_config == "auto",
        "server.log_requests": False if flags.disable_access_log else None,
    }
    if flags.swap_space:
        values |= {"allocator.swap_gib": flags.swap_space, "scheduler.preemption": "swap"}
    made += [f"{key}={_literal(value)}" for key, value in values.items() if value is not None]
    return made + flags.set


def _budget(flags: argparse.Namespace) -> int | None:
    """Tokens of a step; None: what the scheduler has under mode=serve."""
    if flags.max_num_batched_tokens is not None:
        return int(flags.max_num_batched_tokens)
    usual = IN_CHUNKS_TOKENS if (flags.scheduler or "chunked") in SCHEDULERS_IN_CHUNKS else 2048
    return None if (flags.max_num_seqs or 0) <= usual else int(flags.max_num_seqs)


def _check(flags: argparse.Namespace) -> None:
    if flags.model and flags.model_flag:
        raise ConfigError("MODEL and --model both name the model; give one of them")
    if flags.data_parallel_size < 1:
        raise ConfigError(f"--data-parallel-size {flags.data_parallel_size} must be at least 1")
    if flags.router and flags.data_parallel_size == 1:
        raise ConfigError(f"--router {flags.router} chooses among engines, and there is one; give --data-parallel-size")
    for kind, without in (("allocator", ALLOCATORS_WITHOUT_SWAP), ("scheduler", SCHEDULERS_WITHOUT_SWAP)):
        name = getattr(flags, kind)
        if flags.swap_space and name in without:
            raise ConfigError(f"--swap-space is nothing that --{kind} {name} can use; leave one out")
    if flags.enable_prefix_caching and flags.allocator not in (None, "paged_prefix", "radix"):
        raise ConfigError(
            f"--enable-prefix-caching needs --allocator paged_prefix or radix, not {flags.allocator}; leave one out"
        )
    if flags.enable_prefix_caching is False and flags.allocator in ("paged_prefix", "radix"):
        raise ConfigError(f"--no-enable-prefix-caching contradicts --allocator {flags.allocator}; leave one out")


def _literal(value: object) -> str:
    """A value in Hydra's override grammar."""
    if isinstance(value, list):
        return "[" + ",".join(_literal(item) for item in value) + "]"
    if value is NULL:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)
