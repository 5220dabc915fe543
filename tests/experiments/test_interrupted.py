"""Ctrl-C, SIGTERM and SIGHUP, and what breaks off by itself, keep what had been measured and say how to go on."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

import kvarena.experiments.jobs.engine_job
import kvarena.reports.drawing.document
from kvarena.engine.errors import EngineError
from kvarena.experiments.entry import main
from kvarena.experiments.recording.interruption import Interrupted, Signals
from kvarena.experiments.sweeps import sweep
from kvarena.reports.__main__ import main as report
from kvarena.reports.pages.summary import summarize
from kvarena.reports.reading.files import read_run

ROOT = Path(__file__).resolve().parents[2]
LOAD = ["workload=fixed", "workload.num_requests=6", "workload.prompt_len=8", "workload.output_len=12",
        "scheduler.max_num_seqs=2", "driver.probe=false", "report.progress=false", "report.pages=false"]  # fmt: skip
SIMULATED = ["runner=simulated", "runner.profile=h100", "engine.dtype=bfloat16"]
STUDY = ["experiment=vattention", "workload.num_requests=20", "kv_cache.num_slots=8192", "study.seeds=[0,1]",
         "study.page_kib=[64,2048]", "report.progress=false"]  # fmt: skip


class Ended:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        self.line = lines[0] if len(lines) == 1 else ""

    @property
    def command(self) -> list[str]:
        """What the line says goes on."""
        return shlex.split(self.line.split("; go on with: ")[1])


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """run.py in this process, which is the one that gets the signals."""

    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored

    def call(*args: str) -> Ended:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py"), *args])
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        code = main()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
        return Ended(code, *capfd.readouterr())

    yield call
    signal.signal(signal.SIGHUP, hang_up)


@pytest.fixture
def at(monkeypatch):
    """Something happens once, as soon as so many requests of a run have ended."""
    driven = kvarena.experiments.jobs.engine_job.drive

    def call(num_ended: int, what, in_cell: int = 0) -> None:
        cells, done = [], []

        def drive(engine, requests, recorder, *, on_progress, **rest):
            cells.append(engine)

            def look(recorder):
                if len(cells) > in_cell and recorder.num_finished >= num_ended and not done:
                    done.append(True)
                    what()
                on_progress(recorder)

            driven(engine, requests, recorder, on_progress=look, **rest)

        monkeypatch.setattr(kvarena.experiments.jobs.engine_job, "drive", drive)

    return call


def kill(number: int):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "more"),
    [
        (signal.SIGINT, SIMULATED),
        (signal.SIGTERM, ["engine.overlap=true"]),
        (signal.SIGHUP, ["driver.record=summary", "arrival=closed_loop", "arrival.num_users=2"]),
        (signal.SIGTERM, [*SIMULATED, "driver.record=none"]),
        (signal.SIGINT, ["arrival=constant", "arrival.rate=0.5"]),  # the next request comes in seconds
    ],
)
def test_a_run_keeps_what_had_ended_and_goes_on(number, more, run, at, tmp_path):
    folder = tmp_path / "one"
    ended = 1 if "arrival=constant" in more else 2
    at(ended, kill(number))
    done = run(*LOAD, *more, f"hydra.run.dir={folder}")
    assert done.code == 128 + number
    name = signal.Signals(number).name
    assert f"error: interrupted by {name}: {ended} of 6 requests had ended and are kept in one (kvarena" in done.line
    assert not (folder / "cell.json").exists()
    came = json.loads((folder / "manifest.json").read_text())["run"]["interrupted"]
    assert (came["by"], came["num_requests"], came["num_ended"]) == (name, 6, ended)
    found = read_run(folder)
    assert summarize(found)["num_finished"] == ended
    if "driver.record=none" not in more:
        reasons = found.requests["finish_reason"].tolist()
        assert reasons.count("length") == ended
        assert reasons.count("abort") == came["num_submitted"] - ended
        assert len(found.steps["total"]) == len(found.steps["step"]) > 0
    assert report([str(folder)]) == 0
    assert f"interrupted ({name}) when {ended} of its 6 requests had ended" in (folder / "report.md").read_text()
    at(99, None)
    rest = [*(["arrival.rate=1000"] if "arrival=constant" in more else [])]
    whole = run(*done.command[2:], *rest)
    assert whole.code == 0, whole.err
    assert (folder / "cell.json").exists() and not (folder / "report.html").exists()
    assert summarize(read_run(folder))["num_finished"] == 6


def test_the_line_names_a_default_folder_too(run, at):
    at(2, kill(signal.SIGINT))
    done = run(*LOAD, *SIMULATED)
    assert done.code == 130
    [word] = [word for word in done.command if word.startswith("hydra.run.dir=outputs/")]
    assert (Path(word.partition("=")[2]) / "manifest.json").exists()
    again = run(*done.command[2:])
    assert (again.code, Path(word.partition("=")[2], "cell.json").exists()) == (0, True)


def test_before_anything_is_measured_it_ends_at_once(run, tmp_path, monkeypatch):
    monkeypatch.setattr(kvarena.experiments.jobs.engine_job, "build", lambda *_: kill(signal.SIGTERM)())
    done = run(*LOAD, *SIMULATED, f"hydra.run.dir={tmp_path}/one")
    assert done.code == 143
    assert "interrupted by SIGTERM: nothing had been measured; go on with: " in done.line
    assert not (tmp_path / "one" / "manifest.json").exists()


def test_a_run_whose_report_is_being_drawn_is_whole(run, tmp_path, monkeypatch):
    folder = tmp_path / "one"
    with monkeypatch.context() as patched:
        patched.setattr(kvarena.reports.drawing.document, "render_html", lambda _: kill(signal.SIGTERM)())
        done = run(*LOAD, *SIMULATED, f"hydra.run.dir={folder}", "report.pages=true")
    assert done.code == 143
    assert "all requests had ended and are in one, without a report" in done.line
    assert not list(folder.rglob("*.partial"))
    measured = (folder / "requests.parquet").stat().st_mtime_ns
    again = run(*done.command[2:])
    assert (again.code, "finished before" in again.err) == (0, True)
    assert (folder / "report.html").exists()
    assert (folder / "requests.parquet").stat().st_mtime_ns == measured


def test_a_signal_after_the_last_request_leaves_a_whole_run(run, at, tmp_path):
    at(6, kill(signal.SIGINT))
    done = run(*LOAD, *SIMULATED, f"hydra.run.dir={tmp_path}/one")
    assert (done.code, (tmp_path / "one" / "cell.json").exists()) == (130, True)
    assert "interrupted" not in (tmp_path / "one" / "manifest.json").read_text().replace('"interrupted": null', "")


def test_what_breaks_off_by_itself_keeps_what_had_ended(run, at, tmp_path):
    def lost():
        raise EngineError("the device is lost")

    at(4, lost)
    done = run(*LOAD, "engine.overlap=true", f"hydra.run.dir={tmp_path}/one")
    assert (done.code, done.line) == (2, "error: the device is lost")
    assert "warning: 4 of 6 requests had ended and are kept in one" in done.err
    assert summarize(read_run(tmp_path / "one"))["interrupted"]["by"] == "EngineError: the device is lost"
    assert not (tmp_path / "one" / "cell.json").exists()


GRID = ["-m", "scheduler=continuous,static,chunked", *SIMULATED, *LOAD]


def test_a_sweep_keeps_its_whole_cells_and_the_requests_of_the_one_that_ran(run, at, tmp_path):
    folder = tmp_path / "D"
    at(2, kill(signal.SIGTERM), in_cell=1)
    done = run(*GRID, f"hydra.sweep.dir={folder}")
    assert done.code == 143
    assert (
        "1 cell of D is whole (kvarena report D); of the cell that ran 2 of 6 requests had ended and are" in done.line
    )
    record = json.loads((folder / "sweep.json").read_text())
    assert len(record["runs"]) == 1
    assert (record["interrupted"]["by"], len(record["interrupted"]["left"]), record["failed"]) == ("SIGTERM", 2, [])
    whole = folder / record["runs"][0]
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert report([str(folder)]) == 0
    assert "The sweep was interrupted (SIGTERM); not in it: " in (folder / "report.md").read_text()
    (folder / "sweep.json").unlink()  # as after SIGKILL
    assert report([str(folder)]) == 0
    assert "D did not come to its end; 1 cell is whole and compared here." in (folder / "report.md").read_text()
    cells = [str(path) for path in folder.iterdir() if (path / "manifest.json").exists()]
    assert (len(cells), report([*cells, "--out", str(tmp_path / "C")])) == (2, 0)
    assert "Left out, because they were interrupted: " in (tmp_path / "C" / "report.md").read_text()
    again = run(*done.command[2:])
    assert again.code == 0, again.err
    assert again.err.count("finished before") == 1
    assert {path: path.read_bytes() for path in before} == before
    record = json.loads((folder / "sweep.json").read_text())
    assert (len(record["runs"]), "interrupted" in record) == (3, False)


def test_an_interrupted_sweep_leaves_the_one_that_had_ended(run, at, tmp_path):
    into = f"hydra.sweep.dir={tmp_path}/D"
    assert run(*GRID, into).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "D").rglob("*") if path.is_file()}
    at(2, kill(signal.SIGINT), in_cell=1)
    assert run(*GRID, "workload.seed=0,1", into).code == 130
    assert {path: path.read_bytes() for path in before} == before


def test_an_experiment_keeps_its_whole_cells(run, at, tmp_path):
    at(2, kill(signal.SIGINT), in_cell=2)
    done = run(*STUDY, f"hydra.run.dir={tmp_path}/E")
    assert done.code == 130
    words = (
        r"2 cells of E are whole \(kvarena report E compares them\); of the cell that ran \d+ of 20 requests had ended"
    )
    assert re.search(words, done.line)
    assert report([str(tmp_path / "E")]) == 0
    assert "E did not come to its end; 2 cells are whole" in (tmp_path / "E" / "report.md").read_text()
    at(99, None)
    again = run(*done.command[2:])
    assert again.code == 0, again.err
    assert again.err.count("finished before") == 2


def test_signals_are_taken_where_nothing_is_half_done():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        with pytest.raises(Interrupted):
            kill(signal.SIGTERM)()
        assert signals.came
    with Signals() as signals, signals.patient():
        kill(signal.SIGTERM)()
        kill(signal.SIGINT)()  # as of an impatient hand
        assert signals.number == signal.SIGTERM
        waited = []
        signals.wait(lambda: waited.append(True))
        assert not waited
        signals._came -= 10
        with signals.patient(sealed=True):
            kill(signal.SIGINT)()
        with pytest.raises(Interrupted):  # what hangs can be ended
            kill(signal.SIGINT)()
    with Signals() as signals, signals.patient():
        signals.wait(kill(signal.SIGINT))
        assert signals.number == signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with Signals() as signals:
            kill(signal.SIGHUP)()
        assert not signals.came
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def started(*args: str, path: Path) -> subprocess.Popen:
    """`path`: where modules of its own are."""
    command, env = [sys.executable, str(ROOT / "run.py"), *args], os.environ | {"PYTHONPATH": str(path)}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for(process: subprocess.Popen, ready) -> None:
    deadline = time.monotonic() + 240
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)


def test_a_sweep_ends_by_the_signal_that_came_whatever_its_launcher_makes_of_it(tmp_path):
    """Ray's calls raise KeyboardInterrupt for all of them."""

    def launch(*_: object, **__: object) -> None:
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        raise KeyboardInterrupt

    plan = SimpleNamespace(batches=[[SimpleNamespace(command=list)]])
    config = OmegaConf.create({"hydra": {"launcher": {"_target_": "x.Y"}, "sweep": {"dir": str(tmp_path)}}})
    with pytest.raises(Interrupted) as caught:
        sweep._launch(plan, config, SimpleNamespace(launch=launch), [])
    assert caught.value.number == signal.SIGTERM


MINE = """import os
from pathlib import Path
from kvarena.allocators.paged import PagedAllocator

class Mine(PagedAllocator):
    def free(self, req):
        super().free(req)
        Path({folder!r}, str(os.getpid())).touch()
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local", "ray"])
def test_a_sweep_in_other_processes_keeps_what_had_ended(launcher, tmp_path):
    """SIGTERM reaches the command alone; its cells are children of it, or of Ray. It comes when requests have ended."""
    folder, ended, num_cells = tmp_path / "sweep", tmp_path / "ended", 1 if launcher == "basic" else 2
    ended.mkdir()
    (tmp_path / "mine.py").write_text(MINE.format(folder=str(ended)))
    long = ["workload.num_requests=400", "arrival=poisson", "arrival.rate=20", "driver.warmup=false"]
    process = started("-m", "scheduler=continuous,static", "allocator._target_=mine.Mine", *LOAD, *long,
                      f"hydra.sweep.dir={folder}", f"hydra/launcher={launcher}", path=tmp_path)  # fmt: skip
    wait_for(process, lambda: len(list(ended.iterdir())) >= num_cells)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert f"no cell of {folder} is whole" in err
    came = [json.loads(file.read_text())["run"]["interrupted"] for file in folder.glob("*/manifest.json")]
    assert len(came) == num_cells
    assert all(0 < one["num_ended"] < 400 for one in came)


@pytest.mark.parametrize(
    ("started", "words"),
    [
        ("/usr/bin/kvarena", ["kvarena", "run"]),
        ("/a/kvarena/__main__.py", ["python", "-m", "kvarena", "run"]),
        ("/a/run.py", ["python", "/a/run.py"]),
    ],
)
def test_the_command_that_goes_on_is_the_one_that_was_started(started, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started, "-m", "allocator=paged,virtual"])
    line = Interrupted(signal.SIGTERM).line()
    assert shlex.split(line.split("; go on with: ")[1]) == [*words, "-m", "allocator=paged,virtual"]
