"""What all tests share. Without a GPU, Triton kernels run in Triton's interpreter: to be chosen before its import."""

import gc
import os
import sys
from types import SimpleNamespace

# Two workers and their servers share the cores; threads of one product would wait for one another. Before torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import sparing
import torch
import yaml

# Every cell reads some twenty YAML files, in a fifth of the time with libyaml. Before OmegaConf makes its loader.
if yaml.__with_libyaml__:
    yaml.SafeLoader = yaml.CSafeLoader

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


_NO_COLLECTIONS = SimpleNamespace(collect=lambda: None, freeze=lambda: None, unfreeze=lambda: None)


def pytest_collection_finish() -> None:
    """The libraries' objects are no garbage: a collection looked through all of them, 0.3 s each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Figures and probes only where a test looks at them (sparing.py).

    Before it measures, a run looks for garbage and sets the rest aside, and afterwards takes all back: a quarter of
    a second for each cell, against pauses that no test measures.
    """
    sparing.set_for_test(
        is_drawn=item.get_closest_marker("drawn") is not None, is_probed=item.get_closest_marker("probed") is not None
    )
    for name in ("engine_job", "replicas_job"):
        if (job := sys.modules.get(f"kvarena.experiments.jobs.{name}")) is not None:
            job.gc = _NO_COLLECTIONS
