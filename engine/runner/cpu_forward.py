"""The fused forward of a CPU in one call: every layer's kernels are stages of one program, and so are its ends.

    embed, angles | norm, q k v, turn and store, attend, o, norm, gate up, silu *, down | ... | pick rows | norm, logits

For a model whose products are all with weights in panels, behind a `CpuBackend`. A step that wants more than that
(images) takes the decoder itself, whose kernels are the same, called one by one.
"""

from __future__ import annotations

import functools
import time
from enum import IntEnum, auto
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionBackend, AttentionMetadata
from kvarena.engine.attention.cpu_backend import CpuBackend, PreparedStep
from kvarena.engine.cpu import decode, prompt
from kvarena.engine.cpu.compiler import most_threads
from kvarena.engine.cpu.layers import bias_kernel, gather_kernel, glu_kernel, norm_kernel, rope_store_kernel
from kvarena.engine.cpu.panels import panel_kernel
from kvarena.engine.cpu.program import Program, Variable
from kvarena.engine.cpu.simd import F32
from kvarena.engine.fusions.decoder import FusedDecoder
from kvarena.engine.fusions.layers import FusedAttention, FusedGlu
from kvarena.engine.fusions.ops import Norm
from kvarena.engine.fusions.panels import PanelLinear, Panels
from kvarena.engine.pool.kv_pool import KVPool

if TYPE_CHECKING:  # of a model that reads text nothing of it is imported
    from kvarena.engine.vision.encoder import InputRows

# Of the processor time of a step's threads: with less they waited for cores that others have. So many steps later,
# twice as many each time, the next step tries again.
_OWN_CORES, _LONGEST_PAUSE = 0.75, 64


class _Step(IntEnum):
    """What a step tells its program: numbers of rows, and addresses."""

    TOKENS = 0
    PICKED_ROWS = auto()
    IDS = auto()
    POSITIONS = auto()
    SLOTS = auto()
    PICKED = auto()
    TABLE = auto()
    TABLE_WIDTH = auto()
    SEQ_LENS = auto()
    QUERY_LOC = auto()
    DECODES = auto()
    NUM_DECODES = auto()
    PROMPTS = auto()
    NUM_PROMPTS = auto()
    LOGITS = auto()
    # Memory to work in: [rows, hidden] twice, twice as wide as a layer wants it, the angles, and the attention's own.
    STREAM = auto()
    NORMED = auto()
    WIDE = auto()
    NARROW = auto()
    COS = auto()
    SIN = auto()
    DECODE_SCRATCH = auto()
    PROMPT_SCRATCH = auto()


_V = {step: Variable(int(step)) for step in _Step}


def make_forward(decoder: FusedDecoder, backend: AttentionBackend, pool: KVPool) -> Any:
    """The decoder's forward over `pool`: in one call where it can be, else the decoder itself."""
    if isinstance(backend, CpuBackend) and _is_compilable(decoder):
        return CpuForward(decoder, backend, pool)
    return functools.partial(decoder, backend=backend, pool=pool)


def _is_compilable(decoder: FusedDecoder) -> bool:
    """Whether all that the decoder does has a kernel."""
    products: list[Any] = [decoder.head]
    norms: list[Norm | None] = [decoder.norm]
    for layer in decoder.layers:
        if not isinstance(layer.mlp, FusedGlu):
            return False
        products += [layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down]
        norms += [layer.attention.norm, layer.mlp.norm, *(layer.attention.head_norms or ())]
        sinks = layer.attention.args.sinks
        if sinks is not None and not (sinks.dtype == torch.float32 and sinks.is_contiguous()):
            return False
    return (
        all(isinstance(product, PanelLinear) for product in products)
        and all(norm is not None and norm.weight.dtype == torch.float32 for norm in norms)
        and _embedding(decoder) is not None
    )


def _embedding(decoder: FusedDecoder) -> tuple[int, int] | None:
    """The address of the tokens' rows and the width of their panels; None where no plain table has one for each."""
    if isinstance(decoder.embed, Panels):
        return decoder.embed.address, decoder.embed.data.shape[2]
    weight = getattr(decoder.embed, "keywords", {}).get("weight")
    if weight is None or weight.dtype != torch.float32 or not weight.is_contiguous():
        return None
    # A kernel would read behind its end.
    return (weight.data_ptr(), 1) if decoder.head is not None and len(weight) >= decoder.head.out_features else None


class CpuForward:
    """See `kvarena.engine.runner.graphs.Forward`.

    Args:
        decoder: of products in panels.
        backend: attention over `pool`.
        pool: where keys and values go.

    Attributes:
        decoder: as given.
        program: the stages.
    """

    def __init__(self, decoder: FusedDecoder, backend: CpuBackend, pool: KVPool) -> None:
        self.decoder = decoder
        self._backend, self._pool = backend, pool
        assert isinstance(decoder.head, PanelLinear)
        self._vocab_size = decoder.head.out_features
        stages = _Stages(decoder, backend, pool)
        self.program = Program(stages.made)
        self._num_stored = stages.num_stored
        sizes = [self._sizes(layer.attention, layer.mlp) for layer in decoder.layers]  # type: ignore[arg-type]
        hidden = len(decoder.layers[0].attention.norm.weight)
        wide, narrow = (max(size[part] for size in sizes) for part in (0, 1))
        # Of a row, in whole lines of the cache.
        self._columns = [-(-words // 16) * 16 for words in (hidden, hidden, wide, narrow, decoder.rotation.shape[1])]
        self._rows = 0
        self._work = self._scratch = torch.empty(0)
        self._pause = self._next_pause = 0

    @staticmethod
    def _sizes(attention: FusedAttention, mlp: FusedGlu) -> tuple[int, int]:
        heads = attention.heads
        wide = max(attention.qkv.out_features, mlp.gate_up.out_features)
        return wide, max(heads.num_heads * heads.head_dim, mlp.gate_up.out_features // 2)

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        meta: AttentionMetadata,
        *,
        out: Tensor | None = None,
        all_rows: bool = False,
        inputs: InputRows | None = None,
    ) -> Tensor:
        """See `FusedDecoder.__call__`."""
        if inputs is not None or positions.dim() > 1:
            return self.decoder(
                input_ids, positions, meta, self._backend, self._pool, all_rows=all_rows, out=out, inputs=inputs
            )
        picked = meta.logits_indices
        logits = torch.empty(len(picked), self._vocab_size) if out is None else out
        threads = self._threads()
        self.program.set(self._values(input_ids, positions, meta, logits, threads))
        last = len(self.program.names) if len(picked) else self._num_stored
        if threads == 1:
            self.program.run(1, 0, last)
            return logits
        start, used = time.perf_counter(), time.process_time()
        self.program.run(threads, 0, last)
        used, start = time.process_time() - used, time.perf_counter() - start
        if used < _OWN_CORES * threads * start:
            self._pause = self._next_pause = min(2 * self._next_pause + 1, _LONGEST_PAUSE)
        else:
            self._next_pause = 0
        return logits

    def _threads(self) -> int:
        """All that there may be; one for a while after some had no core to themselves."""
        if self._pause:
            self._pause -= 1
            return 1
        return most_threads()

    def _values(
        self, input_ids: Tensor, positions: Tensor, meta: AttentionMetadata, logits: Tensor, threads: int
    ) -> list[int]:
        """Of the variables, in the order of `_Step`."""
        prepared: PreparedStep = meta.prepared
        tokens, picked = len(input_ids), len(meta.logits_indices)
        if max(tokens, picked) > self._rows:
            self._rows = max(tokens, picked) * 5 // 4
            self._work = torch.empty(self._rows * sum(self._columns))
        place, parts = self._work.data_ptr(), []
        for words in self._columns:
            parts.append(place)
            place += 4 * self._rows * words
        for_decodes, for_prompts = self._scratch_words(threads, prepared.decode_chunks)
        if for_decodes + for_prompts > len(self._scratch):
            self._scratch = torch.empty(2 * (for_decodes + for_prompts))
        scratch = self._scratch.data_ptr()
        return [
            tokens, picked, input_ids.data_ptr(), positions.data_ptr(), meta.slot_mapping.data_ptr(),
            meta.logits_indices.data_ptr(), meta.block_table.data_ptr(), meta.block_table.stride(0),
            meta.seq_lens.data_ptr(), meta.query_start_loc.data_ptr(), prepared.decode_rows.ctypes.data,
            len(prepared.decode_rows), prepared.prompt_rows.ctypes.data, len(prepared.prompt_rows),
            logits.data_ptr(), *parts, parts[-1] + 2 * self.decoder.rotation.shape[1], scratch,
            scratch + 4 * for_decodes,
        ]  # fmt: skip

    def _scratch_words(self, threads: int, chunks: int) -> tuple[int, int]:
        """Of decodes and prompts, for whichever layer has most."""
        heads = [layer.attention.heads for layer in self.decoder.layers]
        return (
            max(decode.scratch_words(n, dim, threads, chunks) for n, _, dim in heads),
            max(prompt.scratch_words(n // kv, dim, threads) for n, kv, dim in heads),
        )


class _Stages:
    """Writes a decoder down as stages.

    Attributes:
        made: the stages.
        num_stored: those of a step that wants no logits: at their end all keys and values are in the pool.
    """

    def __init__(self, decoder: FusedDecoder, backend: CpuBackend, pool: KVPool) -> None:
        self.made: list[tuple[Any, tuple[Any, ...]]] = []
        self.num_stored = 0
        self._backend, self._pool, self._rotary = backend, pool, decoder.rotation.shape[1]
        self._product, self._norm, self._glu = panel_kernel(), norm_kernel(F32), glu_kernel(F32)
        self._turn, self._gather = rope_store_kernel(F32, backend.kind), gather_kernel(F32)
        hidden = len(decoder.layers[0].attention.norm.weight)
        rows, stream, normed = _V[_Step.TOKENS], _V[_Step.STREAM], _V[_Step.NORMED]
        table, width = _embedding(decoder)  # type: ignore[misc]
        self._add(self._gather, table, width, _V[_Step.IDS], stream, rows, hidden)
        angles = decoder.rotation.data_ptr(), 1, _V[_Step.POSITIONS], _V[_Step.COS]
        self._add(self._gather, *angles, rows, self._rotary)
        for layer in decoder.layers:
            self._normed(layer.attention.norm, stream, normed, rows)
            self._attend(layer.attention)
            attended = _V[_Step.NARROW]
            if layer is decoder.layers[-1]:
                # From here on it works for the logits alone: of a prompt, one token.
                rows = _V[_Step.PICKED_ROWS]
                picked, heads = _V[_Step.PICKED], layer.attention.heads
                self._add(self._gather, attended, 1, picked, _V[_Step.WIDE], rows, heads.num_heads * heads.head_dim)
                self._add(self._gather, stream, 1, picked, normed, rows, hidden)
                attended, stream, normed = _V[_Step.WIDE], normed, stream
            self._multiply(layer.attention.out, attended, stream, rows, adds=1)
            mlp: Any = layer.mlp
            self._normed(mlp.norm, stream, normed, rows)
            self._multiply(mlp.gate_up, normed, _V[_Step.WIDE], rows)
            self._add(self._glu, _V[_Step.WIDE], _V[_Step.NARROW], rows, mlp.gate_up.out_features // 2)
            self._multiply(mlp.down, _V[_Step.NARROW], stream, rows, adds=1)
        assert decoder.norm is not None
        self._normed(decoder.norm, stream, normed, rows)
        self._multiply(decoder.head, normed, _V[_Step.LOGITS], rows)

    def _add(self, kernel: Any, *arguments: Any) -> None:
        self.made.append((kernel, arguments))

    def _normed(self, norm: Norm, x: Variable, out: Variable, rows: Variable) -> None:
        self._add(self._norm, x, norm.weight.data_ptr(), out, rows, len(norm.weight), norm.eps)

    def _multiply(self, linear: Any, x: Variable, y: Variable, rows: Variable, adds: int = 0) -> None:
        panels: Panels = linear.panels
        self._add(self._product, x, panels.address, y, rows, panels.num_rows, panels.data.shape[1], adds)
        if linear.bias is not None:
            self._add(bias_kernel(F32), y, linear.bias.data_ptr(), rows, panels.num_rows)

    def _attend(self, attention: FusedAttention) -> None:
        """Queries, keys and values of `NORMED` to the attention's output in `NARROW`."""
        heads, kv_heads, dim = attention.heads
        qkv, rows = _V[_Step.WIDE], _V[_Step.TOKENS]
        self._multiply(attention.qkv, _V[_Step.NORMED], qkv, rows)
        q_norm, k_norm, eps = 0, 0, 0.0
        if attention.head_norms is not None:
            q, k = attention.head_norms
            q_norm, k_norm, eps = q.weight.data_ptr(), k.weight.data_ptr(), q.eps
        keys, values = self._backend.layers[attention.index]
        self._add(
            self._turn, qkv, _V[_Step.COS], _V[_Step.SIN], _V[_Step.SLOTS], keys, values, q_norm, k_norm, rows, heads,
            kv_heads, dim, self._rotary // 2, self._rotary, 0, eps,
        )  # fmt: skip
        self.num_stored = len(self.made)
        scale, window, softcap, sinks = attention.args
        shape = dim, heads // kv_heads, F32, self._backend.kind
        decodes = _V[_Step.DECODES], _V[_Step.NUM_DECODES], _V[_Step.DECODE_SCRATCH]
        prompts = _V[_Step.PROMPTS], _V[_Step.NUM_PROMPTS], _V[_Step.PROMPT_SCRATCH]
        for kernel, (which, count, scratch) in (
            (decode.decode_kernel(*shape), decodes),
            (decode.merge_kernel(*shape[:3]), decodes),
            (prompt.prompt_kernel(*shape), prompts),
        ):
            self._add(
                kernel, qkv, _V[_Step.NARROW], keys, values, _V[_Step.TABLE], _V[_Step.TABLE_WIDTH],
                _V[_Step.SEQ_LENS], _V[_Step.QUERY_LOC], which, count, self._pool.block_size, kv_heads, window or 0,
                self._backend.contiguous, 0 if sinks is None else sinks.data_ptr(), scratch,
                (heads + 2 * kv_heads) * dim, scale, softcap or 0.0,
            )  # fmt: skip
