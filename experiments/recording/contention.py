"""What else the machine did while a cell was measured: the process's share of it, stolen time, load, clocks, a probe.

    probe --> measured part --> probe

The probe does the same small work over and over: first until clocks and threads are awake, then for ten slices of
0.1 s. It says how often a second, as the median of the slices, and how far apart they are. On a quiet machine it is
twice the same number, within that spread; cells whose probes differ by more ran on two machines, whatever their names
say.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

WARM_SECONDS = 0.3  # an idle processor or GPU is slow at first
SLICES, SLICE_SECONDS = 10, 0.1
CPU_SIZE, GPU_SIZE = 192, 2048  # rows of the probe's square matrices
PRODUCTS = 4  # one after the other: the first wakes what was idle
LOOPS = 2000  # of plain Python beside the products
PROC_STAT = Path("/proc/stat")


class Probe(NamedTuple):
    """What a probe found.

    Attributes:
        speed: pieces of work a second, the median of the slices.
        spread: between the slices' quartiles, over the median.
    """

    speed: float
    spread: float


@dataclass
class Contention:
    """Context of a cell's measured part; a virtual clock needs none.

    Args:
        probe: run the probe before and after.
        cuda: the cell computes on a GPU: its clocks are read, and the probe uses it too.
    """

    probe: bool
    cuda: bool
    _probes: list[Probe] = field(default_factory=list)
    _clocks: list[int | None] = field(default_factory=list)
    _loads: list[float | None] = field(default_factory=list)
    _start: tuple[float, float] = (0.0, 0.0)
    _spent: tuple[float, float] = (0.0, 0.0)
    _ticks: tuple[int, int] | None = None
    _steal_share: float | None = None

    def before(self) -> None:
        """Probe the machine; call when nothing of the cell runs yet."""
        self._look()

    def __enter__(self) -> Self:
        self._ticks = _stolen()
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self._spent = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        after = _stolen()
        if self._ticks is not None and after is not None and after[1] > self._ticks[1]:
            self._steal_share = (after[0] - self._ticks[0]) / (after[1] - self._ticks[1])

    def after(self) -> dict[str, Any]:
        """Probe the machine again, and return what the manifest says."""
        self._look()
        wall, processor = self._spent
        clocks, probes = self._clocks, self._probes
        return {
            "processor_share": processor / wall if wall > 0 else None,
            "steal_share": self._steal_share,
            "load_average": self._loads,
            "gpu_clock_mhz": None if None in clocks else {"before": clocks[0], "after": clocks[1]},
            "probe": _both(*probes) if self.probe else None,
        }

    def _look(self) -> None:
        try:
            self._loads.append(os.getloadavg()[0])
        except OSError:
            self._loads.append(None)
        if self.probe:
            self._probes.append(run_probe(self.cuda))
        self._clocks.append(_gpu_clock() if self.cuda else None)  # behind the probe, which has woken the GPU


def run_probe(cuda: bool, slices: int = SLICES) -> Probe:
    """How often a second a fixed piece of work is done: plain Python, and products on the engine's threads or its GPU.

    Args:
        cuda: multiply on the GPU, and wait for it.
        slices: of SLICE_SECONDS each.
    """
    work = _work(cuda)
    _rate(work, WARM_SECONDS)
    rates = sorted(_rate(work, SLICE_SECONDS) for _ in range(slices))
    low, speed, high = statistics.quantiles(rates, n=4, method="inclusive")
    return Probe(speed, (high - low) / speed)


def _rate(work: Callable[[], None], seconds: float) -> float:
    count, start = 0, time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        work()
        count += 1
    return count / (now - start)


def _both(before: Probe, after: Probe) -> dict[str, float]:
    return {"before": before.speed, "after": after.speed, "spread": max(before.spread, after.spread)}


def _work(cuda: bool) -> Callable[[], None]:
    """Plain Python, and products where the engine computes.

    On a GPU none on the processor: a product on all its threads waits for the slowest one every time, which on 16 of
    them was noise of 17 % beside runs that repeated within 1 %.
    """
    if cuda:
        one = torch.full((GPU_SIZE, GPU_SIZE), 0.5, dtype=torch.bfloat16, device="cuda")
    else:
        one = torch.full((CPU_SIZE, CPU_SIZE), 0.5)

    def work() -> None:
        total = 0
        for number in range(LOOPS):
            total += number
        for _ in range(PRODUCTS):
            one @ one
        if cuda:
            torch.cuda.synchronize()

    return work


def _stolen() -> tuple[int, int] | None:
    """Ticks that a hypervisor took, and all ticks, of all processors; None where the system does not say."""
    try:
        ticks = [int(word) for word in PROC_STAT.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return (ticks[7], sum(ticks)) if len(ticks) == 8 else None


def _gpu_clock() -> int | None:
    """The first GPU's clock in MHz, from NVML where Python has it, else from nvidia-smi; None where neither is."""
    try:
        return int(torch.cuda.clock_rate())
    except (RuntimeError, ImportError, AttributeError):
        command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--id=0", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
