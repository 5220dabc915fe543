"""Faults in the files of a mixture are told by the names in these files, packed or not."""

import json
import shutil

import pytest
from checkpoints import write_checkpoint
from packed_checkpoints import write_packed
from safetensors.torch import load_file, save_file

from kvarena.engine.errors import ModelError
from kvarena.engine.models import load_model

QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
PLACES = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.1.w2",
    "qwen3_moe": "model.layers.1.mlp.experts.1.down_proj",
    "mixtral packed": "model.layers.1.block_sparse_moe.experts.1.w2",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    return {
        "mixtral": write_checkpoint(root / "mixtral", "mixtral"),
        "qwen3_moe": write_checkpoint(root / "qwen", "qwen3_moe", **QWEN),
        "mixtral packed": write_packed(root / "packed", "awq", "mixtral", 32)[0],
    }


@pytest.mark.parametrize("top_k", [0, 5, -1])
def test_a_token_takes_some_of_the_experts(made, top_k, tmp_path):
    shutil.copytree(made["mixtral"], tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": top_k}))
    with pytest.raises(ModelError, match=f"num_experts_per_tok={top_k} of a config with 4 experts"):
        load_model(tmp_path / "x")


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("fault", ["missing", "misshapen", "surplus", "cut off"])
def test_a_fault_is_named(made, kind, fault, tmp_path):
    shutil.copytree(made[kind], tmp_path / "x")
    file, place = tmp_path / "x" / "model.safetensors", PLACES[kind]
    state = load_file(file)
    words = {
        "missing": f"lacks the weights {place}.weight; copy",
        "misshapen": f"weight {place}.weight has shape [",
        "surplus": f"holds the weight {place.replace('experts.1', 'experts.6')}.weight, and config.json says that a "
        "layer has 4 experts",
        "cut off": f"{file} is truncated or broken",
    }[fault]
    for name in [name for name in state if name.startswith(f"{place}.")]:
        tensor = state.pop(name)
        if fault == "misshapen":
            step = 1 if tensor.dtype.is_floating_point is False else 8
            # Outputs of AWQ lie along the last axis, of a plain weight along the first.
            state[name] = (tensor[:, :-step] if "packed" in kind else tensor[:-8]).contiguous()
        if fault == "surplus":
            state |= {name: tensor, name.replace("experts.1.", "experts.6."): tensor.clone()}
    if fault == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path / "x")
    assert words in str(caught.value) and "\n" not in str(caught.value)
