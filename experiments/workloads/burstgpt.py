"""BurstGPT traces: CSV of 6 columns (`BurstGPT_1`, `_2`) or 8 (`BurstGPT_3`), read by name.

`Timestamp` is in seconds, counted from the start of a day and not from the first row; `Response tokens` of 0 mark
failed requests. github.com/HPMLL/BurstGPT, arXiv 2401.17644.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvarena.experiments.workloads.parts.reading import CsvReader
from kvarena.experiments.workloads.parts.trace import TraceRow, TraceWorkload

_REQUIRED = ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type")
_OPTIONAL = ("Session ID", "Elapsed time")


class BurstGPTWorkload(TraceWorkload):
    """Lengths and times of a BurstGPT trace; prompts are drawn. Failed requests are dropped and counted.

    Args:
        model: only rows of this model (`ChatGPT`, `GPT-4`); None takes all.
        log_type: only rows of this log (`Conversation log`, `API log`); None takes all.
        options: see TraceWorkload.
    """

    name = "burstgpt"

    def __init__(self, *, model: str | None = None, log_type: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._wanted = {"Model": model, "Log Type": log_type}

    def _read(self) -> Iterator[TraceRow | str]:
        reader = CsvReader(self.path, _REQUIRED, _OPTIONAL)
        sessions = reader.has("Session ID")
        wanted = [(name, value) for name, value in self._wanted.items() if value is not None]
        for row in reader:
            time = reader.seconds(row, "Timestamp")
            prompt = reader.length(row, "Request tokens", 0)
            output = reader.length(row, "Response tokens", 0)
            other = next((name for name, value in wanted if reader.text(row, name) != value), None)
            if other is not None:
                yield f"rows of another {other}"
            elif output == 0:
                yield "failed requests (Response tokens 0)"
            elif prompt == 0:
                yield "rows with Request tokens 0"
            else:
                yield TraceRow(time, prompt, output, reader.text(row, "Session ID") if sessions else "")
