"""Shows what is in a trace file: a table of its statistics, and as its last line the same as JSON.

kvarena describe FILE --format azure
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from kvarena.experiments.workloads.azure import AzureTraceWorkload
from kvarena.experiments.workloads.bailian import BailianWorkload
from kvarena.experiments.workloads.burstgpt import BurstGPTWorkload
from kvarena.experiments.workloads.mooncake import MooncakeWorkload
from kvarena.experiments.workloads.parts.base import Workload
from kvarena.experiments.workloads.sharegpt_json import ShareGPTJsonWorkload
from kvarena.experiments.workloads.statistics import table_statistics
from kvarena.experiments.workloads.vidur import VidurWorkload
from kvarena.reports.reading.options import Options

FORMATS: dict[str, Callable[..., Workload]] = {
    "azure": AzureTraceWorkload,
    "bailian": BailianWorkload,
    "burstgpt": BurstGPTWorkload,
    "mooncake": MooncakeWorkload,
    "sharegpt": ShareGPTJsonWorkload,
    "vidur": VidurWorkload,
}
# Lengths and times do not depend on the vocabulary; the bound only has to admit any tokenizer's ids.
_VOCAB_SIZE = 1 << 20


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = Options(prog="kvarena describe", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="a trace; .gz is decompressed")
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="whose trace it is")
    parser.add_argument("--tokenizer", help="tokenizer.json or its folder (format sharegpt)")
    parser.add_argument("--num-requests", type=int, help="rows to take from the start (default: all)")
    args = parser.parse_args(argv)
    facts = describe_file(args.file, args.format, args.tokenizer, args.num_requests)
    print("\n".join(format_statistics(facts)))
    print(json.dumps(facts))
    return 0


def describe_file(
    path: str, file_format: str, tokenizer: str | None = None, num_requests: int | None = None
) -> dict[str, Any]:
    """Statistics of a trace file (see `table_statistics`), with `file`, `format` and, with hash ids, `blocks`.

    Raises:
        KvarenaError: the file is malformed, or the format needs a tokenizer.
    """
    options: dict[str, Any] = {"path": path, "num_requests": num_requests, "seed": 0, "vocab_size": _VOCAB_SIZE}
    if file_format == "sharegpt":
        options["tokenizer"] = tokenizer
    workload = FORMATS[file_format](**options)
    facts = {"file": path, "format": file_format} | table_statistics(workload.table)
    if isinstance(workload, MooncakeWorkload):
        hits, total = workload.block_hits()
        facts["blocks"] = {"num_blocks": total, "infinite_cache_hit_rate": hits / total}
    return facts


def format_statistics(facts: dict[str, Any]) -> list[str]:
    """The statistics as lines of text."""
    lines = [f"{facts['file']} ({facts['format']}): {facts['num_requests']} requests"]
    columns = list(facts["prompt_len"])
    lines.append(f"{'tokens':<12}" + "".join(f"{name:>10}" for name in columns))
    for key, label in (("prompt_len", "prompt"), ("output_len", "output")):
        lines.append(f"{label:<12}" + "".join(f"{_number(facts[key][name]):>10}" for name in columns))
    times = facts.get("times")
    if times is not None:
        dispersion = "-" if times["dispersion"] is None else _number(times["dispersion"])
        lines.append(
            f"times: span {times['span']:.1f} s, rate {times['rate']:.3f} requests/s, interval CV "
            f"{times['interval_cv']:.2f}, dispersion of 1-s counts {dispersion}, {times['num_distinct']} distinct, "
            f"at most {times['max_at_once']} at once"
        )
    blocks = facts.get("blocks")
    if blocks is not None:
        rate = blocks["infinite_cache_hit_rate"]
        lines.append(f"blocks: {blocks['num_blocks']}, hit rate of a cache without end {rate:.1%}")
    return lines + [f"note: {note}" for note in facts.get("notes", [])]


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}"
