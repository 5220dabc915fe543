"""What the kernel benchmark counts, and what it says without a GPU."""

import json

import numpy as np
import pytest
import torch

from kvarena.engine.errors import ConfigError
from kvarena.engine.kernels.attention.config import decode_config
from kvarena.engine.kernels.experts.grouped import GroupedTile
from kvarena.engine.kernels.experts.products import MANY_ROWS, tile_for
from kvarena.engine.kernels.gemm import dense, turned
from kvarena.engine.kernels.gemm.dense import DenseTile
from kvarena.engine.kernels.gemm.packed_stream import StreamWeight
from kvarena.engine.kernels.gemm.packed_wide import PackedWideTile, WideShape
from kvarena.engine.kernels.gemm.stream import StreamTile
from kvarena.engine.kernels.hopper import SHARED_BYTES
from kvarena.engine.quantization.hopper import hopper_tile
from kvarena.experiments.benchmarks.engine_profile import find_gaps
from kvarena.experiments.benchmarks.kernels import experts, kernels, layer_gemm, packed_gemm
from kvarena.experiments.benchmarks.kernels.attention_cases import LLAMA_8B, Batch, visible_pairs
from kvarena.experiments.benchmarks.kernels.attention_variants import DECODE_TILES, decode_variants
from kvarena.experiments.benchmarks.kernels.gemm import cases
from kvarena.experiments.gpu.floors import shape_of


@pytest.mark.parametrize("rows", [[(0, 5)], [(7, 1), (3, 4)], [(100, 1)] * 3])
def test_visible_pairs_are_those_of_causal_attention(rows):
    counted = sum(start + i + 1 for start, new in rows for i in range(new))
    starts, query_lens = (np.array(column) for column in zip(*rows, strict=True))
    assert visible_pairs(starts, query_lens) == counted


def test_bytes_are_keys_values_queries_and_results():
    q = torch.empty(2, 32, 128)
    batch = Batch(LLAMA_8B, np.array([9, 19]), np.array([1, 1]), q, q, q, q, 16)
    assert batch.num_bytes == 30 * 8 * 128 * 2 * 2 + 2 * 2 * 32 * 128 * 2
    assert batch.num_flops == 4 * 30 * 32 * 128


@pytest.mark.parametrize("batch_size", [1, 8, 32, 64, 256])
def test_variants_begin_with_the_default_and_repeat_none(batch_size):
    default = decode_config(128, 2, 256)
    variants = decode_variants(default, batch_size, DECODE_TILES)
    assert variants[0] == default and len(variants) == len(set(variants)) > 5


def test_packed_weights_that_are_timed_are_of_the_size_that_weights_have():
    weight = packed_gemm.random_packed(48, 256, 64, torch.device("cpu"))
    values = weight.dequantize()
    assert values.shape == (48, 256)
    assert 0.5 < float(values.std()) * 16 < 2
    assert weight.num_bytes == 48 * 256 // 2 + 3 * 48 * 4


@pytest.mark.parametrize("num_rows", [1, 8, 40, 64, 100, 192, 256, 2048])
def test_the_packed_benchmark_measures_what_the_engine_takes_and_with_tune_others_that_fit(num_rows):
    for case in list(cases(shape_of("llama-3.1-8b"), num_rows))[:4]:
        _, num_cols, depth, glu = case.product
        chunks = torch.empty(num_cols // 64, depth // 128, 1088, device="meta")
        weight = StreamWeight(chunks, (num_cols, depth), 1, glu)
        taken = hopper_tile(num_rows, weight, 132, norm=case.has_norm, glu=glu)
        own, tuned = (
            packed_gemm.stream_tiles(case, weight, 132, tune=tune)
            + packed_gemm.wide_tiles(case, weight, 132, tune=tune)
            for tune in (False, True)
        )
        assert taken in own and set(own) < set(tuned) and len(set(tuned)) == len(tuned), (case, own)
        assert len(own) == (num_rows <= 256) + (num_rows > 32)
        for tile in tuned:
            if isinstance(tile, PackedWideTile):
                assert tile.fits(WideShape(num_rows, *chunks.shape[:2], 1, glu)), tile
            else:
                launch = packed_gemm.PackedStreamLaunch(tile, num_rows, depth, 1, "GLU" if glu else "ADD")
                assert launch.num_stages >= 2 and launch.shared_bytes * tile.per_sm <= SHARED_BYTES, tile


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures on this machine")
@pytest.mark.parametrize("tool", [kernels, layer_gemm, packed_gemm])
def test_without_a_gpu_it_says_so_in_one_line(tool, capsys):
    with pytest.raises(ConfigError, match="run it on a CUDA machine"):
        tool.main([])
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
def test_the_experts_benchmark_works_without_a_gpu(capsys, tmp_path):
    """Of the tiny shape: every line whole, and the kernels' sum that of transformers' grouped product."""
    out = tmp_path / "lines.jsonl"
    assert experts.main(["--shape", "tiny", "--tokens", "1", "6", "--out", str(out)]) == 0
    machine, *lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "interpreted" in machine["device"] and machine["matmul_tflops"] >= 0
    assert [(line["tokens"], line["by"]) for line in lines] == [
        (tokens, by) for tokens in (1, 6) for by in ("kvarena", "transformers grouped_mm")
    ]
    assert [line["experts_read"] for line in lines] == [2, 2, 8, 8]
    assert all(line["us"] > 0 for line in lines)
    assert all(line["difference"] < 0.02 for line in lines if line["by"] == "kvarena")
    assert len(out.read_text().splitlines()) == 5
    with pytest.raises(ConfigError, match="run it on a CUDA machine"):
        experts.main([])


def test_the_experts_benchmark_counts_weights_that_are_read():
    """Mixtral's bars are those of a card that copies at 4.25 TB/s: 2 and 8 experts of 352 MB each."""
    shape = experts.SHAPES["mixtral-8x7b"]
    with torch.device("meta"):
        weights = torch.empty(8, 2 * 14336, 4096, dtype=torch.bfloat16), torch.empty(8, 4096, 14336)
        one, eight = (experts.Layer(shape, tokens, weights) for tokens in (1, 8))
    assert one.num_bytes / 4.25e12 * 1e6 == pytest.approx(166, abs=1)
    assert eight.num_bytes / 4.25e12 * 1e6 == pytest.approx(663, abs=1)
    assert experts.Layer(shape, 2048, weights).num_flops / 690e12 * 1e6 == pytest.approx(2091, abs=1)
    assert [len(chosen.unique()) for chosen in experts.Layer(experts.SHAPES["tiny"], 3, experts.make_weights(
        experts.SHAPES["tiny"], torch.device("cpu"))).choices] == [6] * experts.NUM_ROUTINGS  # fmt: skip


def test_the_experts_benchmark_measures_what_the_engine_takes_first_and_the_other_kernel_beside_it():
    few, many = experts.choices(8, 128, hopper=True, tune=False), experts.choices(4096, 8, hopper=True, tune=False)
    assert few == [(tile_for(8, 128), None)]
    assert many == [(GroupedTile(False), None), (MANY_ROWS, None), (GroupedTile(True), None)]
    assert experts.choices(4096, 8, hopper=False, tune=False) == [(MANY_ROWS, None)]
    for pairs, num_experts in ((8, 128), (4096, 8)):
        found = experts.choices(pairs, num_experts, hopper=True, tune=True)
        assert len(found) == len(set(found)) > 10
        assert all(down is None or down.rows == tile.rows for tile, down in found)


def test_tables_have_the_launches_that_are_faster(monkeypatch):
    """And nothing of rows that no table has, nor of what is within noise."""
    heads, wide = StreamTile(2, 2, 2, 1, True), DenseTile(192, 2, False, 2)

    class Layer(layer_gemm.Layer):
        def heads_line(self, num_rows):
            return {"us": 8.0, "best_us": 6.5 if num_rows == 8 else 7.9, "tile": heads}

        def dense_line(self, product, num_rows, num_tiles):
            assert num_tiles == 3
            return {"us": 24.0} if product == "o" else {"us": 24.0, "best_us": 21.0, "tile": wide}

        def gated_line(self, num_rows):
            return {"us": 24.0, "best_us": 30.0 if num_rows == 100 else 20.0, "tile": (224, 2)}

    class Kernels:
        num_multiprocessors = 132

    monkeypatch.setattr(layer_gemm, "Layer", Layer)
    for name in ("TritonOps", "TurnedGemm", "DenseGemm", "WideGemm"):
        monkeypatch.setattr(layer_gemm, name, lambda *args: None)
    monkeypatch.setattr(layer_gemm, "load_hopper_kernels", lambda device: Kernels())
    monkeypatch.setattr(turned, "MEASURED", {(1, 1): {}})
    monkeypatch.setattr(dense, "MEASURED", {(1, 1): {}})
    shapes = ["llama-3.1-8b", "qwen3-30b-a3b"]
    *lines, last = layer_gemm.lines(shapes, list(layer_gemm.PRODUCTS), [8, 100, 256], 3)
    assert len(lines) == 3 * 6 + 3 * 4 and not turned.MEASURED and not dense.MEASURED
    tables = {name: eval(text) for name, text in last["tables"].items()}
    assert tables["turned"] == {(6144, 4096): {8: heads}, (5120, 2048): {8: heads}}
    assert tables["dense"][4096, 14336] == {256: wide} and (4096, 4096) not in tables["dense"]
    assert tables["wide"][28672, 4096] == 256, "8 rows were faster, and 100 were not"
    assert json.loads(json.dumps(lines[0]))["tile"] == list(heads)


def test_gaps_are_where_nothing_runs():
    """Kernels that overlap leave none, whatever ended first."""
    events = [(0, 10, "a"), (4, 8, "b"), (9, 12, "c"), (15, 16, "a"), (16, 20, "b"), (23, 24, "a")]
    assert find_gaps(events[::-1]) == {("c", "a"): (1, 3.0), ("b", "a"): (1, 3.0)}
    assert find_gaps([]) == {}
