"""The wheel, installed beside a user's own packages called as our folders are.

What is in it is looked at in `make test`; that it runs, in four interpreters of their own, in `make test-all`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("kvarena", "allocators", "schedulers", "routers", "engine", "experiments", "reports", "conf")
OWN = ("engine", "experiments", "conf", "reports")
SIMULATED = ("runner=simulated", "model=qwen3-0.6b-shape", "engine.dtype=bfloat16", "workload=fixed",
             "workload.num_requests=2", "report.progress=false")  # fmt: skip
SCRIPT = """
import engine, experiments, conf
assert engine.WHOSE == experiments.WHOSE == conf.WHOSE == "the user's"
import kvarena
from kvarena.allocators.paged import PagedAllocator
from experiments.mine import Mine

settings = {"runner": "simulated", "model": "qwen3-0.6b-shape", "engine": {"dtype": "bfloat16"}, "workload": "fixed"}
result = kvarena.run(Mine, folder="own", **settings | {"workload.num_requests": 2})
assert result.name == "Mine x continuous" and result.summary.num_finished == 2
bench = kvarena.load("bench")
assert bench.steps["decision_hash"].equals(result.steps["decision_hash"])
for one in (bench, result):
    assert "experiments/mine.py" in one.manifest["sources"]["strategy"], one.manifest["sources"]
assert (result.folder / "report.html").stat().st_size > 100_000
print(kvarena.__file__)
"""
GENERATE = """
from kvarena import LLM, SamplingParams
print([len(one.outputs[0].token_ids) for one in LLM().generate(["The", "A"], SamplingParams(max_tokens=3))])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel in an empty folder, built from a copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / part, folder / "tree" / part, symlinks=True, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / "tree" / file)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", ".", "./tree"], folder)
    [wheel] = folder.glob("*.whl")
    run([*pip, "install", "--no-deps", "--target", "site", wheel.name], folder)
    return folder / "site"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A user's folder with packages of its own."""
    folder = tmp_path_factory.mktemp("own")
    for name in OWN:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text('WHOSE = "the user\'s"\n')
    text = "from kvarena.allocators.paged import PagedAllocator\n\n\nclass Mine(PagedAllocator):\n    pass\n"
    (folder / "experiments" / "mine.py").write_text(text)
    return folder


def run(command: list[str], folder: Path, site: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {} if site is None else {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_wheel_brings_one_package(installed):
    names = {path.name for path in installed.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"kvarena", "bin"}
    files = {path.name for path in (installed / "kvarena").iterdir()}
    assert {*PARTS[1:], "py.typed", "running.py", "results.py", "llm.py"} <= files
    assert (installed / "kvarena" / "experiments" / "models" / "demo" / "config.json").is_file()
    version = run([sys.executable, "-c", "import kvarena; print(kvarena.__version__)"], installed, installed).strip()
    assert (installed / f"kvarena-{version}.dist-info").is_dir()


@pytest.mark.slow
def test_it_runs_beside_packages_of_the_same_names(installed, own):
    bench = [sys.executable, "-m", "kvarena", "run", *SIMULATED, "hydra.run.dir=bench", "report.pages=false"]
    assert '"num_finished": 2' in run([*bench, "allocator._target_=experiments.mine.Mine"], own, installed)
    (own / "script.py").write_text(SCRIPT)
    said = run([sys.executable, "script.py"], own, installed)
    assert Path(said.splitlines()[-1]).parent == installed / "kvarena"


@pytest.mark.slow
def test_it_generates_beside_packages_of_the_same_names(installed, own):
    (own / "generate.py").write_text(GENERATE)
    assert "[3, 3]" in run([sys.executable, "generate.py"], own, installed)
