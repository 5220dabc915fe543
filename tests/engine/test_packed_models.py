"""Models with packed weights give the tokens of transformers' own model with the same weights dequantised."""

import functools
import json

import pytest
import torch
from checkpoints import random_prompts
from image_checkpoints import shared_model, write_original
from packed_checkpoints import pack_state, pack_words, settings, write_packed
from runner_driver import generate, make_requests
from safetensors.torch import load_file, save_file

from kvarena.engine.checkpoints.directory import read_config
from kvarena.engine.checkpoints.packed import packed_checkpoint
from kvarena.engine.fusions.check import check_decoder, record
from kvarena.engine.fusions.detect import NotFusable, fuse
from kvarena.engine.fusions.ops import TorchOps
from kvarena.engine.fusions.pack import projection
from kvarena.engine.fusions.packed_ops import PackedOps
from kvarena.engine.models import load_model, loader
from kvarena.engine.models.sizes import model_sizes
from kvarena.engine.quantization import linear, products
from kvarena.engine.quantization.experts import PackedExperts
from kvarena.engine.quantization.linear import PackedLinear, PackedProjection, settle_products
from kvarena.engine.quantization.products import PackedProduct, TritonProduct
from kvarena.engine.quantization.state import PackedTensors
from kvarena.experiments.correctness import model_classes
from kvarena.experiments.correctness.reference import greedy_reference
from kvarena.experiments.settings.strategies import strategy_names

PROMPTS = random_prompts((5, 13, 1, 30))
NUM_TOKENS = 8
CASES = {
    "llama-awq": ("awq", "llama", {}),
    "llama-awq-all": ("awq", "llama", {"group_size": -1}),
    "llama-gptq-act": ("gptq", "llama", {"act_order": True}),
    "llama-gptq-v2": ("gptq_v2", "llama", {"symmetric": True}),
    "qwen2-gptq": ("gptq", "qwen2", {"symmetric": True}),
    "qwen2-awq": ("awq", "qwen2", {}),
    "mixtral-awq": ("awq", "mixtral", {}),
    "mixtral-gptq": ("gptq", "mixtral", {"act_order": True}),
    "llama-compressed": ("compressed-tensors", "llama", {}),
    "llama-compressed-act": ("compressed-tensors", "llama", {"act_order": True, "symmetric": True}),
}


# Of these one layer stays packed: the interpreter takes milliseconds for a product.
CASES_OF_A_LAYER = {
    f"{case}-1": (kind, family, options | {"num_hidden_layers": 1})
    for case, (kind, family, options) in CASES.items()
    if case in ("llama-gptq-act", "qwen2-awq", "mixtral-awq", "mixtral-gptq")
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints by case, packed and plain: made once."""
    found = {}

    def make(case):
        if case not in found:
            kind, family, options = (CASES | CASES_OF_A_LAYER)[case]
            found[case] = write_packed(tmp_path_factory.mktemp(case), kind, family, **options)
        return found[case]

    return make


def _no_probe(probe):
    """The probe runs some twenty forwards, which the interpreter takes seconds for: give it the dequantised model."""

    def of_plain(module, *args):
        for part in module.modules():
            if isinstance(part, PackedLinear):
                part.product._product = products.PlainProduct(part.product.weight)
        found = probe(module, *args)
        for part in module.modules():
            if isinstance(part, PackedLinear):
                part.product._product = TritonProduct(part.product.weight)
        return found

    return of_plain


@pytest.fixture
def packed_here(monkeypatch):
    """Weights stay packed on a CPU too, loaded as onto a GPU, and the Triton kernel multiplies them, interpreted."""
    monkeypatch.setattr(loader, "keeps_packed", lambda device: True)
    monkeypatch.setattr(loader, "placement", lambda directory, device: {"device_map": {"": device}})
    monkeypatch.setattr(products, "first_product", TritonProduct)
    monkeypatch.setattr(loader, "probe_attention", _no_probe(loader.probe_attention))


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_transformers_with_the_dequantised_weights(made, case, caplog):
    packed, plain = made(case)
    model = load_model(packed)
    assert "dequantised at load" in caplog.text
    expected = load_model(plain).module.state_dict()
    state = model.module.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-8)
    tokens = greedy_reference(plain, PROMPTS, NUM_TOKENS)
    assert len({token for answer in tokens for token in answer}) > 8
    assert generate(model, make_requests(PROMPTS, NUM_TOKENS), block_size=3, chunk=5).tokens == tokens


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "auto"])
def test_every_dtype_takes_packed_weights(made, dtype):
    """AWQ's own kernels take float16 alone; here the weight is dequantised in float32 and rounded once."""
    packed, plain = made("llama-awq")
    model = load_model(packed, dtype=dtype)
    assert model.spec.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float16)
    weight = model.module.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, load_model(plain).module.model.layers[0].mlp.up_proj.weight.to(weight.dtype))


def test_groups_of_unequal_size_are_dequantised(made, tmp_path, packed_here, caplog):
    """A g_idx may say anything; no kernel multiplies what it says then."""
    packed, plain = made("llama-gptq-act")
    name, state = "model.layers.0.mlp.up_proj", load_file(packed / "model.safetensors")
    groups = state[f"{name}.g_idx"] * 0
    groups[:5] = 1
    state[f"{name}.g_idx"] = groups
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    model = load_model(tmp_path)
    assert "1 of them dequantised at load" in caplog.text
    layer = model.module.model.layers[0].mlp
    assert isinstance(layer.gate_proj, PackedLinear)
    codes = torch.stack([(state[f"{name}.qweight"] >> (4 * i)) & 15 for i in range(8)], 1).flatten(0, 1)
    zeros = torch.stack([(state[f"{name}.qzeros"] >> (4 * i)) & 15 for i in range(8)], 2).flatten(1)
    scales, of = state[f"{name}.scales"].float(), groups.long()
    want = ((codes - ((zeros[of] + 1) & 15)) * scales[of]).t()
    assert torch.allclose(layer.up_proj.weight, want, atol=1e-6)
    assert not torch.allclose(want, load_model(plain).module.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "mixtral-awq-1" else ()) for case in CASES_OF_A_LAYER]
)
def test_layers_that_stay_packed_equal_the_dequantised_ones(made, case, packed_here, monkeypatch):
    """One forward each through the modules and through the fused layers, whose projections are joined."""
    packed, plain = made(case)
    model, reference = load_model(packed), load_model(plain)
    assert type(model.module) is type(reference.module)
    layers = [part for part in model.module.modules() if isinstance(part, PackedLinear)]
    experts = [part for part in model.module.modules() if isinstance(part, PackedExperts)]
    depth = model.spec.num_layers
    is_mixture = case.startswith("mixtral")
    assert (len(layers), len(experts)) == ((4 * depth, depth) if is_mixture else (7 * depth, 0))
    assert model.spec.num_parameters == reference.spec.num_parameters
    recorded = record(reference, 256)
    torch.testing.assert_close(record(model, 256).logits, recorded.logits, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr("kvarena.engine.fusions.detect.record", lambda *_: recorded)
    decoder = fuse(model, TorchOps(), 256)
    assert isinstance(decoder.ops, PackedOps)
    assert isinstance(decoder.layers[0].attention.qkv, PackedProjection)
    assert check_decoder(decoder, recorded) is None
    # Settled, joined layers still answer alone, with their rows; nothing is in memory twice.
    # A layer has two products of attention, and two of an MLP that is not of experts.
    assert settle_products(model.module, torch.float32) == {"Triton": (2 if experts else 4) * depth}
    attention, own = model.module.model.layers[0].self_attn, reference.module.model.layers[0].self_attn
    x, seen, kept = torch.randn(2, 3, 64), [], PackedProduct.__call__
    monkeypatch.setattr(linear, "_ROWS_AT_ONCE", 4)
    monkeypatch.setattr(PackedProduct, "__call__", lambda self, x, *rest: seen.append(len(x)) or kept(self, x, *rest))
    for name in ("q_proj", "v_proj", "o_proj"):
        torch.testing.assert_close(getattr(attention, name)(x), getattr(own, name)(x), rtol=1e-4, atol=1e-4)
    # Of all outputs, of which a layer keeps its own: never for many rows at once. The largest step sizes the pool.
    assert seen == [4, 2, 4, 2, 6]
    assert attention.q_proj.product is attention.v_proj.product is decoder.layers[0].attention.qkv.product
    checkpoint = packed_checkpoint(packed, read_config(packed))
    taken = sum(part.num_bytes for part in (*layers, *experts))
    # Zero points take a byte, in the files half of one; groups are files' alone, or an order that joined layers share.
    entries = checkpoint.entries.values()
    zeros = sum(entry.num_groups * entry.num_outputs // 2 for entry in entries)
    assert checkpoint.num_bytes + zeros - sum(4 * entry.num_inputs for entry in entries) <= taken
    assert taken <= checkpoint.num_bytes + zeros


@pytest.fixture(scope="module")
def served(made):
    packed, plain = made("llama-gptq-act")
    return model_classes.Checkpoint(str(packed)), greedy_reference(plain, model_classes.prompts(), 12)


def strategies():
    """Every allocator once, schedulers in turn; all pairs in `make test-all`."""
    schedulers = strategy_names("scheduler")
    for i, allocator in enumerate(strategy_names("allocator")):
        for j, scheduler in enumerate(schedulers):
            marks = () if j == i % len(schedulers) else pytest.mark.slow
            yield pytest.param(allocator, scheduler, marks=marks)


@pytest.mark.parametrize(("allocator", "scheduler"), strategies())
def test_strategies_do_not_notice_packed_weights(served, allocator, scheduler):
    checkpoint, expected = served
    setting = model_classes.Setting(allocator, scheduler, ("kv_cache.num_slots=256",))
    assert [req.output_token_ids for req in checkpoint.run(setting)] == expected


def test_layers_that_cannot_be_joined_run_on_their_modules(made, tmp_path, monkeypatch):
    packed, _ = made("llama-awq")
    state = load_file(packed / "model.safetensors")
    name = "model.layers.2.self_attn.k_proj"
    found = PackedTensors(packed_checkpoint(packed, read_config(packed)), torch.float32).packed[name][...]
    for part in ("qweight", "qzeros", "scales"):
        del state[f"{name}.{part}"]
    state[f"{name}.weight"] = found
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    monkeypatch.setattr(loader, "keeps_packed", lambda device: True)
    model = load_model(tmp_path)
    with pytest.raises(NotFusable, match="layer 2: q_proj, k_proj and v_proj are packed in different ways"):
        fuse(model, TorchOps(), 256)
    tokens = generate(load_model(packed), make_requests(PROMPTS, 4), block_size=16).tokens
    assert generate(model, make_requests(PROMPTS, 4), block_size=16).tokens == tokens


EIGHT_BITS = ("int8", "int8-zeros", "fp8", "fp8-tensor", "fp8-blocks", "packed", "packed-zeros")


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_eight_bits_of_compressed_tensors(tmp_path, kind):
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (32, 64))
    scale = torch.rand(32, 1).bfloat16() + 0.01
    parts = {"weight_scale": scale}
    zeros = torch.randint(-9, 9, (32, 1)) if kind.endswith("zeros") else torch.zeros(32, 1, dtype=torch.int64)
    if kind.startswith("packed"):
        parts |= {"weight_packed": pack_words(codes + 128, bits=8), "weight_shape": torch.tensor([32, 64])}
        if kind == "packed-zeros":
            parts["weight_zero_point"] = pack_words((zeros + 128).t(), bits=8).t().contiguous()
    elif kind.startswith("int8"):
        parts |= {"weight": codes.to(torch.int8), "weight_zero_point": zeros.to(torch.int8)}
    else:
        values = torch.randn(32, 64).to(torch.float8_e4m3fn)
        codes = values.double()
        if kind == "fp8-tensor":
            scale = torch.tensor([0.25])
        elif kind == "fp8-blocks":
            scale = torch.rand(2, 4)
        parts |= {"weight": values, "weight_scale": scale}
    tensors = {f"x.{suffix}": value for suffix, value in parts.items()} | {"norm.weight": torch.ones(4)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    layout = "pack-quantized" if kind.startswith("packed") else "float-quantized"
    group = {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": {"num_bits": 8, "dynamic": True}}
    said = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": said}))
    checkpoint = packed_checkpoint(tmp_path, read_config(tmp_path))
    assert checkpoint.settings.quantizes_inputs
    source = PackedTensors(checkpoint, torch.float32).packed["x"]
    full = scale.double()
    if full.dim() == 2:
        full = full.repeat_interleave(32 // full.shape[0], 0).repeat_interleave(64 // full.shape[1], 1)
    assert torch.allclose(source[...].double(), (codes.double() - zeros.double()) * full, rtol=1e-5)
    assert source.part("codes").dtype == source.load().codes.dtype
    assert source.load().without_zeros().zeros is None or kind.endswith("zeros")


def test_a_state_dict_of_packed_tensors_can_be_taken_apart_by_rows(tmp_path):
    """InternLM2's `wqkv` is one matrix: [queries of a group, key, value] for each KV head."""
    torch.manual_seed(0)
    wqkv = torch.randn(2 * (2 + 2) * 16, 64)
    packed, plain = pack_state({"language_model.model.layers.0.attention.w1.weight": wqkv}, "awq", 32)
    save_file(packed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = settings("awq", 32, symmetric=False, act_order=False)
    config = {"model_type": "internvl_chat", "llm_config": {"model_type": "internlm2", "quantization_config": said}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = PackedTensors(packed_checkpoint(tmp_path, read_config(tmp_path)), torch.float32)
    name, exact = next(iter(plain.items()))
    assert list(tensors.state()) == [name]
    source = tensors.state()[name]
    assert source.get_shape() == [128, 64]
    assert torch.allclose(source[...], exact, atol=1e-7)
    heads = torch.arange(128).view(2, 4, 16)
    weight = source.load()
    for rows in (heads[:, :2].flatten(), heads[:, 2].flatten(), heads[:, 3].flatten()):
        assert torch.allclose(weight.select_rows(rows).dequantize(), exact[rows], atol=1e-7)


VISION_CASES = {
    "internlm2-awq": ("InternLM2ForCausalLM", "llama", "awq", {}),
    "internlm2-gptq-act": ("InternLM2ForCausalLM", "llama", "gptq", {"act_order": True}),
    "qwen2-gptq": ("Qwen2ForCausalLM", "qwen2", "gptq", {"symmetric": True}),
}


@pytest.fixture(scope="module")
def with_vision(tmp_path_factory):
    """InternVL in the original's format, by case: its language model packed alone, and the same dequantised."""

    def make(case):
        architecture, text, kind, options = VISION_CASES[case]
        folders = []
        for is_packed in (True, False):
            directory = tmp_path_factory.mktemp(case) / "vl"
            write_original(directory, shared_model(text), architecture)
            files = sorted(directory.glob("*.safetensors"))
            state = {name: tensor for file in files for name, tensor in load_file(file).items()}
            packed, plain = pack_state(state, kind, 32, **options)
            assert not [name for name in packed if name.startswith("vision") and name.endswith("qweight")]
            for file in (*files, directory / "model.safetensors.index.json"):
                file.unlink()
            tensors = packed if is_packed else plain
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
            config = json.loads((directory / "config.json").read_text())
            if is_packed:
                said = settings(kind, 32, **{"symmetric": False, "act_order": False} | options)
                config["llm_config"]["quantization_config"] = said
            (directory / "config.json").write_text(json.dumps(config))
            folders.append(directory)
        return folders

    return functools.cache(make)


@pytest.mark.parametrize("case", VISION_CASES)
def test_internvl_with_its_language_model_packed_alone(with_vision, case, caplog):
    """As InternVL2-AWQ has it: `wqkv` one packed matrix, the tower in 16 bits, the settings in `llm_config`."""
    packed, plain = with_vision(case)
    model = load_model(packed, quantization=VISION_CASES[case][2])
    assert "14 weights in" in caplog.text and "dequantised at load" in caplog.text
    mine, wanted = (model.module.state_dict() for model in (model, load_model(plain)))
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=1e-8)
    assert model.spec.quantization.endswith("4 bits in groups of 32, dequantised")
    assert model.images is not None


@pytest.mark.parametrize("case", VISION_CASES)
def test_internvl_s_language_model_stays_packed(with_vision, case, packed_here):
    """By the Triton kernel, interpreted: each layer's product, and queries, keys and values joined again."""
    packed, plain = with_vision(case)
    model, reference = load_model(packed), load_model(plain)
    layers = {name: part for name, part in model.module.named_modules() if isinstance(part, PackedLinear)}
    assert len(layers) == 14 and "model.layers.1.self_attn.v_proj" in layers
    assert model.spec.num_parameters == reference.spec.num_parameters
    assert not model.spec.quantization.endswith("dequantised")
    own = dict(reference.module.named_modules())
    torch.manual_seed(0)
    for name, layer in layers.items():
        weight = layer.product.weight.dequantize()
        torch.testing.assert_close(weight, own[name].weight, rtol=1e-6, atol=1e-8)
        if name.startswith("model.layers.0"):
            x = torch.randn(3, weight.shape[1])
            torch.testing.assert_close(layer(x), own[name](x), rtol=1e-4, atol=1e-4)
    entry = packed_checkpoint(packed, read_config(packed))
    taken = sum(layer.num_bytes for layer in layers.values())
    assert taken <= 1.1 * entry.num_bytes  # zero points take a byte; groups are files' alone
    joined_again = projection([model.module.model.layers[0].self_attn.get_submodule(f"{n}_proj") for n in "qkv"])
    assert joined_again.out_features == 64 + 2 * 32
    tower, same = (m.images.tower.state_dict() for m in (model, reference))
    assert all(torch.equal(tower[name], same[name]) for name in same)


def test_the_simulator_counts_a_packed_language_model_beside_a_tower(with_vision):
    packed, plain = with_vision("internlm2-awq")
    found = packed_checkpoint(packed, read_config(packed))
    size = sum(2 * entry.num_outputs * entry.num_inputs for entry in found.entries.values())
    sizes = [model_sizes(path, dtype="float16").weight_bytes for path in (plain, packed)]
    assert sizes[0] - sizes[1] == size - found.num_bytes
