"""Checkpoints with packed weights as people have them: what is told from their files, each fault in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_checkpoints import pack_words, write_packed
from safetensors.torch import load_file, save_file
from test_import_rule import ROOT

from kvarena.engine.checkpoints.check import check_checkpoint
from kvarena.engine.checkpoints.directory import read_config
from kvarena.engine.checkpoints.packed import packed_checkpoint
from kvarena.engine.errors import ConfigError, ModelError
from kvarena.engine.models import load_model
from kvarena.engine.models.sizes import model_sizes

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def awq(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("awq"), "awq")[0]


@pytest.fixture(scope="module")
def gptq(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("gptq"), "gptq", act_order=True)[0]


@pytest.fixture
def changed(tmp_path):
    """A copy of a checkpoint with other tensors, or another config."""

    def change(source: Path, tensors=None, without=(), config=None, **settings):
        state = load_file(source / "model.safetensors")
        state = {name: value for name, value in state.items() if name not in without} | (tensors or {})
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        values = json.loads((source / "config.json").read_text()) | (config or {})
        values["quantization_config"] = values.get("quantization_config", {}) | settings
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return change


def refusal(directory, **options) -> str:
    with pytest.raises(ModelError) as caught:
        check_checkpoint(directory, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert str(directory) in line
    return line


def test_what_is_packed_is_told_by_the_tensors(awq, gptq):
    """`modules_to_not_convert: ["gate"]` is a router, not gate_proj."""
    for directory, name in ((awq, "AWQ"), (gptq, "GPTQ")):
        found = packed_checkpoint(directory, read_config(directory))
        assert len(found.entries) == 21
        assert "model.layers.0.mlp.gate_proj" in found.entries
        assert found.describe() == f"{name}, 4 bits in groups of 32"
        entry = found.entries[LAYER]
        assert (entry.num_outputs, entry.num_inputs, entry.num_groups) == (96, 64, 2)
        assert entry.num_bytes == 96 * 64 // 2 + 2 * 2 * 96 + 2 * 96 // 2 + (4 * 64 if name == "GPTQ" else 0)


@pytest.mark.parametrize(
    ("kind", "where"), [("awq", "quant_config.json"), ("gptq", "quantize_config.json"), ("gptq_v2", "config.json")]
)
def test_settings_beside_the_config(tmp_path, kind, where):
    directory, _ = write_packed(tmp_path, kind, where=where)
    found = packed_checkpoint(directory, read_config(directory))
    assert found.settings.method == kind.partition("_")[0]
    assert found.settings.file.name == where
    assert found.settings.zero_offset == (kind == "gptq")
    assert check_checkpoint(directory) == directory.resolve()


def test_settings_of_a_language_model_inside(awq, changed):
    said = json.loads((awq / "config.json").read_text())["quantization_config"]
    for section in ("llm_config", "text_config"):
        directory = changed(awq, config={"quantization_config": {}, section: {"quantization_config": said}})
        assert packed_checkpoint(directory, read_config(directory)).settings.method == "awq"


def test_a_file_of_settings_that_was_left_behind_counts_for_nothing(tmp_path, awq):
    _, plain = write_packed(tmp_path, "gptq")
    (plain / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    assert packed_checkpoint(plain, read_config(plain)) is None
    assert load_model(plain).spec.quantization == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 3}, "AWQ packs the weights into 3 bits; 4 bits are read"),
        ({"bits": 8}, "into 8 bits; 4 bits"),
        ({"bits": None}, "into None bits"),
        ({"group_size": 0}, "group_size=0; it must be -1"),
        ({"group_size": "all"}, "group_size=all; it must be -1"),
        ({"version": "gemv"}, "version=gemv, an order of bits that is not read"),
        ({"group_size": 64}, f"{LAYER}"),
        ({"quant_method": "gptq"}, "(768 inputs in groups of 32); settings and weights do not belong together"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format=marlin"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format=nvfp4-pack-quantized"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "holds no packed one"),
        ({"quant_method": "aqlm"}, "quantised with AQLM"),
    ],
)
def test_settings_that_are_not_read(awq, changed, settings, words):
    line = refusal(changed(awq, **settings))
    if words != LAYER:
        assert words in line
    else:
        assert "96 inputs in groups of 64" in line and "down_proj.scales is [3, 64] of F16" in line


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("source", ["awq", "gptq"])
def test_a_part_that_is_missing_or_of_another_shape_or_type(request, changed, source, part):
    directory = request.getfixturevalue(source)
    name = f"{LAYER}.{part}"
    tensor = load_file(directory / "model.safetensors")[name]
    line = refusal(changed(directory, without=(name,)))
    assert name in line and "model.safetensors holds" in line
    for wrong in (tensor[:-1].contiguous(), tensor[:, :-8].contiguous(), tensor.flatten(), tensor.to(torch.int16)):
        line = refusal(changed(directory, {name: wrong}))
        assert f"model.safetensors: {LAYER}." in line
        assert "do not belong together, or the file is broken" in line


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("compressed"), "compressed-tensors", act_order=True)[0]


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("weight_shape", torch.tensor([96, 64, 1])),
        ("weight_shape", torch.tensor([96, 0])),
        ("weight_shape", torch.tensor([96, 128])),
        ("weight_shape", None),
        ("weight_packed", torch.zeros(96, 8, dtype=torch.int16)),
        ("weight_scale", torch.ones(96, 3)),
        ("weight_scale", torch.ones(96, 2, dtype=torch.int32)),
        ("weight_scale", None),
        ("weight_zero_point", torch.zeros(96, 2, dtype=torch.int32)),
        ("weight_g_idx", torch.zeros(63, dtype=torch.int32)),
    ],
)
def test_parts_of_compressed_tensors(compressed, changed, part, wrong):
    assert check_checkpoint(changed(compressed, config_groups=["not", "groups"]))
    name = f"{LAYER}.{part}"
    directory = changed(compressed, without=(name,)) if wrong is None else changed(compressed, {name: wrong})
    assert f"{LAYER}.weight" in refusal(directory)


def test_groups_of_inputs_out_of_range(gptq, changed):
    name = f"{LAYER}.g_idx"
    indices = load_file(gptq / "model.safetensors")[name]
    assert name in refusal(changed(gptq, {name: indices[:-1].contiguous()}))
    for wrong in (2, -1):
        directory = changed(gptq, {name: indices.index_fill(0, torch.tensor([3]), wrong)})
        with pytest.raises(ModelError, match=rf"model.safetensors: {name} names group {wrong}, and the layer has"):
            load_model(directory)


def test_a_truncated_file_is_named(awq, changed):
    directory = changed(awq)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} is truncated or broken" in refusal(directory)


def test_packed_weights_that_nothing_describes(awq, changed):
    directory = changed(awq, config={"quantization_config": {}})
    assert "config.json says nothing of how, nor quantize_config.json" in refusal(directory)


def test_packed_weights_in_a_pickle(awq, tmp_path):
    torch.save(load_file(awq / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((awq / "config.json").read_text())
    assert "packed weights are read from model.safetensors alone" in refusal(tmp_path)


def test_who_insists_on_quantised_weights_gets_them_or_a_line(awq, gptq, tmp_path):
    for directory, method in ((awq, "awq"), (gptq, "gptq")):
        assert check_checkpoint(directory, quantization=method) == directory.resolve()
        assert load_model(directory, quantization=method).spec.quantization.endswith("dequantised")
    assert "model.quantization=gptq, and the weights of" in (line := refusal(awq, quantization="gptq"))
    assert "are quantised with AWQ" in line
    with pytest.raises(ModelError, match=r"demo are not quantised; leave model\.quantization out"):
        load_model("models/demo", quantization="awq")
    drawn = load_model(awq, quantization="gptq", load_format="dummy").spec.quantization
    assert drawn == "random GPTQ, 4 bits in one group, dequantised"
    check_checkpoint(awq, quantization="awq", weights=False)
    with pytest.raises(ConfigError, match=r"model\.quantization=mxfp4 insists on such weights"):
        check_checkpoint(awq, quantization="mxfp4", weights=False)


def test_biases_of_zeros_that_the_model_has_no_place_for(gptq, changed, caplog):
    """AutoGPTQ writes them; one that is not 0 is named, as other weights without a place are."""
    zeros = {f"{LAYER}.bias": torch.zeros(96, dtype=torch.float16)}
    load_model(changed(gptq, zeros))
    assert "no place" not in caplog.text
    load_model(changed(gptq, {f"{LAYER}.bias": torch.ones(96, dtype=torch.float16)}))
    assert f"the model has no place for the weights {LAYER}.bias" in caplog.text


def test_weights_of_another_model_are_named_by_the_model_s_own_names(awq, changed):
    directory = changed(awq, config={"intermediate_size": 192})
    with pytest.raises(ModelError, match=r"mlp.down_proj.weight has shape \[64, 96\] and config.json asks for"):
        load_model(directory)


def test_a_checkpoint_is_judged_without_torch(awq):
    code = (
        "import sys; from kvarena.engine.checkpoints.check import check_checkpoint; "
        f"check_checkpoint({str(awq)!r}, quantization='awq'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_simulator_counts_the_bytes_of_packed_weights(awq):
    """Of linear layers in 16 bits, a packed one takes a quarter, its scales and its zero points."""
    sizes = model_sizes(awq, dtype="float16")
    plain = model_sizes(awq.parent / "plain", dtype="float16")
    entries = packed_checkpoint(awq, read_config(awq)).entries.values()
    assert sizes.spec.num_parameters == plain.spec.num_parameters
    saved = sum(2 * entry.num_outputs * entry.num_inputs - entry.num_bytes for entry in entries)
    assert plain.weight_bytes - sizes.weight_bytes == saved > plain.weight_bytes // 3


def test_words_are_packed_as_the_formats_say():
    """The packer of these tests, against words written by hand."""
    row = torch.arange(8)[None]
    assert int(pack_words(row)[0, 0]) & 0xFFFFFFFF == 0x76543210
    assert int(pack_words(row, (0, 2, 4, 6, 1, 3, 5, 7))[0, 0]) & 0xFFFFFFFF == 0x75316420
