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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvarena.engine.runner.step_graphs import graph_tokens

MAX_OUTPUT_LEN = 512
MAX_NUM_SEQS = 256
FIT, HELD_OUT = "fit", "held-out"
SEEDS = {FIT: 100, HELD_OUT: 200}  # the n-th cell of a part adds n
NUM_CLIENTS, NUM_PRIORITIES = 4, 3
SMALL = "qwen3-0.6b-shape"  # whose number of requests models have that the table does not name
# Of prompts that no graph serves: odd and whole multiples of 16, for which Triton compiles kernels of their own.
STRIDE, GROWTH = 64, 1.15
# Steps with prompts beside few and many decodes: requests, and most new tokens of a step.
MIXED_STEPS = ((6, 256), (6, 4096), (64, 512), (64, 2048), (64, 8192))

Lengths = dict[str, dict[str, float]]


def _uniform(prompt: tuple[int, int], output: tuple[int, int]) -> tuple[str, Lengths]:
    names = ("min", "max")
    return "uniform", {
        "prompt_len": dict(zip(names, prompt, strict=True)),
        "output_len": dict(zip(names, output, strict=True)),
    }


def _lognormal(prompt: tuple[int, float, int, int], output: tuple[int, float, int, int]) -> tuple[str, Lengths]:
    names = ("mean", "sigma", "min", "max")
    return "lognormal", {
        "prompt_len": dict(zip(names, prompt, strict=True)),
        "output_len": dict(zip(names, output, strict=True)),
    }


# Name -> workload, and the lengths that are not its own.
LENGTHS: dict[str, tuple[str, Lengths]] = {
    "sharegpt": ("sharegpt", {}),
    "azure_conv": ("azure_conv", {}),
    "azure_code": ("azure_code", {}),
    "alpaca": ("alpaca", {}),
    "short": _uniform((16, 256), (32, 512)),
    "even": _uniform((100, 1024), (100, 1024)),
    "long": _uniform((1000, 30_000), (16, 256)),
    "mid": _lognormal((600, 1.0, 16, 4096), (150, 0.8, 8, 512)),
    "tail": _lognormal((6000, 1.0, 200, 30_000), (60, 0.8, 4, 256)),
}


def scaled(name: str, value: float, share: float) -> float:
    """A number of a distribution of lengths, for requests of a `share` of their lengths."""
    if share == 1 or name == "sigma":
        return value
    least = {"min": 1, "mean": 2.5, "max": 8}[name]
    return max(least, value * share if name == "mean" else round(value * share))


def lengths_overrides(lengths: str, share: float = 1.0) -> list[str]:
    """The workload of one of LENGTHS, as on run.py's command line."""
    workload, numbers = LENGTHS[lengths]
    found = [f"workload={workload}"]
    if workload != "uniform":
        found.append("workload.max_total_len=${engine.max_model_len}")
    if not numbers:
        limit = scaled("max", MAX_OUTPUT_LEN, share)
        found += ["workload.on_exceed=clip", f"workload.max_output_len={limit}"]
        found += [] if share == 1 else [f"workload.max_prompt_len={scaled('max', 30_000, share)}"]
    return found + [
        f"workload.{key}.{name}={scaled(name, value, share)}"
        for key, options in numbers.items()
        for name, value in options.items()
    ]


@dataclass(frozen=True)
class CalibrationCell:
    """One cell of the table.

    Attributes:
        part: FIT or HELD_OUT.
        scheduler: of conf/scheduler.
        budget: most new tokens of a step.
        lengths: of LENGTHS.
        requests: by the option of conf/model.
        load: multiple of the rate that `of` served; None: all at once.
        of: name of the cell whose rate is meant; it comes before.
        allocator: of conf/allocator.
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

    def overrides(self, model: str, seed: int, rate: float | None, share: float = 1.0) -> list[str]:
        """The cell as on run.py's command line, on top of `experiment=record`.

        Args:
            model: whose number of requests.
            seed: of lengths and arrivals.
            rate: requests per second; None: all at once.
            share: of the requests, and of their lengths; below 1 to try the command out.
        """
        count = max(4, round(self.requests.get(model, self.requests[SMALL]) * share))
        return [
            f"allocator={self.allocator}",
            *(["allocator.reservation=oracle"] if self.allocator == "contiguous" else []),
            f"scheduler={self.scheduler}",
            f"scheduler.max_num_seqs={MAX_NUM_SEQS}",
            f"scheduler.max_num_batched_tokens={self.budget}",
            *([] if self.num_slots is None else [f"kv_cache.num_slots={self.num_slots}"]),
            f"engine.overlap={str(self.overlap).lower()}",
            *lengths_overrides(self.lengths, share),
            f"workload.num_requests={count}",
            f"workload.seed={seed}",
            f"workload.num_clients={NUM_CLIENTS}",
            f"workload.num_priorities={NUM_PRIORITIES}",
            *(["arrival=all_at_once"] if rate is None else ["arrival=poisson", f"arrival.rate={rate}"]),
        ]

    def facts(self, served: float) -> dict[str, Any]:
        """What a recording says of it beside its run: `served` requests per second."""
        return {"part": self.part, "load": self.load, "of": self.of, "served": served}


def seeds(cells: Sequence[CalibrationCell]) -> list[int]:
    """A seed of its own for every cell."""
    counts = dict(SEEDS)
    found = []
    for cell in cells:
        found.append(counts[cell.part])
        counts[cell.part] += 1
    return found


def warm_up_lengths(active_parameters: int, longest: int) -> list[int]:
    """Prompt lengths, in tokens, from where graphs end to `longest`: close together at first, then by a factor."""
    lengths = list(range(graph_tokens(active_parameters) + 1, min(2048, longest), STRIDE))
    length = 2048.0
    while length < longest:
        lengths.append(int(length))
        length *= GROWTH
    return [length // 16 * 16 + 7 * (number % 2) for number, length in enumerate(lengths)]


def _count(llama: int, qwen: int) -> dict[str, int]:
    """Requests of a cell by model; Mixtral's steps take more than twice as long as Llama's."""
    return {"llama-3.1-8b-shape": llama, SMALL: qwen, "mixtral-8x7b-shape": max(12, round(0.4 * llama))}


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
