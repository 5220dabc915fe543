"""Plain weights that are quantised to 8 bits as they are read give the tokens of the weights that these stand for."""

import json
import shutil

import pytest
import torch
from checkpoints import random_prompts, write_checkpoint
from image_checkpoints import shared_model, write_original
from runner_driver import generate, make_requests
from safetensors.torch import load_file, save_file

from kvarena.engine.checkpoints.check import check_checkpoint
from kvarena.engine.errors import ModelError
from kvarena.engine.fusions.check import check_decoder, record
from kvarena.engine.fusions.detect import fuse
from kvarena.engine.fusions.ops import TorchOps
from kvarena.engine.models import load_model, loader
from kvarena.engine.models.sizes import model_sizes
from kvarena.engine.quantization.linear import PackedLinear
from kvarena.engine.quantization.made import quantise_rows
from kvarena.engine.quantization.products import TritonProduct
from kvarena.experiments.correctness.reference import greedy_reference

METHODS = ("int8", "fp8")
PROMPTS = random_prompts((5, 13, 1, 30))


def rounded(weight, method):
    """What a weight stands for in 8 bits, from the definition: a value at a time."""
    made = torch.empty_like(weight)
    for n, row in enumerate(weight.double()):
        scale = row.abs().max() / (127 if method == "int8" else 448)
        values = [float(value / scale) for value in row]
        if method == "int8":
            codes = torch.tensor([round(value) for value in values])
        else:
            codes = torch.tensor(values).to(torch.float8_e4m3fn).double()
        made[n] = (codes * scale).float()
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, and for each method the same with the rounded weights."""
    found = {}

    def make(family):
        if family not in found:
            root = tmp_path_factory.mktemp(family)
            found[family] = {None: write_checkpoint(root / "plain", family)}
            for method in METHODS:
                shutil.copytree(root / "plain", root / method)
                file = root / method / "model.safetensors"
                state = load_file(file)
                for name, weight in state.items():
                    if name.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight")):
                        state[name] = rounded(weight, method)
                save_file(state, file, metadata={"format": "pt"})
                found[family][method] = root / method
        return found[family]

    return make


@pytest.fixture
def packed_here(monkeypatch):
    monkeypatch.setattr(loader, "keeps_packed", lambda device: True)
    monkeypatch.setattr(loader, "placement", lambda directory, device: {"device_map": {"": device}})


@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_rounded_by_its_own_scale(method):
    torch.manual_seed(0)
    weight = torch.randn(6, 40) * torch.logspace(-3, 3, 6)[:, None]
    weight[2] = 0
    packed = quantise_rows(weight, method)
    assert packed.codes.dtype == (torch.int8 if method == "int8" else torch.float8_e4m3fn)
    error = (packed.dequantize() - weight).abs().amax(1)
    bound = weight.abs().amax(1) * (0.5 / 127 * 1.01 if method == "int8" else 1 / 16)
    assert (error <= bound).all() and not packed.dequantize()[2].any()
    weight[2] = 1  # rounding a row of zeros from the definition divides by 0
    torch.testing.assert_close(quantise_rows(weight, method).dequantize(), rounded(weight, method))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("method", METHODS)
def test_greedy_tokens_equal_transformers_with_the_rounded_weights(made, family, method, caplog):
    folders = made(family)
    model = load_model(folders[None], quantization=method)
    assert f"weights in {method} with a scale for each output" in caplog.text
    assert model.spec.quantization == f"{method} with a scale for each output, dequantised"
    expected = load_model(folders[method]).module.state_dict()
    for name, value in model.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
    tokens = greedy_reference(folders[method], PROMPTS, 8)
    assert generate(model, make_requests(PROMPTS, 8), block_size=3, chunk=5).tokens == tokens


@pytest.mark.parametrize("method", METHODS)
def test_they_stay_packed_on_a_gpu(made, method, packed_here, monkeypatch):
    folders = made("llama")
    model = load_model(folders[None], quantization=method)
    layers = [part for part in model.module.modules() if isinstance(part, PackedLinear)]
    assert len(layers) == 21 and model.spec.quantization == f"{method} with a scale for each output"
    recorded = record(load_model(folders[method]), 256)
    assert check_decoder(fuse(model, TorchOps(), 256), recorded) is None
    layer = layers[0]
    x = torch.randn(3, layer.in_features)
    weight = layer.product.weight
    torch.testing.assert_close(TritonProduct(weight)(x, None, None, None), x @ weight.dequantize().t())


def test_the_simulator_counts_a_byte_a_weight(made):
    folder = made("llama")[None]
    plain, packed = (model_sizes(folder, dtype="float16", drawn=method) for method in (None, "int8"))
    state = load_file(folder / "model.safetensors")
    sizes = [weight.shape for name, weight in state.items() if name.endswith("_proj.weight")]
    assert plain.weight_bytes - packed.weight_bytes == sum(n * k - 4 * n for n, k in sizes)


def test_internvl_s_language_model_alone(tmp_path):
    directory = write_original(tmp_path / "vl", shared_model("llama"), "InternLM2ForCausalLM")
    model, plain = load_model(directory, quantization="int8"), load_model(directory)
    mine, own = model.module.state_dict(), plain.module.state_dict()
    name = "model.layers.0.self_attn.k_proj.weight"
    torch.testing.assert_close(mine[name], rounded(own[name], "int8"))
    tower, same = (one.images.tower.state_dict() for one in (model, plain))
    assert all(torch.equal(tower[key], same[key]) for key in same)


def test_drawn_in_eight_bits():
    shape = json.loads((load_model("models/demo").path / "config.json").read_text())
    for method in METHODS:
        model = load_model(shape=shape, load_format="dummy", quantization=method)
        assert model.module.model.layers[0].mlp.up_proj.weight.std() == pytest.approx(0.02, rel=0.15)
        assert model.spec.quantization == f"random {method} with a scale for each output, dequantised"


def test_what_is_quantised_already_is_not_again(made, tmp_path):
    shutil.copytree(made("llama")[None], tmp_path / "x")
    assert check_checkpoint(tmp_path / "x", quantization="int8")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    said = {"quant_method": "mxfp4"}
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    for method in METHODS:
        with pytest.raises(
            ModelError, match=f"model.quantization={method}, and the weights of .* quantised with mxfp4"
        ):
            load_model(tmp_path / "x", quantization=method)
    gpt2 = write_checkpoint(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ModelError, match="no linear layer that int8 would take"):
        load_model(gpt2, quantization="int8")
