"""Where a result comes from: commit, machine and versions, as written into a run's manifest."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "numpy", "pandas", "hydra-core")


def git_state() -> dict[str, Any]:
    """Commit of the project's checkout and whether tracked files differ from it; None where there is no checkout."""

    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(status) if commit else None}


def code_state() -> str:
    """The commit, with a digest of what tracked files differ by; the version where there is no checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return f"kvarena {importlib.metadata.version('kvarena')}"
    changes = _git("diff", "HEAD")
    return commit if not changes else f"{commit} + {hashlib.blake2b(changes.encode(), digest_size=12).hexdigest()}"


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
