"""Step times from tables of operations, and the command that makes them of AIConfigurator's."""

import io
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from kvarena.engine.errors import ConfigError
from kvarena.experiments.building.parts import sizes_of
from kvarena.experiments.models import profile as tool
from kvarena.experiments.recording.step_features import StepFeatures
from kvarena.experiments.settings.compose import CONF_DIR, load_run
from kvarena.experiments.simulation.collectives import ONE_CARD
from kvarena.experiments.simulation.operation_tables import ROWS, OperationTables
from kvarena.experiments.simulation.profiles import load_profile

TABLES = CONF_DIR / "profile" / "h200-tables.parquet"


@pytest.fixture(scope="module")
def tables() -> OperationTables:
    return OperationTables(TABLES)


def test_a_product_of_the_table_is_the_table_s(tables):
    rows = pq.read_table(TABLES).to_pandas()
    of = rows[(rows["op"] == "gemm") & (rows["n"] == 6144) & (rows["k"] == 4096)].set_index("m")["seconds"]
    ours = tables.product(6144, 4096)
    for count in (1, 64, 1024, 8192):
        assert ours[list(ROWS).index(count)] == pytest.approx(of[count])


def test_between_two_sides_it_lies_between_their_seconds_a_weight(tables):
    low, high, between = (tables.product(n, 4096) / n for n in (12288, 16384, 14336))
    assert (between <= np.maximum(low, high) + 1e-15).all() and (between >= np.minimum(low, high) - 1e-15).all()
    # Beyond the table as dear a weight as its last entry.
    assert tables.product(131072, 4096) == pytest.approx(2 * tables.product(65536, 4096))


def test_a_pair_is_never_dearer_in_a_longer_prompt(tables):
    """As 32-bit integers the pairs of 16,384 tokens are a negative number."""
    _, _, pair, _ = tables.attention(16, 8, 128)
    assert min(pair.y) > 0 and all(b < 1.1 * a for a, b in pairwise(pair.y))


def sizes(model: str):
    return sizes_of(load_run(["runner=simulated", f"model={model}", "engine.dtype=bfloat16"]))


def test_a_decode_step_is_the_sum_of_its_operations(tables):
    llama = sizes("llama-3.1-8b-shape")
    step = load_profile("h200-tables").step_time(llama, 16)
    requests, decode, _, _ = tables.attention(32, 8, 128)
    products = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    at = list(ROWS).index(32)
    moved = 32 * (8 * 4096 + 3 * 14336 + 2 * 6144) * 2 / 3.84e12
    layer = sum(tables.product(*one)[at] for one in products) + moved + decode[requests.index(32)](1024)
    expected = 32 * layer + tables.product(128256, 4096)[at]
    assert step(StepFeatures(0, 32, 32 * 1024, 0, 0, 0)) == pytest.approx(expected)


def test_longer_contexts_prompts_and_batches_take_longer(tables):
    step = load_profile("h200-tables").step_time(sizes("mixtral-8x7b-shape"), 16)
    times = [step(StepFeatures(0, n, n * kv, 0, 0, 0)) for n, kv in ((1, 100), (1, 8000), (64, 8000), (300, 8000))]
    prompts = [step(StepFeatures(n, 4, n + 4000, n * (n + 1) // 2, 0, 1, n)) for n in (100, 1000, 20000, 40000)]
    assert times == sorted(times) and prompts == sorted(prompts)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            "opt-13b-shape",
            "for layers of q, k, v and o and a gated MLP or experts, and model 'opt-13b-shape' has others",
        ),
        ("qwen3-30b-a3b-shape", "has no attention of 32 heads, 4 KV heads"),
    ],
)
def test_what_the_tables_do_not_know_is_a_line(model, words, tables):
    try:
        load_profile("h200-tables").step_time(sizes(model), 16, 0.0, ONE_CARD)
    except ConfigError as error:
        assert words in str(error)
    else:
        assert model != "opt-13b-shape"  # a newer table may know more heads


def test_a_skew_and_other_weights_are_a_line():
    profile = load_profile("h200-tables")
    with pytest.raises(ConfigError, match=r"runner\.expert_skew=0\.5 is for a card"):
        profile.step_time(sizes("mixtral-8x7b-shape"), 16, 0.5)
    plain = sizes_of(load_run(["runner=simulated", "model=llama-3.1-8b-shape", "engine.dtype=float32"]))
    with pytest.raises(ConfigError, match="tables of 16 bit"):
        profile.step_time(plain, 16)


def test_a_file_that_is_none_is_a_line(tmp_path):
    (tmp_path / "x.parquet").write_text("nothing")
    with pytest.raises(ConfigError, match="holds no tables of kvarena make profile"):
        OperationTables(tmp_path / "x.parquet")


@pytest.fixture
def wheel(tmp_path) -> Path:
    """The package in small: the columns that are read, one framework, two versions of one table."""

    def parquet(**columns) -> bytes:
        out = io.BytesIO()
        pd.DataFrame(columns).to_parquet(out)
        return out.getvalue()

    attention = {
        "num_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "kv_cache_dtype": "bfloat16",
        "window_size": 0,
    }
    gemm = parquet(gemm_dtype=["bfloat16", "bfloat16", "fp8"], m=[1, 64, 1], n=8, k=16, latency=[0.1, 0.2, 9.0])
    files = {
        "gemm/sglang/0.9.0/gemm_perf": parquet(gemm_dtype=["bfloat16"], m=[1], n=8, k=16, latency=[7.0]),
        "gemm/sglang/0.10.0/gemm_perf": gemm,
        "attention/sglang/0.10.0/context_attention_perf": parquet(
            **attention, batch_size=[1, 1, 2], isl=[16, 32, 16], step=0, latency=[0.1, 0.3, 9.0]),
        "attention/sglang/0.10.0/generation_attention_perf": parquet(
            **attention, batch_size=[1, 1], step=[15, 31], latency=[0.1, 0.2]),
        "moe/sglang/0.10.0/moe_perf": parquet(
            moe_dtype=["bfloat16"], distribution=["balanced"], num_tokens=[1], hidden_size=[8], inter_size=[16],
            num_experts=[4], topk=[2], moe_tp_size=[1], moe_ep_size=[1], latency=[0.5]),
        "comm/sglang/0.10.0/custom_allreduce_perf": parquet(
            kernel_source=["x_graph", "x_graph", "x_eager"], num_gpus=2, message_size=[128, 256, 128],
            latency=[0.004, 0.009, 0.001]),
        "comm/nccl/2.0/nccl_perf": parquet(
            kernel_source="NCCL", op_name=["all_reduce", "all_gather"], nccl_dtype="half", num_gpus=2,
            message_size=[256, 128], latency=[0.005, 0.0001]),
    }  # fmt: skip
    system = {"gpu": {"mem_bw": 1e12, "mem_bw_empirical_scaling_factor": 0.5, "mem_capacity": 10**10},
              "node": {"pcie_bw": 1e10, "p2p_latency": 1e-5, "intra_node_bw": 1e11}}  # fmt: skip
    path = tmp_path / "aiconfigurator_core-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("aiconfigurator_core/systems/card_x.yaml", yaml.safe_dump(system))
        for name, content in files.items():
            archive.writestr(f"aiconfigurator_core/systems/data/card_x/{name}.parquet", content)
    return path


def test_the_command_makes_a_profile_of_a_wheel(wheel, tmp_path):
    out = tmp_path / "mine.yaml"
    assert tool.main([str(wheel), "--system", "card_x", "--out", str(out)]) == 0
    profile = load_profile(str(out))
    assert "aiconfigurator-core 1.2.3, Apache-2.0" in profile.source and "products 0.10.0" in profile.source
    assert profile.bandwidth == 5e11 and profile.memory_bytes == 1e10
    reduce = profile.collectives.all_reduce[2]
    assert list(reduce.bytes) == [128, 256] and list(reduce.seconds) == [4e-6, 5e-6]  # in a graph, and NCCL
    rows = pq.read_table(out.with_suffix(".parquet")).to_pandas()
    assert rows.groupby("op").size().to_dict() == {"context": 3, "experts": 1, "gemm": 2, "generation": 2}
    gemm = rows[rows["op"] == "gemm"].sort_values("m")
    assert gemm["m"].tolist() == [1, 64] and gemm["seconds"].tolist() == pytest.approx([1e-4, 2e-4])
    assert rows[rows["op"] == "generation"]["length"].tolist() == [16, 32]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--system", "card_y"), "--system card_y: there is no such system; there are card_x"),
        (("--system", "card_x", "--framework", "vllm"), r"try another --framework"),
        (("--system", "card_x", "--out", "x.json"), "must end with .yaml"),
    ],
)
def test_what_a_wheel_has_not_is_a_line(arguments, words, wheel, tmp_path):
    with pytest.raises(ConfigError, match=words):
        tool.main([str(wheel), "--out", str(tmp_path / "mine.yaml"), *arguments])


def test_no_package_and_no_wheel_are_a_line(tmp_path):
    with pytest.raises(ConfigError, match="is no wheel"):
        (tmp_path / "x.whl").write_text("nothing")
        tool.main([str(tmp_path / "x.whl"), "--out", str(tmp_path / "mine.yaml")])
    with pytest.raises(ConfigError, match="has no folder systems"):
        tool.main([str(tmp_path), "--out", str(tmp_path / "mine.yaml")])
