"""The files of conf: which choices a group has, what each file says of itself, and the options in it.

Options that several choices have stand once, in conf/base or in one of them; a file takes them in by its defaults list.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONF = Path(__file__).resolve().parents[2] / "conf"
GROUPS = {  # in the order in which they are shown
    "allocator": "who owns which slots of the KV pool",
    "scheduler": "who runs in the next step",
    "router": "which of several replicas gets a request (simulated, or on a CPU)",
    "workload": "what is asked: prompts and output lengths",
    "arrival": "when requests arrive",
    "experiment": "a question that several cells answer, run in place of one cell",
    "model": "what is run; model.path=DIR takes any local model directory",
    "runner": "what executes a step",
    "profile": "runner.profile=NAME: how long a step takes, for runner=simulated",
    "slo": "limits that a good request keeps",
    "tracking": "where runs are logged too",
}
BASE = re.compile(r"^  - (?:/(base)/(\w+)@_here_|(?!_self_)(\w+))$", re.M)  # or another choice of the group
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


def with_bases(path: Path) -> Iterator[Path]:
    """A choice's file, behind those that it takes in: of conf/base, and other choices of its group."""
    for base, name, other in BASE.findall(path.read_text(encoding="utf-8")):
        yield from with_bases(CONF / base / f"{name}.yaml" if base else path.with_name(f"{other}.yaml"))
    yield path


def options(path: Path) -> dict[str, Any]:
    """The options that a choice's file sets, those that it takes in from conf/base among them."""
    from omegaconf import OmegaConf

    found: dict[str, Any] = {}
    for part in with_bases(path):
        node = OmegaConf.to_container(OmegaConf.load(part))
        found |= {str(key): value for key, value in node.items() if key != "defaults"} if isinstance(node, dict) else {}
    return found


def defaults() -> dict[str, str]:
    """The choice of each group where a command line names none; groups that start empty are left out."""
    found = dict(DEFAULT.findall((CONF / "config.yaml").read_text(encoding="utf-8")))
    return {group: choice for group, choice in found.items() if choice != "null"}


def settings() -> str:
    """The main config's settings as they are written, comments and all, without Hydra's own."""
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    return text[text.index("\nmode:") : text.index("\nhydra:")].strip()
