"""Commands that the docs print: settings of run.py compose to a config, modules and their flags exist.

Nothing runs here: that a command does what its line says is seen by running it.
"""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from kvarena.experiments.cli import COMMANDS
from kvarena.experiments.serving import flags
from kvarena.experiments.settings.compose import compose_cell
from kvarena.experiments.tools import TOOLS

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
HISTORY = ("LOG.md",)  # commands of their time
OF_READERS = (
    "allocator=paged,mine",
    "scheduler=chunked,mine",
    "experiment=NAME",
)  # what a reader is to add, or to choose
SHELL = re.compile(r" (?:\||2?>) ?")  # what follows is other programs' or a file's
PROGRAM = re.compile(rf"((?:python (?:run\.py|-m [\w.]+)|kvarena (?:{'|'.join(COMMANDS)})\b)[^`\n|]*)")


def commands(start: str) -> list[str]:
    """Every printed command that begins with `start`, continued lines joined."""
    found = []
    for page in PAGES:
        if page.name not in HISTORY:
            text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
            found += [SHELL.split(line)[0] for line in PROGRAM.findall(text) if line.startswith(start)]
    return list(dict.fromkeys(found))


RUN_COMMANDS = [line for line in commands("python run.py") if not any(of in line for of in OF_READERS)]
MODULE_COMMANDS = commands("python -m ")
OWN_COMMANDS = commands("kvarena ")
OF_SERVE = {name for action in flags._parser()._actions for name in action.option_strings}


def cell_overrides(command: str) -> list[str]:
    """The first cell's overrides of a printed command."""
    words = [word for word in shlex.split(command.split(";", maxsplit=1)[0], comments=True)[2:] if word != "..."]
    options = [word for word in words if not word.startswith("-")]
    if "--cfg" in words:
        options.remove("job")
    parsed = OverridesParser.create().parse_overrides(options)
    return [
        f"{of.get_key_element()}={next(of.sweep_string_iterator())}" if of.is_sweep_override() else text
        for of, text in zip(parsed, options, strict=True)
    ]


def test_there_are_commands():
    assert len(RUN_COMMANDS) > 12 and len(OWN_COMMANDS) > 30 and MODULE_COMMANDS


@pytest.mark.parametrize("command", RUN_COMMANDS)
def test_settings_of_a_printed_command_exist(command):
    compose_cell(cell_overrides(command))


@pytest.mark.parametrize("command", MODULE_COMMANDS)
def test_modules_and_flags_of_a_printed_command_exist(command):
    words = words_of(command)
    spec = importlib.util.find_spec(words[2])
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin)
    if source.name == "__init__.py":
        source = source.with_name("__main__.py")
    if source.is_relative_to(ROOT):  # else pytest and its like
        assert_flags_exist(words[3:], source)


@pytest.mark.parametrize("command", OWN_COMMANDS)
def test_tools_and_flags_of_a_printed_command_exist(command):
    _, name, *rest = words_of(command)
    if name in TOOLS:
        if rest and rest[0].islower():  # NAME is the reader's
            source = importlib.util.find_spec(TOOLS[name][rest[0]].module).origin
            assert_flags_exist(rest[1:], Path(source))
    elif name == "serve":
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= OF_SERVE
    elif name == "report":
        assert_flags_exist(rest, ROOT / "reports/__main__.py")
    elif name == "describe":
        assert_flags_exist(rest, ROOT / "experiments/workloads/describe.py")


def words_of(command: str) -> list[str]:
    """A shell's words, up to the end of the command; brackets are around what may be left out."""
    return [word.strip("[]()") for word in shlex.split(re.split(r"[;&]", command)[0], comments=True)]


def assert_flags_exist(words: list[str], source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    own = words[: words.index("--")] if "--" in words else words
    for flag in (word.split("=")[0] for word in own if word.startswith("--")):
        assert f'"{flag}"' in text, f"{source.name} knows no {flag}"


def test_a_setting_that_is_gone_is_noticed():
    with pytest.raises(Exception, match="no_such_key"):
        compose_cell(cell_overrides("python run.py -m allocator=paged,contiguous no_such_key=1  # comment"))
