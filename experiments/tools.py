"""The tools: what `kvarena benchmark`, `kvarena check` and `kvarena make` run.

Each is a module with one `main(argv)` that gives the exit code; it reads its command line with `tool_parser`, and
raises KvarenaError for what is wrong, which the command prints as a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvarena.reports.reading.options import Options

HOME = "kvarena.experiments."


class Tool(NamedTuple):
    """Where a tool is, and what it does in a line."""

    module: str
    line: str


def _tools(home: str, lines: dict[str, str]) -> dict[str, Tool]:
    return {name: Tool(f"{HOME}{home}.{name}", line) for name, line in lines.items()}


TOOLS: dict[str, dict[str, Tool]] = {
    "benchmark": _tools("benchmarks", {
        "engine": "GPU: throughput, decode steps, prefill, start-up, ablations and correctness of the engine",
        "parallel": "several devices: sums over the ranks by size and way, and what the other ranks cost the host",
        "first_token": "GPU: seconds from a fresh process to its first token, and where they go",
        "images": "what images cost: pixels, tower, prompts, and the pauses of those who decode beside them",
        "recording": "what recording costs a run, beside the bare engine",
        "cpu": "host: useful tokens per second beside transformers' own generation",
        "scheduler": "host: time of a step's scheduling and of the allocators' operations",
        "simulator": "host: simulated requests per minute, and memory, end to end",
        "probe": "host: how noisy the probe is that stands around every measured run",
        "served": "server: what serving costs beside the same engine in-process",
        "front": "server: the HTTP front alone, beside a plain FastAPI loop; its APIs beside each other",
        "stream_load": "server: a closed loop of streaming clients on any OpenAI-compatible server",
        "soak": "server: hours of clients of which some hang up, and what leaks",
        "under_attack": "server: honest streams beside requests that mean harm",
    }) | _tools("benchmarks.tenants", {
        "fairness": "server: a client beside one that floods, under each scheduler",
    }) | _tools("benchmarks.kernels", {
        "kernels": "GPU: attention and fused kernels against copied bytes and a matrix product",
        "shared_reads": "GPU: decodes that begin with the same blocks: plan (on a CPU too), kernel, steps, a run",
        "experts": "GPU: the experts of one layer beside transformers' grouped product; `--shape tiny` on a CPU",
        "gemm": "GPU: searches launches of the skinny GEMM, for its table",
        "hopper": "GPU: the CUDA kernels for Hopper beside those they replace",
        "library_gemm": "GPU: searches the library's GEMM kernels, for their table",
        "layer_gemm": "GPU: searches launches of a layer's products on Hopper, for their tables",
        "packed_gemm": "GPU: products with weights of 4 bits, by each kernel, beside 16 bits and a copy",
        "mapping": "GPU: what CUDA's virtual memory calls cost",
        "draw": "GPU: the draw of a step's tokens, whatever its requests filter",
        "swaps": "GPU: what it costs to move a request's KV to the host and back",
    }) | _tools("benchmarks.serving", {
        "recording_cost": "server: what the ledger and a recording cost the engine's process, beside neither",
    }) | _tools("gpu", {
        "shares": "GPU: servers that share one card, and what they say where its memory runs out",
    }),
    "check": _tools("correctness", {
        "verify": "a run's tokens against transformers' own generation",
        "model_classes": "every causal language model class of transformers: the same tokens, or a refusal",
        "same_results": "two versions of this code: the same decisions, tokens and numbers on twenty cells",
        "map_check": "a run's KV map against its memory ledger",
        "verdict_rates": "how often the verdicts of reports are false, and how often they decide",
        "drawn_beams": "how much KV a model's beams share, and those that the simulator draws",
        "steady_rates": "how often the rule for a run's steady part gives each of its answers, on known load",
        "aa_under_load": "how often identical cells are told apart on a machine that is busy on purpose",
    }) | _tools("fuzzing", {
        "traces": "random traces through every strategy, against the oracle",
        "bodies": "random request bodies against a server: no 500, no stack trace",
        "constraints": "random schemas, regexes, grammars and tools against the server's bounds",
        "tool_texts": "random answers with tool calls, cut at every position",
    }),
    "make": _tools("models", {
        "train_demo": "train the embedded demo model",
        "shape": "a model directory of a real shape without weights",
        "profile": "a profile for the simulator from AIConfigurator's published tables",
        "recordings": "packs the cells of experiment=record, which the simulator is calibrated from, and unpacks them",
        "flag_page": "docs/flags.md: what each flag of vllm serve does here; `--check` compares",
    }),
}  # fmt: skip


def tool_parser(module: str, doc: str | None) -> Options:
    """The parser of a tool's command line.

    Args:
        module: the tool's `__name__`.
        doc: its docstring, which its help begins with.
    """
    for kind, tools in TOOLS.items():
        for name, tool in tools.items():
            if tool.module == module:
                return Options(prog=f"kvarena {kind} {name}", description=doc)
    raise KeyError(module)


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A tool's own arguments, and those behind `--`, which are of `kvarena serve`."""
    at = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def say(line: Mapping[str, Any], out: Path | None = None) -> None:
    """Print a line of JSON; `out` gets it, too."""
    text = json.dumps(line)
    print(text, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(text + "\n")


def say_all(lines: Iterable[Mapping[str, Any]], out: Path | None, failed: str) -> int:
    """Print lines as they come; 1 when one holds something under `failed`."""
    code = 0
    for line in lines:
        code |= bool(line.get(failed))
        say(line, out)
    return code


def page(kind: str) -> str:
    """What `kvarena KIND` prints: its tools, a line each."""
    width = max(map(len, TOOLS[kind]))
    lines = "\n".join(f"  {name:{width}}  {tool.line}" for name, tool in TOOLS[kind].items())
    return f"usage: kvarena {kind} NAME ...\n\nnames (kvarena {kind} NAME --help says more):\n{lines}"
