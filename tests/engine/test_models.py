"""Loading models: what is loaded, and one clear line for everything that cannot be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import BASE, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from kvarena.engine.errors import ConfigError, ModelError
from kvarena.engine.models import load_model, load_tokenizer
from kvarena.engine.models.choices import NoteChoices, RepeatChoices, side_by_side
from kvarena.engine.models.limits import max_model_len
from kvarena.engine.models.probe import probe_attention

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
SHAPE = {"model_type": "llama"} | BASE


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("llama"), eos_token_id=[3, 4])


@pytest.fixture
def copy(llama, tmp_path):
    """A copy of the checkpoint that a test may break."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def refusal(*args, error=ModelError, **kwargs) -> str:
    with pytest.raises(error) as caught:
        load_model(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change(directory: Path, **fields) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def test_spec_of_a_directory(llama):
    model = load_model(llama)
    spec = model.spec
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (3, 2, 16, 128)
    assert spec.max_model_len == 256
    assert spec.dtype == torch.float32
    assert spec.kv_bytes_per_token == 2 * 3 * 2 * 16 * 4
    assert spec.eos_token_ids == {3, 4}
    assert spec.bos_token_id == 1
    assert spec.num_parameters == sum(t.numel() for t in load_file(llama / "model.safetensors").values())
    assert spec.name == llama.name
    assert spec.sliding_window is None
    assert model.path == llama
    assert model.special_token_ids == {0, 1, 3, 4}
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_weights_are_those_of_the_file(llama):
    loaded = load_model(llama, dtype="bfloat16").module.state_dict()
    for key, tensor in load_file(llama / "model.safetensors").items():
        assert torch.equal(loaded[key], tensor.bfloat16()), key


def test_auto_dtype_is_the_checkpoints(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert load_model(copy, dtype="auto").spec.dtype == torch.bfloat16
    assert load_model(copy).spec.dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "window", "has_plain_layers"),
    [
        ("mistral", 8, False),
        ("gemma2", None, False),  # soft-capped
        ("gpt_oss", None, False),  # with sinks
        ("phi3", 8, False),
        ("qwen2", None, True),
        ("llama", None, True),
    ],
)
def test_sliding_window_is_the_widest_layers(family, window, has_plain_layers, tmp_path):
    spec = load_model(write_checkpoint(tmp_path, family)).spec
    assert (spec.sliding_window, spec.has_plain_layers) == (window, has_plain_layers)


def test_relative_paths_also_start_at_the_project_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_model("models/demo").spec.name == "demo"


def test_dummy_weights_come_from_the_seed_and_leave_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = load_model(shape=SHAPE, load_format="dummy", seed=1)
    assert torch.equal(torch.rand(1), expected)
    same = load_model(shape=SHAPE, load_format="dummy", seed=1)
    other = load_model(shape=SHAPE, load_format="dummy", seed=2)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.module.state_dict()[weight], same.module.state_dict()[weight])
    assert not torch.equal(first.module.state_dict()[weight], other.module.state_dict()[weight])
    assert first.path is None


def test_a_directory_without_weights_can_be_run_with_dummy_ones(copy):
    (copy / "model.safetensors").unlink()
    assert load_model(copy, load_format="dummy").spec.num_layers == 3


@pytest.mark.parametrize("name", ["llama-3.1-8b-shape", "qwen3-0.6b-shape"])
def test_shipped_shapes(name):
    """The KV sizes are those that the field publishes for these models."""
    section = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    shape = section["shape"] | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 100}
    spec = load_model(shape=shape, dtype="auto", load_format=section["load_format"], name=section["name"]).spec
    layers = section["shape"]["num_hidden_layers"]
    assert spec.kv_bytes_per_token * layers == {"llama-3.1-8b-shape": 131_072, "qwen3-0.6b-shape": 114_688}[name]
    assert spec.dtype == torch.bfloat16
    assert spec.name == name
    config = AutoConfig.for_model(**section["shape"])
    assert config.rope_parameters["rope_theta"] == section["shape"]["rope_theta"]


def test_missing_directory(tmp_path):
    assert "does not exist; give a local directory" in refusal(tmp_path / "none")
    assert "is no folder here, and as a model's name" in refusal("meta-llama/Llama-3.1-8B")
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in refusal(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("{broken", "cannot be read as JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"hidden_size": 3}', "has no model_type"),
        ('{"model_type": "nope"}', "names model type 'nope', which transformers"),
        ('{"model_type": "nope", "auto_map": {}}', "set model.trust_remote_code=true"),
        (
            '{"model_type": "llama", "hidden_size": "wide"}',
            "is not a valid config: Validation error for field 'hidden_s",
        ),
        ('{"model_type": "llama", "num_attention_heads": 0}', "config.json is not a valid config"),
        ('{"model_type": "llama", "quantization_config": [1]}', "config.json is not a valid config"),
        ('{"model_type": "llama", "architectures": "LlamaForCausalLM"}', "config.json is not a valid config"),
        ('{"model_type": "llama", "hidden_act": "gelux"}', "cannot be built from its config: there is no 'gelux'"),
        ('{"model_type": "vit"}', "no causal language model for model type 'vit'"),
    ],
)
def test_bad_config(copy, content, message):
    (copy / "config.json").unlink()
    if content is not None:
        (copy / "config.json").write_text(content)
    assert message in refusal(copy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": "four"}, "got str (value: 'four')"),
        ({"num_attention_heads": 0}, "is not a valid config: integer modulo by zero"),
        ({"quantization_config": [1]}, "is not a valid config"),
    ],
)
def test_a_broken_config_is_no_fault_of_the_tokenizer_s(copy, fields, message):
    shutil.copy("experiments/models/demo/tokenizer.json", copy)
    change(copy, **fields)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(copy)
    assert str(caught.value).startswith(f"{copy}/config.json is not a valid config: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_of_more_than_the_machine_holds_is_refused_before_any_weight_is_made(copy):
    """What the files lack transformers would make, of the config's size."""
    change(copy, intermediate_size=10**12)
    assert "does not fit in the memory of cpu" in refusal(copy)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    assert "holds no weights: model.safetensors or" in refusal(copy)


@pytest.mark.parametrize("kept", [0, 5, 2000, -1])
def test_truncated_weights(copy, kept):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:kept])
    assert "model.safetensors is truncated or broken" in refusal(copy)


def test_missing_weights_are_not_drawn_at_random(copy):
    tensors = load_file(copy / "model.safetensors")
    for layer in range(2):
        for name in ("up_proj", "down_proj"):
            del tensors[f"model.layers.{layer}.mlp.{name}.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "lacks the weights model.layers.0.mlp.down_proj.weight" in refusal(copy)
    assert "and 1 more" in refusal(copy)


def test_weights_of_another_shape(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "weight model.layers.1.mlp.up_proj.weight has shape [3, 3]" in refusal(copy)


def test_sharded_weights_and_a_missing_shard(llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert load_model(tmp_path).spec.num_parameters == load_model(llama).spec.num_parameters
    shards[1].unlink()
    assert f"lacks {shards[1].name}, which model.safetensors.index.json names" in refusal(tmp_path)


def test_tied_weights_are_not_missing(tmp_path):
    assert load_model(write_checkpoint(tmp_path, tie_word_embeddings=True)).spec.num_layers == 3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model_type": "mamba", "num_hidden_layers": 2}, "do not use transformers' attention interface"),
        ({"model_type": "bloom", "n_layer": 2}, "do not use transformers' attention interface"),
        (
            {
                "model_type": "qwen3_next",
                "num_hidden_layers": 4,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32,
                "head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
            },
            "1 of 4 layers use standard attention; layer 0 does not",
        ),
    ],
)
def test_models_without_standard_attention_are_refused(shape, message):
    with pytest.raises(ModelError, match=message):
        load_model(shape=BASE | shape, load_format="dummy")


def test_layers_with_different_kv_heads_are_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaAttention.__init__

    def init(self, config, layer_idx):
        config.num_key_value_heads = 4 if layer_idx == 1 else 2
        original(self, config, layer_idx)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "__init__", init)
    assert "its layers differ in KV heads (2 x 16, 4 x 16)" in refusal(shape=SHAPE, load_format="dummy")


def test_a_model_that_mixes_tokens_outside_attention_is_refused(monkeypatch):
    """Such as a convolution beside the attention: right alone, wrong when packed."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        modeling_llama.LlamaMLP, "forward", lambda self, x: original(self, x) + 0.5 * x.roll(1, dims=1) + x.cumsum(1)
    )
    assert "packed sequences give other logits than each alone" in refusal(shape=SHAPE, load_format="dummy")


def test_a_model_whose_forward_fails_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    def fail(self, x):
        raise ValueError("no kernel\nfor this")

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", fail)
    assert "a probing forward failed with ValueError: no kernel" in refusal(shape=SHAPE, load_format="dummy")


def test_a_directory_with_its_own_code(copy, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (copy / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    assert "set model.trust_remote_code=true" in refusal(copy)
    model = load_model(copy, trust_remote_code=True)
    assert type(model.module).__name__ == "OwnForCausalLM"
    assert model.spec.num_layers == 3
    (copy / "own.py").write_text("import no_such_module\n")
    assert "config.json is not a valid config" in refusal(copy, trust_remote_code=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither is set"),
        ({"path": "x", "shape": SHAPE}, "both are set"),
        ({"shape": SHAPE}, "set model.load_format=dummy"),
        ({"shape": SHAPE, "load_format": "fast"}, "model.load_format=fast must be one of auto, dummy"),
        ({"shape": SHAPE, "load_format": "dummy", "dtype": "int8"}, "engine.dtype=int8 must be one of"),
        ({"shape": {"model_type": "nope"}, "load_format": "dummy"}, "model.shape.model_type=nope is not"),
        ({"shape": {"model_type": "llama", "hidden_size": "x"}, "load_format": "dummy"}, "not a valid llama config"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    assert message in refusal(error=ConfigError, **options)


def test_context_limits_keep_packed_sequences_independent():
    def limit(family: str, **fields) -> int:
        return max_model_len(AutoConfig.for_model(family, **(BASE | fields)), family)

    assert limit("llama") == 256
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    assert limit("llama", rope_parameters=dynamic) == 256
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
    assert limit("qwen2", rope_parameters=yarn) == 1024
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
    fields = {"rope_parameters": longrope, "original_max_position_embeddings": 64}
    assert limit("phi3", **fields) == 64
    assert limit("llama4_text", attention_chunk_size=128) == 128


@pytest.mark.parametrize(
    ("family", "fields", "line"),
    [
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                                      "rope_theta": 1e4}, "original_max_position_embeddings": 64},
         "a context of 64 tokens, of 256 that config.json states: beyond them longrope takes other frequencies"),
        ("llama4_text", {"attention_chunk_size": 128, "num_local_experts": 2, "intermediate_size_mlp": 96,
                         "head_dim": 16},
         "a context of 128 tokens, of 256 that config.json states: its attention is cut in chunks of 128 tokens"),
        ("phi3", {}, ""),
    ],
)  # fmt: skip
def test_a_context_that_is_cut_is_said_at_the_start(family, fields, line, caplog):
    load_model(shape=BASE | fields | {"model_type": family}, load_format="dummy")
    assert line in caplog.text and bool(line) == ("a context of" in caplog.text)


def test_a_linear_scale_stretches_the_context():
    def limit(family: str, rope: dict, **fields) -> int:
        return max_model_len(AutoConfig.for_model(family, **(BASE | {"rope_parameters": rope} | fields)), family)

    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert limit("llama", linear) == 1024
    assert limit("llama", linear | {"factor": 1.5}) == 384
    assert limit("llama", linear | {"factor": 0.5}) == 256
    # The config states both: the longer one is what it says, not that times four again.
    assert limit("llama", linear | {"original_max_position_embeddings": 64}) == 256
    both = {"full_attention": linear, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert limit("gemma3_text", both) == 256
    old = AutoConfig.for_model("llama", **(BASE | {"rope_scaling": {"type": "linear", "factor": 2.0}}))
    assert max_model_len(old, "llama") == 512


def test_tokenizer(tmp_path):
    tokenizer = load_tokenizer("models/demo")
    text = "a function returns a value"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_special_tokens_of_the_tokenizer_are_known():
    assert load_model("models/demo").special_token_ids == {0, 1, 2}


def test_a_gpu_needs_what_places_weights_there(llama, monkeypatch):
    monkeypatch.setattr("kvarena.engine.models.building.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs accelerate .* onto cuda: pip install 'kvarena\[gpu\]'"):
        load_model(path=llama, dtype="float32", device="cuda")


def test_loading_is_quiet_and_names_surplus_weights(copy, capfd, caplog):
    load_model(copy)
    tensors = load_file(copy / "model.safetensors")
    tensors |= {f"vision.{name}": torch.zeros(3) for name in "abcd"}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    load_model(copy)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert [record.message for record in caplog.records] == [
        f"{copy}: the model has no place for the weights vision.a, vision.b, vision.c and 1 more"
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_config_with_fewer_layers_than_the_weights_is_refused(family, tmp_path):
    config = json.loads((write_checkpoint(tmp_path, family) / "config.json").read_text())
    fewer = {"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(config | fewer))
    assert "holds weights of 3 layers, and its config.json says num_hidden_layers=2" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | fewer | {"num_nextn_predict_layers": 1}))
    assert load_model(tmp_path).spec.num_layers == 2  # the third one predicts further tokens


def test_experts_that_rounding_exchanges_refuse_no_model():
    """In bf16 two orders of computing may choose other experts of a token, and with them give other logits."""
    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=8, num_experts_per_tok=2, vocab_size=256, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config).eval().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        factor = 0.02 if "gate.weight" in name else 15 if "experts" in name else 1 if "norm" in name else 3
        parameter.data *= factor
    assert probe_attention(model, "near ties", 12, 256).num_layers == 12


def test_choices_are_noted_and_repeated():
    x, y = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[0.0, 9.0, 8.0], [1.0, 2.0, 3.0]])
    with NoteChoices() as first:
        torch.topk(x, 2)
    with NoteChoices() as second:
        y.topk(2, dim=-1)
    packed = torch.tensor([[1.0, 5.0, 4.0], [7.0, 0.0, 1.0], [9.0, 1.0, 2.0]])
    with RepeatChoices(side_by_side([first.found, second.found])):
        values, indices = packed.topk(2)
        again = packed.topk(2).indices  # nothing was noted of a second call
    assert indices.tolist() == [[0, 2], [1, 2], [2, 1]]
    assert values.tolist() == [[1.0, 4.0], [0.0, 1.0], [2.0, 1.0]]
    assert again.tolist() == [[1, 2], [0, 2], [0, 2]]
    assert side_by_side([first.found, []]) == []
    groups = [[torch.zeros(tokens, 3, 2, dtype=torch.int64)] for tokens in (7, 5)]  # the best two of each of 3 groups
    assert [part.shape for part in side_by_side(groups)] == [(12, 3, 2)]
    assert side_by_side([[torch.zeros(7, 3)], [torch.zeros(5, 4)]]) == []
    with RepeatChoices(first.found):
        assert packed.topk(2).indices.tolist() == again.tolist(), "of another shape"
        assert packed[:1].topk(1, dim=0).indices.tolist() == [[0, 0, 0]], "along another dimension"
