"""Paged attention of one query per request on Hopper, by programs that stay and never let their fetches run dry.

    items    | row 0 ............ | row 1 .. | row 2 ................. |     a row's context for one KV head, in tiles
    slots    |      0      |      1       |       2      |      3      |     equal numbers of tiles, in order
    a slot   its items' blocks of 16 tokens, every fourth to each of four warps

The Triton kernel starts a program per item, whose first loads nothing overlaps, and whose last step leaves its part of
the memory's bandwidth unused; with a context of a thousand tokens that is several percent. Here a multiprocessor holds
two programs of four warps, and a warp has three blocks of keys and values on their way at all times, through the ends
of its items too. It fetches them by itself (tensor memory accelerator, a barrier per block) and shares nothing with
other warps until an item ends, when the four sums are merged in shared memory. Rows that are cut between slots are
merged by the last to arrive, as in `decode.py`.

The scores are computed as K Q^T and the output as V^T P^T, so that up to 8 query heads of a KV head are the narrow
side of the tensor cores' product (16 x 8 x 16). The first blocks are fetched before the kernel before this one has
ended, except for those that hold a token which that kernel stores.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvarena.engine.kernels.attention.base import AttentionCall
from kvarena.engine.kernels.attention.decode import DecodeScratch
from kvarena.engine.kernels.hopper import HopperKernels, Kernel

# Of fewer rows the merge is the longest part, and the programs of `decode.py` have more threads for it.
FEWEST_ROWS = 8
_HEAD_DIM, _WARPS, _BLOCK_TOKENS, _STAGES = 128, 4, 16, 3
_MOST_GROUP = 8
_BLOCK_BYTES = 2 * 2 * _BLOCK_TOKENS * _HEAD_DIM
_LOG2_E = 1.4426950408889634


def streams(head_dim: int, group: int, block_size: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernel takes a pool of such blocks, with `group` query heads to a KV head."""
    fits = head_dim == _HEAD_DIM and 1 <= group <= _MOST_GROUP and block_size % _BLOCK_TOKENS == 0
    return fits and dtype == torch.bfloat16


def launch_constants(group: int, block_size: int, *, contiguous: bool) -> tuple[dict[str, int], int]:
    """The kernel's constants, and a program's bytes of dynamic shared memory."""
    constants = {"GROUP": group, "BLOCK_SIZE": block_size, "CONTIGUOUS": int(contiguous), "STAGES": _STAGES}
    pass_dims = _HEAD_DIM // (2 if group > 4 else 1)
    sums = 4 * _WARPS * group * (pass_dims + 4)
    return constants, 1024 + _WARPS * _STAGES * _BLOCK_BYTES + sums


class StreamDecode:
    """Launches the kernel.

    Args:
        kernels: of the device where the pool is.
    """

    def __init__(self, kernels: HopperKernels) -> None:
        self._kernels = kernels
        self._compiled: dict[tuple[int, int, bool], Kernel] = {}

    def takes(self, call: AttentionCall) -> bool:
        """Whether it can do this layer: plain attention over a pool whose layers are contiguous."""
        plain = call.sliding_window is None and call.softcap is None and call.sinks is None
        shape = streams(call.q.shape[2], call.group, call.block_size, call.keys.dtype)
        q = call.q
        # Queries are read two at a time.
        pairs = (
            q.dtype == torch.bfloat16
            and q.stride(2) == 1
            and not (q.data_ptr() % 4 or q.stride(0) % 2 or q.stride(1) % 2)
        )
        return plain and shape and pairs and call.keys.is_contiguous() and call.values.is_contiguous()

    def __call__(
        self,
        call: AttentionCall,
        *,
        items: Tensor,
        num_items: int,
        starts: Tensor,
        scratch: DecodeScratch,
        overlap: bool = True,
    ) -> None:
        """Attention of the rows that `items` name, one query each.

        Args:
            call: what is read and written, which `takes` agreed to.
            items: int32 [5 * num_items], see `kvarena.engine.kernels.attention.plan`; chunks begin at multiples of 16
            tokens. num_items: how many there is room for.
            starts: int32 [slots + 1], the first item of each slot and the end of the last one's.
            scratch: with room for the items and rows.
            overlap: launch it while the kernel before it runs, which may store these rows' new tokens and nothing else
                that is read here; the inputs of the step must have been complete when that one began.
        """
        heads = call.num_kv_heads
        self._kernels.launch(
            self._kernel(call.group, call.block_size, contiguous=call.contiguous), heads * (len(starts) - 1),
            self._kernels.head_map(call.keys, _BLOCK_TOKENS), self._kernels.head_map(call.values, _BLOCK_TOKENS),
            *(ctypes.c_void_p(x.data_ptr()) for x in (
                call.q, call.out, items, starts, call.query_start_loc, call.seq_lens, call.block_table,
                scratch.partial, scratch.stats, scratch.counters,
            )),
            *map(ctypes.c_int, (
                num_items, heads, call.q.stride(0), call.q.stride(1), call.out.stride(0), call.out.stride(1),
                call.block_table.stride(0),
            )),
            ctypes.c_float(call.scale * _LOG2_E), overlap=overlap,
        )  # fmt: skip

    def _kernel(self, group: int, block_size: int, *, contiguous: bool) -> Kernel:
        key = (group, block_size, contiguous)
        if key not in self._compiled:
            constants, shared_bytes = launch_constants(group, block_size, contiguous=contiguous)
            self._compiled[key] = self._kernels.compile(
                "stream_decode", constants, threads=32 * _WARPS, shared_bytes=shared_bytes
            )
        return self._compiled[key]
