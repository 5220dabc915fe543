"""The files of conf as texts: which choices a group has, and what each file says of itself. Reads no YAML."""

from __future__ import annotations

import re
from pathlib import Path

CONF = Path(__file__).resolve().parents[2] / "conf"
GROUPS = {  # in the order in which they are shown
    "allocator": "who owns which slots of the KV pool",
    "scheduler": "who runs in the next step",
    "workload": "what is asked: prompts and output lengths",
    "arrival": "when requests arrive",
    "experiment": "a question that several cells answer, run in place of one cell",
    "model": "what is run; model.path=DIR takes any local model directory",
    "runner": "what executes a step",
    "profile": "runner.profile=NAME: how long a step takes, for runner=simulated",
    "slo": "limits that a good request keeps",
    "tracking": "where runs are logged too",
}
DEFAULT = re.compile(r"^  - (\w+): ([\w.-]+)", re.M)


def choices(group: str) -> dict[str, str]:
    """The choices of a group by name, each with the first line of comment in its file."""
    return {path.stem: first_line(path) for path in sorted((CONF / group).glob("*.yaml"))}


def first_line(path: Path) -> str:
    """What a file says of itself: its first line of comment that is no directive of Hydra's."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# @package"):
            return line.removeprefix("#").strip() if line.startswith("#") else ""
    return ""


def defaults() -> dict[str, str]:
    """The choice of each group where a command line names none; groups that start empty are left out."""
    found = dict(DEFAULT.findall((CONF / "config.yaml").read_text(encoding="utf-8")))
    return {group: choice for group, choice in found.items() if choice != "null"}


def settings() -> str:
    """The main config's settings as they are written, comments and all, without Hydra's own."""
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    return text[text.index("\nmode:") : text.index("\nhydra:")].strip()
