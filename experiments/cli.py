"""The `kvarena` command: `serve`, `bench` and `report`, thin fronts of the same config.

`kvarena serve MODEL --allocator paged` is `python run.py mode=serve model.path=MODEL allocator=paged`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kvarena.engine.errors import ConfigError, KvarenaError
from kvarena.experiments.settings.near import did_you_mean
from kvarena.reports.drawing.plain_text import write_any_text
from kvarena.reports.reading.packages import missing_package

USAGE = """usage: kvarena COMMAND ...

commands:
  serve MODEL [flags]     serve a model directory over the OpenAI API (kvarena serve --help)
  bench [key=value ...]   run one cell, or a sweep with -m: the same as python run.py
  report DIR [DIR ...]    make a run's or a sweep's report again from its files; several runs: compare them
                          --commit: of runs of a copy without git, find the commit by the hash of their sources
"""
COMMANDS = ("serve", "bench", "report")
USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    write_any_text(logs=args[:1] == ["serve"] and not {"-h", "--help"} & set(args))
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if args else USER_ERROR
    command, rest = args[0], args[1:]
    try:
        if command == "serve":
            return _serve(rest)
        if command == "bench":
            return _bench(rest)
        if command == "report":
            return _report(rest)
    except (KvarenaError, ModuleNotFoundError) as error:
        reason = missing_package(error) if isinstance(error, ModuleNotFoundError) else str(error)
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        return USER_ERROR
    print(f"error: unknown command {command!r}{did_you_mean(command, COMMANDS)}", file=sys.stderr)
    return USER_ERROR


def _serve(args: list[str]) -> int:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from kvarena.experiments.serving.flags import overrides_of, parse_flags
    from kvarena.experiments.serving.words import in_flags
    from kvarena.experiments.settings.compose import compose_cell
    from kvarena.experiments.settings.explain import explain

    overrides = overrides_of(parse_flags(args))
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


def _bench(args: list[str]) -> int:
    from kvarena.experiments.entry import main as hydra_main

    # Hydra reads the command line; there is no other way to hand it overrides and keep its job folder and sweeps.
    before = sys.argv
    sys.argv = [before[0], *args]
    try:
        return hydra_main()
    finally:
        sys.argv = before


def _report(args: list[str]) -> int:
    from kvarena.reports.__main__ import main as make_report

    if "--commit" in args:
        from kvarena.experiments.folders.commits import write_commit

        args = [arg for arg in args if arg != "--commit"]
        for folder in [Path(arg) for arg in args if Path(arg).is_dir()]:
            print(f"{folder}: commit {write_commit(folder)}")
    return make_report(args)


if __name__ == "__main__":
    sys.exit(main())
