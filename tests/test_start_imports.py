"""What a start must not import before it is over: seconds of a user's time, on a machine with a slow disk many."""

import functools
import subprocess
import sys

import pytest
from test_import_rule import ROOT

WEB = {"fastapi", "starlette", "uvicorn", "pydantic", "httpcore", "opentelemetry"}
REPORTS = {"pandas", "pyarrow", "matplotlib", "jinja2", "rich"}
HELP = """
import contextlib, io, sys
import kvarena.experiments.cli, kvarena.experiments.entry
for argv in (["--help"], ["serve", "--help"], ["report", "--help"], ["run", "--help"], ["list"]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        kvarena.experiments.cli.main(argv)
"""
FIRST_HELP = """
import contextlib, io
from kvarena.experiments.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    main(["--help"]), main(["--version"]), main(["benchmark", "--help"])
"""
SUPERVISOR = "import kvarena.experiments.cli, kvarena.experiments.serving.flags, kvarena.experiments.serving.serve"
ENGINE = """
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.serving.flags import overrides_of, parse_flags
from kvarena.experiments.serving.serve import build_served_engine
build_served_engine(load_run(overrides_of(parse_flags(["models/demo"]))), {})
"""
FIRST_TOKEN = """
from kvarena.experiments.benchmarks.first_token import first_token
first_token("tiny", 8192, ["engine.device=cpu"])
"""
# Collections of everything, by the number of modules at that time.
COLLECTIONS = """
import gc, sys
collections = []
gc.callbacks.append(lambda phase, info: info["generation"] == 2 and collections.append(len(sys.modules)))
"""


@functools.cache
def imports_of(code: str) -> tuple[list[int], set[str]]:
    """Of a fresh interpreter: the number of its modules at each collection and at the end; its top-level packages."""
    code = f"{COLLECTIONS}{code}\nprint(*collections, len(sys.modules))"
    code += "\nprint(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *_, counts, names = run.stdout.splitlines()
    return [int(count) for count in counts.split()], set(names.split())


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        pytest.param(
            FIRST_HELP, WEB | REPORTS | {"torch", "numpy", "hydra", "omegaconf", "yaml"}, id="help of the command"
        ),
        pytest.param(HELP, WEB | REPORTS | {"torch", "transformers", "scipy", "numpy"}, id="help"),
        pytest.param(SUPERVISOR, WEB | REPORTS | {"torch", "transformers", "llguidance"}, id="supervisor"),
        # transformers brings along httpcore, jinja2 and rich.
        pytest.param(ENGINE, (WEB | REPORTS) - {"httpcore", "jinja2", "rich"}, id="the server's engine"),
        pytest.param(
            FIRST_TOKEN,
            (WEB | REPORTS) - {"httpcore", "jinja2", "rich"},
            id="the benchmark's engine",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_process_that_starts_leaves_alone_what_others_need(code, unwanted):
    assert not imports_of(code)[1] & unwanted


@pytest.mark.parametrize(
    "code", [ENGINE, pytest.param(FIRST_TOKEN, marks=pytest.mark.slow)], ids=["server", "benchmark"]
)
def test_imports_are_not_looked_through_for_garbage(code):
    """All of it was, again and again: a fifth of the time that they took."""
    *collections, num_modules = imports_of(code)[0]
    assert not [at for at in collections if 700 < at < 0.9 * num_modules], collections
