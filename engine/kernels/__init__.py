"""Triton kernels. On a machine without CUDA they run in Triton's interpreter, which is slow and meant for tests.

Traps that the code here steps around:
- The interpreter's `tl.dot` multiplies the bit patterns of bfloat16 operands: they are upcast when interpreting.
- It casts float32 to bfloat16 by truncation: tests allow one unit in the last place.
- Triton reads TRITON_INTERPRET when it is first imported. It is set here if that is not too late; tests/conftest.py
  sets it early.
"""

from __future__ import annotations

import os
import sys

import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton

INTERPRET: bool = bool(triton.knobs.runtime.interpret)
