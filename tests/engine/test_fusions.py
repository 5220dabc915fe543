"""Fused layers against the transformers modules that they stand for, in float32."""

import copy

import pytest
import torch
from checkpoints import write_checkpoint

from kvarena.engine.fusions.check import check_decoder, record
from kvarena.engine.fusions.detect import NotFusable, fuse
from kvarena.engine.fusions.layers import FusedExperts, FusedGlu
from kvarena.engine.fusions.ops import TorchOps
from kvarena.engine.fusions.pack import pack
from kvarena.engine.models import load_model

FUSABLE = {
    "llama": {},
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "mixtral": {},
    "smollm3": {"num_hidden_layers": 3, "no_rope_layer_interval": 8},
}
NOT_FUSABLE = {
    "gemma2": "pre_feedforward_layernorm",
    "gpt2": "no module model",
    "phi3": "no module q_proj",
    "granite": "embedding alone",
    "starcoder2": "has a bias",
    "cohere": "no module post_attention_layernorm",
}


def load(tmp_path, name, **overrides):
    model = load_model(write_checkpoint(tmp_path, name.split("-")[0], **overrides))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.dim() == 1:  # biases are 0 and norms 1 after initialisation, which would hide faults
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", FUSABLE)
def test_fused_layers_equal_their_modules(tmp_path, name):
    model = load(tmp_path, name, **FUSABLE[name])
    recorded = record(model, 256)
    decoder = fuse(model, TorchOps(), 256)
    assert check_decoder(decoder, recorded) is None
    assert isinstance(decoder.layers[0].mlp, FusedExperts if name == "mixtral" else FusedGlu)
    assert decoder.is_capturable


@pytest.mark.parametrize("name", NOT_FUSABLE)
def test_other_shapes_are_named_and_left_alone(tmp_path, name):
    options = {"granite": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0}}.get(name, {})
    model = load_model(write_checkpoint(tmp_path, name, **options))
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    with pytest.raises(NotFusable, match=NOT_FUSABLE[name]):
        fuse(model, TorchOps(), 256)
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())


def test_a_multiplier_that_the_shape_does_not_show_is_found(tmp_path):
    model = load(tmp_path, "granite", residual_multiplier=0.5, embedding_multiplier=1.0, attention_multiplier=0.2)
    with pytest.raises(NotFusable, match="layer 0, fused, differs from its module"):
        fuse(model, TorchOps(), 256)


def test_a_rotation_of_neighbours_is_refused(tmp_path):
    """Interleaved pairs (element 2i with 2i + 1) have cosines that repeat in another order."""
    model = load(tmp_path, "llama")
    rotary = model.module.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda *args: tuple(t[..., : t.shape[-1] // 2].repeat_interleave(2, -1) for t in forward(*args))
    with pytest.raises(NotFusable, match="halves of a head"):
        fuse(model, TorchOps(), 256)


def test_a_layer_without_rotation_is_found(tmp_path):
    model = load(tmp_path, "smollm3", num_hidden_layers=3, no_rope_layer_interval=3)
    with pytest.raises(NotFusable, match="layer 2, fused"):
        fuse(model, TorchOps(), 256)


@pytest.mark.parametrize("part", ["norm", "qkv", "down", "head", "rotation"])
def test_the_check_sees_a_wrong_weight(tmp_path, part):
    model = load(tmp_path, "qwen3")
    recorded = record(model, 256)
    decoder = fuse(model, TorchOps(), 256)
    broken = copy.deepcopy(decoder)
    layer = broken.layers[1]
    tensor = {
        "norm": layer.attention.norm.weight,
        "qkv": layer.attention.qkv.weight,
        "down": layer.mlp.down.weight,
        "head": broken.head.weight,
        "rotation": broken.rotation,
    }[part]
    tensor.mul_(1.1)
    assert check_decoder(broken, recorded) is not None
    assert check_decoder(decoder, recorded) is None


def test_packing_shares_memory_and_keeps_the_modules_working():
    torch.manual_seed(0)
    q, k = torch.nn.Linear(8, 6), torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(3, 8)
    expected = torch.cat([q(x), k(x)], dim=-1)
    packed = pack([q, k])
    assert torch.allclose(torch.nn.functional.linear(x, packed.weight, packed.bias), expected, atol=1e-6)
    assert torch.equal(torch.cat([q(x), k(x)], dim=-1), expected)
    assert q.weight.data_ptr() == packed.weight.data_ptr()
    assert k.weight.untyped_storage().data_ptr() == packed.weight.untyped_storage().data_ptr()
    again = pack([q, k])
    assert again.weight.data_ptr() == packed.weight.data_ptr()
    assert torch.equal(again.weight, packed.weight)
