"""The parts of a GPU's memory add up to its peak, and nothing is in two of them."""

from dataclasses import replace

import pytest
import torch

from kvarena.engine.pool.gpu_memory import PARTS, Reading, is_private, memory_parts, storage_bytes

GIB = 2**30
# 1 of weights, a pool of 4, workspace of 1/2; half a GiB of graphs in place, 1/4 reserved and unused.
BEFORE = Reading(
    allocated=11 * GIB // 2, all_allocated=11 * GIB // 2, peak_allocated=6 * GIB, peak_reserved=25 * GIB // 4,
    graphs=GIB // 2, outside=GIB,
)  # fmt: skip


def parts(before=BEFORE, after=BEFORE, *, pool_in_torch=4 * GIB):
    found = memory_parts(GIB // 2, GIB, 4 * GIB, pool_in_torch, before, after)
    assert sum(found[name] for name in PARTS) == found["peak_gpu_bytes"]
    return {name: value / GIB for name, value in found.items()}


def test_a_run_whose_steps_are_all_in_graphs():
    after = replace(BEFORE, peak_allocated=BEFORE.all_allocated)
    assert parts(after=after) == {
        "weights_bytes": 1.0, "pool_bytes": 4.0, "image_cache_bytes": 0.0, "workspace_bytes": 0.5, "graphs_bytes": 0.5,
        "activations_bytes": 0.0, "context_bytes": 0.5, "other_bytes": 0.75, "peak_gpu_bytes": 7.25,
    }  # fmt: skip


def test_encoded_tiles_are_a_part_of_their_own():
    found = memory_parts(GIB // 2, GIB, 4 * GIB, 4 * GIB, BEFORE, BEFORE, image_cache=GIB // 4)
    assert (found["image_cache_bytes"], found["workspace_bytes"]) == (GIB // 4, GIB // 4)
    assert sum(found[name] for name in PARTS) == found["peak_gpu_bytes"]


def test_steps_hold_activations_on_top():
    after = replace(BEFORE, peak_allocated=BEFORE.all_allocated + GIB, peak_reserved=BEFORE.peak_reserved + GIB)
    found = parts(after=after)
    assert (found["activations_bytes"], found["other_bytes"], found["peak_gpu_bytes"]) == (1.0, 0.75, 8.25)


def test_a_graph_that_is_captured_in_a_step_is_not_an_activation_too():
    after = replace(
        BEFORE, peak_allocated=BEFORE.all_allocated + GIB, graphs=BEFORE.graphs + GIB,
        peak_reserved=BEFORE.peak_reserved + GIB,
    )  # fmt: skip
    found = parts(after=after)
    assert (found["activations_bytes"], found["graphs_bytes"], found["other_bytes"]) == (0.0, 1.5, 0.75)


def test_mapped_pages_are_outside_of_torch_and_count_once():
    """Under allocator=virtual the pool is not among torch's tensors: it is in what the device says is in use."""
    mapped = replace(
        BEFORE, allocated=BEFORE.allocated - 4 * GIB, all_allocated=BEFORE.all_allocated - 4 * GIB,
        peak_allocated=BEFORE.all_allocated - 4 * GIB, peak_reserved=BEFORE.peak_reserved - 4 * GIB,
        outside=BEFORE.outside + 4 * GIB,
    )  # fmt: skip
    assert parts(mapped, mapped, pool_in_torch=0) == parts(after=replace(BEFORE, peak_allocated=BEFORE.all_allocated))


def test_a_storage_counts_once_however_many_views_it_has():
    weights = torch.zeros(100)
    assert storage_bytes([weights[:50], weights[50:], weights, torch.zeros(3)], torch.device("cpu")) == 412
    assert storage_bytes([weights], torch.device("cuda")) == 0


def test_a_pool_of_a_graph_is_told_from_the_common_one():
    assert is_private({"segment_pool_id": (0, 1)})
    assert not is_private({"segment_pool_id": (0, 0)})
    assert not is_private({})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("allocator", ["paged", "virtual"])
def test_a_run_on_a_gpu(allocator, tmp_path):
    from kvarena.experiments.jobs.job import execute
    from kvarena.experiments.settings.compose import compose_cell

    cfg, choices = compose_cell([
        f"allocator={allocator}", "model=qwen3-0.6b-shape", "engine.dtype=bfloat16", "workload=uniform",
        "kv_cache.num_slots=65536", "workload.num_requests=16", "report.progress=false",
    ])  # fmt: skip
    total = torch.cuda.mem_get_info()[1]
    summary = execute(cfg, tmp_path, "a run", choices)
    memory, peak = summary["memory"], summary["peak_gpu_bytes"]
    assert sum(memory[name] for name in PARTS) == peak <= total
    assert min(memory.values()) >= 0
    assert memory["weights_bytes"] == pytest.approx(2 * summary["model"]["num_parameters"], rel=0.01)
    assert memory["pool_bytes"] == pytest.approx(65536 * 114688, rel=0.02)
    assert memory["graphs_bytes"] > 0
    assert memory["other_bytes"] < 0.25 * peak
    assert "GPU memory" in (tmp_path / "report.md").read_text()
