"""Checks a run's tokens against transformers' own `generate`.

    kvarena check verify RUN_DIR [RUN_DIR ...]

Greedy runs in fp32 of a local model directory, and runs of beams. The reference is computed once, in left-padded
batches (of beams prompt by prompt), for the first run's requests; all runs must hold the same requests. Prints one JSON
line per run; exit code 1 when tokens differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvarena.engine.checkpoints.directory import resolve_directory
from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.correctness.reference import beam_texts, generate_static, load_reference
from kvarena.experiments.tools import tool_parser
from kvarena.reports.reading.files import read_json, read_table
from kvarena.reports.reading.names import MANIFEST_FILE, REQUESTS_FILE
from kvarena.reports.reading.shapes import MANIFEST

COLUMNS = ("request_id", "prompt_token_ids", "output_token_ids", "max_tokens", "finish_reason")


def main(argv: Sequence[str]) -> int:
    """Compare and print; returns the exit code."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("run_dirs", nargs="+", type=Path, help="run folders with the same requests")
    parser.add_argument("--batch-size", type=int, default=16, help="of the padded reference batches")
    parser.add_argument("--num-requests", type=int, default=None, help="only the first so many")
    args = parser.parse_args(argv)
    return _verify(args.run_dirs, args.batch_size, args.num_requests)


def _verify(run_dirs: list[Path], batch_size: int, limit: int | None) -> int:
    manifest = read_json(run_dirs[0] / MANIFEST_FILE, MANIFEST)
    config, recording = manifest["config"], manifest.get("recording") or {}
    if config["sampling"]["temperature"] != 0 or manifest["model"]["dtype"] != "float32":
        raise ConfigError(f"{run_dirs[0]} is not a greedy fp32 run; only those have a reference")
    if recording.get("content") == "hashes":
        raise ConfigError(f"{run_dirs[0]} holds hashes in place of tokens; record with --record-content tokens")
    if recording.get("num_not_greedy"):
        raise ConfigError(
            f"{run_dirs[0]}: {recording['num_not_greedy']} of its {manifest['workload']['num_requests']} requests were "
            "sampled, or held to something; only greedy ones have a reference (temperature 0)"
        )
    if config["model"]["path"] is None:
        raise ConfigError(f"{run_dirs[0]} ran a bare shape; there is no checkpoint to compare with")
    sampling = config["sampling"]
    width = sampling.get("beams", 0)
    rows = _rows(run_dirs[0], limit and limit * max(1, width), any_end=bool(width))
    requests = [
        Request(row["request_id"], row["prompt_token_ids"], SamplingParams(max_tokens=row["max_tokens"]))
        for row in rows
    ]
    module = load_reference(str(resolve_directory(config["model"]["path"])))
    if width:
        # Of each prompt all beams, the best one first.
        outputs = [text for req in requests[::width] for text in beam_texts(module, req, sampling)]
    else:
        outputs = generate_static(module, requests, batch_size)
    expected = dict(zip((req.request_id for req in requests), outputs, strict=True))
    differing = 0
    for run_dir in run_dirs:
        of_run = _rows(run_dir, limit and limit * max(1, width), any_end=bool(width))
        found = {row["request_id"]: row["output_token_ids"] for row in of_run}
        if found.keys() != expected.keys():
            raise ConfigError(f"{run_dir} holds other requests than {run_dirs[0]}")
        wrong = [name for name, tokens in expected.items() if found[name] != tokens]
        differing += len(wrong)
        tokens = sum(map(len, expected.values()))
        line = {"run": str(run_dir), "requests": len(expected), "output_tokens": tokens, "differing": wrong}
        print(json.dumps(line), flush=True)
    return 1 if differing else 0


def _rows(run_dir: Path, limit: int | None, *, any_end: bool) -> list[dict[str, Any]]:
    """The finished requests of a run, in order of submission; `any_end`: those that a stop token ended, too."""
    ends = ("length", "stop") if any_end else ("length",)
    rows = read_table(run_dir / REQUESTS_FILE, COLUMNS).to_pylist()
    return [row for row in rows if row["finish_reason"] in ends][:limit]
