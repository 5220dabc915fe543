"""`import kvarena`: fast, with every name that it promises."""

import re
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


def test_nothing_below_imports_the_door():
    """The package's own modules stand above the folders: nothing in these may need them."""
    door = {path.stem for path in (ROOT / "kvarena").glob("*.py")} - {"__init__", "__main__"}
    assert {"running", "results", "llm", "texts"} <= door
    pattern = re.compile(rf"from kvarena(?:\.| import )(?:{'|'.join(door)})\b|import kvarena\.(?:{'|'.join(door)})\b")
    folders = ("engine", "allocators", "schedulers", "routers", "experiments", "reports")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200 and not [path for path in files if pattern.search(path.read_text())]
