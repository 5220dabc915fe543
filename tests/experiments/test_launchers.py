"""A sweep's cells on cores, through submitit and on a real local Ray: the same cells, the same report."""

import os
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm

from kvarena.engine.errors import ConfigError
from kvarena.experiments.folders.sources import code_hash
from kvarena.experiments.sweeps.ray_cells import _check_node, _connect, _gather, _Sweep, run_cells

ROOT = Path(__file__).resolve().parents[2]
# The last block size is refused.
SWEEP = [
    "-m", "allocator=contiguous", "allocator.block_size=16,32,0", "runner=simulated", "runner.profile=h100",
    "engine.dtype=bfloat16", "workload=uniform", "workload.num_requests=20", "kv_cache.num_slots=6000",
    "report.progress=false", "report.pages=false",
]  # fmt: skip


def sweep(out: Path, launcher: str, *more: str) -> subprocess.CompletedProcess:
    command = [str(ROOT / "run.py"), *SWEEP, f"hydra.sweep.dir={out}", f"hydra/launcher={launcher}", *more]
    return warm.run(command, ROOT)


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    out = tmp_path_factory.mktemp("basic")
    done = sweep(out, "basic")
    assert done.returncode == 2
    return out, done


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(("joblib", "hydra.launcher.n_jobs=1"), marks=pytest.mark.slow),  # in this process
        pytest.param(("joblib", "hydra.launcher.n_jobs=2"), marks=pytest.mark.slow),
        pytest.param(("submitit_local",), marks=pytest.mark.slow),
        pytest.param(("ray",), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_every_launcher_gives_the_same_report_and_the_same_errors(launcher, one_by_one, tmp_path):
    out, expected = one_by_one
    done = sweep(tmp_path, *launcher)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [line for line in expected.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    texts = [(folder / "report.md").read_text().replace(str(folder), "DIR") for folder in (tmp_path, out)]
    texts = [re.sub(r" hydra(/|\.)launcher\S*", "", text) for text in texts]  # in the command that made it
    assert texts[0] == texts[1]
    assert not list(tmp_path.glob(".ray-*"))


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_a_cell_whose_worker_dies_is_an_error_of_its_own(cluster, tmp_path):
    @cluster.remote(max_retries=0)
    def task(index, overrides, sweep):
        if index == 5:
            os._exit(1)
        return overrides

    progress = SimpleNamespace(report=SimpleNamespace(progress=False))
    state = SimpleNamespace(config=progress, folder=str(tmp_path))
    jobs = [["a=1", "hydra.sweep.subdir=x"], ["a=2", "hydra.sweep.subdir=y"], ["a=3", "hydra.sweep.subdir=z"]]
    returns = _gather(cluster, task.remote, state, jobs, 4)
    assert returns[0] == jobs[0]
    assert returns[2] == jobs[2]
    left = returns[1].return_value
    assert left["folder"] == str(tmp_path / "y")
    assert left["error"].startswith("its Ray worker ended: ")
    assert "\n" not in left["error"]


def test_ray_takes_no_signal_from_the_sweep():
    """Its head's processes end a driver at SIGTERM with code 1, and cells that ran are lost."""
    ours = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, ours)
    taken = []
    ray = SimpleNamespace(init=lambda **_: taken.append(signal.signal(signal.SIGTERM, lambda *_: None)))
    try:
        _connect(ray, "local")
        assert taken == [ours] and signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_node_must_see_the_folder_and_have_the_same_code(tmp_path):
    def node(witness, code):
        return _Sweep(None, None, None, {}, "/", str(tmp_path), str(witness), code)

    there = tmp_path / "witness"
    there.touch()
    _check_node(node(there, code_hash()))
    with pytest.raises(ConfigError, match=r"does not see the sweep's folder .*hydra\.sweep\.dir"):
        _check_node(node(tmp_path / "nowhere", code_hash()))
    with pytest.raises(ConfigError, match="has other code of kvarena than the driver"):
        _check_node(node(there, "other"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("local", 0, 0), r"num_cpus=0 must be a finite number above 0"),
        (("local", 1, -1), r"num_gpus=-1 must be a finite number of at least 0"),
        (("127.0.0.1:9", 1, 0), r"address=127.0.0.1:9: no Ray cluster answers there \(.*refused\); start one"),
        (("nonsense", 1, 0), r"no Ray cluster answers there \(Invalid address format: nonsense\)"),
        pytest.param(  # starts Ray
            ("local", 1, 99), r"no node of the Ray cluster has 1 CPUs and 99 GPUs for a cell", marks=pytest.mark.slow
        ),
    ],
)
def test_what_ray_cannot_do_is_one_line(options, message, tmp_path):
    config = SimpleNamespace(hydra=SimpleNamespace(sweep=SimpleNamespace(dir=str(tmp_path))))
    with pytest.raises(ConfigError, match=message):
        address, num_cpus, num_gpus = options
        run_cells(address, {"num_cpus": num_cpus, "num_gpus": num_gpus}, (config, None, None), [["a=1"]], 0)
    assert not list(tmp_path.iterdir())


def test_slurm_where_there_is_none_is_one_line(tmp_path):
    done = sweep(tmp_path, "submitit_slurm")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        'error: hydra/launcher: Could not detect "srun", are you indeed on a slurm cluster?'
    ]
