"""Bad input to run.py gets one line on stderr that says what to change, a non-zero exit code and no stack trace."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from kvarena.experiments.entry import main
from kvarena.experiments.settings.explain import explain

ROOT = Path(__file__).resolve().parents[2]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """run.py's main in this process, which saves the imports of one process per case."""

    def call(*args: str) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # main sets it; put it back afterwards
        probe = [] if any("driver.probe" in arg for arg in args) else ["driver.probe=false"]
        monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py"), *args, "report.progress=false", *probe])
        code = main()
        return Done(code, *capfd.readouterr())

    return call


def broken_checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "broken"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama", ')
    return directory


SMALL = ["workload=fixed", "workload.num_requests=4", "workload.prompt_len=8", "workload.output_len=4",
         "driver.warmup=false", "report.pages=false", "report.kv_map=false"]  # fmt: skip
CASES = {
    "unknown key": (["allocator.blok_size=8"], "allocator.block_size"),
    "unknown section": (["nonsense=1"], "nonsense"),
    "unknown strategy": (["allocator=nonsense"], "Available options in 'allocator'"),
    "a misspelt strategy": (["allocator=pagd"], "allocator=pagd: there is no such choice; did you mean paged?"),
    "a misspelt strategy of a sweep": (["-m", "scheduler=fair,Statik"], "did you mean static?"),
    "a misspelt experiment": (["experiment=paper_fgi2"], "did you mean paper_fig2"),
    "an experiment with a plus": (["+experiment=paper_fig2"], "type experiment=paper_fig2, without the +"),
    "a strategy with a plus": (["+allocator=radix"], "type allocator=radix, without the +"),
    "objectives with a plus": (["+slo=chat"], "type slo=chat, without the +"),
    "a misspelt launcher": (
        ["-m", "hydra/launcher=jobblib"],
        "hydra/launcher=jobblib: there is no such choice; did you",
    ),
    "a directory as a choice": (["model=/tmp"], "a directory is given as model.path=/tmp"),
    "a misspelt group": (["alocator=paged"], "did you mean allocator?"),
    "a misspelt key of an experiment": (["experiment=paper_fig2", "study.sedds=[1]"], "did you mean study.seeds"),
    "a key without its section": (["seed=3"], "did you mean engine.seed or workload.seed?"),
    "a misspelt key of another choice": (
        ["allocator.placemnt=buddy"],
        "allocator.placement (of allocator=contiguous)?",
    ),
    "a misspelt key of Hydra's": (["hydra.run.dirr=x"], "did you mean hydra.run.dir"),
    "a new section": (["+nonsense=1"], "unknown config key 'nonsense'"),
    "a new key of the model": (["+model.pth=x"], "unknown config key 'model.pth'; did you mean path?"),
    "a new key of the server": (["+server.prt=1"], "unknown config key 'server.prt'; did you mean port?"),
    "a new key of a section": (["+engine.dtyp=x"], "unknown key 'dtyp' of section 'engine'; did you mean dtype?"),
    "a new key of a strategy": (["+allocator.block_sise=8"], "no setting 'block_sise'; did you mean block_size"),
    "a key that is taken out": (["~engine.dtype"], "engine.dtype is needed: leave ~engine.dtype out"),
    "a key without a value": (["allocator.block_size"], "settings are key=value, such as allocator.block_size=..."),
    "a class that is not there": (["allocator._target_=nowhere.Mine"], "_target_=nowhere.Mine cannot be loaded"),
    "neither short nor full": (["report.json=all"], "report.json=all must be one of short, full"),
    "not a number": (["engine.max_model_len=long"], "engine.max_model_len"),
    "unknown mode": (["mode=nonsense"], "run or serve"),
    "a sweep of servers": (["-m", "mode=serve"], "leave -m out"),
    "negative": (["scheduler.max_num_seqs=-1"], "max_num_seqs"),
    "missing model": (["model.path=/nowhere/at/all"], "/nowhere/at/all"),
    "pool too small": (["kv_cache.num_slots=3"], "kv_cache.num_slots"),
    "memory too small": (["kv_cache.memory_gib=0.0000001"], "kv_cache.memory_gib"),
    "two sizes": (["kv_cache.num_blocks=4", "kv_cache.memory_gib=1"], "give one of them"),
    "missing trace": (["workload=azure_trace", "workload.path=/nowhere.csv"], "/nowhere.csv"),
    "a baseline of nothing": (
        ["report.baseline=nope"],
        "report.baseline=nope names a cell of a sweep, and this is none",
    ),
    "a baseline of a study": (["experiment=paper_fig2", "report.baseline=nope"], "report.baseline=nope names a cell"),
    "zero requests": (["workload.num_requests=0"], "num_requests"),
    "a port that is none": (["target=http://localhost:abc"], "target=http://localhost:abc is no address"),
    "a port too large": (["target=http://localhost:99999"], "give one from 1 to 65535"),
    "an address cut off": (["target='http://[::1'"], "target=http://[::1 is no address"),
    "a pool without end": (["kv_cache.num_slots=inf"], "kv_cache.num_slots=inf must be"),
    "a pool beyond 64 bits": (["kv_cache.num_slots=99999999999999999999999"], "must be at most 281474976710656"),
    "a pool of all memory": (["kv_cache.num_slots=99999999999"], "were free; lower kv_cache.num_slots"),
    "memory without end": (["kv_cache.memory_gib=inf"], "kv_cache.memory_gib=inf must be a finite number"),
    "more memory than there is": (["kv_cache.memory_gib=1e300"], "must be at most 1073741824"),
    "blocks of null": (["allocator.block_size=null"], "allocator.block_size=None must be an integer"),
    "blocks of text": (["allocator.block_size=abc"], "allocator.block_size=abc must be an integer"),
    "sequences without end": (["scheduler.max_num_seqs=inf"], "scheduler.max_num_seqs=inf must be a finite number"),
    "no number of sequences": (["scheduler.max_num_seqs=null"], "scheduler.max_num_seqs=None must be an integer"),
    "a budget of text": (["scheduler.max_num_batched_tokens=x"], "max_num_batched_tokens=x must be an integer"),
    "a limit without end": (["slo.ttft=inf"], "slo.ttft=inf must be a finite number"),
    "a limit of text, of a target": (["target=http://127.0.0.1:9", "slo.ttft=abc"], "slo.ttft=abc must be above 0"),
    "too much attained, of a target": (
        ["target=http://127.0.0.1:9", "slo.attainment=2"],
        "slo.attainment=2 must be in",
    ),
    "no rule, of a target": (["target=http://127.0.0.1:9", "slo.rule=most"], "slo.rule=most must be one of"),
    "no pool, of a target": (["target=http://127.0.0.1:9", "kv_cache.num_slots=abc"], "kv_cache.num_slots=abc must be"),
    "no layout, of a target": (["target=http://127.0.0.1:9", "runner.layout=x"], "runner.layout=x must be one of"),
    "a limit of text, of a study": (["experiment=capacity", "slo.ttft=abc"], "slo.ttft=abc must be above 0"),
    "no limit, of a study": (
        ["experiment=capacity", "slo.ttft=null", "slo.tpot=null", "slo.e2e=null"],
        "experiment=capacity needs a limit",
    ),
    "another runner's setting": (
        ["runner=simulated", "runner.attention=triton"],
        "'runner.attention'; it is a setting of runner=torch: choose one of these",
    ),
    "another allocator's setting": (["allocator.placement=buddy"], "a setting of allocator=contiguous"),
    "an arrival's setting": (["arrival.rate=4"], "'arrival.rate'; it is a setting of arrival=constant"),
    "an experiment's setting": (["study.start_rate=4"], "'study.start_rate'; it is a setting of experiment=capacity"),
    "a target's query": (["target='http://127.0.0.1:9/v1?a=1'"], "leave out what is behind it"),
    "samples without end": (["sampling.n=99999999999999999999"], "must be an integer in [1, 65536]"),
    "a level below no prefix cache": (
        ["allocator=paged", "kv_cache.host_gib=1"],
        "kv_cache.host_gib=1 keeps what a prefix cache evicts",
    ),
    "a level of no block": (
        ["allocator=radix", "kv_cache.host_gib=0.0000001"],
        "kv_cache.host_gib=1e-07 holds no block",
    ),
    "a share above the whole": (
        ["allocator=radix", "kv_cache.host_gib=0.1", "allocator.swap_gib=0.2"],
        "must be at most kv_cache.host_gib",
    ),
    "no swap space": (["allocator.swap_gib=null"], "allocator.swap_gib=None must be a finite number of at least 0"),
    "a list of strategies": (["allocator=[1]"], "the command line cannot be read: "),
    "a spread beyond floats": (["workload=lognormal", "workload.output_len.sigma=1e30"], "config section 'workload': "),
    "no temperature": (["sampling.temperature=null"], "sampling.temperature=None must be a number"),
    "no top_k": (["sampling.top_k=null"], "sampling.top_k=None must be an integer"),
    "no section": (["engine=null"], "engine=None must be a section of settings"),
    "no pool": (["kv_cache=null"], "kv_cache=None must be a section of settings"),
    "no strategy": (["allocator=null"], "the command line cannot be read: "),
    "a maybe": (["report.kv_map=7"], "report.kv_map=7 must be true or false"),
    "a probe, maybe": (["driver.probe=maybe"], "driver.probe=maybe must be true or false"),
    "no round": (["sweep.rounds=0"], "sweep.rounds=0 must be an integer of at least 1"),
    "rounds of one run": (["sweep.rounds=2"], "sweep.rounds=2 repeats the cells of a sweep, and this is none"),
    "rounds of an experiment": (["-m", "experiment=paper_fig2", "sweep.rounds=2"], "repeats cells, not experiments"),
    "several numbers of rounds": (["-m", "sweep.rounds=1,2"], "sweep.rounds holds for a whole sweep"),
    "a round of one's own": (["-m", "sweep.round=1"], "sweep.round is what a sweep sets"),
    "a name for all cells": (["-m", "hydra.sweep.subdir=x"], "hydra.sweep.subdir is what a sweep sets"),
    "mixed, maybe": (["sweep.allow_mixed=maybe"], "sweep.allow_mixed=maybe must be true or false"),
    "arrivals in no lifetime": (["arrival=poisson", "arrival.rate=1e-300"], "raise the rate of section arrival"),
    "a misspelt option": (["--multirn"], "unrecognized arguments: --multirn; did you mean --multirun?"),
    "an option's value": (["--info", "nope"], "argument --info/-i: invalid choice: 'nope'"),
    "nothing": ([""], "the command line cannot be read: '' names no setting; settings are key=value"),
    "a value alone": (["="], "'=' names no setting"),
    "half a list": (["workload.num_requests=[1,2"], "cannot be read: 'workload.num_requests=[1,2': no viable"),
    "a folder in no folder": (["hydra.run.dir=/proc/nope"], "cannot make the run's folder /proc/nope"),
    "a sweep in no folder": (["-m", "hydra.sweep.dir=/proc/nope"], "hydra.sweep.dir with -m"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_settings(name: str, run):
    args, expected = CASES[name]
    done = run(*args)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert expected in lines[0]


def test_memory_that_runs_out_is_one_line():
    error = MemoryError("Unable to allocate 23.3 GiB")
    assert explain(error) == (
        "this machine's memory is not enough (Unable to allocate 23.3 GiB); lower kv_cache.num_slots or "
        "workload.num_requests"
    )


def test_a_broken_model_directory(tmp_path: Path, run):
    done = run(f"model.path={broken_checkpoint(tmp_path)}")
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_negative_length_in_a_trace_names_file_line_and_column(tmp_path: Path, run):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9799600,-4,10\r\n")
    done = run("workload=azure_trace", f"workload.path={trace}")
    assert done.returncode == 2
    assert "trace.csv" in done.stderr
    assert "line 2" in done.stderr
    assert "ContextTokens" in done.stderr


def test_a_failed_cell_does_not_stop_a_sweep(tmp_path: Path, run):
    done = run("-m", "kv_cache.num_slots=1,512", *SMALL)
    assert done.returncode == 2
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(last["failed"]) == 1
    assert last["failed"][0]["name"] == "kv_cache.num_slots=1"  # what all cells share is left out
    assert "kv_cache.num_slots" in last["failed"][0]["error"]
    assert Path(tmp_path, last["report"]).exists()


def test_a_cell_that_means_nothing_is_left_out_of_a_sweep(tmp_path: Path, run):
    done = run("-m", "allocator=contiguous,paged", "runner.layout=paged,contiguous", "report.json=full", *SMALL)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["failed"] == []
    [left_out] = last["not_defined"]
    assert left_out["name"] == "allocator=paged, runner.layout=contiguous"
    text = Path(tmp_path, last["sweep_dir"], "report.md").read_text()
    assert "allocator=paged, runner.layout=contiguous is not defined: " + left_out["error"] in text
    assert last["summary"]["same_tokens"]["verdict"] == "same"
    assert [entry["factor"] for entry in last["summary"]["costs"]] == ["capacity", "the kernel"]


def test_a_baseline_may_be_named_by_its_folder(run):
    """By its name without the digits, which nobody knows beforehand."""
    done = run("-m", "allocator=contiguous,paged", "report.baseline=paged-continuous", *SMALL)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["baseline"] == "paged × continuous"


def test_a_sweep_without_its_comparison_is_an_error(tmp_path: Path, run):
    """Hydra turns a callback's error into a warning: the sweep ended with exit code 0 and no report."""
    done = run("-m", "allocator=contiguous,paged", "report.baseline=nope", f"hydra.sweep.dir={tmp_path}/s", *SMALL)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.strip().splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: no comparison: there is no run called 'nope' to compare with; the runs are ")
    assert "baseline" in json.loads((tmp_path / "s" / "sweep.json").read_text())


def test_nothing_but_cells_that_mean_nothing_is_an_error(run):
    for mode in ([], ["-m"]):
        done = run(*mode, "allocator=paged", "runner.layout=contiguous")
        assert done.returncode == 2
        [line] = done.stderr.strip().splitlines()
        assert "runner.layout=contiguous" in line


def test_the_command_itself_exits_with_2_and_one_line(tmp_path: Path):
    command = [sys.executable, str(ROOT / "run.py"), "allocator=nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
