"""Servers that share one GPU by `--gpu-memory-utilization`, and what they say where its memory runs out.

    kvarena benchmark shares --out shares.jsonl

starts `kvarena serve` with random weights of the Qwen3-0.6B shape and prints one JSON line per part: what was started,
the pools that came of it or the line that refused, and `holds`. Whatever a refusal advises is done, and must serve.
Without a GPU (`--model models/demo`) a share means nothing: all servers start, `holds` is null, and the same lines show
that the script itself runs. The exit code is 1 where a part does not hold.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch

from kvarena.engine.pool.memory_limits import size_text
from kvarena.experiments.models.shape import make_model_dir
from kvarena.experiments.serving.child import Server
from kvarena.experiments.settings.compose import CONF_DIR
from kvarena.experiments.tools import tool_parser

Line = dict[str, Any]
KEY = "k"
SMALL = ("--max-model-len", "512", "--max-num-seqs", "8")
ALLOCATORS = ("paged", "radix", "contiguous", "orca_pow2", "virtual")
REFUSED_SECONDS = 200.0
NUM_LARGE_REQUESTS = 5
# What is left of a card is taken in such pieces, the large ones first.
PIECES = (2**30, 2**26, 2**21)
# What a line may advise, as a person reads it, and the flags that follow it. A step is made smaller to a quarter.
ADVICE: tuple[tuple[str, Callable[[str], tuple[str, str]]], ...] = (
    (r"lower it to at most (0\.\d+)", lambda value: ("--gpu-memory-utilization", value)),
    (r"raise it to at least (0\.\d+)", lambda value: ("--gpu-memory-utilization", value)),
    (r"raise the pool to --gpu-memory-utilization (0\.\d+)", lambda value: ("--gpu-memory-utilization", value)),
    (r"set --max-model-len (\d+)", lambda value: ("--max-model-len", value)),
    (r"set --dtype (\w+)", lambda value: ("--dtype", value)),
    (r"lower (--max-num-batched-tokens)", lambda flag: (flag, "512")),
)


class Servers:
    """Servers of one model on one card.

    Args:
        arguments: the model, and flags of every server.
    """

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments

    def start(self, *flags: str) -> Server:
        """One that serves. Raises EngineError with the end of its log where it does not start."""
        return Server([*self._arguments, *flags], KEY)

    def start_all(self, *flags_of_each: tuple[str, ...]) -> tuple[list[Server], list[str]]:
        """Start them at the same moment: those that serve, and the logs of the others."""
        with ThreadPoolExecutor(len(flags_of_each)) as pool:
            starts = [pool.submit(self.start, *flags) for flags in flags_of_each]
        return [s.result() for s in starts if not s.exception()], [str(s.exception()) for s in starts if s.exception()]

    def refused(self, *flags: str) -> str:
        """The line with which a start ends; empty where it serves."""
        command = [sys.executable, "-m", "kvarena", "serve", *self._arguments, *flags, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if "Uvicorn running" in line:
                    process.terminate()
            code = process.wait(REFUSED_SECONDS)
        return "" if code == 0 else one_line_of("".join(said))


def one_line_of(log: str) -> str:
    """The error of a log, where it is one line as it should be; else the end of the log."""
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    return lines[0] if len(lines) == 1 and "Traceback" not in log else f"NOT ONE LINE: {log[-1000:]}"


def pool_of(server: Server) -> int:
    """Tokens of a server's pool, as its log says."""
    found = re.search(r"KV pool of ([\d,]+) tokens", server.log)
    return int(found[1].replace(",", "")) if found else 0


def serves(server: Server) -> bool:
    """Whether a request is answered."""
    return server.is_alive(KEY)


def alike(pools: list[int]) -> bool:
    """Whether pools are as large as each other, to 5 %."""
    return min(pools) >= 0.95 * max(pools) > 0


@contextlib.contextmanager
def stopping(servers: list[Server]) -> Iterator[list[Server]]:
    """Stop them at the end."""
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


def side_by_side(servers: Servers) -> Iterator[Line]:
    """0.4 and 0.4: at once, one after the other, and what 0.9 beside one of them is told."""
    share = ("--gpu-memory-utilization", "0.4")
    running, failed = servers.start_all(share, share)
    with stopping(running):
        pools = [pool_of(server) for server in running]
        answers = [serves(server) for server in running]
        yield {"part": "two at 0.4 at once", "pools": pools, "answers": answers, "failed": failed,
               "free": free(), "holds": len(pools) == 2 and all(answers) and alike(pools)}  # fmt: skip
        if len(running) == 2:
            running.pop().stop()
        running.append(servers.start(*share))
        pools = [pool_of(server) for server in running]
        answers = [serves(server) for server in running]
        yield {"part": "0.4 beside a running 0.4", "pools": pools, "answers": answers,
               "holds": all(answers) and alike(pools)}  # fmt: skip
        running.pop().stop()
        line = servers.refused("--gpu-memory-utilization", "0.9")
        tried, answer = try_advice(servers, line), serves(running[0])
        yield {"part": "0.9 beside 0.4", "line": line, "tried": tried, "answers": [answer],
               "holds": "--gpu-memory-utilization 0.9 asks for" in line and good(tried) and answer}  # fmt: skip


def two_at_most(servers: Servers) -> Iterator[Line]:
    """0.9 and 0.9: one after the other, and at once."""
    share = ("--gpu-memory-utilization", "0.9")
    with stopping([servers.start(*share)]) as (first,):
        line = servers.refused(*share)
        yield {"part": "0.9 beside a running 0.9", "pools": [pool_of(first)], "line": line, "answers": [serves(first)],
               "holds": "--gpu-memory-utilization 0.9 asks for" in line and serves(first)}  # fmt: skip
    running, failed = servers.start_all(share, share)
    with stopping(running):
        lines = [one_line_of(log) for log in failed]
        answers = [serves(server) for server in running]
        yield {"part": "two at 0.9 at once", "answers": answers, "lines": lines,
               "holds": len(running) < 2 and all(answers) and not any("NOT ONE" in line for line in lines)}  # fmt: skip


def allocators(servers: Servers) -> Iterator[Line]:
    """Every kind of pool with 0.15 of the card, all of them at once."""
    running, failed = servers.start_all(
        *(("--gpu-memory-utilization", "0.15", "--allocator", name) for name in ALLOCATORS)
    )
    with stopping(running):
        pools = [pool_of(server) for server in running]
        answers = [serves(server) for server in running]
        yield {"part": "0.15 for each allocator", "allocators": ALLOCATORS, "pools": pools, "answers": answers,
               "failed": failed, "free": free(),
               "holds": len(pools) == len(ALLOCATORS) and all(answers) and alike(pools)}  # fmt: skip


def too_small(servers: Servers) -> Iterator[Line]:
    """Shares, pools and contexts that do not go together; each way out that is named is gone."""
    cases = {
        "a share that holds no step": ("--gpu-memory-utilization", "0.01", "--max-num-batched-tokens", "4096"),
        "a share that holds no context": ("--gpu-memory-utilization", "0.03", "--max-model-len", "40960"),
        "a pool that holds no context": ("--max-model-len", "8192", "--num-gpu-blocks-override", "100"),
        "a pool larger than the card": ("--kv-cache-memory-gib", "1000"),
    }
    for name, flags in cases.items():
        line = servers.refused(*flags)
        tried = try_advice(servers, line, flags)
        yield {"part": name, "flags": flags, "line": line, "tried": tried,
               "holds": line.startswith("error: ") and " 0.00 " not in line and good(tried)}  # fmt: skip


def in_a_step(servers: Servers) -> Iterator[Line]:
    """A step that finds the card full: its requests end, the server goes on, and serves again when there is room."""
    with stopping([servers.start("--gpu-memory-utilization", "0.3", "--max-model-len", "8192")]) as (server,):
        before = serves(server)
        held = fill_card()
        left = free()
        codes = [large_request(server) for _ in range(NUM_LARGE_REQUESTS)]
        small = serves(server)
        del held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        after = [large_request(server), 200 if serves(server) else 0]
        said = [line for line in server.log.splitlines() if "out of memory" in line]
        yield {"part": "out of memory in steps", "free": left, "codes": codes, "small_request_meanwhile": small,
               "codes_with_room": after, "said": said[:2], "num_said": len(said),
               "holds": before and set(codes) == {500} and after == [200, 200] and len(said) == len(codes)
               and "Traceback" not in server.log}  # fmt: skip


def large_request(server: Server) -> int:
    """The status of a request that needs memory beyond what steps had until then: log-probabilities of its prompt."""
    body = {"prompt": [5] * 2000, "max_tokens": 1, "prompt_logprobs": 0}
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=120).status_code


def fill_card() -> list[torch.Tensor]:
    """Take what the card has left."""
    held: list[torch.Tensor] = []
    if torch.cuda.is_available():
        for size in PIECES:
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    return held


def free() -> str:
    """Of the card."""
    return size_text(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else "no GPU"


def try_advice(servers: Servers, line: str, flags: tuple[str, ...] = ()) -> dict[str, str]:
    """Do what a line advises, one after the other: by the flags that were added, `serves` or what was said then."""
    tried = {}
    for pattern, follow in ADVICE:
        found = re.search(pattern, line)
        if found:
            added = follow(found[1])
            tried[" ".join(added)] = servers.refused(*flags, *added) or "serves"
    return tried


def good(tried: dict[str, str]) -> bool:
    """Whether whatever was advised served."""
    return all(outcome == "serves" for outcome in tried.values())


PARTS = (side_by_side, two_at_most, allocators, too_small, in_a_step)


def main(argv: Sequence[str]) -> int:
    """Run the parts; returns the exit code."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--model", type=Path, help="a model directory in place of the shape")
    parser.add_argument("--parts", nargs="*", default=[part.__name__ for part in PARTS], help="some of them")
    parser.add_argument("--out", type=Path, help="a file that gets every line, too")
    options = parser.parse_args(argv)
    failed = False
    with tempfile.TemporaryDirectory(prefix="kvarena-shares-") as folder:
        arguments = [str(options.model)]
        if options.model is None:
            directory = make_model_dir(CONF_DIR / "model" / "qwen3-0.6b-shape.yaml", Path(folder))
            arguments = [str(directory), "--load-format", "dummy", "--dtype", "bfloat16"]
        servers = Servers([*arguments, *SMALL])
        for part in PARTS:
            if part.__name__ not in options.parts:
                continue
            for line in part(servers):
                if not torch.cuda.is_available():
                    line["holds"] = None
                failed |= line["holds"] is False
                text = json.dumps(line)
                print(text, flush=True)
                if options.out is not None:
                    with options.out.open("a") as file:
                        file.write(text + "\n")
    return int(failed)
