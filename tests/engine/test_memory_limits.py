"""Shares of a GPU's memory, and what is said where there is none left: figures that tell, settings that help."""

import re

import pytest
import torch

from kvarena.engine.errors import ConfigError, EngineError, ModelError
from kvarena.engine.models import load_model
from kvarena.engine.models.building import build_dummy
from kvarena.engine.pool.host_blocks import HostBlocks
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.pool.memory_limits import _group_rooms, asked_and_free, is_out_of_memory, size_text
from kvarena.engine.runner.profile import KEPT_FREE, LIBRARY_BYTES, CardMemory

GIB = 2**30
TOTAL = 80 * GIB
CONTEXT = GIB // 2
BLOCK = 2 * 2**20
CUDA_ERROR = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 12.31 MiB is "
    "free. Process 7 has 40.00 GiB memory in use. Including non-PyTorch memory, this process has 39.00 GiB in use."
)


def card(others: int = 0, *, weights: int = 16 * GIB, step: int = GIB, libraries: int = GIB // 4) -> CardMemory:
    """A card on which other processes hold `others` bytes and this one has run its largest step."""
    before = CONTEXT + others
    return CardMemory(TOTAL, before, before + libraries, weights, weights + step)


def kv(memory: CardMemory, share: float, dtype: torch.dtype = torch.bfloat16) -> int:
    memory.check_share(share)
    return memory.kv_bytes(share, BLOCK, dtype)


def test_a_share_is_an_engines_own_whatever_others_hold():
    alone = kv(card(), 0.4)
    assert alone == int(0.4 * TOTAL) - 17 * GIB - GIB // 4
    first = CONTEXT + int(0.4 * TOTAL) + GIB  # with its CUDA graphs, which come on top of its share
    assert kv(card(first), 0.4) == alone
    assert alone > 0


def test_another_engine_that_starts_meanwhile_is_no_library_of_this_one():
    growing = CardMemory(TOTAL, CONTEXT, CONTEXT + 32 * GIB, 16 * GIB, 17 * GIB)
    assert growing.kv_bytes(0.4, BLOCK, torch.bfloat16) == int(0.4 * TOTAL) - 17 * GIB - LIBRARY_BYTES


@pytest.mark.parametrize("share", [0.55, 0.9, 1.0])
def test_a_share_that_the_card_cannot_give_is_refused_and_the_one_that_is_named_starts(share):
    crowded = card(int(0.5 * TOTAL) + GIB)
    with pytest.raises(ConfigError) as caught:
        kv(crowded, share)
    line = str(caught.value)
    assert line.startswith(
        f"engine.gpu_memory_utilization={share:g} asks for {80 * share:.1f} GiB of the GPU's 80.0 GiB"
    )
    named = float(re.search(r"lower it to at most (0\.\d+)", line)[1])
    # Of a card's last memory no pool is made: 81.1 GiB could not be had where 81.12 were free.
    assert 0 < kv(crowded, named) <= TOTAL - crowded.in_use_now - crowded.peak - KEPT_FREE
    assert kv(card(), share) > 0


def test_the_whole_card_is_a_share():
    """This process's own context is no reason to refuse it, and no memory to give; nor is the card's last memory."""
    assert kv(card(), 1.0) == TOTAL - CONTEXT - GIB // 4 - 17 * GIB - KEPT_FREE


def test_a_full_card_names_no_share():
    with pytest.raises(ConfigError, match="end what holds the rest, or wait for them"):
        card(TOTAL - CONTEXT - 2**20).check_share(0.1)


@pytest.mark.parametrize(
    ("memory", "share", "dtype", "ways"),
    [
        (card(), 0.2, torch.bfloat16, "; raise it to at least 0.22"),
        (card(56 * GIB), 0.2, torch.bfloat16, "; raise it to at least 0.22"),
        (card(step=4 * GIB), 0.25, torch.bfloat16, "raise it to at least 0.26, or lower scheduler.max_num_batched"),
        (card(), 0.15, torch.float32, "raise it to at least 0.22, or set engine.dtype=bfloat16"),
        (card(62 * GIB), 0.2, torch.bfloat16, "; take a smaller model or a larger GPU"),
    ],
)
def test_a_share_too_small_names_what_would_do(memory, share, dtype, ways):
    """Each way is followed, and a pool comes of it."""
    with pytest.raises(ConfigError) as caught:
        kv(memory, share, dtype)
    line = str(caught.value)
    assert ways in line
    assert "weights take 16.0 GiB" in line
    assert "0.00 " not in line
    least = re.search(r"at least (0\.\d+)", line)
    if least:
        assert kv(memory, float(least[1]), dtype) >= 2 * BLOCK
    if "max_num_batched_tokens" in line:
        half = card(step=2 * GIB)
        assert kv(half, share, dtype) >= 2 * BLOCK
    if "bfloat16" in line:
        assert kv(card(weights=8 * GIB), share) >= 2 * BLOCK


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.50 KiB"), (20 * 2**20, "20.0 MiB"), (3 * GIB, "3.00 GiB"),
     (-2 * GIB, "-2.00 GiB"), (140 * GIB, "140.0 GiB")],
)  # fmt: skip
def test_sizes_have_figures(num_bytes, text):
    assert size_text(num_bytes) == text


def test_what_was_asked_for_and_what_was_free():
    cpu = torch.device("cpu")
    error = torch.OutOfMemoryError(CUDA_ERROR)
    assert asked_and_free(error, cpu) == "20.00 MiB were asked for and 12.31 MiB were free"
    assert asked_and_free(error, cpu, 5 * GIB) == "5.00 GiB were asked for and 12.31 MiB were free"
    assert re.fullmatch(r"more memory was asked for and [\d.]+ [MG]iB were free", asked_and_free(MemoryError(), cpu))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert asked_and_free(caught.value, cpu).startswith("4194304.0 GiB were asked for and ")
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_pools_that_cannot_be_had_say_by_which_setting():
    pool = {"num_blocks": 2**40, "block_size": 16, "num_layers": 1, "num_kv_heads": 1, "head_dim": 8}
    with pytest.raises(
        EngineError, match=r"\d GiB were asked for and [\d.]+ [MG]iB were free; lower kv_cache.num_blocks"
    ):
        KVPool(**pool, sized_by="kv_cache.num_blocks")
    with pytest.raises(
        EngineError, match=r"below the KV pool: \d+\.\d GiB were asked for and .* lower kv_cache.host_gib"
    ):
        HostBlocks(torch.zeros(2, 3, 2**10), 2**40)


@pytest.mark.parametrize(
    ("dtype", "free", "way"),
    [
        (torch.float32, 3 * 10**6, "set engine.dtype=bfloat16, in which they take 1.91 MiB"),
        (torch.float32, 10**6, "take a smaller model, or a device with more memory free"),
        (torch.bfloat16, 3 * 10**6, "take a smaller model, or a device with more memory free"),
    ],
)
def test_weights_that_do_not_fit(dtype, free, way, monkeypatch):
    """A smaller dtype is advised only where the weights would then fit."""

    def fail(*args, **options):
        raise torch.OutOfMemoryError(CUDA_ERROR)

    name = str(dtype).removeprefix("torch.")
    num_weights = load_model("models/demo").spec.num_parameters
    monkeypatch.setattr("kvarena.engine.models.loader.free_bytes", lambda device: free)
    with monkeypatch.context() as patch, pytest.raises(ModelError) as caught:
        patch.setattr("kvarena.engine.models.loader.AutoModelForCausalLM.from_pretrained", fail)
        load_model("models/demo", dtype=name)
    size = size_text(num_weights * dtype.itemsize)
    assert f"its weights take {size} in {name}, and {size_text(free)} were free; {way}" in str(caught.value)


def test_random_weights_that_do_not_fit(monkeypatch):
    shape = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 99,
    }
    made = build_dummy

    def fail(config, dtype, device, *args):
        if str(device) == "meta":
            return made(config, dtype, device, *args)
        with monkeypatch.context() as patch:
            patch.setattr("kvarena.engine.models.building.torch.manual_seed", lambda seed: torch.empty(2**50))
            return made(config, dtype, device, *args)

    monkeypatch.setattr("kvarena.engine.models.loader.build_dummy", fail)
    with pytest.raises(
        ModelError, match=r"llama does not fit in the memory of cpu: its weights take \d\d\d\.\d KiB in"
    ):
        load_model(shape=shape | {"num_attention_heads": 4}, load_format="dummy")


def test_a_host_is_asked_before_its_memory_is_taken(monkeypatch):
    """It would promise more than it has, and kill whoever takes it: pools, swap space, weights, read or random."""
    with monkeypatch.context() as patch, pytest.raises(EngineError, match=r"8\.00 KiB were asked for and 6\.00 KiB"):
        patch.setattr("kvarena.engine.pool.host_blocks.free_bytes", lambda device: 6143)
        patch.setattr("kvarena.engine.pool.memory_limits.free_bytes", lambda device: 6143)
        HostBlocks(torch.zeros(2, 3, 2**8), 3)
    pool = {"num_blocks": 100, "block_size": 16, "num_layers": 1, "num_kv_heads": 1, "head_dim": 8}
    num_bytes = KVPool(**pool).num_bytes
    monkeypatch.setattr("kvarena.engine.pool.kv_pool.free_bytes", lambda device: num_bytes - 1)
    with pytest.raises(EngineError, match=r"KV pool: 101\.0 KiB were asked for .* lower kv_cache.num_blocks"):
        KVPool(**pool, sized_by="kv_cache.num_blocks")
    for module in ("loader", "building"):
        monkeypatch.setattr(f"kvarena.engine.models.{module}.free_bytes", lambda device: 10**6)
    for load_format in ("auto", "dummy"):
        with pytest.raises(ModelError, match=r"its weights take \d\.\d\d MiB in float32, and 976\.6 KiB were free"):
            load_model("models/demo", load_format=load_format)


def test_a_virtual_space_takes_what_is_touched():
    """On a CPU: 64 TiB of regions of which 10 blocks are ever in use, each zeroed like any other."""
    pool = KVPool(
        num_blocks=2**36, block_size=16, num_layers=2, num_kv_heads=1, head_dim=8, dtype=torch.bfloat16,
        num_backed_blocks=10,
    )  # fmt: skip
    keys, values = pool.blocks(1)
    assert not keys[2**35].any()
    values[2**36] = 1
    assert values[2**36].sum() == 16 * 8


@pytest.mark.parametrize(
    ("own", "files", "rooms"),
    [
        ("0::/\n", {}, []),
        ("0::/\n", {"memory.max": "max", "memory.current": "5", "memory.stat": ""}, []),
        ("0::/\n", {"memory.max": "900", "memory.current": "500", "memory.stat": "file 9\ninactive_file 30\n"}, [430]),
        (
            "0::/a/b\n",
            {"a/memory.max": "900", "a/memory.current": "950", "a/memory.stat": "", "a/b/memory.max": "70",
             "a/b/memory.current": "20", "a/b/memory.stat": ""},
            [50, 0],
        ),
        (
            "4:memory:/docker/x\n3:cpu:/\n0::/\n",
            {"memory/memory.limit_in_bytes": "800", "memory/memory.usage_in_bytes": "300",
             "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 2\n"},
            [501],
        ),
    ],
)  # fmt: skip
def test_a_containers_limit_is_the_end_of_its_memory(own, files, rooms, tmp_path):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert _group_rooms(tmp_path / "own", tmp_path / "groups")[1:] == rooms
