"""What CUDA's virtual memory calls cost on this GPU: what a step pays when requests of `allocator=virtual` grow.

    kvarena benchmark mapping --pages 512

Each line is JSON: median and 99th percentile of host microseconds for one page, for each call, for pages that lie side
by side and are made accessible by one call, and for what the pool does with them (two planes; `grow` maps, `regrow`
finds the pages of a released region, `steal` takes them from another one). `idle` and `busy` tell whether the GPU
computed meanwhile.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from kvarena.engine.pool.cuda_memory import CudaDriver
from kvarena.engine.pool.virtual_memory import PageMap
from kvarena.experiments.gpu.timing import require_cuda
from kvarena.experiments.tools import tool_parser

SIDE_BY_SIDE = 8


def timed(call: Callable[[], object]) -> float:
    """Microseconds of one call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def report(name: str, load: str, microseconds: list[float], pages_per_call: int = 1) -> None:
    """Print one line."""
    values = np.array(microseconds) / pages_per_call
    p50, p99 = np.percentile(values, [50, 99]).round(2)
    print(json.dumps({"call": name, "gpu": load, "us_per_page_p50": p50, "us_per_page_p99": p99, "n": len(values)}))


@contextmanager
def gpu_load(busy: bool) -> Iterator[None]:
    """Keep the GPU computing, or leave it alone; waits for it at the end."""
    if busy:
        matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        for _ in range(2000):
            matrix @ matrix
    yield
    torch.cuda.synchronize()


def bench_calls(driver: CudaDriver, num_pages: int, busy: bool) -> None:
    """Every call by itself, page by page."""
    page, load = driver.granularity, "busy" if busy else "idle"
    base = driver.reserve(num_pages * page)
    addresses = [base + i * page for i in range(num_pages)]
    times: dict[str, list[float]] = {name: [] for name in ("create", "map", "set_access", "unmap", "release")}
    handles = []
    with gpu_load(busy):
        for _ in addresses:
            start = time.perf_counter()
            handles.append(driver.create(page))
            times["create"].append((time.perf_counter() - start) * 1e6)
        for address, handle in zip(addresses, handles, strict=True):
            times["map"].append(timed(lambda a=address, h=handle: driver.map(a, page, h)))  # type: ignore[misc]
            times["set_access"].append(timed(lambda a=address: driver.set_access(a, page)))  # type: ignore[misc]
        for address in addresses:
            times["unmap"].append(timed(lambda a=address: driver.unmap(a, page)))  # type: ignore[misc]
        together = []
        for first in range(0, num_pages - SIDE_BY_SIDE + 1, SIDE_BY_SIDE):
            for i in range(first, first + SIDE_BY_SIDE):
                driver.map(addresses[i], page, handles[i])
            together.append(timed(lambda a=addresses[first]: driver.set_access(a, SIDE_BY_SIDE * page)))  # type: ignore[misc]
        for address in addresses[: len(together) * SIDE_BY_SIDE]:
            driver.unmap(address, page)
        for handle in handles:
            times["release"].append(timed(lambda h=handle: driver.release(h)))  # type: ignore[misc]
    driver.free(base, num_pages * page)
    for name, values in times.items():
        report(name, load, values)
    report(f"set_access of {SIDE_BY_SIDE} side by side", load, together, SIDE_BY_SIDE)


def bench_pool(driver: CudaDriver, num_pages: int, busy: bool) -> None:
    """Regions that grow by a page, come back, and take pages from one another."""
    page, load = driver.granularity, "busy" if busy else "idle"
    pages = PageMap(driver, num_pages=num_pages, page_bytes=page, plane_bytes=2 * num_pages * page)
    with gpu_load(busy):
        grow = [timed(lambda n=n: pages.grow(0, n)) for n in range(1, num_pages + 1)]  # type: ignore[misc]
        pages.release([0])
        regrow = [timed(lambda n=n: pages.grow(0, n)) for n in range(1, num_pages + 1)]  # type: ignore[misc]
    report("grow by a page of keys and one of values", load, grow)
    report("regrow", load, regrow)
    if not busy:  # a page is taken only when the steps before its release are over
        pages.release([0])
        steal = [timed(lambda n=n: pages.grow(num_pages, n)) for n in range(1, num_pages + 1)]  # type: ignore[misc]
        report("steal", load, steal)
    pages.close()


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--pages", type=int, default=512, help="pages of each measurement")
    num_pages = parser.parse_args(argv).pages
    run(num_pages)
    return 0


def run(num_pages: int) -> None:
    """Run all of it. Raises ConfigError without a GPU."""
    driver = CudaDriver(require_cuda())
    print(json.dumps({"device": torch.cuda.get_device_name(), "page_bytes": driver.granularity}))
    for busy in (False, True):
        bench_calls(driver, num_pages, busy)
        bench_pool(driver, num_pages, busy)
