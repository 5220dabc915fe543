"""Device timing for the kernel benchmarks: CUDA-graph replays, and the ceilings that figures are held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from kvarena.engine.errors import ConfigError


def require_cuda() -> torch.device:
    """The GPU to measure on. Raises ConfigError without one."""
    if not torch.cuda.is_available():
        raise ConfigError("this benchmark measures a GPU, and torch sees none; run it on a CUDA machine")
    return torch.device("cuda")


def time_launches(launches: Sequence[Callable[[], object]], repeats: int = 15, min_launches: int = 20) -> float:
    """Median microseconds of one launch.

    The launches are captured in one CUDA graph, so that the host plays no part; they should work on different
    memory, several times the L2 cache in all, as a model's layers do. Each is run once before, to compile.

    Args:
        launches: called in turn, again and again until there are `min_launches`.
        repeats: replays of the graph.
        min_launches: at least so many launches per replay.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    rounds = -(-min_launches // len(launches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for launch in launches:
                launch()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) * 1e3 / (rounds * len(launches))


def copy_bandwidth(num_bytes: int = 4 * 2**30, repeats: int = 15) -> float:
    """Bytes per second of a device-to-device copy, read and written bytes together: the median of single copies.

    Not from a CUDA graph: there a copy is a node of its own, which ran at two thirds of the speed.
    """
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * num_bytes / (statistics.median(times[2:]) * 1e-3)


def matmul_flops(size: int = 8192) -> float:
    """Operations per second of a bf16 product of two square matrices of random values."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / (time_launches([lambda: torch.mm(a, b, out=out)], min_launches=4) * 1e-6)
