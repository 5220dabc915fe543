"""Azure LLM inference traces: 2023 and 2024 (three columns), and 2025 multimodal (four).

Header `TIMESTAMP,ContextTokens,GeneratedTokens`, or with `NumImages`; times like `2023-11-16 18:17:03.9799600` with up
to 9 fractional digits (the files have 7) and perhaps an offset from UTC (2024). github.com/Azure/AzurePublicDataset.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Any

from kvarena.engine.checks import check_bool, check_int
from kvarena.experiments.workloads.parts.limits import MAX_LENGTH
from kvarena.experiments.workloads.parts.reading import CsvReader, length_problem
from kvarena.experiments.workloads.parts.trace import TraceRow, TraceWorkload

_TIME = re.compile(r"(\d{4}-\d{2}-\d{2}[ T]\d{2}:\d{2}:\d{2})(?:\.(\d{1,9}))?(Z|[+-]\d{2}:\d{2})?", re.ASCII)
_TIME_FORM = "YYYY-MM-DD HH:MM:SS.fffffff"
_FIRST_DAY = datetime.datetime.min.replace(tzinfo=datetime.UTC)


def parse_time(text: str) -> int | None:
    """A time stamp in exact nanoseconds, or None when it is not one. A time without an offset is UTC."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    moment, fraction, offset = match.groups()
    try:
        time = datetime.datetime.fromisoformat(moment + (offset or "Z"))
    except ValueError:
        return None
    return (time - _FIRST_DAY) // datetime.timedelta(seconds=1) * 10**9 + int((fraction or "").ljust(9, "0"))


class AzureTraceWorkload(TraceWorkload):
    """Lengths and times of an Azure trace; prompts are drawn, since the traces hold no text.

    Args:
        tokens_per_image: added to the prompt for each image of a multimodal trace (0: ContextTokens has them already).
        drop_zero: leave out rows with a length of 0 and count them, instead of refusing the file.
        options: see TraceWorkload.
    """

    name = "azure_trace"
    ticks_per_second = 10**9

    def __init__(self, *, tokens_per_image: int = 0, drop_zero: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._tokens_per_image = check_int("workload.tokens_per_image", tokens_per_image, 0, MAX_LENGTH)
        self._drop_zero = check_bool("workload.drop_zero", drop_zero)

    def _read(self) -> Iterator[TraceRow | str]:
        reader = CsvReader(self.path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), ("NumImages",))
        images = reader.has("NumImages")
        least = 0 if self._drop_zero else 1
        for row in reader:
            stamp = reader.text(row, "TIMESTAMP")
            time = parse_time(stamp)
            if time is None:
                reader.bad("TIMESTAMP", f"{stamp[:40]!a} is not a time of the form {_TIME_FORM}")
            prompt = reader.length(row, "ContextTokens", least)
            output = reader.length(row, "GeneratedTokens", least)
            if images:
                num_images = reader.length(row, "NumImages", 0)
                prompt += num_images * self._tokens_per_image
                problem = length_problem(prompt, 0)
                if problem:
                    reader.bad("NumImages", f"with workload.tokens_per_image the prompt's length {problem}")
            if prompt == 0 or output == 0:
                yield "rows with a length of 0"
            else:
                yield TraceRow(time, prompt, output)
