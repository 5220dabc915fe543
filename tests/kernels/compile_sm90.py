"""Compiles the attention and fused kernels for Hopper without a GPU; prints what each needs as a JSON object.

Run by test_compile_sm90.py in a process of its own, because there the interpreter has to be off.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvarena.engine.kernels import INTERPRET
from kvarena.engine.kernels.activation import gated_kernel
from kvarena.engine.kernels.all_reduce import all_reduce_kernel, best_token_kernel
from kvarena.engine.kernels.attention.config import decode_config, prefill_config, shared_config
from kvarena.engine.kernels.attention.decode import decode_kernel, merge_width
from kvarena.engine.kernels.attention.prefill import prefill_kernel
from kvarena.engine.kernels.attention.shared_decode import VIEWS, constants_of, shared_decode_kernel
from kvarena.engine.kernels.common import VARYING, next_power_of_2
from kvarena.engine.kernels.drawing import MAX_CHOSEN, MAX_PARTS, MAX_TOP_K, NUM_GROUPS, TILE, key_shift
from kvarena.engine.kernels.experts.few import norm_route_kernel, route_few_kernel
from kvarena.engine.kernels.experts.grouped import gather_rows_kernel
from kvarena.engine.kernels.experts.products import MANY_ROWS, TILES, add_experts_kernel, expert_product_kernel
from kvarena.engine.kernels.experts.routing import route_kernel, sort_kernel
from kvarena.engine.kernels.filtered import CHOSEN_WARPS, check_kernel, draw_again_kernel, draw_chosen_kernel
from kvarena.engine.kernels.norm import rms_norm_kernel
from kvarena.engine.kernels.penalties import penalize_kernel
from kvarena.engine.kernels.rope import rope_store_kernel
from kvarena.engine.kernels.sample import draw_kernel
from kvarena.engine.kernels.store import store_kv_kernel
from kvarena.engine.kernels.threshold import SETTLE_TILE, SETTLE_WARPS, settle_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Head size, query heads per KV head, block size, and what else: one line per family of models.
ATTENTION = {
    "llama-8b": (128, 4, 16, {}),
    "llama-8b contiguous": (128, 4, 16, {"CONTIGUOUS": True}),
    "qwen2-7b": (128, 7, 1, {}),
    "gemma2": (256, 2, 16, {"WINDOW": 4096, "SOFTCAP": True}),
    "gpt-oss": (64, 8, 256, {"WINDOW": 128, "SINKS": True}),
    "phi": (80, 1, 16, {}),
}
# One of each configuration that `decode_config` knows; for the most common heads and the largest.
DECODE_ROWS = (1, 16, 32, 256)
EVERY_CONFIG = ("llama-8b", "gemma2")
FEW = ("llama-8b", "gpt-oss")  # with --few: decodes in every configuration of one, all kernels of the other
MEMORY_ACCESS = re.compile(r"\b(ld\.global|st\.global|cp\.async|atom\.)")
INTEGERS = {
    "items_ptr",
    "query_loc_ptr",
    "seq_lens_ptr",
    "table_ptr",
    "counters_ptr",
    "queue_ptr",
    "head_ptr",
    "places_ptr",
    "cells_ptr",
    "parts_ptr",
    "ids_ptr",
    "order_ptr",
    "read_ptr",
    "calls_ptr",
    "params_ptr",
}
ADDRESSES = {"slots_ptr", "buffers_ptr", "flags_ptr", "tokens_ptr", "last_ptr"}  # fmt: skip
FLOATS = {"partial_ptr", "stats_ptr", "cos_ptr", "sin_ptr", "weights_ptr", "shared_ptr", "scores_ptr"}
DRAW = {"last_ptr": "*i64", "sums_ptr": "*i64", "cuts_ptr": "*i64"} | dict.fromkeys(
    ("params_ptr", "tokens_ptr", "arrived_ptr", "groups_ptr", "states_ptr", "pivots_ptr", "bounds_ptr",
     "num_chosen_ptr", "chosen_ptr"), "*i32",
) | dict.fromkeys(("scores_ptr", "tops_ptr", "row_peaks_ptr", "peaks_ptr"), "*fp32")  # fmt: skip


def argument_type(name):
    if name in ADDRESSES:
        return "*i64"
    if name in INTEGERS:
        return "*i32"
    if name in FLOATS:
        return "*fp32"
    if name.endswith("_ptr"):
        return "*bf16"
    return "fp32" if name in {"scale", "softcap", "epsilon"} else "i32"


def resources(kernel, constants, num_warps, num_stages, max_registers=None, unaligned=(), types=None):
    """Registers, stack and local bytes per thread, shared memory, and which matrix instructions occur."""
    if "OVERLAP" in kernel.arg_names:
        constants = constants | {"OVERLAP": True}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else (types or {}).get(name) or argument_type(name)
        varying = [*VARYING["do_not_specialize"], *VARYING["do_not_specialize_on_alignment"], *unaligned]
        if name not in varying and (
            signature[name].startswith("*") or name.startswith("stride") or name == "vocab_size"
        ):
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "maxnreg": max_registers},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return found | {
        "shared": compiled.metadata.shared,
        "wgmma": "wgmma.mma_async" in ptx,
        "mma": "mma.sync" in ptx,
        "waits": "griddepcontrol.wait" in ptx,
        "before_wait": sorted(set(MEMORY_ACCESS.findall(ptx.split("griddepcontrol.wait")[0]))),
        "wrong_reductions": wrong_reductions(compiled.asm["ttgir"]),
        "arrivals": arrivals(ptx),
        "argmax": bool(re.search(r'"tt\.reduce"\(%\w+, ', compiled.asm["ttgir"])),
        "cp_async": "cp.async" in ptx,
        "exchange": re.findall(
            r"bar\.sync|\bld\.global\.sys\.acquire|\bld\.global\.cg\S*|\batom\.global\.sys\.release", ptx
        ),
        "wide_loads": "ld.global.v4" in ptx or "cp.async.cg.shared.global" in ptx,
    }


def arrivals(ptx):
    """How programs tell the last of them that they have written: each time, [what is before, what is after].

    Before: whether all threads' stores come before a barrier, and this before the one thread's exchange. After: whether
    its outcome goes through shared memory and a barrier to all threads, before any reads what others have written.
    """
    order = re.findall(
        r"^\s*(?:@%\w+ )?(bar\.sync|st\.global|ld\.global\.cg|st\.shared|ld\.shared|atom\.global\.gpu\.acq_rel\.add)",
        ptx, re.MULTILINE,
    )  # fmt: skip
    found = []
    for at, one in enumerate(order):
        if one.startswith("atom"):
            before = next((o for o in reversed(order[:at]) if o in ("bar.sync", "st.global")), None)
            after = [o for o in order[at + 1 :] if o != "st.global"][:3]
            found.append([before == "bar.sync", after == ["st.shared", "bar.sync", "ld.shared"]])
    return found


def wrong_reductions(ttgir):
    """Reductions and scans for which Triton (3.6, 3.7) adds up the wrong lanes.

    It takes the lanes that differ along the axis to be neighbours. In a layout that came of a reshape they need not be:
    others between them may repeat what they hold.
    """
    bases = dict(re.findall(r"^(#linear\d*) = #ttg\.linear<\{.*lane = (\[\[.*?\]\])", ttgir, re.MULTILINE))
    found = re.findall(r'"tt\.(?:reduce|scan)"\(.*?<\{axis = (\d+).*?\n\s*\}\) : \((.*?)\) ->', ttgir, re.DOTALL)
    wrong = []
    for axis, operand in found:
        for layout in re.findall(r"#linear\d*", operand):
            moves = [bit for bit, basis in enumerate(json.loads(bases[layout])) if basis[int(axis)]]
            if "parent" in operand or (moves and moves[-1] - moves[0] >= len(moves)):
                wrong.append(f"{operand} with lanes {bases[layout]}")
    return wrong


def draw_resources(few):
    """The draw's kernels, over logits as a model in bf16 gives them and as an edit leaves them; penalties."""
    shared = {"PARTS": MAX_PARTS, "FAST": True}
    floats = ("logits_ptr", "presence_ptr", "frequency_ptr", "repetition_ptr")
    types = {"rows_ptr": "*i64", "slots_ptr": "*i64", "in_prompt_ptr": "*u8", "counts_ptr": "*i32"}
    types |= dict.fromkeys(floats, "*fp32")
    yield "penalties", resources(penalize_kernel, {"TILE": TILE}, 4, 3, types=types)
    for name, dtype in (("", torch.bfloat16),) if few else (("", torch.bfloat16), (" float32", torch.float32)):
        types = DRAW | {"logits_ptr": "*bf16" if dtype == torch.bfloat16 else "*fp32"}
        shift = {"SHIFT": key_shift(dtype)}
        groups = {"GROUPS": NUM_GROUPS, "MAX_TOP_K": MAX_TOP_K}
        for pair in (False, True):
            own = shared | shift | groups | {"TILE": TILE, "PAIR": pair}
            outputs = {"out_ptr": "*i64", "peaks_ptr": "*fp32" if pair else types["logits_ptr"]}
            yield f"draw{' part' * pair}{name}", resources(draw_kernel, own, 4, 3, types=types | outputs)
        types |= {"out_ptr": "*i64"}
        yield f"draw again{name}", resources(draw_again_kernel, shared | {"TILE": TILE}, 4, 3, types=types)
        own = shift | {"TILE": TILE, "PARTS": MAX_PARTS, "CHOSEN": MAX_CHOSEN}
        yield f"draw check{name}", resources(check_kernel, own, 4, 3, types=types)
        own = shift | {"FAST": True, "CHOSEN": MAX_CHOSEN}
        yield f"draw chosen{name}", resources(draw_chosen_kernel, own, CHOSEN_WARPS, 3, types=types)
        own = shift | {"TILE": SETTLE_TILE, "FAST": True}
        yield f"draw settle{name}", resources(settle_kernel, own, SETTLE_WARPS, 3, types=types)


def launch(config):
    return config.num_warps, config.num_stages, config.max_registers


def attention_resources(few):
    for name, (head_dim, group, block_size, options) in ATTENTION.items():
        if few and name not in FEW:
            continue
        group_pad, dim_pad = next_power_of_2(group), max(16, next_power_of_2(head_dim))
        shared = {
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "DIM_PAD": dim_pad,
            "SLOT": tl.int32,
            "STRIDE_SLOT": 8 * head_dim,
            "BLOCK_SIZE": block_size,
            "WINDOW": 0,
            "SOFTCAP": False,
            "SINKS": False,
            "CONTIGUOUS": False,
            "UPCAST": False,
        } | options
        for num_rows in DECODE_ROWS if name in EVERY_CONFIG else DECODE_ROWS[-1:]:
            decode = decode_config(head_dim, 2, num_rows)
            own = {
                "GROUP_PAD": group_pad,
                "ROWS": max(16, group_pad),
                "TILE": decode.tile,
                "MERGE": merge_width(group_pad, dim_pad, decode.num_warps),
                "STAGES": decode.num_stages,
            }
            needs = resources(decode_kernel, shared | own, *launch(decode))
            yield f"decode {name} x {num_rows}", needs | {"threads": 32 * decode.num_warps}
        if few and name in EVERY_CONFIG:
            continue
        if not shared["CONTIGUOUS"]:
            config = shared_config(head_dim, 2, group)
            own = constants_of(config, group, dim_pad) | {"TILE": config.tile, "STAGES": config.num_stages}
            needs = resources(shared_decode_kernel, shared | own, *launch(config), unaligned=VIEWS)
            yield f"shared {name}", needs | {"threads": 32 * config.num_warps, "programs": config.programs_per_sm}
        prefill = prefill_config(head_dim, 2, group)
        own = {
            "QUERIES": prefill.rows // group,
            "ROWS": prefill.rows,
            "TILE": prefill.tile,
            "STAGES": prefill.num_stages,
        }
        yield f"prefill {name}", resources(prefill_kernel, shared | own, *launch(prefill))


def fused_resources():
    heads = {"HEAD_DIM": 128, "DIM_PAD": 128}
    rope = heads | {"KV_HEADS": 8, "KV_HEADS_PAD": 8, "HALF": 64, "HALF_PAD": 64, "TURN_KEYS": True}
    yield "rope", resources(rope_store_kernel, rope | {"HEADS": 16, "HEADS_PAD": 16, "NORM": True}, 2, 3)
    yield "store", resources(store_kv_kernel, heads | {"HEADS": 8, "HEADS_PAD": 8, "GATHER": False}, 4, 3)
    norm = {"SIZE": 4096, "SIZE_PAD": 4096, "ADD": True}
    yield "norm", resources(rms_norm_kernel, norm, 8, 3)
    ranks = {"RANKS": 2, "RANK": 1, "PUBLISH": True, "REDUCE": True}
    yield "all-reduce", resources(all_reduce_kernel, norm | ranks | {"NORM": True}, 8, 3)
    yield "best token", resources(best_token_kernel, ranks, 1, 3)
    yield "activation", resources(gated_kernel, {"SIZE": 14336, "TILE": 2048}, 4, 3)


def expert_resources(few):
    """The kernels of a layer's experts, in every shape of launch."""
    sizes = {"EXPERTS": 128, "TOP_K": 8}
    route = sizes | {"EXPERTS_PAD": 128, "TOP_K_PAD": 8, "RENORMALIZE": True, "SHARED": True, "PADDED": True}
    yield "experts route", resources(route_kernel, route, 1, 3)
    mixtral = route | {"EXPERTS": 8, "EXPERTS_PAD": 8, "TOP_K": 2, "TOP_K_PAD": 2, "SHARED": False}
    for name, chosen, tokens in (
        ("", route, 1), ("", route, 8), (" of 8", mixtral, 1), (" of 8", mixtral, 8), (" of 8", mixtral, 16),
        (" of 8", mixtral, 32),
    ):  # fmt: skip
        if few and chosen is mixtral and tokens in (8, 16):
            continue
        shape = chosen | {"TOKENS_PAD": tokens, "ROWS": 16, "SPAN": 16}
        # A row of logits of eight experts is no multiple of 16, and `num_read` is one of a tensor's.
        unaligned = ("read_ptr", "stride_logits") if chosen is mixtral else ()
        needs = resources(route_few_kernel, shape, 1 if tokens == 1 else 4, 3, unaligned=unaligned)
        yield f"experts route few{name} x {tokens}", needs
        if tokens <= 8:
            made = (
                {"LOGITS": 9, "SIZE": 4096, "SIZE_PAD": 4096, "BLOCK": 2}
                if chosen is mixtral
                else {"LOGITS": 129, "SIZE": 2048, "SIZE_PAD": 2048, "BLOCK": 4}
            )
            needs = resources(norm_route_kernel, shape | made, 4, 3, unaligned=unaligned, types={"lock_ptr": "*i32"})
            yield f"experts norm and route{name} x {tokens}", needs
    for block, warps in ((1024, 4), (4096, 16)):
        sort = {"EXPERTS": 128, "EXPERTS_PAD": 256, "ROWS": 16, "SPAN": 16, "BLOCK": block}
        yield f"experts sort x {block}", resources(sort_kernel, sort, warps, 3)
    yield "experts gather", resources(gather_rows_kernel, {"TOP_K": 8, "SIZE": 2048, "TILE": 2048}, 2, 3)
    yield "experts sum", resources(add_experts_kernel, sizes | {"SIZE": 4096, "TILE": 2048}, 4, 3)
    for tile in [*TILES.values(), MANY_ROWS]:
        if few and tile.rows not in (16, 128):
            continue
        shape = {"TOP_K": 2, "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "EVEN_DEPTH": True,
                 "SWAP": tile.swap, "UPCAST": False, "STAGES": tile.num_stages, "LINES": tile.depth // 64,
                 "PER_LINE": 64}  # fmt: skip
        for name, glu, summed in (("gate and up", True, False), ("down", False, False), ("down and sum", False, True)):
            if summed and tile.rows > 16:
                continue  # of few tokens
            kind = {"GLU": glu, "SUM": summed, "EXPERTS": 8}
            types = {"locks_ptr": "*i32"}
            needs = resources(expert_product_kernel, shape | kind, tile.num_warps, tile.num_stages, types=types)
            yield f"experts {name} x {tile.rows}", needs | {"threads": 32 * tile.num_warps}


if __name__ == "__main__":
    if INTERPRET:
        raise SystemExit("set TRITON_INTERPRET=0")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        few = "--few" in sys.argv
        found = dict(attention_resources(few)) | dict(fused_resources()) | dict(expert_resources(few))
        found |= dict(draw_resources(few))
        print(json.dumps(found))
