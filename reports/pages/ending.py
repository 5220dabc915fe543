"""How a command ends: one line of JSON of at most 2 kB as the last of stdout; on a terminal a sentence with the same.

Both say where the files are, what failed, what is not defined, and the figures that are asked for most, under the names
that summary.json has for them. summary.json has all the others.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from kvarena.reports.drawing.format import count, rate, seconds

MOST_BYTES = 2000  # of the JSON line, its end included
MOST_TEXT = 160  # characters of a name, an error or a headline in it
PERCENTILES = {
    "ttft_seconds": ("p50", "p99"), "tpot_seconds": ("p50", "p99"), "itl_seconds": ("p99",), "e2e_seconds": ("p50",),
}  # fmt: skip
RUN_FIGURES = ("num_requests", "num_finished", "num_rejected", "num_failed", "num_preemptions", "duration_seconds",
               "output_tokens_per_second", "peak_rss_bytes", "valid")  # fmt: skip
STUDY_FIGURES = (
    "num_claims", "num_judged", "num_holding", "num_differing", "num_not_decided", "num_not_comparable", "num_checks",
    "num_passing", "num_failing", "num_checks_not_decided", "num_checks_not_comparable", "simulated",
)  # fmt: skip
LISTS = ("failed", "not_defined", "unserved")  # of a sweep's cells
WORDS = {"failed": "failed", "not_defined": "not defined", "unserved": "served nothing"}


@dataclass(frozen=True)
class Ending:
    """What is said last.

    Attributes:
        place: `run_dir`, `sweep_dir` or `study_dir`, and the folder.
        report: report.html; None where there is none.
        summary: what summary.json holds; None where there is none.
        figures: numbers by their names.
        said: the same for a person, without the paths.
        left_out: of a sweep: name and error of the cells that `failed`, `not_defined` and `unserved`.
        more: what the JSON has besides where it fits, and the full one always.
    """

    place: tuple[str, Path]
    report: Path | None
    summary: Mapping[str, Any] | None
    figures: Mapping[str, Any]
    said: str
    left_out: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """All of it; `summary` is summary.json's path."""
        key, folder = self.place
        return {
            key: str(folder),
            "report": None if self.report is None else str(self.report),
            "summary": None if self.summary is None else str(folder / "summary.json"),
            **{name: [dict(one) for one in self.left_out.get(name, ())] for name in ("failed", "not_defined")},
            **({"unserved": [dict(one) for one in self.left_out["unserved"]]} if "unserved" in self.left_out else {}),
            **self.figures,
        }

    def line(self, *, full: bool = False) -> str:
        """One line of JSON, in ASCII, of at most MOST_BYTES with its end.

        Names, errors and headlines are cut, then lists (`num_failed_cells` and its like still say how many there are),
        then figures; paths never: a folder whose path alone takes as much makes a longer line.

        Args:
            full: nothing is cut, and `summary` is what summary.json holds.
        """
        result = self.as_json()
        if full:
            return _dump({**result, **self.more, "summary": self.summary})
        lists = [name for name in LISTS if result.get(name)]
        result |= {name: [{key: _cut(value) for key, value in one.items()} for one in result[name]] for name in lists}
        figures = [name for name in self.figures if name in result]
        result |= {name: _cut(result[name]) for name in figures}
        if len(_dump({**result, **self.more})) < MOST_BYTES:  # whole or not at all
            result |= self.more
        while len(_dump(result)) >= MOST_BYTES:
            longest = max(lists, key=lambda name: len(_dump(result[name])), default=None)
            if longest is not None and result[longest]:
                result[longest].pop()
            elif figures:
                del result[figures.pop()]
            else:
                break
        return _dump(result)

    def sentence(self) -> str:
        """The same for a person: what came out, what is missing, and where it all is."""
        parts = [self.said]
        for name in LISTS:
            if cells := self.left_out.get(name):
                names = ", ".join(str(one.get("name")) for one in cells[:3])
                more = f" and {len(cells) - 3} more" if len(cells) > 3 else ""
                parts.append(f"{len(cells)} {WORDS[name]} ({names}{more})")
        folder = self.place[1]
        where = f"report: {self.report}" if self.report is not None else f"files: {folder}"
        if self.summary is not None:
            where += f"; all figures: {folder / 'summary.json'}"
        return f"{'; '.join(parts)}. {where}"


def print_ending(ending: Ending, *, full: bool = False, file: TextIO | None = None) -> None:
    """Print the last line of stdout: the sentence on a terminal, else the JSON.

    Args:
        full: JSON without a limit, on a terminal too.
        file: where to, in place of stdout.
    """
    stream = sys.stdout if file is None else file
    on_terminal = stream is not None and stream.isatty()
    print(ending.sentence() if on_terminal and not full else ending.line(full=full), file=stream, flush=True)


def run_ending(run_dir: Path, summary: Mapping[str, Any]) -> Ending:
    """Of a run, whose folder holds report.html where pages were asked for."""
    figures = {"name": summary["name"]} | {name: summary.get(name) for name in RUN_FIGURES}
    for name, keys in PERCENTILES.items():
        figures |= {f"{name}_{key}": (summary.get(name) or {}).get(key) for key in keys}
    if slo := (summary.get("slo") or {}).get("whole_run"):
        figures |= {f"slo_{name}": slo[name] for name in ("attainment", "met")}
    figures["num_notices"] = len(summary["notices"])
    said = (
        f"{summary['name']}: {count(summary['num_finished'])} of {count(summary['num_requests'])} requests, "
        f"{count(summary['num_rejected'])} rejected, {count(summary['num_failed'])} failed, "
        f"{rate(summary['output_tokens_per_second'])} output tokens/s"
    )
    ttft = (summary.get("ttft_seconds") or {}).get("p50")
    if ttft is not None:
        said += f", first token after {seconds(ttft)} (median)"
    return Ending(("run_dir", run_dir), _page(run_dir), summary, figures, said)


def sweep_ending(
    folder: Path,
    summary: Mapping[str, Any] | None,
    left_out: Mapping[str, Sequence[Mapping[str, Any]]],
    runs: Sequence[str] = (),
) -> Ending:
    """Of a sweep.

    Args:
        folder: where the comparison is.
        summary: of the comparison; None where there was nothing to compare.
        left_out: name and error of the cells that `failed`, are `not_defined`, and were `unserved`.
        runs: the cells' folders.
    """
    more = {"runs": list(runs)}
    figures: dict[str, Any] = {f"num_{name}_cells": len(cells) for name, cells in left_out.items()}
    if summary is None:
        return Ending(("sweep_dir", folder), None, None, figures, "No cell to compare", left_out, more)
    cells = [cell for cell in summary["cells"] if cell["output_tokens_per_second"]]
    figures = {"num_cells": len(summary["cells"]), "num_runs": len(summary["runs"])} | figures
    figures["baseline"] = summary["baseline"]
    base = next((cell for cell in summary["cells"] if cell["label"] == summary["baseline"]), None)
    figures["baseline_output_tokens_per_second"] = base and base["output_tokens_per_second"]
    said = f"{count(len(summary['cells']))} cells in {count(len(summary['runs']))} runs"
    if cells:
        best = max(cells, key=lambda cell: cell["output_tokens_per_second"])
        shown = summary.get("fastest") or {}
        figures |= {
            "highest_output_tokens_per_second": best["output_tokens_per_second"],
            "highest": best["label"],
            "highest_ratio": best["output_tokens_per_second_ratio"],
            "highest_verdict": shown.get("verdict"),
        }
        said += f", most output tokens/s: {best['label']} with {rate(best['output_tokens_per_second'])}"
        first = [cell for cell in cells if cell["ttft_seconds"]["p50"] is not None]
        if first:
            soonest = min(first, key=lambda cell: cell["ttft_seconds"]["p50"])
            figures |= {"lowest_ttft_seconds_p50": soonest["ttft_seconds"]["p50"], "lowest_ttft": soonest["label"]}
    figures |= {
        "same_tokens": summary["same_tokens"]["verdict"],
        "num_failed_requests": sum(run["num_failed"] for run in summary["runs"]),
        "num_notices": len(summary["notices"]),
    }
    return Ending(("sweep_dir", folder), _page(folder), summary, figures, said, left_out, more)


def study_ending(study_dir: Path, summary: Mapping[str, Any]) -> Ending:
    """Of an experiment: how many claims are judged, hold, and are not comparable, each by itself."""
    figures = {"experiment": summary["experiment"], "headline": summary["headline"]}
    figures |= {name: summary.get(name) for name in STUDY_FIGURES} | {"num_cells": len(summary["cells"])}
    said = (
        f"{count(summary['num_claims'])} claims: {count(summary['num_judged'])} judged, "
        f"{count(summary['num_holding'])} hold, {count(summary['num_not_comparable'])} not comparable; "
        f"{count(summary['num_passing'])} of {count(summary['num_checks'])} checks pass"
    )
    return Ending(("study_dir", study_dir), _page(study_dir), summary, figures, said)


def _page(folder: Path) -> Path | None:
    page = folder / "report.html"
    return page if page.exists() else None


def _cut(value: Any) -> Any:
    return value if not isinstance(value, str) or len(value) <= MOST_TEXT else f"{value[: MOST_TEXT - 3]}..."


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, which JSON can carry."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _dump(value: Any) -> str:
    return json.dumps(_finite(value), default=str)
