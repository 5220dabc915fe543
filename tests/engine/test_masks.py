"""What masks, windows and scales the probe at load sees, and what it refuses."""

import pytest
import torch
from checkpoints import BASE, write_checkpoint
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from kvarena.engine.attention import hook
from kvarena.engine.errors import ModelError
from kvarena.engine.models import load_model
from kvarena.engine.models.masks import Span, find_span
from kvarena.engine.models.sizes import model_sizes
from kvarena.engine.models.spans import short_spans

CPU = torch.device("cpu")
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
       "shared_expert_intermediate_size": 32, "use_sliding_window": True, "sliding_window": 100,
       "max_window_layers": 1, "decoder_sparse_step": 1}  # fmt: skip
LLAMA4 = {"intermediate_size_mlp": 96, "num_local_experts": 2, "head_dim": 16,
                 "no_rope_layers": [1, 0, 1]}  # fmt: skip


def chunks(size: int):
    return chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("num_positions", [7, 1000])
@pytest.mark.parametrize(
    ("function", "window", "chunk"),
    [
        (causal_mask_function, None, None),
        *((sliding_window_causal_mask_function(size), size, None) for size in (1, 2, 5, 64)),
        *((chunks(size), None, size) for size in (2, 5, 64)),
    ],
)
def test_masks_are_known_at_positions_that_no_short_prompt_reaches(function, window, chunk, num_positions):
    beyond = (window or chunk or 0) >= num_positions
    wanted = Span(None if beyond else window, None if beyond else chunk, asked=num_positions)
    assert find_span(function, num_positions, CPU) == wanted


@pytest.mark.parametrize(
    "function",
    [
        bidirectional_mask_function,
        sliding_window_bidirectional_mask_function(5),
        or_masks(causal_mask_function, lambda b, h, q, k: k < 10),
        and_masks(sliding_window_causal_mask_function(64), lambda b, h, q, k: (k != 60) | (q == k)),
        and_masks(causal_mask_function, lambda b, h, q, k: (q < 100) | (k % 2 == 0)),
        and_masks(sliding_window_causal_mask_function(48), chunks(64)),
    ],
)
def test_other_masks_are_not_taken_for_windows(function):
    assert not find_span(function, 1000, CPU).is_known


@pytest.mark.parametrize("family", ["qwen2_moe", "phimoe"])
def test_a_window_in_the_mask_alone_is_the_layers(family, tmp_path):
    """These layers do not hand their window to the attention function."""
    model = load_model(write_checkpoint(tmp_path, family, **MOE))
    windows = (100, None, None) if family == "qwen2_moe" else (100, 100, 100)
    assert model.spec.windows == windows
    assert model_sizes(tmp_path, dtype="bfloat16").spec.windows == windows


def test_doge_is_refused_for_its_selection_of_keys():
    """Its default of 2,048 kept keys is far beyond the probe's prompts."""
    with pytest.raises(
        ModelError, match="the mask of layer 0 is not causal, or hides keys in a way of the model's own"
    ):
        load_model(shape=BASE | {"model_type": "doge"}, load_format="dummy")


def test_faults_behind_a_temperature_step_are_seen(monkeypatch, tmp_path):
    """Llama 4 counts the rows of a step where the engine needs positions; its steps are 8,192 of them."""
    write_checkpoint(tmp_path, "llama4_text", **LLAMA4)
    assert load_model(tmp_path).spec.num_layers == 3
    monkeypatch.setattr(hook, "by_position", lambda query, module, meta: query)
    with pytest.raises(ModelError, match="with floor_scale cut to a few tokens: packed sequences give other logits"):
        load_model(tmp_path)


def test_faults_behind_a_window_are_seen(monkeypatch, tmp_path):
    original = hook.attention
    write_checkpoint(tmp_path, "mistral", sliding_window=100)
    monkeypatch.setattr(hook, "attention", lambda *args, **kwargs: original(*args, **kwargs | {"sliding_window": None}))
    with pytest.raises(ModelError, match="with sliding_window cut to a few tokens: packed sequences give other logits"):
        load_model(tmp_path)


def test_spans_are_put_back(tmp_path):
    module = load_model(write_checkpoint(tmp_path, "phimoe", **MOE)).module
    before = [dict(vars(part)) for part in (module.config, *module.modules())]
    with pytest.raises(RuntimeError), short_spans(module) as names:
        assert names == ["sliding_window"]
        assert module.config.sliding_window == 3
        raise RuntimeError
    assert [dict(vars(part)) for part in (module.config, *module.modules())] == before


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bart", "its forward takes no position_ids, so it counts positions along the packed row"),
        ("roberta", "it counts them in another way"),
        ("bert", "is not causal"),
        ("diffllama", "layer 0 calls attention 2 times in a forward"),
    ],
)
def test_refusals_say_the_reason(family, reason):
    with pytest.raises(ModelError, match=reason):
        load_model(
            shape=BASE | {"model_type": family, "is_decoder": family != "bert", "decoder_layers": 3},
            load_format="dummy",
        )


def test_needed_bytes_of_latents_windows_and_shared_layers(tmp_path):
    spec = load_model(write_checkpoint(tmp_path / "mla", "deepseek_v3")).spec
    assert spec.needed_kv_bytes(100) == 100 * 3 * (16 + 8) * 4 < 100 * spec.kv_bytes_per_token
    assert spec.kv_surplus_reasons(100) == ["latent attention needs 24 elements of a token and layer, of 192 stored"]
    spec = load_model(write_checkpoint(tmp_path / "mixed", "gpt_oss")).spec
    layer = spec.kv_bytes_per_token // 3
    assert spec.windows == (8, None, 8)
    assert spec.needed_kv_bytes(100) == (100 + 8 + 8) * layer
    assert spec.kv_surplus_reasons(100) == ["2 of 3 layers see 8 tokens"]
    assert spec.needed_kv_bytes(8) == 8 * spec.kv_bytes_per_token
    assert spec.kv_surplus_reasons(8) == []
    mixed = ["sliding_attention", "full_attention"] * 2
    shape = BASE | {"model_type": "gemma3n_text", "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 16,
                    "layer_types": mixed, "sliding_window": 8, "hidden_size_per_layer_input": 16,
                    "vocab_size_per_layer_input": 128, "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
    spec = load_model(shape=shape, load_format="dummy").spec
    assert (spec.shared_layers, spec.windows) == (2, (8, None, 8, None))
    assert spec.needed_kv_bytes(100) == (8 + 100) * spec.kv_bytes_per_token // 4
    spec = load_model(write_checkpoint(tmp_path / "plain")).spec
    assert spec.needed_kv_bytes(100) == 100 * spec.kv_bytes_per_token
    assert spec.kv_surplus_reasons(100) == []
