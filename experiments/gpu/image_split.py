"""What requests take of the device for tower, prompts and decodes, and of the host for launches."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch

from kvarena.engine.vision.encoder import ImageEncoder


class Split:
    """Times an engine's steps while it is entered, by events in stream order on a GPU; waits for the device at the end.

    A step's time is that from the first of its launches to the last on the device, so pauses in which the device waits
    for the host are in it; how long the host took for its launches stands beside.

    Args:
        runner: whose `execute` launches steps.
        images: whose `inputs` runs the tower; only in steps with images.
    """

    def __init__(self, runner: Any, images: ImageEncoder) -> None:
        self._runner, self._images = runner, images
        self._on_gpu = torch.cuda.is_available()
        self._spans: dict[str, list[tuple[Any, Any]]] = {"tower": [], "prompt": [], "decode": []}
        self._launching = 0.0

    def __enter__(self) -> Split:
        execute, inputs = self._runner.execute, self._images.inputs

        def timed_execute(plan: Any, allocator: Any) -> Any:
            kind = "decode" if plan.num_decodes == len(plan.scheduled) else "prompt"
            began, first = time.perf_counter(), self._mark()
            step = execute(plan, allocator)
            self._spans[kind].append((first, self._mark()))
            self._launching += time.perf_counter() - began
            return step

        def timed_inputs(plan: Any, input_ids: Any) -> Any:
            first = self._mark()
            rows = inputs(plan, input_ids)
            self._spans["tower"].append((first, self._mark()))
            return rows

        # Of the objects, beside their classes' methods, which come back when these are taken away.
        vars(self._runner)["execute"], vars(self._images)["inputs"] = timed_execute, timed_inputs
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._runner.execute, self._images.inputs
        if self._on_gpu:
            torch.cuda.synchronize()

    def per_request(self, num_requests: int) -> dict[str, float]:
        """Milliseconds a request: of the device for `tower`, `prompt` and `decode`, of the host for `launch`; steps."""
        totals = {name: sum(self._between(*span) for span in spans) for name, spans in self._spans.items()}
        totals["prompt"] -= totals["tower"]  # which ran inside
        line = {f"{name}_ms": round(1e3 * total / num_requests, 2) for name, total in totals.items()}
        line["launch_ms"] = round(1e3 * self._launching / num_requests, 2)
        return line | {f"{name}_steps": len(self._spans[name]) for name in ("prompt", "decode")}

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, last: Any) -> float:
        """Seconds."""
        return float(first.elapsed_time(last)) / 1e3 if self._on_gpu else float(last - first)
