"""Random weights that a quantiser could have packed: drawn where they are used, the same wherever that is."""

import pytest
import torch
from runner_driver import generate, make_requests
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvarena.engine.errors import ConfigError, ModelError
from kvarena.engine.models import load_model, loader
from kvarena.engine.models.made_packed import load_packed_dummy, plan_dummy
from kvarena.engine.models.sizes import model_sizes
from kvarena.engine.quantization.experts import PackedExperts
from kvarena.engine.quantization.linear import PackedLinear
from kvarena.engine.quantization.weight import PackedWeight
from kvarena.experiments.benchmarks.engine_checks import check_logits
from kvarena.experiments.gpu.engines import Engines

COMMON = {
    "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip
SHAPES = {
    "llama": COMMON | {"model_type": "llama"},
    "qwen2": COMMON | {"model_type": "qwen2", "tie_word_embeddings": True},
    "mixtral": COMMON | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": COMMON | {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "head_dim": 64,
    },
}  # fmt: skip
PROMPTS = [[5, 9, 200], [7] * 20]


def drawn(family, method="awq", **options):
    return load_model(shape=SHAPES[family], load_format="dummy", quantization=method, **options)


@pytest.fixture
def packed_here(monkeypatch):
    """Weights stay packed on a CPU too, where plain torch multiplies them."""
    monkeypatch.setattr(loader, "keeps_packed", lambda device: True)
    monkeypatch.setattr(loader, "placement", lambda directory, device: {"device_map": {"": device}})


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_cpu_gets_them_dequantised(method):
    model = drawn("qwen2", method)
    state = model.module.state_dict()
    weight = state["model.layers.0.mlp.down_proj.weight"]
    assert weight.std() == pytest.approx(0.02, rel=0.1)
    # GPTQ's symmetric codes are -8 to 7.
    assert weight.mean() == pytest.approx(-0.5 * 0.02 / 4.61 if method == "gptq" else 0, abs=3e-4)
    assert weight[0, :128].unique().numel() <= 16 < weight[0].unique().numel()  # two groups of 128
    assert not state["model.layers.1.self_attn.q_proj.bias"].any()
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    name = {"awq": "AWQ", "gptq": "GPTQ"}[method]
    assert model.spec.quantization == f"random {name}, 4 bits in groups of 128, dequantised"
    again, other = drawn("qwen2", method).module.state_dict(), drawn("qwen2", method, seed=1).module.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name])
    assert not torch.equal(weight, other["model.layers.0.mlp.down_proj.weight"])
    assert not torch.equal(state["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_caller_s_random_numbers_stay_as_they_were():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    drawn("llama")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_layers_stay_packed_where_kernels_take_them(family, packed_here, monkeypatch):
    model = drawn(family)
    layers = {name for name, part in model.module.named_modules() if isinstance(part, PackedLinear)}
    assert {name for name, part in model.module.named_modules() if type(part) is nn.Linear} == {"lm_head"}
    assert len(layers) == 14
    assert model.spec.quantization == "random AWQ, 4 bits in groups of 128"
    monkeypatch.setattr(loader, "keeps_packed", lambda device: False)
    same = drawn(family)
    assert model.spec.num_parameters == same.spec.num_parameters
    tokens = generate(same, make_requests(PROMPTS, 6), block_size=16).tokens
    assert generate(model, make_requests(PROMPTS, 6), block_size=16).tokens == tokens


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_drawn_packed_under_their_makers_names(family):
    config = CONFIG_MAPPING[family].from_dict(SHAPES[family])
    shape = loader.build_dummy(config, torch.float32, "meta", 0, False, family)
    device = torch.device("cpu")
    load = plan_dummy(shape, family, "awq", torch.float32, device, 0, stay_packed=True)
    module = load_packed_dummy(load, config, torch.float32, device, 0, output_loading_info=True)
    plain = drawn(family).module.state_dict()
    for index, layer in enumerate(module.model.layers):
        experts = layer.mlp.experts
        assert isinstance(experts, PackedExperts) and isinstance(layer.self_attn.o_proj, PackedLinear)
        for stacked, name in zip(experts._stacked, ("gate_up_proj", "down_proj"), strict=True):
            first = PackedWeight(*(None if part is None else part[0] for part in stacked[:4]), stacked.group_size)
            assert torch.equal(first.dequantize(), plain[f"model.layers.{index}.mlp.experts.{name}"][0])


def test_other_methods_and_shapes_that_cannot_be_packed_are_refused():
    for method in ("compressed-tensors", "mxfp4"):
        with pytest.raises(ConfigError, match="draws plain ones, or those of awq, gptq, int8, fp8"):
            drawn("llama", method)
        with pytest.raises(ConfigError, match="draws plain ones, or those of awq, gptq, int8, fp8"):
            model_sizes(shape=SHAPES["llama"], drawn=method)
    odd = SHAPES["llama"] | {"hidden_size": 36, "intermediate_size": 20, "num_attention_heads": 1, "head_dim": 20}
    with pytest.raises(ModelError, match="llama has no linear layer that awq would take: of inputs and outputs"):
        load_model(shape=odd | {"num_key_value_heads": 1}, load_format="dummy", quantization="awq")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_simulator_counts_them(family):
    """Layers and experts take 4.16 bits a weight; embeddings, head, norms and routers 16."""
    plain, packed = (model_sizes(shape=SHAPES[family], dtype="bfloat16", drawn=one) for one in (None, "awq"))
    layers = plain.num_layer_weights - 256 * 5 - (2 * 4 * 256 if family == "mixtral" else 0)
    assert plain.weight_bytes - packed.weight_bytes == pytest.approx(layers * (16 - 4 - 20 / 128) / 8, rel=1e-3)


def test_the_engine_benchmark_judges_packed_weights_by_the_same_ones_in_float32(packed_here):
    engines = Engines(
        "tiny", "engine.device=cpu", "kv_cache.num_slots=4096", "engine.dtype=bfloat16", "runner.fusions=true",
        "model.quantization=awq",
    )  # fmt: skip
    assert engines.quantization == "awq"
    line = check_logits(engines)
    assert "error" not in line and 0 < line["decode"]["fused_error"] < 0.05
