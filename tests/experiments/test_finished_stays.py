"""What is refused, or cannot be written, leaves every file of what is finished as it was, and loses nothing."""

import json
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import kvarena.experiments.jobs.job
import kvarena.reports.pages.comparison
import kvarena.reports.pages.run_report
from kvarena.experiments.entry import main
from kvarena.reports.__main__ import main as report
from kvarena.reports.reading.errors import NotWritten
from kvarena.reports.reading.writing import replacing, write_text

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["runner=simulated", "runner.profile=h100", "engine.dtype=bfloat16", "workload=fixed",
         "workload.num_requests=3", "workload.prompt_len=8", "workload.output_len=4",
         "report.progress=false"]  # fmt: skip
GRID = ["-m", "scheduler=continuous,static", "report.pages=false"]
STUDY = ["experiment=vattention", "workload.num_requests=20", "kv_cache.num_slots=8192", "study.seeds=[0,1]",
         "study.page_kib=[64,2048]", "report.progress=false"]  # fmt: skip


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """run.py in this process."""

    def call(*args: str) -> Ended:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py"), *args])
        code = main()
        return Ended(code, *capfd.readouterr())

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def errors(done: Ended) -> list[str]:
    return [line for line in done.err.splitlines() if line.startswith("error: ")]


def test_whatever_is_refused_leaves_a_finished_sweep_as_it_was(run, tmp_path):
    folder = tmp_path / "D"
    into = [*SMALL, f"hydra.sweep.dir={folder}"]
    assert run(*GRID, *into).code == 0
    before = files(folder)
    cell = next(folder.glob("*/cell.json")).parent
    for args, words in {
        ("-m", "scheduler=continuous,static", "scheduler.max_num_seqs=-1", *into): "max_num_seqs",
        ("-m", "scheduler=continuous,static", *into, "runner.profile=nowhere"): "nowhere",
        ("-m", "scheduler=nonsense", *into): "nonsense",
        (*GRID, "report.baseline=nope", *into): "no run called 'nope'",
        (*SMALL, f"hydra.run.dir={folder}"): "is the folder of a sweep; give a run one of its own",
        (*SMALL, "scheduler.max_num_seqs=-1", f"hydra.run.dir={folder}"): "is the folder of a sweep",
        (*SMALL, "workload.seed=7", f"hydra.run.dir={cell}"): "holds the result of another config",
        (*SMALL, "scheduler.max_num_seqs=-1", f"hydra.run.dir={cell}"): "holds the result of another config",
        (*STUDY, f"hydra.run.dir={folder}"): "is the folder of a sweep; give an experiment one of its own",
        (*STUDY, f"hydra.run.dir={cell}"): "is the folder of a run; give an experiment one of its own",
        (*GRID, *SMALL, f"hydra.sweep.dir={cell}"): "is the folder of a run; give a sweep one of its own",
    }.items():
        done = run(*args)
        assert (done.code, "Traceback" in done.err) == (2, False), done.err
        assert words in errors(done)[0]
        after = files(folder)
        assert {name: after.get(name) for name in before} == before, args
    again = run(*GRID, *into)
    assert (again.code, again.err.count("finished before")) == (0, 2)


def test_single_runs_that_meet_in_one_folder(run, tmp_path):
    folder = tmp_path / "one"
    assert run(*SMALL, f"hydra.run.dir={folder}").code == 0
    before = files(folder)
    assert (folder / ".hydra/overrides.yaml").exists()
    other = run(*SMALL, "workload.output_len=5", f"hydra.run.dir={folder}")
    assert (other.code, len(other.err.splitlines())) == (2, 1)
    assert f"{folder} holds the result of another config" in other.err
    assert files(folder) == before
    same = run(*SMALL, f"hydra.run.dir={folder}")
    assert (same.code, "finished before" in same.err) == (0, True)
    assert files(folder) == before


def test_runs_that_begin_in_the_same_second_do_not_meet(run, tmp_path):
    assert [run(*SMALL, "report.pages=false", f"workload.seed={seed}").code for seed in range(2)] == [0, 0]
    found = [path.parent.name for path in tmp_path.glob("outputs/*/*/cell.json")]
    assert len(found) == 2
    assert all(len(name.split("-")) == 4 for name in found)


@pytest.mark.parametrize("name", ["manifest.json", "report.html", ".hydra/config.yaml", "figures/mine.png"])
def test_a_folder_of_something_else(run, tmp_path, name):
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    before = files(tmp_path / "mine")
    for args in (
        (*SMALL, f"hydra.run.dir={tmp_path}/mine"),
        (*SMALL, f"hydra.run.dir={tmp_path}/mine", "scheduler.max_num_seqs=-1"),
        (*GRID, *SMALL, f"hydra.sweep.dir={tmp_path}/mine"),
        (*STUDY, f"hydra.run.dir={tmp_path}/mine"),
    ):
        done = run(*args)
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
        assert "holds files of something else" in done.err or "max_num_seqs" in done.err
        assert files(tmp_path / "mine") == before


def test_a_run_does_not_take_the_folder_of_a_cell_that_is_to_come(run, tmp_path):
    """The sweep would find another config there for ever."""
    into = [*SMALL, f"hydra.sweep.dir={tmp_path}/D"]
    run(*GRID, *into)
    cell = next((tmp_path / "D").glob("*/cell.json")).parent
    (cell / "cell.json").unlink()
    done = run(*SMALL, "workload.seed=7", f"hydra.run.dir={cell}")
    assert (done.code, "belongs to a cell of a sweep" in done.err) == (2, True)
    assert run(*GRID, *into).code == 0


@contextmanager
def files_of_at_most(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_is_one_line_and_later_cells_run(run, tmp_path, monkeypatch):
    folder = tmp_path / "D"
    args = ["-m", *SMALL, "workload.num_requests=1000,3", "report.pages=false", f"hydra.sweep.dir={folder}"]
    written = kvarena.experiments.jobs.job.write_run

    def write_run(*args):
        with files_of_at_most(100 if args[1]["workload"]["num_requests"] == 1000 else 1_000_000):
            written(*args)

    with monkeypatch.context() as patched:
        patched.setattr(kvarena.experiments.jobs.job, "write_run", write_run)
        done = run(*args)
    assert done.code == 2
    [line] = errors(done)
    assert "(File too large); make room there, or choose another folder" in line
    record = json.loads((folder / "sweep.json").read_text())
    [failed] = record["failed"]
    left = folder / failed["folder"]
    assert json.loads((left / "error.json").read_text())["error"] == failed["error"]
    assert not list(folder.rglob("*.parti*")) and not (left / "manifest.json").exists()
    [kept] = record["runs"]
    before = files(folder / kept)
    assert run(*args).code == 0
    assert files(folder / kept) == before
    assert not (left / "error.json").exists()


def test_what_was_measured_goes_elsewhere_when_the_folder_is_full(run, tmp_path):
    """Here a folder lies in the place of a file."""
    folder = tmp_path / "one"
    (folder / ".lock").parent.mkdir()
    (folder / ".lock").touch()
    (folder / "steps.parquet").mkdir()
    done = run(*SMALL, f"hydra.run.dir={folder}")
    [line] = done.err.splitlines()
    assert line.startswith(
        f"error: cannot write {folder} (Is a directory); choose another folder; what was measured is"
    )
    spare = Path(line.split("what was measured is in ")[1].split(" (kvarena report")[0])
    assert report([str(spare)]) == 0
    assert json.loads((spare / "summary.json").read_text())["num_finished"] == 3
    shutil.rmtree(spare)
    assert not (folder / "cell.json").exists()


def test_a_folder_that_takes_no_file_is_one_line(run, tmp_path):
    (tmp_path / "full" / ".lock").mkdir(parents=True)
    for args in ((*SMALL, f"hydra.run.dir={tmp_path}/full"), (*GRID, *SMALL, f"hydra.sweep.dir={tmp_path}/full")):
        done = run(*args)
        assert (done.code, done.err) == (
            2, f"error: cannot write {tmp_path}/full (Is a directory); choose another folder\n"
        )  # fmt: skip
    cell = tmp_path / "D" / "cell"
    cell.parent.mkdir()
    cell.write_text("")
    done = run(*SMALL, f"hydra.run.dir={cell}")
    assert (done.code, len(done.err.splitlines())) == (2, 1)


def test_a_report_that_cannot_be_drawn_loses_no_measurement(run, tmp_path, monkeypatch):
    folder = tmp_path / "one"

    def full(*_):
        raise NotWritten("cannot write report.html (No space left on device); make room there")

    with monkeypatch.context() as patched:
        patched.setattr(kvarena.reports.pages.run_report, "write_run_report", full)
        done = run(*SMALL, f"hydra.run.dir={folder}")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert json.loads((folder / "cell.json").read_text())["reports"] is None
    assert not (folder / "error.json").exists()
    before = (folder / "requests.parquet").stat().st_mtime_ns
    again = run(*SMALL, f"hydra.run.dir={folder}")
    assert (again.code, "finished before" in again.err) == (0, True)
    assert (folder / "requests.parquet").stat().st_mtime_ns == before
    assert (folder / "report.html").exists()


def test_a_bug_in_one_cell_keeps_the_others_and_its_stack_trace(run, tmp_path, monkeypatch):
    ran = kvarena.experiments.jobs.job.run_engine

    def broken(cfg, name, *rest):
        if "static" in name:
            raise ZeroDivisionError("a bug")
        return ran(cfg, name, *rest)

    monkeypatch.setattr(kvarena.experiments.jobs.job, "run_engine", broken)
    with pytest.raises(ZeroDivisionError):
        run("-m", "scheduler=static,continuous", "report.pages=false", *SMALL, f"hydra.sweep.dir={tmp_path}/D")
    record = json.loads((tmp_path / "D/sweep.json").read_text())
    assert (len(record["runs"]), record["failed"][0]["error"]) == (1, "a bug: ZeroDivisionError: a bug")


def test_a_comparison_does_not_replace_the_report_of_a_run_or_a_sweep(run, tmp_path, capfd):
    run(*GRID, *SMALL, f"hydra.sweep.dir={tmp_path}/D")
    before = files(tmp_path / "D")
    cells = [str(path.parent) for path in (tmp_path / "D").glob("*/cell.json")]
    for place in (cells[0], str(tmp_path / "D")):
        assert report([*cells, "--out", place]) == 2
        assert "whose report this would replace; choose another one" in capfd.readouterr().err
    assert files(tmp_path / "D") == before


def test_a_file_takes_its_place_as_a_whole_or_not_at_all(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "one")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a" / "b.txt") as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(NotWritten, match="File exists"):
        write_text(tmp_path / "a" / "b.txt" / "c", "two")
    with pytest.raises(NotWritten, match="No space left on device"):
        write_text(Path("/dev/full"), "two")
    assert files(tmp_path) == {"a/b.txt": b"one"}


def test_a_second_run_of_a_folder_that_is_written_leaves_no_note_there(tmp_path):
    """Two processes: the one that comes second is refused while the first one works."""
    hold = ("import sys; from pathlib import Path; from kvarena.experiments.folders.lock import only_writer\n"
            "with only_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()")  # fmt: skip
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == "held\n"
    from kvarena.experiments.folders.failures import _may_write
    from kvarena.experiments.folders.place import RUN

    assert not _may_write(tmp_path, RUN)
    holder.communicate("")
    assert _may_write(tmp_path, RUN)
