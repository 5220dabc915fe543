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

    Before it measures, a run looks for garbage and sets the rest aside, and afterwards takes all back; who lets go of
    a model looks for garbage, too: a quarter of a second each time, against pauses that no test measures and memory
    that no small model needs.
    """
    sparing.set_for_test(
        is_drawn=item.get_closest_marker("drawn") is not None, is_probed=item.get_closest_marker("probed") is not None
    )
    is_collected = item.get_closest_marker("collected") is not None
    for name in ("jobs.engine_job", "jobs.replicas_job", "building.shared"):
        if (module := sys.modules.get(f"kvarena.experiments.{name}")) is not None:
            module.gc = gc if is_collected else _NO_COLLECTIONS
