"""`import kvarena`: fast, with every name that it promises."""

import subprocess
import sys
from pathlib import Path

import kvarena

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "hydra", "omegaconf", "pandas", "numpy", "pyarrow", "pydantic", "fastapi"}


def test_the_import_loads_nothing_heavy():
    code = "import sys, kvarena; print(kvarena.__version__, *{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    version, *modules = run.stdout.split()
    assert version == kvarena.__version__ and not HEAVY & set(modules)


def test_every_name_is_there():
    assert {"run", "sweep", "load", "LLM", "SamplingParams", "Result", "Comparison"} <= set(kvarena.__all__)
    assert all(getattr(kvarena, name) is not None for name in kvarena.__all__)
    assert set(kvarena.__all__) <= set(dir(kvarena)) and not hasattr(kvarena, "no_such_name")
