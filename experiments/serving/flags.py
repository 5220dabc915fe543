"""The flags of `kvarena serve`, as overrides of the config: parser and meaning.

    flag_table.py      what has an effect         ----> parser, help, and docs/flags.md (models/flag_page.py)
    foreign_flags.py   what has none, or is refused --^

Dashes and underscores mean the same. What has no flag is reached by `--set key=value`, any key of the config.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from kvarena.engine.checkpoints.directory import is_model_name
from kvarena.engine.checkpoints.hubs import fetch_model
from kvarena.engine.errors import ConfigError
from kvarena.experiments.serving.flag_table import DTYPES, EXECUTORS, FLAGS, LOAD_FORMATS, POLICIES
from kvarena.experiments.serving.flag_values import QUIET_LEVELS
from kvarena.experiments.serving.flag_words import Nothing, as_arguments, read_file, said_of, spelled
from kvarena.experiments.serving.foreign_flags import FOREIGN
from kvarena.experiments.serving.words import FLAGS as FLAG_OF_KEY
from kvarena.reports.reading.options import Options

# They own regions, which are not swapped, and never take a request's slots away.
ALLOCATORS_WITHOUT_SWAP = ("contiguous", "orca_max", "orca_oracle", "orca_pow2", "virtual")
SCHEDULERS_WITHOUT_SWAP = ("static",)
# They size their chunks by what steps take (conf/base/chunks.yaml), so that the budget is for idle moments.
SCHEDULERS_IN_CHUNKS, IN_CHUNKS_TOKENS = ("chunked", "fair", "priority", "sjf"), 16384
NULL = object()  # a setting's null, where None means that no flag was given


class _Parser(Options):
    """Raises where it cannot read a command line: what gives flags may be Python code (kvarena.LLM)."""

    def error(self, message: str) -> NoReturn:
        """A flag is unknown or its value cannot be read."""
        raise ConfigError(self.said(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kvarena serve", description="Serve a model over the OpenAI API.")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a local model directory (default: the demo model)")
    parser.add_argument("--model", dest="model_flag", metavar="MODEL", help=argparse.SUPPRESS)
    groups = {name: parser.add_argument_group(name) for name in ("web", "engine")}
    for flag in FLAGS:
        groups[flag.group].add_argument(*flag.names, help=flag.says.replace("%", "%%"), **flag.options)
    nothing = parser.add_argument_group("of vllm serve, and without an effect here")
    refused = parser.add_argument_group("of vllm serve, and refused here")
    for foreign in FOREIGN:
        for names in foreign.names:
            group = refused if foreign.refused else nothing
            opposite = [f"--no-{names[0][2:]}"] if foreign.takes == "switch" else []
            group.add_argument(
                *names, *opposite, action=Nothing, foreign=foreign, dest=argparse.SUPPRESS,
                metavar=None if foreign.takes == "switch" else "VALUE", help=said_of(foreign),
            )  # fmt: skip
    return parser


def parse_flags(args: Sequence[str]) -> argparse.Namespace:
    """Read the command line, and the file that its --config names.

    Raises:
        ConfigError: a flag is unknown, refused, or has a value of the wrong kind.
    """
    parser = _parser()
    given = parser.parse_args(list(spelled(parser, args)))
    if given.config is None:
        return given
    values = read_file(given.config)
    if given.model or given.model_flag:
        values.pop("model", None)
    lines = list(spelled(parser, as_arguments(parser, values)))
    try:
        parser.parse_args(lines)
    except ConfigError as error:
        raise ConfigError(f"--config {given.config}: {error}") from None
    return parser.parse_args([*lines, *spelled(parser, args)])


def overrides_of(flags: argparse.Namespace) -> list[str]:
    """The config overrides that the flags stand for.

    A model that is given by its name with a revision or a folder of its own is downloaded here.

    Raises:
        ConfigError: flags that exclude each other, or that this engine cannot honour.
        ModelError: a model that cannot be downloaded.
    """
    _check(flags)
    scheduler = _scheduler(flags)
    allocator = flags.allocator or ("paged" if flags.enable_prefix_caching is False else "paged_prefix")
    made = ["mode=serve", f"allocator={allocator}", f"scheduler={scheduler}"]
    if flags.data_parallel_size > 1:
        made += [f"router={flags.router or 'prefix_affinity'}", f"router.num_replicas={flags.data_parallel_size}"]
    # A flag is called as its setting is spoken of, and sets it to what was given ...
    values = {
        key: getattr(flags, flag.removeprefix("--").replace("-", "_"))
        for key, flag in FLAG_OF_KEY.items()
        if flag not in ("MODEL", "--swap-space", "--disable-access-log")
    }
    is_quiet = flags.disable_access_log or (
        flags.disable_access_log is None and flags.uvicorn_log_level in QUIET_LEVELS
    )
    # ... but for these, and for what no flag or more than one decides.
    values |= _model(flags) | {
        "model.trust_remote_code": flags.trust_remote_code or None,
        "model.load_format": LOAD_FORMATS.get(flags.load_format or ""),
        "model.quantization": None if flags.quantization == "none" else flags.quantization,
        "engine.dtype": DTYPES[flags.dtype],
        "engine.overlap": flags.async_scheduling is not False,
        "scheduler.max_num_batched_tokens": _budget(flags, scheduler),
        # What the model allows, and below what the memory allows, unless a flag says otherwise: for the demo, too.
        "engine.max_model_len": NULL if flags.max_model_len is None else flags.max_model_len,
        "kv_cache.num_slots": NULL,
        "runner.graphs": False if flags.enforce_eager else None,
        "parallel.executor": EXECUTORS.get(flags.distributed_executor_backend or ""),
        "server.generation_config": None if flags.generation_config is None else flags.generation_config == "auto",
        "server.log_requests": False if is_quiet else None,
    }
    if flags.swap_space:
        values |= {"allocator.swap_gib": flags.swap_space, "scheduler.preemption": "swap"}
    made += [f"{key}={literal(value)}" for key, value in values.items() if value is not None]
    return made + flags.set


def _model(flags: argparse.Namespace) -> dict[str, Any]:
    """Where the model is; what a hub's library is to be told is told here, so that what follows finds a folder."""
    model = flags.model or flags.model_flag
    if model is None or not (flags.revision or flags.download_dir) or not is_model_name(model):
        return {"model.path": model}
    weights = flags.load_format != "dummy"
    folder = fetch_model(model, weights=weights, revision=flags.revision, cache_dir=flags.download_dir)
    return {"model.path": str(folder), "model.name": model}


def _scheduler(flags: argparse.Namespace) -> str:
    if flags.scheduler is not None:
        return str(flags.scheduler)
    policy = POLICIES[flags.scheduling_policy or "fcfs"]
    return "continuous" if flags.enable_chunked_prefill is False else policy


def _budget(flags: argparse.Namespace, scheduler: str) -> int | None:
    """Tokens of a step; None: what the scheduler has under mode=serve."""
    if flags.max_num_batched_tokens is not None:
        return int(flags.max_num_batched_tokens)
    usual = IN_CHUNKS_TOKENS if scheduler in SCHEDULERS_IN_CHUNKS else 2048
    return None if (flags.max_num_seqs or 0) <= usual else int(flags.max_num_seqs)


def _check(flags: argparse.Namespace) -> None:
    model = flags.model or flags.model_flag
    if flags.model and flags.model_flag and flags.model != flags.model_flag:
        raise ConfigError("MODEL and --model both name the model; give one of them")
    if flags.tokenizer and (model is None or flags.tokenizer.rstrip("/") != str(model).rstrip("/")):
        raise ConfigError(
            f"--tokenizer {flags.tokenizer} is refused: the tokenizer is the model's own; copy its files into the "
            "model's folder, or leave it out"
        )
    if flags.data_parallel_size < 1:
        raise ConfigError(f"--data-parallel-size {flags.data_parallel_size} must be at least 1")
    if flags.router and flags.data_parallel_size == 1:
        raise ConfigError(f"--router {flags.router} chooses among engines, and there is one; give --data-parallel-size")
    for kind, without in (("allocator", ALLOCATORS_WITHOUT_SWAP), ("scheduler", SCHEDULERS_WITHOUT_SWAP)):
        name = getattr(flags, kind)
        if flags.swap_space and name in without:
            raise ConfigError(f"--swap-space is nothing that --{kind} {name} can use; leave one out")
    _check_prefixes(flags)
    _check_scheduler(flags)


def _check_prefixes(flags: argparse.Namespace) -> None:
    if flags.enable_prefix_caching and flags.allocator not in (None, "paged_prefix", "radix"):
        raise ConfigError(
            f"--enable-prefix-caching needs --allocator paged_prefix or radix, not {flags.allocator}; leave one out"
        )
    if flags.enable_prefix_caching is False and flags.allocator in ("paged_prefix", "radix"):
        raise ConfigError(f"--no-enable-prefix-caching contradicts --allocator {flags.allocator}; leave one out")


def _check_scheduler(flags: argparse.Namespace) -> None:
    policy, chunks = flags.scheduling_policy, flags.enable_chunked_prefill
    if flags.scheduler is not None:
        if policy and (policy == "priority") != (flags.scheduler == "priority"):
            raise ConfigError(f"--scheduling-policy {policy} contradicts --scheduler {flags.scheduler}; leave one out")
        if chunks is not None and flags.scheduler in ("static", "continuous", *SCHEDULERS_IN_CHUNKS):
            in_chunks = flags.scheduler in SCHEDULERS_IN_CHUNKS
            if chunks != in_chunks:
                no = "" if chunks else "no-"
                raise ConfigError(
                    f"--{no}enable-chunked-prefill contradicts --scheduler {flags.scheduler}; leave one out"
                )
    elif chunks is False and policy == "priority":
        raise ConfigError("--no-enable-chunked-prefill contradicts --scheduling-policy priority; leave one out")


def literal(value: object) -> str:
    """A value in Hydra's override grammar."""
    if isinstance(value, list):
        return "[" + ",".join(literal(item) for item in value) + "]"
    if value is NULL:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)
