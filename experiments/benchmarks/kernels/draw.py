"""The draw of a step's tokens on a GPU, as a decode step's graphs hold it. JSON lines.

    kvarena benchmark draw
    kvarena benchmark draw --rows 32 --sampling top_k=20,top_p=0.95

Every line: microseconds of a replay, in the median, the 90th percentile and the longest of 40 draws with random bits of
their own, of so many rows of random logits: `model`, normal of deviation 2.5; `flat`, of 0.02, where the kept tokens
are most of all. `plain` is temperature 0.6 alone, whose pass the others begin with too; `half` has every other row
plain. The last line is a JSON object with the medians that each filter adds to the plain step's.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.draw import Draw
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.experiments.benchmarks.engine import PLAIN, sampling_of
from kvarena.experiments.gpu.timing import require_cuda
from kvarena.experiments.tools import tool_parser

ROWS = (1, 32, 256, 512)
VOCABULARY = 151_936
SAMPLINGS = (PLAIN, "top_p=0.9", "top_k=20,top_p=0.95", "min_p=0.05", "top_p=0.5", "top_k=5000,top_p=0.9")
DEVIATIONS = {"model": 2.5, "flat": 0.02}
DRAWS = 40

Line = dict[str, Any]


def params_of(count: int, fields: dict[str, Any], turn: int, vocab_size: int, *, half: bool) -> Tensor:
    """What the draw of `count` rows needs, with random bits of the `turn`."""
    requests = [
        Request(
            f"{turn}-{i}", [0], SamplingParams(**({"temperature": 0.6} | ({} if half and i % 2 else fields)))
        )
        for i in range(count)
    ]  # fmt: skip
    rows = RequestRows(vocab_size, "cpu", engine_seed=turn, num_rows=count)
    at = rows.of(requests)
    return torch.from_numpy(rows.draw_params(at, np.full(count, 1 + turn)))


def draw_line(
    count: int, name: str, fields: dict[str, Any], logits: Tensor, *, half: bool = False, dtype: str = "bf16"
) -> Line:
    """Times one setting."""
    vocab_size = logits.shape[1]
    turns = [params_of(count, fields, turn, vocab_size, half=half) for turn in range(DRAWS)]
    params = turns[0].cuda()
    last = torch.zeros(count + 1, dtype=torch.int64, device="cuda")
    draw = Draw(count, torch.device("cuda"))

    def launch() -> None:
        draw.begin(logits, params, last)
        if fields:
            draw.end(logits, params, last)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    times = []
    for turn in turns:
        params.copy_(turn)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    times = sorted(times[2:])
    return {
        "kernel": "draw", "rows": count, "vocabulary": vocab_size, "dtype": dtype,
        "sampling": name + " half" * half, "us": round(statistics.median(times), 1),
        "p90_us": round(times[int(0.9 * len(times))], 1), "longest_us": round(times[-1], 1),
    }  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Measure every setting."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--rows", type=int, action="append", help=f"rows of a step; {', '.join(map(str, ROWS))}")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="entries of a row")
    parser.add_argument("--sampling", type=sampling_of, action="append", metavar="NAME=NUMBER,...", help="of all rows")
    args = parser.parse_args(argv)
    if args.vocabulary < 2 or min(args.rows or ROWS) < 1:
        parser.error("--rows must be at least 1 and --vocabulary at least 2")
    require_cuda()
    device = torch.cuda.get_device_name()
    print(json.dumps({"device": device, "torch": torch.__version__}), flush=True)
    samplings = dict([sampling_of(PLAIN), *(args.sampling or map(sampling_of, SAMPLINGS))])
    added: dict[str, float] = {}
    for count in args.rows or ROWS:
        for kind, deviation in DEVIATIONS.items():
            logits = (deviation * torch.randn(count, args.vocabulary, device="cuda")).bfloat16()
            plain = 0.0
            for name, fields in samplings.items():
                line = draw_line(count, name, fields, logits) | {"logits": kind}
                print(json.dumps(line), flush=True)
                if fields:
                    added[f"{count} rows, {kind}, {name}"] = round(line["us"] - plain, 1)
                else:
                    plain = line["us"]
            if not args.sampling:
                name, fields = sampling_of(SAMPLINGS[1])
                print(json.dumps(draw_line(count, name, fields, logits, half=True) | {"logits": kind}), flush=True)
        edited = logits.float()
        print(json.dumps(draw_line(count, name, fields, edited, dtype="fp32") | {"logits": kind}), flush=True)
    print(json.dumps({"added_us": added}))
    return 0
