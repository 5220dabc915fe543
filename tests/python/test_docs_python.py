"""docs/python.md, the README and the notebook, as they are written."""

import json
import re
from pathlib import Path

import pytest

import kvarena

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "python.md").read_text(encoding="utf-8")
NOTEBOOK = DOCS / "strategy_of_your_own.ipynb"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_runs_as_written(capsys):
    scope: dict = {"__name__": "__main__"}
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), scope)
    assert len(BLOCKS) == 5
    said = capsys.readouterr().out
    assert "paged x continuous served 4 of 4 requests" in said and "The engine keeps" in said


def test_the_readme_runs_as_written(capsys):
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "openai" not in block]
    scope: dict = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert len(blocks) == 2 and scope["result"].summary.num_finished == 4
    assert "tpot" in capsys.readouterr().out


def test_the_page_names_everything_that_there_is():
    for name in kvarena.__all__:
        assert name in PAGE or name in ("__version__", "CompletionOutput", "RequestOutput"), name
    for kind in (kvarena.Result, kvarena.Comparison, kvarena.Experiment):
        public = [name for name in vars(kind) if not name.startswith("_")]
        assert all(f".{name}`" in PAGE or f"`.{name}" in PAGE for name in public), public


def test_no_paragraph_is_a_table_in_disguise():
    cells = [cell for line in PAGE.splitlines() if line.startswith("|") for cell in line.split("|")]
    paragraphs = [line for line in PAGE.splitlines() if not line.startswith("|")]
    assert max(map(len, cells + paragraphs)) <= 400


def test_the_notebook_s_code_runs(monkeypatch):
    """In this process and without its pictures; in a kernel of its own, with them, in `make test-all`."""
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    scope: dict = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        code = "".join(line for line in cell["source"] if not line.startswith("%"))
        exec(compile(code, NOTEBOOK.name, "exec"), scope)
    assert "Frugal × continuous" in list(scope["comparison"].cells["label"])


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))  # of the kernel
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": "."}}).execute()
    kinds = [kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())]
    assert "text/html" in kinds and "image/png" in kinds
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", ()))


def test_the_notebook_is_kept_without_output():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
