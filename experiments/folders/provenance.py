"""Where a result comes from: commit, machine and versions, as written into a run's manifest."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from kvarena.experiments.folders.sources import PROJECT_ROOT, REPORTS_PACKAGE, SHARED_PACKAGES, STRATEGY_PACKAGES

# What of the checkout a result may depend on.
CODE = (*SHARED_PACKAGES, *STRATEGY_PACKAGES, REPORTS_PACKAGE, "conf", "run.py")
PACKAGES = ("torch", "triton", "transformers", "numpy", "pandas", "hydra-core")


@functools.cache
def git_state() -> dict[str, Any]:
    """Commit of the project's checkout, and whether its code differs from that; None where there is no checkout.

    A new file that git does not know counts, where it lies in a package or in conf.
    """
    found = _git("rev-parse", "HEAD", "--show-toplevel")
    commit, _, top = (found or "").partition("\n")
    if not commit or Path(top).resolve() != PROJECT_ROOT:  # another project's checkout may hold our installation
        return {"commit": None, "dirty": None}
    changed = _git("status", "--porcelain", "--untracked-files=all", "--", *CODE)
    return {"commit": commit, "dirty": bool(changed)}


def _git(*args: str) -> str | None:
    command = ["git", "-C", str(PROJECT_ROOT), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here: the manifest then says null, which is the truth
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """CPU, cores, memory, GPU and platform of this machine."""
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {"name": properties.name, "memory_bytes": properties.total_memory, "count": torch.cuda.device_count()}
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpu,
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def utc_now(precision: str = "milliseconds") -> str:
    """The wall clock's time as ISO 8601; for people and files, never for durations."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec=precision)
