"""What scheduling costs on the host, as JSON lines:

    kvarena benchmark scheduler

`step`: `schedule()` + `update()` and the allocator calls in them, every request decoding. `allocate_free`: one request
of 16 blocks, by the size of the pool. `match_prefix`: a prompt of 32k tokens that the cache holds. `evicting_step`: a
step of 256 decodes in a full pool with 100,000 cached blocks, of which 16 go. `evicting_prompt`: a prompt of 1,024
blocks that evicts as many: its admission, and with the commit that publishes them. Both in processor time, by eviction
policy; `--evicting` measures these alone. In the same run, `transformers_step`: transformers' continuous-batching
scheduler and cache manager on the same decode-only step (its `schedule_batch`, the tokens taken in, blocks marked as
complete; no tensors are prepared on either side).
Times are in milliseconds, the median and the minimum over the repeats.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kvarena.allocators.eviction_policies import policy_names
from kvarena.engine.contract import KVAllocator
from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.settings.strategies import build_allocator, build_scheduler
from kvarena.experiments.tools import tool_parser
from kvarena.reports.reading.names import cell_name
from kvarena.schedulers.base import Scheduler

BLOCK_SIZE = 16
MAX_MODEL_LEN = 65536
NUM_STEPS_BEFORE = 20
PROMPT_TOKENS = range(64, 512)
VOCAB_SIZE = 32000
NUM_CACHED = 100_000


def measure(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median and minimum time of `run()` in milliseconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return {"median_ms": round(statistics.median(times) * 1e3, 4), "min_ms": round(min(times) * 1e3, 4)}


def prompts(num_requests: int) -> list[list[int]]:
    """Random prompts, the same for every engine."""
    rng = random.Random(0)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(rng.choice(PROMPT_TOKENS))] for _ in range(num_requests)]


def bench_step(allocator: str, scheduler: str, num_running: int, repeats: int) -> dict[str, float]:
    """One decode-only step of `num_running` requests."""
    blocks, policy = _strategy(allocator, scheduler, num_blocks=200_000, max_num_seqs=num_running)
    sampling = SamplingParams(max_tokens=repeats + NUM_STEPS_BEFORE + 1000)
    for i, prompt in enumerate(prompts(num_running)):
        policy.add(Request(f"r{i}", prompt, sampling))
    while policy.num_waiting or policy.prefilling:
        _step(policy)
    for _ in range(NUM_STEPS_BEFORE):
        _step(policy)
    # The tokens of each step come from the device; making the list is not the scheduler's work.
    tokens = [7] * num_running
    result = measure(lambda: policy.update(policy.schedule(0.0), tokens), repeats)
    for request_id in list(policy.requests):
        policy.abort(request_id)
    if blocks.usage().owned:
        raise EngineError(f"{cell_name(allocator, scheduler)} leaked slots: {blocks.usage()}")
    return result


def bench_allocate_free(allocator: str, num_blocks: int, repeats: int) -> dict[str, float]:
    """allocate() and free() of 16 blocks, in a pool with 15 requests and as many holes, whatever its size."""
    blocks = build_allocator(allocator, num_blocks=num_blocks, max_model_len=1024, block_size=BLOCK_SIZE)
    size = 16 * BLOCK_SIZE
    sampling = SamplingParams(max_tokens=1)
    holders = [Request(f"h{i}", [1] * size, sampling) for i in range(30)]
    for holder in holders:
        if not blocks.allocate(holder, size):
            break
    for holder in holders[::2]:  # holes
        blocks.free(holder)
    req = Request("r", [1] * size, sampling)

    def run() -> None:
        blocks.allocate(req, size)
        blocks.free(req)

    return measure(run, repeats)


def bench_match_prefix(allocator: str, num_tokens: int, repeats: int) -> dict[str, float]:
    """match_prefix() of a prompt that the cache holds, for a request that was not seen before."""
    blocks, policy = _strategy(allocator, "continuous", num_blocks=2 * num_tokens // BLOCK_SIZE, max_num_seqs=4)
    rng = random.Random(0)
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(num_tokens)]
    policy.add(Request("first", prompt, SamplingParams(max_tokens=1)))
    while policy.has_work:
        _step(policy)
    fresh = iter([Request(f"r{i}", list(prompt), SamplingParams(max_tokens=1)) for i in range(repeats)])
    hits: list[int] = []
    result = measure(lambda: hits.append(blocks.match_prefix(next(fresh))), repeats)
    return result | {"hit_tokens": hits[-1]}


def bench_evictions(allocator: str, policy: str | None, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Steps of 256 decodes that evict 16 blocks each, and prompts that evict 1,024, in processor time.

    Args:
        allocator: with a prefix cache.
        policy: None: the allocator's default.
        repeats: steps; of prompts an eighth as many.
    """
    options = {} if policy is None else {"eviction": policy}
    num_running, length = 256, 40 * BLOCK_SIZE
    num_blocks = NUM_CACHED + num_running * (length // BLOCK_SIZE + 1)
    blocks = build_allocator(
        allocator, num_blocks=num_blocks, max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, **options
    )
    scheduler = build_scheduler("continuous", blocks, max_model_len=MAX_MODEL_LEN, max_num_seqs=num_running,
                                max_num_batched_tokens=8192)  # fmt: skip
    rng = random.Random(0)

    def prompt(num_tokens: int) -> list[int]:
        return [rng.randrange(VOCAB_SIZE) for _ in range(num_tokens)]

    head = prompt(8 * BLOCK_SIZE)
    for number in range(NUM_CACHED // 100 + 60):  # until the pool is full; half of the prompts have a head in common
        tokens = (head if number % 2 else []) + prompt(100 * BLOCK_SIZE)
        _compute(blocks, Request(f"c{number}", tokens[: 100 * BLOCK_SIZE], SamplingParams(max_tokens=1)))
    sampling = SamplingParams(max_tokens=repeats + 1000)
    for number in range(num_running):  # whose blocks become full in turn
        scheduler.add(Request(f"r{number}", prompt(length - number % BLOCK_SIZE), sampling))
    while scheduler.num_waiting or scheduler.prefilling:
        _step(scheduler)
    fillers = 0
    while blocks.usage().free:  # what is left of the pool
        _compute(blocks, Request(f"f{fillers}", prompt(4 * BLOCK_SIZE), sampling))
        fillers += 1
    tokens = [7] * num_running
    steps = [_processor_ms(lambda: scheduler.update(scheduler.schedule(0.0), tokens)) for _ in range(repeats)]
    admissions, commits = [], []
    for number in range(max(8, repeats // 8)):
        req = Request(f"p{number}", prompt(1024 * BLOCK_SIZE), sampling)
        admissions.append(_processor_ms(partial(_admit, blocks, req)) * 1e3 / 1024)
        commits.append(_processor_ms(partial(blocks.commit, req)) * 1e3 / 1024)
        blocks.free(req)
    admission, commit = statistics.median(admissions), statistics.median(commits)
    return _quantiles(steps), {"admission_us_a_block": round(admission, 3), "us_a_block": round(admission + commit, 3)}


def _compute(blocks: KVAllocator, req: Request) -> None:
    """A request comes, is computed and goes."""
    _admit(blocks, req)
    blocks.commit(req)
    blocks.free(req)


def _admit(blocks: KVAllocator, req: Request) -> None:
    if not blocks.allocate(req, req.num_tokens, blocks.match_prefix(req)):
        raise EngineError(f"no room for {req.request_id!r}: {blocks.usage()}")
    req.num_computed_tokens = req.num_tokens


def _processor_ms(run: Callable[[], Any]) -> float:
    begin = time.process_time()
    run()
    return (time.process_time() - begin) * 1e3


def _quantiles(times: Sequence[float]) -> dict[str, float]:
    return {
        "mean_ms": round(statistics.fmean(times), 4),
        "median_ms": round(statistics.median(times), 4),
        "max_ms": round(max(times), 3),
    }


def bench_transformers(num_running: int, share_blocks: bool, repeats: int) -> dict[str, float]:
    """The decode-only step of transformers' continuous batching, its tensors and forward left out."""
    import torch
    from transformers import ContinuousBatchingConfig, LlamaConfig
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.distributed import DistributedHelper
    from transformers.generation.continuous_batching.requests import RequestState
    from transformers.generation.continuous_batching.scheduler import FIFOScheduler

    model = LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=VOCAB_SIZE
    )
    config = ContinuousBatchingConfig(
        block_size=BLOCK_SIZE, num_blocks=60_000, max_batch_tokens=8192, allow_block_sharing=share_blocks
    )
    cache = PagedAttentionCache(
        model, config, torch.device("cpu"), DistributedHelper(None, None), tp_plan={}, dtype=torch.float16
    )
    scheduler = FIFOScheduler(cache, safety_margin=0.0, max_requests_per_batch=num_running)

    def step() -> None:
        batch = scheduler.schedule_batch(cache.max_batch_tokens, cache.num_pages)[0]
        for future in batch or ():
            state = future.state
            state.position_offset += future.query_length
            if future.has_new_token:
                state.update_and_check_completion(7, None)
            cache.mark_shareable_blocks_as_complete(state, future.complete_blocks)

    for i, prompt in enumerate(prompts(num_running)):
        scheduler.add_waiting_request(RequestState(f"r{i}", prompt, max_new_tokens=None))
    while scheduler.waiting_requests or any(state.remaining_prefill_tokens for state in _active(scheduler)):
        step()
    for _ in range(NUM_STEPS_BEFORE):
        step()
    return measure(step, repeats)


def _active(scheduler: Any) -> list[Any]:
    return list(scheduler.active_requests.values())


def _strategy(allocator: str, scheduler: str, num_blocks: int, max_num_seqs: int) -> tuple[KVAllocator, Scheduler]:
    blocks = build_allocator(allocator, num_blocks=num_blocks, max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE)
    policy = build_scheduler(
        scheduler, blocks, max_model_len=MAX_MODEL_LEN, max_num_seqs=max_num_seqs, max_num_batched_tokens=8192
    )
    return blocks, policy


def _step(policy: Scheduler) -> None:
    plan = policy.schedule(0.0)
    policy.update(plan, [7 if sample else None for sample in plan.samples])


def main(argv: Sequence[str]) -> int:
    """Run all benchmarks; see the module's docstring."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--repeats", type=int, default=300, help="steps or calls per line")
    parser.add_argument("--evicting", action="store_true", help="evictions alone, by policy")
    args = parser.parse_args(argv)
    repeats = args.repeats

    def line(bench: str, result: dict[str, float], **what: object) -> None:
        print(json.dumps({"bench": bench, **what, **result}), flush=True)

    for allocator in ("paged_prefix", "radix"):
        for policy in [name for name in policy_names() if name != "min"]:
            step, prompt = bench_evictions(allocator, policy, repeats)
            line("evicting_step", step, allocator=allocator, eviction=policy)
            line("evicting_prompt", prompt, allocator=allocator, eviction=policy)
    if args.evicting:
        return 0
    for num_running in (256, 1024):
        for allocator, scheduler in (
            ("paged", "continuous"),
            ("paged", "chunked"),
            ("paged", "fair"),
            ("paged_prefix", "continuous"),
            ("radix", "continuous"),
        ):
            result = bench_step(allocator, scheduler, num_running, repeats)
            line("step", result, allocator=allocator, scheduler=scheduler, num_running=num_running)
        for share_blocks in (False, True):
            result = bench_transformers(num_running, share_blocks, repeats)
            line("transformers_step", result, share_blocks=share_blocks, num_running=num_running)
    for allocator in ("paged", "paged_prefix", "radix", "contiguous", "orca_max"):
        for num_blocks in (10**3, 10**5, 10**7):
            result = bench_allocate_free(allocator, num_blocks, repeats)
            line("allocate_free", result, allocator=allocator, num_blocks=num_blocks)
    for allocator in ("paged_prefix", "radix"):
        result = bench_match_prefix(allocator, 32768, max(1, repeats // 10))
        line("match_prefix", result, allocator=allocator, num_tokens=32768)
    return 0
