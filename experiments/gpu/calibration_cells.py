"""The cells that the simulator is calibrated from and judged by: one table, the same for every shape.

    fit         schedulers: continuous, static, chunked of 512, 2,048 and 8,192 tokens a step
                lengths:    sharegpt, azure_conv, short, long
    held-out    schedulers: chunked of 256, 1,024 and 4,096, sjf, fair, priority
                lengths:    azure_code, alpaca, even, mid, tail

No held-out cell shares its scheduler, its lengths or its seed with a fitted one. Loads: all requests at once, or
Poisson arrivals at a multiple of what the named cell served. With twice that the queue grows to the end: such cells and
those with all requests at once test throughput. Where arrivals set the pace, only latencies are tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvarena.allocators.contiguous import ContiguousAllocator
from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.gpu.cells import SAMPLING, GpuCell, Strategy
from kvarena.experiments.load.arrivals import PoissonArrival
from kvarena.experiments.workloads.parts.base import Workload, WorkloadItem
from kvarena.experiments.workloads.published import (
    AlpacaWorkload,
    AzureCodeWorkload,
    AzureConvWorkload,
    ShareGPTWorkload,
)
from kvarena.experiments.workloads.synthetic import LognormalWorkload, UniformWorkload
from kvarena.schedulers.chunked import ChunkedScheduler
from kvarena.schedulers.continuous import ContinuousScheduler
from kvarena.schedulers.fair import FairScheduler
from kvarena.schedulers.priority import PriorityScheduler
from kvarena.schedulers.sjf import SJFScheduler
from kvarena.schedulers.static import StaticScheduler

MAX_MODEL_LEN = 32768
MAX_OUTPUT_LEN = 512
MAX_NUM_SEQS = 256
FIT, HELD_OUT = "fit", "held-out"
SEEDS = {FIT: 100, HELD_OUT: 200}  # the n-th cell of a part adds n
NUM_CLIENTS, NUM_PRIORITIES = 4, 3

SCHEDULERS: dict[str, type[Any]] = {
    "continuous": ContinuousScheduler,
    "static": StaticScheduler,
    "chunked": ChunkedScheduler,
    "sjf": SJFScheduler,
    "fair": FairScheduler,
    "priority": PriorityScheduler,
}
ALLOCATORS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "paged": (PagedAllocator, {}),
    "contiguous": (ContiguousAllocator, {"reservation": "oracle"}),
}
LIMITS: dict[str, Any] = {"max_output_len": MAX_OUTPUT_LEN, "max_total_len": MAX_MODEL_LEN, "on_exceed": "clip"}
LENGTHS: dict[str, Callable[..., Workload]] = {
    "sharegpt": lambda **common: ShareGPTWorkload(**LIMITS, **common),
    "azure_conv": lambda **common: AzureConvWorkload(**LIMITS, **common),
    "azure_code": lambda **common: AzureCodeWorkload(**LIMITS, **common),
    "alpaca": lambda **common: AlpacaWorkload(**LIMITS, **common),
    "short": lambda **common: _uniform((16, 256), (32, 512), common),
    "even": lambda **common: _uniform((100, 1024), (100, 1024), common),
    "long": lambda **common: _uniform((1000, 30_000), (16, 256), common),
    "mid": lambda **common: _lognormal((600, 1.0, 16, 4096), (150, 0.8, 8, 512), common),
    "tail": lambda **common: _lognormal((6000, 1.0, 200, 30_000), (60, 0.8, 4, 256), common),
}


def _uniform(prompt: tuple[int, int], output: tuple[int, int], common: dict[str, Any]) -> Workload:
    low_high = ("min", "max")
    return UniformWorkload(
        prompt_len=dict(zip(low_high, prompt, strict=True)),
        output_len=dict(zip(low_high, output, strict=True)),
        **common,
    )


def _lognormal(
    prompt: tuple[int, float, int, int], output: tuple[int, float, int, int], common: dict[str, Any]
) -> Workload:
    names = ("mean", "sigma", "min", "max")
    return LognormalWorkload(
        prompt_len=dict(zip(names, prompt, strict=True)), output_len=dict(zip(names, output, strict=True)), **common
    )


@dataclass(frozen=True)
class CalibrationCell:
    """One cell of the table.

    Attributes:
        part: FIT or HELD_OUT.
        scheduler: of SCHEDULERS.
        budget: most new tokens of a step.
        lengths: of LENGTHS.
        requests: by the number of the shape's parameters, in billions.
        load: multiple of the rate that `of` served; None: all at once.
        of: name of the cell whose rate is meant; it comes before.
        allocator: of ALLOCATORS.
        num_slots: of the pool that the cell may use; None: all.
        overlap: the loop.
    """

    part: str
    scheduler: str
    budget: int
    lengths: str
    requests: dict[str, int] = field(hash=False)
    load: float | None = None
    of: str | None = None
    allocator: str = "paged"
    num_slots: int | None = None
    overlap: bool = True

    @property
    def name(self) -> str:
        """A folder's name."""
        load = "once" if self.load is None else f"load{self.load:g}"
        memory = "" if self.allocator == "paged" else f"{self.allocator}-"
        return f"{memory}{self.scheduler}{self.budget}-{self.lengths}-{load}{'' if self.overlap else '-plain'}"

    def strategy(self) -> Strategy:
        """Allocator and scheduler; every option that matters is stated, so that no default can change a replay."""
        kind, options = ALLOCATORS[self.allocator]
        stated: dict[str, Any] = {"max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": self.budget}
        if self.scheduler != "static":
            stated |= {"watermark": 0.01, "preemption": "recompute"}
        return Strategy(
            self.allocator, kind, self.scheduler, SCHEDULERS[self.scheduler],
            allocator_options=options, scheduler_options=stated,
        )  # fmt: skip

    def build(self, shape: str, seed: int, rate: float | None, vocab_size: int, share: float = 1.0) -> GpuCell:
        """The cell as `run_cell` takes it.

        Args:
            shape: whose number of requests.
            seed: of lengths and arrivals.
            rate: requests per second; None: all at once.
            vocab_size: of the prompts' tokens.
            share: of the requests, and of their lengths; below 1 to try the command out.
        """
        count = max(4, round(self.requests[shape] * share))
        source = LENGTHS[self.lengths](num_requests=count, seed=seed, vocab_size=vocab_size)
        items = source.items()
        times = None if rate is None else PoissonArrival(rate).times(items, seed).tolist()
        return GpuCell(
            name=self.name,
            strategy=self.strategy(),
            max_model_len=MAX_MODEL_LEN,
            requests=[_request(i, item, 0.0 if times is None else times[i], share) for i, item in enumerate(items)],
            workload={"name": self.lengths, "seed": seed, "description": source.description},
            arrival={"name": "all_at_once"} if rate is None else {"name": "poisson", "rate": rate},
            num_slots=self.num_slots,
        )


def _request(index: int, item: WorkloadItem, arrival_time: float, share: float) -> Request:
    """Of one of a few clients and priorities in turn, which only those schedulers look at that go by them."""
    output_len = max(2, round(item.output_len * share))
    return Request(
        request_id=f"r{index}",
        prompt_token_ids=item.prompt_token_ids[: max(1, round(len(item.prompt_token_ids) * share))],
        sampling=SamplingParams(**SAMPLING, max_tokens=output_len),
        arrival_time=arrival_time,
        priority=index % NUM_PRIORITIES,
        client_id=f"c{index % NUM_CLIENTS}",
        oracle_output_len=output_len,
    )


def _count(llama: int, qwen: int) -> dict[str, int]:
    return {"llama-3.1-8b": llama, "qwen3-0.6b": qwen, "tiny": qwen}


# In order of recording: what is fitted, then what judges it; a run that is cut off leaves the most.
CELLS: tuple[CalibrationCell, ...] = (
    CalibrationCell(FIT, "continuous", 8192, "sharegpt", _count(450, 900)),
    CalibrationCell(FIT, "chunked", 512, "azure_conv", _count(200, 600)),
    CalibrationCell(FIT, "chunked", 2048, "long", _count(18, 60)),
    CalibrationCell(FIT, "static", 8192, "short", _count(500, 800)),
    CalibrationCell(FIT, "continuous", 32_768, "long", _count(14, 50)),
    CalibrationCell(FIT, "chunked", 8192, "azure_conv", _count(200, 700)),
    CalibrationCell(FIT, "chunked", 2048, "sharegpt", _count(400, 900), 1.0, "continuous8192-sharegpt-once"),
    CalibrationCell(FIT, "chunked", 512, "sharegpt", _count(120, 300), 0.3, "continuous8192-sharegpt-once"),
    CalibrationCell(HELD_OUT, "chunked", 1024, "even", _count(256, 256)),
    CalibrationCell(HELD_OUT, "sjf", 1024, "azure_code", _count(130, 700)),
    CalibrationCell(HELD_OUT, "chunked", 256, "azure_code", _count(130, 600), 2.0, "sjf1024-azure_code-once"),
    CalibrationCell(HELD_OUT, "priority", 2048, "mid", _count(350, 1200)),
    CalibrationCell(HELD_OUT, "fair", 512, "mid", _count(300, 1000), 1.0, "priority2048-mid-once"),
    CalibrationCell(HELD_OUT, "chunked", 1024, "tail", _count(50, 140)),
    CalibrationCell(HELD_OUT, "sjf", 4096, "tail", _count(40, 140), 2.0, "chunked1024-tail-once"),
    CalibrationCell(HELD_OUT, "chunked", 4096, "alpaca", _count(2500, 4000)),
    CalibrationCell(HELD_OUT, "fair", 1024, "even", _count(120, 200), allocator="contiguous", num_slots=98_304),
    CalibrationCell(HELD_OUT, "priority", 1024, "alpaca", _count(1500, 3000), 1.0, "chunked4096-alpaca-once"),
    CalibrationCell(FIT, "continuous", 8192, "sharegpt", _count(200, 400), overlap=False),
    CalibrationCell(FIT, "chunked", 512, "azure_conv", _count(60, 200), overlap=False),
    CalibrationCell(HELD_OUT, "sjf", 1024, "mid", _count(150, 400), overlap=False),
    CalibrationCell(HELD_OUT, "priority", 2048, "azure_code", _count(60, 250), overlap=False),
)
