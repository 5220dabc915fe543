"""Vidur traces: CSV with `num_prefill_tokens,num_decode_tokens`, and `arrived_at` in seconds where there are times.

github.com/microsoft/vidur. Other columns may be there and are not read.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvarena.experiments.workloads.parts.reading import CsvReader
from kvarena.experiments.workloads.parts.trace import TraceRow, TraceWorkload


class VidurWorkload(TraceWorkload):
    """Lengths and times of a Vidur trace; prompts are drawn."""

    name = "vidur"

    def _read(self) -> Iterator[TraceRow | str]:
        reader = CsvReader(self.path, ("num_prefill_tokens", "num_decode_tokens"), allow_extra=True)
        timed = reader.has("arrived_at")
        for row in reader:
            time = reader.seconds(row, "arrived_at") if timed else None
            prompt = reader.length(row, "num_prefill_tokens", 1)
            yield TraceRow(time, prompt, reader.length(row, "num_decode_tokens", 1))
