"""An engine is built in one place: nobody else puts together a model, a pool, a runner and a step loop."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kvarena", "engine", "allocators", "schedulers", "routers", "experiments", "reports")
# What an engine is made of, and the modules that make one.
MAKERS = {
    # The stub server has neither a config nor a model, and starts without either.
    "Engine": {"experiments/settings/strategies.py", "experiments/serving/stub_engine.py"},
    "load_model": {"experiments/building/loading.py"},
    "FusedRunner": {"experiments/building/runners.py"},
    "TorchRunner": {"experiments/building/runners.py"},
    "TritonBackend": {"experiments/building/runners.py"},
    # Also of a loaded model's checks, of one kernel's benchmark, and a second pool beside the engine's.
    "KVPool": {
        "experiments/building/pools.py",
        "engine/fusions/check.py",
        "engine/models/probe.py",
        "experiments/benchmarks/engine_checks.py",
        "experiments/benchmarks/kernels/shared_reads.py",
        "experiments/benchmarks/kernels/swaps.py",
    },
    "VirtualKVPool": {"experiments/building/pools.py"},
    # Also its own twin, which a warm-up times.
    "SimulatedRunner": {
        "experiments/building/simulated.py",
        "experiments/simulation/rerun.py",
        "experiments/simulation/runner.py",
    },
    "build_simulated_engine": {"experiments/building/build.py"},
}


def calls(path: Path) -> set[str]:
    """Names that a module calls, those of a class's methods too (`KVPool.of_model`)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            function = node.func.value if isinstance(node.func, ast.Attribute) else node.func
            if isinstance(function, ast.Name):
                found.add(function.id)
    return found


@pytest.fixture(scope="module")
def called() -> dict[str, set[str]]:
    files = {path.resolve() for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    return {path.relative_to(ROOT).as_posix(): calls(path) for path in sorted(files)}


@pytest.mark.parametrize("name", MAKERS)
def test_only_the_builder_makes(name, called):
    assert {module for module, names in called.items() if name in names} == MAKERS[name]


def test_whoever_runs_an_engine_has_it_from_the_builder(called):
    """Runs, the server, benchmarks and checks; `kvarena.LLM` has the server's."""
    assert {module for module, names in called.items() if names & {"build_engine", "build"}} == {
        "experiments/benchmarks/cpu.py",
        "experiments/benchmarks/images.py",
        "experiments/building/build.py",
        "experiments/building/replicas.py",
        "experiments/correctness/drawn_beams.py",
        "experiments/correctness/model_classes.py",
        "experiments/gpu/engines.py",
        "experiments/jobs/engine_job.py",
        "experiments/serving/serve.py",
    }
    assert "build_served_engine" in called["kvarena/llm.py"]
