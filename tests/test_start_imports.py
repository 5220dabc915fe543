"""What a start must not import before it is over: seconds of a user's time, on a machine with a slow disk many."""

import subprocess
import sys

import pytest
from test_import_rule import ROOT

WEB = {"fastapi", "starlette", "uvicorn", "pydantic", "httpcore", "opentelemetry"}
REPORTS = {"pandas", "pyarrow", "matplotlib", "jinja2", "rich"}
SUPERVISOR = "import experiments.cli, experiments.serving.flags, experiments.serving.serve"
ENGINE = """
from omegaconf import OmegaConf
from experiments.compose import load_config
from experiments.serving.flags import overrides_of, parse_flags
from experiments.serving.serve import build_served_engine
build_served_engine(OmegaConf.to_container(load_config(overrides_of(parse_flags(["models/demo"]))), resolve=True))
"""


def imported_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after `code`."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        pytest.param(SUPERVISOR, WEB | REPORTS | {"torch", "transformers", "llguidance"}, id="supervisor"),
        # transformers brings along httpcore, jinja2 and rich.
        pytest.param(ENGINE, (WEB | REPORTS) - {"httpcore", "jinja2", "rich"}, id="the server's engine"),
    ],
)
def test_a_process_that_starts_leaves_alone_what_others_need(code, unwanted):
    assert not imported_by(code) & unwanted
