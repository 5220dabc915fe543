"""The `kvarena` command, and run.py: thin fronts of one config, and the tools.

`kvarena serve MODEL --allocator paged` is `python run.py mode=serve model.path=MODEL allocator=paged`. What a command
needs is imported when it runs: help comes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import kvarena
from kvarena.engine.errors import ConfigError, KvarenaError
from kvarena.experiments.settings.near import did_you_mean
from kvarena.reports.drawing.plain_text import write_any_text
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.packages import missing_package

USER_ERROR, INTERRUPTED = 2, 130
HELP = {"-h", "--help"}
USAGE = """\
usage: kvarena COMMAND ...

Compares KV-cache strategies for LLM inference on one engine, and serves the winner.

commands (kvarena COMMAND --help says more):
{commands}

options:
  -h, --help   this page
  --version    which version this is
"""


class Command(NamedTuple):
    """A subcommand: what follows it in its usage, its line, what runs it and gives the exit code."""

    usage: str
    line: str
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    name, rest = (args[0], args[1:]) if args else ("", [])
    write_any_text(logs=name == "serve" and not HELP & set(args))
    if not args or name in HELP:
        print(_usage(), end="")
        return 0 if args else USER_ERROR
    if name == "--version":
        print(f"kvarena {kvarena.__version__}")
        return 0
    try:
        if name not in COMMANDS:
            raise ConfigError(f"kvarena has no command {name}{did_you_mean(name, COMMANDS)}")
        return COMMANDS[name].run(rest)
    except (KvarenaError, ModuleNotFoundError) as error:
        reason = missing_package(error) if isinstance(error, ModuleNotFoundError) else str(error)
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:  # while modules are imported: what runs has a line of its own
        print(f"error: kvarena {name} was interrupted before it began", file=sys.stderr)
        return INTERRUPTED


def _usage() -> str:
    named = {f"{name} {command.usage}": command.line for name, command in COMMANDS.items()}
    width = max(map(len, named))
    return USAGE.format(commands="\n".join(f"  {name:{width}}  {line}" for name, line in named.items()))


def _run(args: list[str]) -> int:
    if HELP & set(args):
        from kvarena.experiments.listing import run_help

        program = "python run.py" if Path(sys.argv[0]).name == "run.py" else "kvarena run"
        print(run_help([arg for arg in args if arg not in HELP], program), end="")
        return 0
    from kvarena.experiments.entry import main as hydra_main

    # Hydra reads the command line; there is no other way to hand it overrides and keep its job folder and sweeps.
    before = sys.argv
    sys.argv = [before[0], *args]
    try:
        return hydra_main()
    finally:
        sys.argv = before


def _serve(args: list[str]) -> int:
    from kvarena.experiments.serving.flags import overrides_of, parse_flags
    from kvarena.experiments.settings.loading import need_extra

    overrides = overrides_of(parse_flags(args))
    need_extra("serve")
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from kvarena.experiments.serving.words import in_flags
    from kvarena.experiments.settings.compose import compose_cell
    from kvarena.experiments.settings.explain import explain

    try:
        config, choices = compose_cell(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(in_flags(explain(error, overrides) or str(error))) from error
    except KvarenaError as error:
        raise ConfigError(in_flags(str(error))) from error
    from kvarena.experiments.serving.serve import serve

    try:
        return serve(config, choices, in_flags)
    except KvarenaError as error:
        raise ConfigError(in_flags(str(error))) from error


def _report(args: list[str]) -> int:
    from kvarena.reports.__main__ import main as make_report

    return make_report(args, _find_commit)


def _find_commit(folder: Path) -> str:
    from kvarena.experiments.folders.commits import write_commit

    return write_commit(folder)


def _list(args: list[str]) -> int:
    from kvarena.experiments.listing import list_choices

    print(list_choices(args))
    return 0


def _describe(args: list[str]) -> int:
    from kvarena.experiments.workloads.describe import main as describe

    return describe(args)


def _tool(kind: str, args: list[str]) -> int:
    """Run a tool of experiments/tools.py; `args` begin with its name."""
    from kvarena.experiments.tools import TOOLS, page

    tools, name = TOOLS[kind], args[0].replace("-", "_") if args else ""
    if not args or args[0] in HELP:
        print(page(kind))
        return 0 if args else USER_ERROR
    if name not in tools:
        raise ConfigError(f"kvarena {kind} has no {args[0]}{did_you_mean(name, tools)}")
    try:
        return int(import_module(tools[name].module).main(args[1:]))
    except (ReportError, OSError) as error:
        raise ConfigError(f"kvarena {kind} {name}: {error}") from error
    except KeyboardInterrupt:
        print(f"error: kvarena {kind} {name} was interrupted", file=sys.stderr)
        return INTERRUPTED


COMMANDS = {
    "run": Command("[key=value ...]", "run one cell, a sweep (-m) or an experiment: the same as python run.py", _run),
    "bench": Command("[key=value ...]", "another name of run", _run),
    "serve": Command("[MODEL] [flags]", "serve a model directory over the OpenAI API", _serve),
    "report": Command("DIR [DIR ...]", "make the report of a run, sweep or experiment again, or compare runs", _report),
    "list": Command("[GROUP ...]", "show allocators, schedulers, workloads, experiments and more, a line each", _list),
    "describe": Command("FILE --format F", "show the statistics of a trace file", _describe),
    "benchmark": Command(
        "NAME ...", "measure the speed of the engine, its kernels, the host or the server",
        lambda args: _tool("benchmark", args),
    ),
    "check": Command(
        "NAME ...", "check results against references, and strategies and the server on random input",
        lambda args: _tool("check", args),
    ),
    "make": Command("NAME ...", "make model directories and recordings", lambda args: _tool("make", args)),
}  # fmt: skip
