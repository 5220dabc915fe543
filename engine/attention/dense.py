"""Whole prompts of equal length through PyTorch's attention, which has no block table and so wants keys side by side.

On Hopper cuDNN's kernel does 1.4 times the operations per second of the Triton one on 4 prompts of 4,096 tokens, and
1.15 times those of the CUDA kernel (`kvarena benchmark kernels --only chunks`). It builds a plan for every new shape,
in tens of milliseconds of host time: a shape has to come twice before it is worth one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvarena.engine.pool.kv_pool import KVPool

# Shorter prompts cost little attention: below it a plan saves less than a millisecond a step of an 8B model, and takes
# the host 5 to 70 ms, again for every length of a real workload.
MIN_LENGTH = 2048
MAX_SHAPES = 1024


class DensePrompts:
    """Decides which steps go to the library, and runs their attention.

    Args:
        backend: which of PyTorch's kernels; None: none, no step goes to it.
        min_length: prompts shorter than that stay with the Triton kernel.
    """

    def __init__(self, backend: SDPBackend | None, min_length: int = MIN_LENGTH) -> None:
        self._backend = backend
        self._min_length = min_length
        self._seen: set[tuple[int, int]] = set()

    def shape(self, query_start_loc: np.ndarray, seq_lens: np.ndarray) -> tuple[int, int] | None:
        """(rows, length) if a step is nothing but prompts of that length from their first token; else None.

        Also None the first time that the shape comes.

        Args:
            query_start_loc, seq_lens: see `AttentionMetadata`, on the host.
        """
        if self._backend is None or not len(seq_lens):
            return None
        length = int(seq_lens[0])
        if length < self._min_length or (seq_lens != length).any() or (np.diff(query_start_loc) != length).any():
            return None
        shape = (len(seq_lens), length)
        if shape in self._seen:
            return shape
        if len(self._seen) < MAX_SHAPES:
            self._seen.add(shape)
        return None

    def warm_up(self, num_heads: int, pool: KVPool) -> None:
        """Call the library once, of whose code the first call loads hundreds of megabytes: a second in some prompt.

        Args:
            num_heads: query heads of a layer.
            pool: with keys and values of the size and type that it will be given.
        """
        q, kv = (
            torch.zeros(self._min_length, count, pool.head_dim, dtype=pool.dtype, device=pool.device)
            for count in (num_heads, pool.num_kv_heads)
        )
        self.attend(q, kv, kv, (1, self._min_length), 1.0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int], scale: float) -> Tensor | None:
        """Causal attention within each prompt; None when the library does not take these tensors.

        Args:
            q: [T, num_heads, head_dim], T = rows * length.
            k, v: [T, num_kv_heads, head_dim], in the same order; rows may be strided.
            shape: from `shape`.
            scale: factor on the scores.

        Returns:
            [T, num_heads, head_dim].
        """
        if self._backend is None:
            return None
        query, key, value = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
        groups = q.shape[1] != k.shape[1]
        if self._backend == SDPBackend.CUDNN_ATTENTION:
            # Its kernel wants the attributes of a call without a mask and without dropout.
            params = SDPAParams(query, key, value, None, 0.0, True, groups)
            if not can_use_cudnn_attention(params):
                return None
        with sdpa_kernel(self._backend):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=groups)
        return out.transpose(1, 2).flatten(0, 1)


def library_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> SDPBackend | None:
    """cuDNN where it is the faster one: half precision on Hopper or later, heads of up to 128 elements."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 128:
        return None
    has_cudnn = torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()
    return SDPBackend.CUDNN_ATTENTION if has_cudnn and torch.cuda.get_device_capability(device) >= (9, 0) else None
