"""Compiles the GEMM, draw and step kernels for Hopper without a GPU; prints what each needs as a JSON object.

Run by test_gemm_compile.py in a process of its own, because there the interpreter has to be off.
"""

import itertools
import json
import sys

import compile_sm90
from compile_sm90 import resources

from kvarena.engine.kernels import INTERPRET, step
from kvarena.engine.kernels.gemm import glu, packed, packed_experts
from kvarena.engine.kernels.gemm import skinny as gemm
from kvarena.engine.kernels.gemm.table import GemmTable

TYPES = {
    "ws_ptr": "*fp32", "lock_ptr": "*i32", "eps": "fp32", "scores_ptr": "*fp32", "tokens_ptr": "*i32",
    "arrived_ptr": "*i32", "params_ptr": "*i32", "last_ptr": "*i64", "out_ptr": "*i64", "sent_ptr": "*i32",
    "tables_ptr": "*i32", "ids_ptr": "*i64", "positions_ptr": "*i64", "slots_ptr": "*i64", "lens_ptr": "*i32",
    "scales_ptr": "*fp16", "experts_ptr": "*i32", "order_ptr": "*i32",
    "zeros_ptr": "*u8", "out_table_ptr": "*i32", "flat_ptr": "*i32",
    "pairs_ptr": "*i32", "fields_ptr": "*i32",
}  # fmt: skip


PACKED_CODES = ("*i32", "*fp8e4nv")
PRODUCTS = ((1, 6144, 4096, False), (1, 28672, 4096, True), (32, 4096, 14336, False), (32, 28672, 4096, True))


def gemm_resources(few):
    table = GemmTable(max_rows=64)
    for rows, cols, depth, is_glu in PRODUCTS[::3] if few else PRODUCTS:
        config = table.find(rows, cols, depth, glu=is_glu)
        assert config is not None
        constants = {
            "BM": gemm.block_m(rows, config), "BN": config.block_n, "BK": config.block_k,
            "IS_SPLIT": config.split_k > 1, "EVEN_K": True, "HAS_BIAS": False, "HAS_NORM": config.fuse_norm,
            "HAS_RES": not is_glu, "GLU": is_glu, "USE_DOT": config.use_dot, "UPCAST": False,
            "STAGES": config.num_stages,
        }  # fmt: skip
        yield (
            f"gemm {rows} x {cols} x {depth}",
            resources(gemm.skinny_gemm_kernel, constants, config.num_warps, config.num_stages),
        )


def glu_resources(few):
    for num_rows in (32, 256) if few else (32, 128, 192, 256):
        tile = glu.glu_tile(num_rows, 6144, 1024, 132)
        constants = {
            "STEPS": 1024 // tile.depth, "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "PAIRED": 8,
            "UPCAST": False, "STAGES": tile.num_stages,
        }  # fmt: skip
        TYPES["x_desc"] = f"tensordesc<bf16[{tile.rows},{tile.depth}]>"
        TYPES["w_desc"] = f"tensordesc<bf16[{tile.cols // 16},2,8,{tile.depth}]>"
        yield f"glu {num_rows}", resources(glu.glu_kernel, constants, tile.num_warps, tile.num_stages)


def packed_resources(few):
    """Products with packed weights: of 4 bits with zero points, and in 8 bits, for few rows and for many."""
    for num_rows, codes in ((1, "*i32"), (256, "*i32")) if few else itertools.product((1, 32, 64, 256), PACKED_CODES):
        tile = packed.packed_tile(num_rows, 4096, 128)
        constants = {
            "BM": tile.rows, "BN": tile.cols, "BK": tile.depth, "BITS": 4 if codes == "*i32" else 8,
            "HAS_ZEROS": codes == "*i32", "HAS_BIAS": False, "HAS_RES": True, "EVEN_K": True, "UPCAST": False,
            "STAGES": tile.num_stages,
        }  # fmt: skip
        TYPES["codes_ptr"] = codes
        yield (
            f"packed {num_rows} {codes}",
            resources(packed.packed_gemm_kernel, constants, tile.num_warps, tile.num_stages),
        )


def packed_expert_resources(few):
    for num_rows in (64,) if few else (16, 32, 64):
        tile = packed.packed_tile(num_rows, 4096, 128)
        constants = {
            "TOP_K": 2, "BM": tile.rows, "BN": tile.cols, "BK": tile.depth, "BITS": 4, "HAS_ZEROS": True,
            "HAS_ORDER": False, "EVEN_K": True, "UPCAST": False, "STAGES": tile.num_stages,
        }  # fmt: skip
        TYPES["codes_ptr"], TYPES["slots_ptr"] = "*i32", "*i32"
        yield (
            f"packed-experts {num_rows}",
            resources(packed_experts.packed_experts_kernel, constants, tile.num_warps, tile.num_stages),
        )
        TYPES["slots_ptr"] = "*i64"


def main():
    if INTERPRET:
        raise SystemExit("run with TRITON_INTERPRET=0")
    attention_type = compile_sm90.argument_type
    compile_sm90.argument_type = lambda name: TYPES.get(name) or attention_type(name)
    few = "--few" in sys.argv
    found = dict(gemm_resources(few)) | dict(glu_resources(few))
    found |= dict(packed_resources(few)) | dict(packed_expert_resources(few))
    found["expand"] = resources(step.expand_kernel, {"BLOCK_SIZE": 16, "CHUNK": 512}, 2, 3)
    found["expand tokens"] = resources(step.expand_tokens_kernel, {"BLOCK_SIZE": 16, "BLOCK": 128}, 4, 3)
    found["scatter"] = resources(step.scatter_kernel, {"BLOCK": 256}, 4, 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
