"""What all tests share. Without a GPU, Triton kernels run in Triton's interpreter: to be chosen before its import."""

import gc
import os

# Two workers and their servers share the cores; threads of one product would wait for one another. Before torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """The libraries' objects are no garbage: a collection looked through all of them, 0.3 s each time."""
    gc.collect()
    gc.freeze()
