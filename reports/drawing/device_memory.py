"""What a run held of its GPU's memory, by part; the parts add up to the peak (docs/gpu.md, Memory)."""

from __future__ import annotations

from typing import Any

from kvarena.reports.drawing.document import Table
from kvarena.reports.drawing.format import DASH, percent, size_bytes

PARTS = {
    "weights_bytes": ("weights", "parameters and buffers of the model, each once"),
    "pool_bytes": ("KV pool", "of which the ledger above says what is in it"),
    "image_cache_bytes": ("image cache", "encoded tiles of images, kept for other requests and steps"),
    "activations_bytes": ("activations", "the most that steps held at once beside the rest, those in a graph left out"),
    "graphs_bytes": ("CUDA graphs", "their own pool: the activations of captured steps"),
    "workspace_bytes": ("workspace", "what the runner keeps: tables, logits, plans of the kernels"),
    "context_bytes": ("CUDA context", "in use before the model was loaded; other processes on this GPU count as well"),
    "other_bytes": ("other", "the rest: kept by torch without use, kernels' code, the driver's part of graphs"),
}


def device_memory_table(summary: dict[str, Any]) -> Table:
    """The parts and their sum.

    Args:
        summary: of a run with a GPU (`peak_gpu_bytes` is not null).
    """
    memory, peak = summary["memory"], summary["peak_gpu_bytes"]
    rows = [
        [label, size_bytes(memory[key]), percent(memory[key] / peak), meaning]
        for key, (label, meaning) in PARTS.items()
        if memory.get(key) or key != "image_cache_bytes"  # of models that read images alone
    ]
    rows.append(["peak", size_bytes(peak), percent(1.0), "of the device, the sum of the above"])
    return Table(["GPU memory", "bytes", "share", "meaning"], rows, text_columns=frozenset({3}))


def device_memory_line(summary: dict[str, Any]) -> str:
    """The largest parts in a few words; a dash where there is no GPU."""
    if not summary["peak_gpu_bytes"]:
        return DASH
    memory = summary["memory"]
    parts = sorted((key for key in PARTS if key in memory), key=lambda key: -memory[key])[:3]
    return ", ".join(f"{PARTS[key][0]} {size_bytes(memory[key])}" for key in parts)
