"""A server whose engine computes nothing: real fronts, scheduler and allocator, and a runner that makes up tokens.

    python -m kvarena.experiments.serving.stub_engine serve models/demo --port 8000 --fronts 2

It shows what the web front costs by itself (experiments/benchmarks/front.py), and lets tests inject faults: a step with
`--fail-token` in a prompt fails, one with `--full-token` or of more than `--full-tokens` finds no memory, one with
`--hang-token` never ends, and from one with `--leak-token` on a block is missing in the pool's counts. While the file
`--hold` exists, steps are so slow that what runs does not end meanwhile.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from dataclasses import dataclass

from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.checkpoints.directory import resolve_directory
from kvarena.engine.clock import WallClock
from kvarena.engine.contract import KVAllocator, KVUsage, StepPlan
from kvarena.engine.core import Engine
from kvarena.engine.errors import KvarenaError, OutOfMemory
from kvarena.engine.model_runner import ReadyTokens, StepResult
from kvarena.engine.request import Request
from kvarena.engine.server.engine.served import ServedEngine
from kvarena.engine.server.processes.engine import ALONE, Place
from kvarena.engine.server.processes.process import ModelFiles
from kvarena.engine.server.processes.supervisor import serve
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.ipc import EngineInfo
from kvarena.reports.reading.options import Options
from kvarena.routers.least_kv import LeastKVRouter
from kvarena.schedulers.chunked import ChunkedScheduler

HELD_STEP_SECONDS = 0.25
FULL = "out of memory on a stub: 2.00 GiB were asked for and 1.00 GiB were free"


@dataclass(frozen=True)
class StubOptions:
    """What the stub does.

    Attributes:
        vocab_size: tokens are below it; ids under 10 are left out (they may be special).
        step_time: seconds per step.
        fail_token: a step that computes a prompt with this token raises.
        full_token: a step that computes a prompt with this token finds the device's memory full.
        hang_token: a step that computes a prompt with this token sleeps for ever.
        leak_token: once a prompt with this token runs, the allocator counts a block too few.
        full_tokens: a step of more tokens finds the device's memory full; 0: none does.
        num_blocks: pool, in blocks of 16 slots.
        max_num_seqs: requests per step.
        max_num_batched_tokens: tokens per step.
        max_model_len: tokens.
        hold: while this file exists, a step takes `HELD_STEP_SECONDS` more; "": never.
    """

    vocab_size: int
    step_time: float = 0.0
    fail_token: int = -1
    full_token: int = -1
    hang_token: int = -1
    leak_token: int = -1
    full_tokens: int = 0
    num_blocks: int = 65536
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 8192
    max_model_len: int = 8192
    hold: str = ""


class LeakyAllocator(PagedAllocator):
    """Miscounts from the first prompt on that holds `leak_token`."""

    leak_token = -1
    has_leaked = False

    def allocate(self, req: Request, num_tokens: int, num_cached: int = 0) -> bool:
        """As any other."""
        self.has_leaked = self.has_leaked or self.leak_token in req.prompt_token_ids
        return super().allocate(req, num_tokens, num_cached)

    def count(self) -> KVUsage:
        """A block less than there is."""
        usage = super().count()
        return usage._replace(free=usage.free - self.block_size) if self.has_leaked else usage


class StubRunner:
    """Makes up tokens: 10, 11, 12, ... one after the other, whatever the request."""

    def __init__(self, options: StubOptions) -> None:
        self._options = options
        self._next = 0
        tokens = max(options.fail_token, options.full_token, options.hang_token)
        self._checks = tokens >= 0 or options.full_tokens > 0

    def execute(self, plan: StepPlan, allocator: KVAllocator) -> ReadyTokens:  # noqa: ARG002
        """A token for each entry that samples."""
        options = self._options
        if self._checks:
            self._inject(plan)
        if options.step_time:
            time.sleep(options.step_time)
        if options.hold and os.path.exists(options.hold):
            time.sleep(HELD_STEP_SECONDS)
        width, first = options.vocab_size - 10, self._next
        tokens = [10 + (first + i) % width if sampled else None for i, sampled in enumerate(plan.samples)]
        self._next = (first + len(tokens)) % width
        return ReadyTokens(StepResult(tokens))

    def _inject(self, plan: StepPlan) -> None:
        if 0 < self._options.full_tokens < plan.num_new_tokens:
            raise OutOfMemory(FULL)
        for req, _, _ in plan.scheduled:
            if self._options.fail_token in req.prompt_token_ids:
                raise RuntimeError("an injected fault")
            if self._options.full_token in req.prompt_token_ids:
                raise OutOfMemory(FULL)
            if self._options.hang_token in req.prompt_token_ids:
                time.sleep(3600)

    def release(self, request_ids: list[str]) -> None:
        """Nothing is kept."""


def build(options: StubOptions, place: Place = ALONE) -> ServedEngine:  # noqa: ARG001 - all are alike
    """A stub engine; called in the engine's process."""
    kind = PagedAllocator if options.leak_token < 0 else LeakyAllocator
    allocator = kind(num_blocks=options.num_blocks, block_size=16, max_model_len=options.max_model_len)
    if isinstance(allocator, LeakyAllocator):
        allocator.leak_token = options.leak_token
    scheduler = ChunkedScheduler(
        allocator=allocator,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=max(options.max_num_batched_tokens, options.max_num_seqs),
    )
    engine = Engine(scheduler, allocator, StubRunner(options), WallClock())
    info = EngineInfo(
        options.max_model_len,
        allocator.max_request_tokens,
        options.vocab_size,
        num_blocks=allocator.num_blocks,
        block_size=allocator.block_size,
    )
    return ServedEngine(engine, info)


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop; returns the exit code."""
    parser = Options(prog="python -m kvarena.experiments.serving.stub_engine", description=__doc__)
    parser.add_argument("command", choices=("serve",), help="as of the kvarena command")
    parser.add_argument("model", help="a model directory; only its tokenizer is used")
    parser.add_argument("--port", type=int, default=8000, help="TCP port; 0: a free one")
    parser.add_argument("--api-key", nargs="*", default=[], help="accepted keys")
    parser.add_argument("--fronts", type=int, default=1, help="HTTP processes")
    parser.add_argument("--engines", type=int, default=1, help="the one with the least KV gets a request")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="keys of the server's config")
    for name, kind, said in (
        ("step-time", float, "seconds of a step"),
        ("fail-token", int, "a step fails that has it in a prompt"),
        ("full-token", int, "a step finds no memory that has it in a prompt"),
        ("hang-token", int, "a step never ends that has it in a prompt"),
        ("leak-token", int, "the pool's counts are wrong once a prompt has it"),
        ("full-tokens", int, "a step finds no memory that has more tokens; 0: none does"),
        ("num-blocks", int, "of the KV pool"),
        ("max-num-seqs", int, "requests of a step"),
        ("max-num-batched-tokens", int, "tokens of a step, at least one a request"),
        ("hold", str, "while this file exists, a step takes a quarter of a second more"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(StubOptions, name.replace("-", "_")), help=said)
    flags = parser.parse_args(argv)
    values = {"port": flags.port, "api_keys": flags.api_key, "num_fronts": flags.fronts, "served_model_names": ["m"]}
    values |= {key: json.loads(value) for key, value in (item.split("=", 1) for item in flags.set)}
    try:
        directory = resolve_directory(flags.model)
        vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
        options = StubOptions(
            vocab_size, flags.step_time, flags.fail_token, flags.full_token, flags.hang_token, flags.leak_token,
            flags.full_tokens, flags.num_blocks, flags.max_num_seqs, flags.max_num_batched_tokens, hold=flags.hold,
        )  # fmt: skip
        router = LeastKVRouter(num_replicas=flags.engines) if flags.engines > 1 else None
        config, factory = ServerConfig.from_dict(values), functools.partial(build, options)
        return serve(config, ModelFiles(str(directory)), factory, router)
    except KvarenaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
