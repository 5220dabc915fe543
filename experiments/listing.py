"""What there is to choose from: `kvarena list`, and the page of `kvarena run --help`, both made from conf's files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from kvarena.engine.errors import ConfigError
from kvarena.experiments.settings import conf_files
from kvarena.experiments.settings.conf_files import CONF, GROUPS
from kvarena.experiments.settings.near import did_you_mean
from kvarena.reports.reading.options import Options

PAGE = """\
usage: {program} [key=value ...] [-m] [--cfg job]

Runs requests through a KV-cache strategy, an allocator crossed with a scheduler, and writes a run folder with what was
measured and a report. Without settings: paged x continuous on the embedded model, on a CPU. `group=choice` takes one of
the choices below, `key=value` changes a setting; with -m values separated by commas make a sweep and its comparison.

options:
  -h, --help       this page; beside group=choice, what can be set of that choice, too: {program} allocator=radix --help
  -m, --multirun   run every combination of the values given, and compare them (default: one run)
  --cfg job        print the config that the settings make, and run nothing
  --resolve        beside --cfg: with references replaced by what they refer to
  --hydra-help     the flags of Hydra, which reads this command line

examples:
  {program} allocator=contiguous scheduler=static workload.num_requests=20
  {program} -m allocator=contiguous,paged scheduler=static,continuous report.baseline=contiguous-static
  {program} runner=simulated runner.profile=h200 workload=lognormal arrival=poisson arrival.rate=8
  {program} model.path=DIR allocator=paged_prefix scheduler=chunked slo=chat
  {program} experiment=seed_claims
  {program} mode=serve model.path=DIR server.port=8000

groups (group=choice):
{groups}
settings (key=value), with their defaults:
{settings}
"""


def run_help(args: Sequence[str], program: str) -> str:
    """The page of `run --help`, and the options of the choices that the command line names.

    Raises:
        ConfigError: a choice that its group has not, or a setting of a section that there is not.
    """
    default = conf_files.defaults()
    _check_sections(args)
    groups = ""
    for group, line in GROUPS.items():
        usual = f" (default: {default[group]})" if group in default else ""
        groups += f"  {group}: {line}{usual}\n{_table(_known(group), '    ')}\n"
    named = "".join(f"\n{_chosen(group, name)}" for group, name in _named(args))
    settings = "\n".join(f"  {line}".rstrip() for line in conf_files.settings().splitlines())
    return PAGE.format(program=program, groups=groups, settings=settings) + named


def _check_sections(args: Sequence[str]) -> None:
    sections = re.findall(r"^(\w+):", conf_files.settings(), re.M)
    known = sorted({*GROUPS, *conf_files.defaults(), *sections, "hydra", "study"})  # the last of an experiment
    for arg in args:
        found = re.match(r"[+~]*(\w+)[\w./@-]*=", arg)
        if found is not None and found[1] not in known:
            raise ConfigError(f"unknown config key {found[1]!r}{did_you_mean(found[1], known)}")


def list_choices(args: Sequence[str]) -> str:
    """The page of `kvarena list GROUP ...`: all groups where none is named.

    Raises:
        ConfigError: a group that there is not.
    """
    parser = Options(prog="kvarena list", description="Show the choices of config groups, a line each.")
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help=f"some of them (default: all): {', '.join(map(_many, GROUPS))}"
    )
    wanted = [
        next((one for one in GROUPS if name in (one, _many(one))), name) for name in parser.parse_args(args).groups
    ]
    for name in wanted:
        if name not in GROUPS:
            raise ConfigError(f"kvarena list: there is no group {name}{did_you_mean(name, map(_many, GROUPS))}")
    pages = []
    for group in wanted or GROUPS:
        typed = "" if group == "profile" else f" ({group}=NAME)"
        pages.append(f"{_many(group)}: {GROUPS[group]}{typed}\n{_table(_known(group), '  ')}")
    return "\n\n".join(pages)


def _many(group: str) -> str:
    return {"slo": "slos", "tracking": "tracking"}.get(group, f"{group}s")


def _known(group: str) -> dict[str, str]:
    """The choices of a group, those of installed packages among them."""
    from kvarena.experiments.settings.outside import GROUPS as OPEN
    from kvarena.experiments.settings.outside import installed

    found = conf_files.choices(group)
    theirs = installed(group) if group in OPEN else {}
    for name, point in theirs.items():
        package = point.dist.name if point.dist else "an installed package"
        found[name] = f"{point.value} of {package}."
    return found


def _table(lines: dict[str, str], margin: str) -> str:
    width = max(map(len, lines), default=0)
    return "\n".join(f"{margin}{name:{width}}  {line}" for name, line in lines.items())


def _named(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The choices that a command line names, group and name; those of a search path of the user's are left out."""
    elsewhere = any("hydra.searchpath=" in arg or arg.startswith(("--config-dir", "-cd")) for arg in args)
    for override in args:
        group, _, names = override.lstrip("+").partition("=")
        for name in names.split(",") if group in GROUPS and group != "profile" else ():
            known = _known(group)
            if name in known:
                yield group, name
            elif name not in ("", "null") and not elsewhere:
                raise ConfigError(f"{group}={name}: there is no such choice{did_you_mean(name, known)}")


def _chosen(group: str, name: str) -> str:
    """What the file of a choice sets."""
    path = CONF / group / f"{name}.yaml"
    if not path.exists():
        return f"{group}={name}: {_known(group)[name]}\n"
    *bases, own = [part.read_text(encoding="utf-8") for part in conf_files.with_bases(path)]
    lines = "".join([own, *bases]).splitlines()
    text = "".join(f"  {line}\n" for line in lines if not re.match(r"defaults:|  - ", line))
    typed = "" if group == "experiment" else f", each as {group}.KEY=VALUE"  # whose keys are those of the whole config
    return f"{group}={name} sets{typed}:\n{text}"
