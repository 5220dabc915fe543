"""The Dockerfile and the workflow name what there is; that they work is seen where they are run."""

import re
import shlex
from pathlib import Path

import yaml

from kvarena.experiments.serving.flags import parse_flags

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_image_is_made_of_all_that_the_package_links_to():
    copied = set(re.findall(r"^COPY (\w+) \1$", DOCKERFILE, re.M))
    links = {path.resolve().name for path in (ROOT / "kvarena").iterdir() if path.is_symlink()}
    assert copied == links | {"kvarena"}
    files = {name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M) for name in line.split()}
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sent == files and all((ROOT / name).exists() for name in sent)


def test_the_image_serves_the_demo_model():
    [entry] = re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.M)
    [command] = re.findall(r"^CMD (.+)$", DOCKERFILE, re.M)
    words = yaml.safe_load(entry) + yaml.safe_load(command)
    assert words[:3] == ["kvarena", "serve", "models/demo"]
    flags = parse_flags(words[2:])
    assert flags.host == "0.0.0.0" and str(flags.port) in re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.M)


def test_ci_runs_what_everybody_runs():
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert ".ci/run" in steps and any(shlex.split(step)[:2] == ["docker", "build"] for step in steps if step)
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
