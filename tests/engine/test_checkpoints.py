"""Model directories as people have them: each that cannot run gets one line that is true and helps, without torch."""

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import sentencepiece
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from test_import_rule import ROOT
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvarena.engine.checkpoints.check import check_checkpoint
from kvarena.engine.checkpoints.directory import resolve_directory
from kvarena.engine.checkpoints.kinds import DEQUANTIZED, WITH_TEXT_MODEL
from kvarena.engine.checkpoints.tokenizer import load_tokenizer
from kvarena.engine.errors import ModelError
from kvarena.engine.models import load_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
ADVISED_IN_VAIN = ("--quantization", "device_map", "pip install", "git+https", "dtype=int")
# Texts of many kinds of characters, none of which SentencePiece's own character map joins with its neighbour.
ALPHABET = "abcdefg the of  ABC.,<>\n\té漢字😀\u2581"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("llama"))
    shutil.copy("experiments/models/demo/tokenizer.json", directory)
    return directory


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refusal(directory, **options) -> str:
    with pytest.raises(ModelError) as caught:
        check_checkpoint(directory, tokenizer=True, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert str(directory) in line
    assert not [words for words in ADVISED_IN_VAIN if words in line]
    return line


def configure(directory: Path, **fields) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def test_a_whole_directory_is_fine(whole):
    assert check_checkpoint(whole, tokenizer=True) == whole.resolve()
    assert check_checkpoint("models/demo", tokenizer=True) == ROOT / "experiments" / "models" / "demo"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised with AWQ"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised with GPTQ"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "with bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": True}}, "with bitsandbytes"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "with compressed-tensors"),
        ({"compression_config": {"format": "pack-quantized"}}, "with compressed-tensors"),
        ({"quantization_config": {"quant_method": "torchao"}}, "with torchao"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "with MLX"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "with AWQ"),
        ({"model_type": "llava", "vision_config": {"a": 1}, "text_config": {"model_type": "llama"}}, "(llama)"),
        ({"model_type": "qwen2_vl", "vision_config": {"a": 1}}, "reads images"),
        ({"model_type": "llava_llama", "mm_vision_tower": "openai/clip"}, "reads images"),
        ({"model_type": "qwen2_audio", "audio_config": {"a": 1}}, "reads sound"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification, which writes no text"),
        ({"architectures": ["Qwen2ForRewardModel"]}, "writes no text"),
    ],
)
def test_kinds_that_are_not_run_are_told_from_the_config(copy, fields, words):
    configure(copy, **fields)
    assert words in refusal(copy)


def test_models_of_text_and_images_that_transformers_runs_as_text_are_let_through():
    """The list is transformers' own: each has a causal language model, and a tower beside it."""
    with_tower = {
        name
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if name in CONFIG_MAPPING
        and {"vision_config", "audio_config", "vq_config"} & set(getattr(CONFIG_MAPPING[name], "sub_configs", {}) or {})
    }
    assert with_tower == WITH_TEXT_MODEL


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"],
)
@pytest.mark.parametrize(
    ("content", "words"), [(POINTER, "git lfs pull"), ("\n<!DOCTYPE html><html>", "a web page, not the file itself")]
)
def test_what_stands_in_for_a_file_is_no_file(copy, name, content, words):
    (copy / name).write_text(content)
    line = refusal(copy)
    assert words in line
    assert name in line


def test_a_pointer_among_the_shards_or_in_place_of_the_index(copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, file in enumerate(files):
        save_file({key: value for j, (key, value) in enumerate(tensors.items()) if j % 2 == i}, copy / file)
    line = refusal(copy)
    assert "2 shards such as model-00001-of-00002.safetensors and lacks model.safetensors.index.json" in line
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: files[j % 2] for j, key in enumerate(tensors)}}))
    check_checkpoint(copy)
    (copy / files[1]).write_text(POINTER)
    assert "git lfs pull" in refusal(copy)
    (copy / files[1]).unlink()
    assert f"lacks {files[1]}, which model.safetensors.index.json names; copy it again" in refusal(copy)
    (copy / files[1]).symlink_to(copy / "blobs" / "gone")
    assert "is a link to" in refusal(copy)
    (copy / files[0]).unlink()
    (copy / files[1]).unlink()
    assert "and 1 more of 2 files" in refusal(copy)
    index.write_text(POINTER)
    assert "git lfs pull" in refusal(copy)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-Q4_K_M.gguf", "model-Q4_K_M.gguf is GGUF weights"),
        ("adapter_model.safetensors", "merging into its base model"),
        ("consolidated.safetensors", "its maker's own format"),
        ("consolidated.00.pth", "its maker's own format"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"),
        ("weights.npz", "MLX"),
        ("mymodel.safetensors", "rename it to model.safetensors"),
        ("readme.md", "model.load_format=dummy runs the shape"),
    ],
)
def test_weights_of_other_formats_are_called_by_their_name(copy, name, words):
    (copy / "model.safetensors").rename(copy / name)
    assert words in refusal(copy)
    check_checkpoint(copy, weights=False, tokenizer=True)


def test_a_directory_that_is_another_one(whole, tmp_path):
    assert "has no config.json; model.path must name" in refusal(tmp_path)
    (tmp_path / "model.gguf").touch()
    assert "it holds GGUF weights" in refusal(tmp_path)
    assert "is a GGUF file, which is not read" in refusal(tmp_path / "model.gguf")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "an adapter of org/base (peft)" in refusal(tmp_path)
    outer = tmp_path / "models--org--name"
    (outer / "snapshots").mkdir(parents=True)
    shutil.copytree(whole, outer / "snapshots" / "abc")
    assert f"give {outer}/snapshots/abc" in refusal(outer)
    nested = tmp_path / "download"
    shutil.copytree(whole, nested / "inner")
    assert f"give {nested}/inner, which has one" in refusal(nested)


def test_packed_weights_whose_config_says_nothing(copy):
    save_file({"model.layers.0.mlp.up_proj.qweight": torch.zeros(1)}, copy / "model.safetensors")
    assert "quantised with GPTQ or AWQ (model.layers.0.mlp.up_proj.qweight)" in refusal(copy)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_whole_numbers_are_no_weights(copy, dtype):
    """They would be read as if they were the weights themselves."""
    state = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(state | {name: torch.zeros_like(state[name], dtype=dtype)}, copy / "model.safetensors")
    assert f"as {name}, and config.json says nothing of quantisation" in refusal(copy)


@pytest.mark.parametrize("name", ["../model/model.safetensors", "/etc/passwd"])
def test_an_index_names_no_file_of_elsewhere(copy, name):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert f"names {name}, which is no file of its directory" in refusal(copy)


def test_pickles_are_looked_at(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    check_checkpoint(copy)
    assert zipfile.is_zipfile(copy / "pytorch_model.bin")
    os.truncate(copy / "pytorch_model.bin", 1000)
    assert "pytorch_model.bin is truncated or broken" in refusal(copy)
    (copy / "pytorch_model.bin").write_text(POINTER)
    assert "git lfs pull" in refusal(copy)
    (copy / "pytorch_model.bin").rename(copy / "pytorch_model-00001-of-00001.bin")
    assert "lacks pytorch_model.bin.index.json" in refusal(copy)


def test_fp8_runs_as_plain_weights(copy, monkeypatch):
    """transformers multiplies its scales in; no kernel for quantised weights is asked for, whatever the device."""
    weights = load_file(copy / "model.safetensors")
    packed = {}
    for key, weight in weights.items():
        packed[key] = weight
        if "_proj" in key:
            scale = weight.abs().max() / 448
            packed |= {key: (weight / scale).to(torch.float8_e4m3fn), f"{key}_scale_inv": scale.reshape(1, 1)}
    save_file(packed, copy / "model.safetensors", metadata={"format": "pt"})
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    configure(copy, quantization_config=fp8)
    asked, load = [], AutoModelForCausalLM.from_pretrained

    def watch(path, config, **options):
        asked.append(config.quantization_config["dequantize"])
        return load(path, config=config, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watch)
    loaded = load_model(copy).module
    assert asked == [True]
    got = loaded.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, weights["model.layers.1.mlp.up_proj.weight"], atol=0.03, rtol=0.07)
    assert "fp8" in DEQUANTIZED
    assert load_model(copy, load_format="dummy").spec.num_layers == 3


def test_a_quantised_shape_runs_with_random_weights(copy):
    configure(copy, quantization_config={"quant_method": "awq", "bits": 4})
    assert load_model(copy, load_format="dummy").spec.num_layers == 3
    with pytest.raises(ModelError, match="quantised with AWQ"):
        load_model(copy)


def test_the_tokenizer_is_read_before_the_weights(copy, monkeypatch):
    (copy / "tokenizer.json").write_text("{")
    monkeypatch.setattr(
        "kvarena.engine.models.loader._from_directory", lambda *args: pytest.fail("the weights were read")
    )
    with pytest.raises(ModelError, match="the tokenizer in"):
        load_model(copy)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer"}', "holds no tokenizer; copy"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["a.B", null]}}', "set model.trust_remote_code=true"),
        ("tekken.json", "{}", "holds tekken.json, which is not read"),
    ],
)
def test_settings_alone_are_no_tokenizer(copy, name, content, words):
    """transformers makes a tokenizer of three tokens of them, or none."""
    (copy / "tokenizer.json").unlink()
    (copy / name).write_text(content)
    assert words in refusal(copy)
    with pytest.raises(ModelError):
        load_tokenizer(copy)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def pieces(request, tmp_path_factory):
    """A directory with a tokenizer.model alone, as SentencePiece's trainer writes it for Llama and its like."""
    directory = tmp_path_factory.mktemp(request.param)
    words = (ROOT / "README.md").read_text().split()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(words[i : i + 12]) for i in range(0, len(words), 12)),
        model_prefix=str(directory / "tokenizer"), model_type=request.param, vocab_size=400, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    (directory / "tokenizer.vocab").unlink()
    return directory


@pytest.mark.parametrize("model_type", [None, "llama", "mistral", "gemma", "qwen2"])
@pytest.mark.parametrize(
    "settings", [{}, {"tokenizer_class": "LlamaTokenizer", "legacy": False}, {"add_bos_token": False}]
)
def test_a_tokenizer_model_alone_is_read_as_sentencepiece_reads_it(pieces, model_type, settings, tmp_path):
    """transformers' classes guess the leading blank from the model's type: for most of these they guess wrong."""
    directory = Path(shutil.copytree(pieces, tmp_path / "model"))
    if model_type is not None:
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    tokenizer = load_tokenizer(directory)
    own = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    draw = random.Random(0)
    for _ in range(100):
        text = "".join(draw.choice(ALPHABET) for _ in range(draw.randrange(30)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == own.encode(text)
        assert tokenizer.decode(ids) == own.decode(ids)
    begin = [] if settings.get("add_bos_token") is False else [own.bos_id()]
    assert tokenizer.encode("the") == begin + own.encode("the")
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<s>", "</s>", own.vocab_size())
    assert bool(tokenizer.chat_template) is bool(settings)


def test_what_is_called_tokenizer_model_and_is_none(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ModelError, match="is no SentencePiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("command", [["run.py", "model.path="], ["-m", "kvarena", "serve", ""]])
def test_a_checkpoint_is_refused_before_torch_is_loaded(copy, command, tmp_path):
    """By the number of modules: an import of torch alone makes over a thousand."""
    configure(copy, quantization_config={"quant_method": "awq"})
    *before, last = command
    count = "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); "
    run = "import runpy; runpy." + ("run_module('kvarena'" if "-m" in before else "run_path('run.py'")
    code = f"{count}sys.argv[1:] = {[*before[(before[0] == '-m' and 2) or 1 :], last + str(copy)]!r}; "
    code += f"{run}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "quantised with AWQ" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout.splitlines()[-1] == "False"


def test_an_empty_folder_does_not_hide_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "demo").mkdir(parents=True)
    assert resolve_directory("models/demo") == ROOT / "experiments" / "models" / "demo"
    (tmp_path / "models" / "demo" / "notes.txt").write_text("")
    assert resolve_directory("models/demo") == tmp_path / "models" / "demo"


def test_the_home_of_nobody_is_one_line():
    with pytest.raises(ModelError, match=r"model.path=~nobody-here/x does not exist"):
        resolve_directory("~nobody-here/x")
