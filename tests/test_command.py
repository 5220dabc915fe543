"""The `kvarena` command: its subcommands, what they list, and the help of every option."""

import ast
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import kvarena
from kvarena.experiments import listing
from kvarena.experiments.cli import COMMANDS, main
from kvarena.experiments.serving import flags
from kvarena.experiments.settings import conf_files, outside
from kvarena.experiments.settings.command_line import command_of
from kvarena.experiments.settings.compose import compose_cell, load_config
from kvarena.experiments.tools import TOOLS
from kvarena.reports.reading.packages import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    path: ast.parse(path.read_text()) for name in ("experiments", "reports") for path in (ROOT / name).rglob("*.py")
}
STARTED_BY_MODULE = {"experiments/serving/stub_engine.py", "reports/__main__.py"}


def said(capsys, *args, code=0):
    assert main(list(args)) == code
    out, err = capsys.readouterr()
    return err if code else out


def lines(page):
    """What stands behind each indented name of a page."""
    return dict(re.findall(r"^ +([\w.-]+) {2,}(\S.*)$", page, re.M))


def test_the_page_of_the_command(capsys):
    page = said(capsys, "--help")
    assert all(re.search(rf"^  {name} .*  \S", page, re.M) for name in COMMANDS)
    assert said(capsys, "--version") == f"kvarena {kvarena.__version__}\n"
    assert main([]) == 2


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["srve"], "did you mean serve?"), (["benchmark", "enginee"], "did you mean engine?"),
        (["check", "trace"], "did you mean traces?"), (["list", "scheduler", "alocators"], "did you mean allocators?"),
        (["run", "allocator=pagd", "--help"], "did you mean paged?"),
        (["run", "--help", "alocator.block_size=8"], "did you mean allocator?"),
        (["run", "--help", "foo=bar"], "unknown config key 'foo'"),
        (["serve", "--prot", "1"], "did you mean --port?"),
    ],
    ids=str,
)  # fmt: skip
def test_a_misspelt_name_is_one_line(args, meant, capsys):
    error = said(capsys, *args, code=2)
    assert error.startswith("error: ") and error.count("\n") == 1 and meant in error


@pytest.mark.parametrize("args", [["report", "--bseline", "x", "d"], ["check", "traces", "--see", "1"]], ids=str)
def test_a_misspelt_option_is_one_line(args, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(args)
    error = capsys.readouterr().err
    assert error.startswith(f"error: kvarena {args[0]}") and error.count("\n") == 1 and "did you mean --" in error


# ---- what there is to choose from


@pytest.mark.parametrize("group", conf_files.GROUPS)
def test_every_choice_says_in_its_first_line_what_it_is(group):
    said = conf_files.choices(group)
    assert said and len(set(said.values())) == len(said)
    for name, line in said.items():
        assert line.endswith((".", ")")) and len(line) < 120, f"{group}/{name}: {line}"


@pytest.mark.parametrize("group", ["allocator", "scheduler", "workload"])
def test_options_that_many_choices_have_stand_once_and_are_found(group):
    texts = [path.read_text() for path in (conf_files.CONF / group).glob("*.yaml")]
    written = Counter(line for text in texts for line in text.splitlines() if re.match(r"\w+: ", line))
    assert max(written.values()) < 5, written.most_common(1)
    with initialize_config_dir(str(conf_files.CONF), version_base="1.3"):
        composed = {
            name: OmegaConf.to_container(compose("config", [f"{group}={name}"])[group])
            for name in conf_files.choices(group)
        }
    for name, options in composed.items():
        found = conf_files.options(conf_files.CONF / group / f"{name}.yaml")
        assert found.keys() == options.keys(), name
        assert found == options or name == "mixture", name  # whose parts are other choices


def test_list_shows_every_choice_with_its_line(capsys):
    page = said(capsys, "list")
    found = lines(page)
    for group in conf_files.GROUPS:
        for name, line in conf_files.choices(group).items():
            assert f"  {name} " in page and (found[name] == line or line in page)
    assert "fair" in lines(said(capsys, "list", "schedulers")) and "paged" not in lines(
        said(capsys, "list", "scheduler")
    )


def test_list_shows_strategies_of_installed_packages(capsys, monkeypatch):
    class Point:
        value, dist = "theirs.strategies:Frugal", None

    monkeypatch.setattr(outside, "installed", lambda group: {"frugal": Point} if group == "allocator" else {})
    assert lines(said(capsys, "list", "allocators"))["frugal"] == "theirs.strategies:Frugal of an installed package."


def test_help_of_run_has_groups_settings_and_examples(capsys):
    page = said(capsys, "run", "allocator=radix", "--help")
    config = (conf_files.CONF / "config.yaml").read_text()
    for comment in re.findall(r"^\S.*(# .*)$", config.partition("\nmode:")[2].partition("\nhydra:")[0], re.M):
        assert comment in page
    assert "who owns which slots of the KV pool (default: paged)" in page
    assert set(conf_files.defaults()) >= {"allocator", "scheduler", "model", "runner", "workload", "arrival", "slo"}
    for group in conf_files.GROUPS:
        assert all(line in page for line in conf_files.choices(group).values())
    assert (conf_files.CONF / "allocator" / "radix.yaml").read_text().splitlines()[-1] in page
    assert "\n  swap_gib: 0 " in page and "@_here_" not in page  # of a base
    assert "sliding_window" not in page  # paged's own: not chosen


def test_help_of_run_takes_what_a_run_takes(capsys):
    page = said(capsys, "run", "-m", "scheduler=fair,sjf", "+experiment=capacity", "slo=null", "-h")
    for named in ("scheduler=fair sets, each as", "scheduler=sjf sets, each as", "experiment=capacity sets:\n"):
        assert named in page
    assert "theirs" not in said(capsys, "run", "hydra.searchpath=[pkg://theirs]", "allocator=theirs", "-h")


def examples():
    text = listing.PAGE.partition("examples:\n")[2].partition("\n\n")[0]
    return [shlex.split(line)[1:] for line in text.splitlines()]


def test_there_are_six_examples():
    assert len(examples()) == 6


def test_a_simulated_run_needs_no_other_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kvarena"])
    small = ["workload.num_requests=2", "report.pages=false", "report.progress=false", f"hydra.run.dir={tmp_path}/run"]
    said(capsys, "run", "runner=simulated", *small)
    assert load_config(["runner=simulated", "model=llama-3.1-8b-shape"]).engine.dtype == "bfloat16"
    assert load_config(["model=llama-3.1-8b-shape"]).engine.dtype == "float32"


@pytest.mark.parametrize("words", examples(), ids=" ".join)
def test_each_example_is_a_config(words):
    compose_cell([word.partition(",")[0] for word in words if word != "-m"])


# ---- options


def test_every_option_has_a_line_of_help():
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            name = getattr(node, "func", None)
            if isinstance(node, ast.Call) and getattr(name, "attr", getattr(name, "id", "")) in ("add_argument", "add"):
                is_option = node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
                if is_option and (len(node.args) > 1 or node.keywords):
                    assert any(keyword.arg == "help" for keyword in node.keywords), f"{path}:{node.lineno}"


def test_help_of_serve_says_the_defaults_of_the_config():
    cfg, served = (
        load_config(["allocator=paged_prefix", "scheduler=chunked"]),
        flags.overrides_of(flags.parse_flags([])),
    )
    keys = {
        "port": "server.port", "host": "server.host", "max_num_queued_requests": "server.max_num_queued_requests",
        "shutdown_timeout": "server.shutdown_timeout", "tool_call_parser": "server.tool_call_parser",
        "max_logprobs": "server.max_logprobs", "device": "engine.device", "seed": "engine.seed",
        "gpu_memory_utilization": "engine.gpu_memory_utilization", "max_num_seqs": "scheduler.max_num_seqs",
        "block_size": "allocator.block_size", "swap_space": "allocator.swap_gib",
    }  # fmt: skip
    actions = {action.dest: action.help for action in flags._parser()._actions}
    for name, key in keys.items():
        section, inner = key.split(".")
        assert f"(default: {cfg[section][inner]}" in actions[name], name
    for name in ("allocator", "scheduler"):
        default = re.search(r"default: (\w+)", actions[name])[1]
        assert f"{name}={default}" in served


def test_report_finds_commits_and_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("kvarena.experiments.folders.commits.write_commit", lambda folder: f"of {folder.name}")
    assert main(["report", "--commit", str(tmp_path)]) == 2  # no run: the report's own line
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}: commit of {tmp_path.name}\n" and err.count("\n") == 1
    with pytest.raises(SystemExit, match="0"):
        main(["report", "--help"])
    assert "--commit" in capsys.readouterr().out


# ---- tools


def test_every_tool_is_in_the_table_and_nothing_else_starts_by_itself():
    modules = {tool.module for tools in TOOLS.values() for tool in tools.values()}
    for path, tree in SOURCES.items():
        relative = path.relative_to(ROOT).as_posix()
        name = f"kvarena.{relative.removesuffix('.py').replace('/', '.')}"
        mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        if name in modules:
            [main_] = mains
            assert len(main_.args.args) == 1 and ast.unparse(main_.returns) == "int", name
            assert "tool_parser(__name__, __doc__)" in path.read_text(), name
            modules.remove(name)
        by_itself = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
        assert by_itself == (relative in STARTED_BY_MODULE), name
    assert not modules


@pytest.mark.parametrize("kind", TOOLS)
def test_tools_are_listed_with_a_line_each(kind, capsys):
    assert lines(said(capsys, kind, "--help")) == {name: tool.line for name, tool in TOOLS[kind].items()}


def test_a_tool_runs_under_its_name_with_dashes_too(capsys):
    for name in ("tool_texts", "tool-texts"):
        assert '"failures": 0' in said(capsys, "check", name, "--texts", "2", "--seed", "0")
    with pytest.raises(SystemExit, match="0"):
        main(["check", "tool_texts", "--help"])
    page = capsys.readouterr().out
    assert page.startswith("usage: kvarena check tool_texts ") and "of processor time (default: 60.0)" in page


def test_a_file_that_a_tool_cannot_read_is_one_line(capsys, tmp_path):
    error = said(capsys, "check", "verify", str(tmp_path / "no"), code=2)
    assert error.startswith("error: kvarena check verify: ") and error.count("\n") == 1
    assert f"{tmp_path / 'no' / 'manifest.json'} is missing; run the job again" in error


# ---- the extra of the server


@pytest.mark.parametrize(
    ("args", "package"),
    [*((["serve"], package) for package in EXTRAS["serve"]), (["run", "mode=serve"], "fastapi")],
    ids=str,
)
def test_without_the_extra_serve_is_one_line_that_names_it(args, package, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    if args[0] == "run":
        args = [*args, f"hydra.run.dir={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["kvarena"])
    error = said(capsys, *args, code=2)
    assert error.count("\n") == 1 and f"has no package {package}" in error and "install kvarena[serve]" in error


# ---- the command that a manifest names


@pytest.mark.parametrize(
    ("started", "words"),
    [
        ("/usr/bin/kvarena", ["kvarena", "run"]), ("/a/kvarena/__main__.py", ["python", "-m", "kvarena", "run"]),
        ("run.py", ["python", "run.py"]), ("/b/pytest/__main__.py", ["python", "run.py"]),
    ],
)  # fmt: skip
def test_a_manifest_names_the_command_that_was_typed(started, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started])
    hydra = OmegaConf.create({
        "runtime": {"config_sources": []}, "job": {"config_name": "config"}, "mode": "RUN",
        "overrides": {"task": ["allocator=paged"], "hydra": []},
    })  # fmt: skip
    assert command_of(hydra) == [*words, "allocator=paged"]


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_while_modules_are_imported_is_one_line(name, capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, name, COMMANDS[name]._replace(run=interrupted))
    assert main([name]) == 130
    assert capsys.readouterr().err == f"error: kvarena {name} was interrupted before it began\n"
