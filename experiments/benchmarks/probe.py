"""How noisy the probe is that stands before and after every measured run (experiments/recording/contention.py).

    kvarena benchmark probe --device cpu --tries 20

The last line is JSON: the standard deviation of the probes over their mean, and that of a cell's geometric mean of two.
On a quiet machine this is the difference between two cells below which "the machine changed" is the probe's own noise.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

from kvarena.experiments.recording.contention import run_probe
from kvarena.experiments.tools import tool_parser


def main(argv: Sequence[str]) -> int:
    """Run the probe several times and print how far apart its answers are."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what is probed")
    parser.add_argument("--tries", type=int, default=20, help="at least 2; each takes 1.3 s")
    options = parser.parse_args(argv)
    if options.tries < 2:
        parser.error("--tries must be at least 2")
    probes = [run_probe(options.device == "cuda") for _ in range(options.tries)]
    speeds = [probe.speed for probe in probes]
    noise = statistics.stdev(speeds) / statistics.mean(speeds)
    for probe in probes:
        print(f"{probe.speed:10.0f} work/s, slices {100 * probe.spread:.1f} % apart")
    print(json.dumps({
        "device": options.device, "tries": options.tries, "mean": statistics.mean(speeds), "noise": noise,
        "noise_of_two": noise / 2**0.5, "largest_change": max(speeds) / min(speeds) - 1,
        "spread": statistics.median(probe.spread for probe in probes),
    }))  # fmt: skip
    return 0
