"""`kvarena report DIR [DIR ...]`: make a run's, sweep's or experiment's report again, or compare runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kvarena.reports.drawing.plain_text import write_any_text
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.names import MANIFEST_FILE, STUDY_FILE, SWEEP_FILE
from kvarena.reports.reading.options import Options
from kvarena.reports.reading.packages import missing_package


def main(arguments: Sequence[str] | None = None, find_commit: Callable[[Path], str] | None = None) -> int:
    """Run the command; returns the exit code. The last line of stdout is JSON, on a terminal a sentence.

    Args:
        arguments: the command line.
        find_commit: what `--commit` does with a folder, and the commit that it found; None: there is no such option.
    """
    write_any_text()
    parser = Options(prog="kvarena report", description=__doc__)
    parser.add_argument(
        "dirs", nargs="+", type=Path, metavar="DIR", help="a run or sweep folder; several runs: compare"
    )
    parser.add_argument("--out", type=Path, help="where a comparison goes (default: comparison/ beside the first run)")
    parser.add_argument(
        "--baseline", help="name or folder of the run that others are compared with (default: the first)"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="also write one run's steps as a Chrome trace")
    if find_commit is not None:
        said = "of runs of a copy without git, find the commit by the hash of their sources, and write it down"
        parser.add_argument("--commit", action="store_true", help=said)
    options = parser.parse_args(arguments)
    if find_commit is not None and options.commit:
        for folder in filter(Path.is_dir, options.dirs):
            print(f"{folder}: commit {find_commit(folder)}")
    try:
        report = make_report(options.dirs, options.out, options.baseline, options.trace)
    except (ReportError, ModuleNotFoundError) as error:
        reason = missing_package(error) if isinstance(error, ModuleNotFoundError) else str(error)
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; every file is as it was or made anew", file=sys.stderr)
        return 130
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    print(f"report: {report}" if on_terminal else json.dumps({"report": str(report)}))
    return 0


def make_report(
    dirs: Sequence[Path], out: Path | None = None, baseline: str | None = None, trace: Path | None = None
) -> Path:
    """Make the report of a run, a sweep, an experiment, or several runs; print its table; return where report.html is.

    Args:
        dirs: one run, sweep or experiment folder, or several run folders.
        out: where the comparison of several runs goes.
        baseline: the run that others are compared with.
        trace: where the Chrome trace of one run goes; None writes none.

    Raises:
        ReportError: a folder is no run, sweep or experiment, a file is broken, or an option does not fit.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        print("loading pandas, scipy and matplotlib ...", file=sys.stderr)
    # Here, for it takes a second or two, and on a slow disk many: what the command line gets wrong is told at once.
    from rich.console import Console

    from kvarena.reports.drawing.chrome_trace import write_chrome_trace
    from kvarena.reports.pages.comparison import compare, whole_cells, write_comparison
    from kvarena.reports.pages.run_report import write_run_report
    from kvarena.reports.pages.study import write_study_report
    from kvarena.reports.pages.study_claims import study_table
    from kvarena.reports.pages.terminal import comparison_table, run_table
    from kvarena.reports.reading.files import read_run

    console = Console()
    words = ["kvarena", "report", *map(str, dirs), *(["--out", str(out)] if out else [])]
    words += ["--baseline", baseline] if baseline else []
    first = dirs[0]
    if len(dirs) == 1 and (first / STUDY_FILE).exists():
        if out or baseline or trace:
            raise ReportError("--out, --baseline and --trace do not go with an experiment's folder; leave them out")
        console.print(study_table(write_study_report(first)))
        return first / "report.html"
    has_record = (first / SWEEP_FILE).exists()
    is_sweep = has_record or (not (first / MANIFEST_FILE).exists() and bool(whole_cells(first)))
    if len(dirs) == 1 and not is_sweep:
        if out or baseline:
            raise ReportError("--out and --baseline belong to comparisons; give two or more run folders")
        console.print(run_table(write_run_report(first)))
        if trace:
            write_chrome_trace(read_run(first), trace)
        return first / "report.html"
    if trace:
        raise ReportError("--trace belongs to one run; give one run folder")
    if len(dirs) == 1:
        summary = write_comparison(first, baseline, out, words if out or baseline or not has_record else None)
        place = out or first
    else:
        for folder in dirs:
            if (folder / SWEEP_FILE).exists() or (folder / STUDY_FILE).exists():
                kind = "a sweep" if (folder / SWEEP_FILE).exists() else "an experiment"
                raise ReportError(f"{folder} holds {kind}; give it alone, or runs of it by their own folders")
        place = out or first.resolve().parent / "comparison"
        if (place / SWEEP_FILE).exists():
            raise ReportError(f"{place} holds a sweep, whose report this would replace; choose another one")
        summary = compare([(_name(path, dirs), path) for path in dirs], place, baseline, commands=[words])
    console.print(comparison_table(summary))
    return place / "report.html"


def _name(path: Path, dirs: Sequence[Path]) -> str:
    """The folder's own name, or its whole path where that is not unique."""
    name = path.resolve().name
    return name if sum(other.resolve().name == name for other in dirs) == 1 else str(path)


if __name__ == "__main__":
    sys.exit(main())
