"""Small random checkpoints of Qwen2.5-VL and Qwen3-VL as they are published, and transformers' own greedy tokens.

Patches of 14 (16) pixels merged by 2 x 2, so 28 (32) pixels a token's side; windows of 2 x 2 tokens. Files are laid out
as the originals': sharded safetensors with an index under the published names, config.json flat or nested as theirs,
tokenizer and image processor.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from image_checkpoints import bytes_tokenizer, write_shards
from PIL import Image
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

KINDS = ("Qwen2.5-VL", "Qwen3-VL")
SIDE = {"Qwen2.5-VL": 28, "Qwen3-VL": 32}
MAX_TOKENS = 12  # of an image
ADDED = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IMAGE = 259 + ADDED.index("<|image_pad|>")
VOCAB = 280
# The published one's part for images, which are numbered on request, and what every chat has.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in "
    "content %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_TOKENS = {"image_token_id": IMAGE, "video_token_id": IMAGE + 1, "vision_start_token_id": IMAGE - 2,
           "vision_end_token_id": IMAGE - 1}  # fmt: skip


def qwen2_5_config(**overrides: Any) -> dict[str, Any]:
    """config.json as published: the language model's fields beside the whole's."""
    vision = {"depth": 3, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
              "in_chans": 3, "out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2,
              "spatial_patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2,
              "temporal_patch_size": 2}  # fmt: skip
    return {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 1,
            "eos_token_id": 260, **_TOKENS, "vision_token_id": 0, "hidden_act": "silu", "hidden_size": 64,
            "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 512,
            "max_window_layers": 3, "model_type": "qwen2_5_vl", "num_attention_heads": 4, "num_hidden_layers": 3,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
            "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.41.2",
            "use_cache": True, "use_sliding_window": False, "vision_config": vision,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "vocab_size": VOCAB} | overrides  # fmt: skip


def qwen3_config(**overrides: Any) -> dict[str, Any]:
    """config.json as published: nested, and with a tower that has the whole's model type."""
    text = {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "float32",
            "eos_token_id": 260, "head_dim": 16, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
            "intermediate_size": 96, "max_position_embeddings": 512, "model_type": "qwen3_vl_text",
            "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
            "rope_theta": 5000000, "use_cache": True, "vocab_size": VOCAB}  # fmt: skip
    vision = {"deepstack_visual_indexes": [0, 2], "depth": 4, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32,
              "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 48, "model_type": "qwen3_vl",
              "num_heads": 2, "num_position_embeddings": 16, "out_hidden_size": 64, "patch_size": 16,
              "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    return {"architectures": ["Qwen3VLForConditionalGeneration"], **_TOKENS, "model_type": "qwen3_vl",
            "text_config": text, "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0",
            "vision_config": vision} | overrides  # fmt: skip


def qwen_model(kind: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A random model of `kind`; `overrides` of its config.json."""
    torch.manual_seed(seed)
    if kind == "Qwen2.5-VL":
        model: Any = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(qwen2_5_config(**overrides)))
    else:
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(qwen3_config(**overrides)))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.03 if "patch_embed" in name else 0.2)
    return model.eval()


@cache
def shared_qwen(kind: str) -> Any:
    """One model for all tests of a process."""
    return qwen_model(kind)


def write_qwen(directory: Path, model: Any) -> Path:
    """As the hub's repositories have it."""
    directory.mkdir(parents=True, exist_ok=True)
    second = isinstance(model, Qwen2_5_VLForConditionalGeneration)
    tensors = dict(model.state_dict())
    if second:  # published before transformers 5: the tower beside the language model, which has no name of its own
        tensors = {
            name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
            for name, tensor in tensors.items()
        }
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    write_shards(directory, {name: tensor.contiguous().clone() for name, tensor in tensors.items()})
    made = qwen2_5_config if second else qwen3_config
    values = made(tie_word_embeddings=model.config.tie_word_embeddings)
    (directory / "config.json").write_text(json.dumps(values))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_tokenizer(), eos_token="<|im_end|>", pad_token="</s>",
        additional_special_tokens=list(ADDED),
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    side = SIDE["Qwen2.5-VL" if second else "Qwen3-VL"]
    most = MAX_TOKENS * side**2
    if second:
        images = {"min_pixels": side**2, "max_pixels": most, "patch_size": 14, "temporal_patch_size": 2,
                  "merge_size": 2, "image_mean": _MEAN, "image_std": _STD,
                  "image_processor_type": "Qwen2VLImageProcessor",
                  "processor_class": "Qwen2_5_VLProcessor"}  # fmt: skip
    else:
        images = {"size": {"longest_edge": most, "shortest_edge": side**2}, "patch_size": 16, "temporal_patch_size": 2,
                  "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
                  "processor_class": "Qwen3VLProcessor",
                  "image_processor_type": "Qwen2VLImageProcessorFast"}  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    return directory


def processed(kind: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """The library's own pixel values of images, and their grids."""
    side = SIDE[kind]
    mean, std = (_MEAN, _STD) if kind == "Qwen2.5-VL" else ([0.5] * 3, [0.5] * 3)
    maker = Qwen2VLImageProcessorPil(
        size={"shortest_edge": side**2, "longest_edge": MAX_TOKENS * side**2}, patch_size=side // 2, merge_size=2,
        temporal_patch_size=2, image_mean=mean, image_std=std,
    )  # fmt: skip
    return dict(maker(images=images, return_tensors="pt"))


def qwen_tokens(model: Any, ids: list[int], images: list[Image.Image], num_tokens: int) -> list[int]:
    """Greedy tokens of transformers' class for a prompt with its placeholders."""
    prompt = torch.tensor([ids])
    kind = "Qwen2.5-VL" if isinstance(model, Qwen2_5_VLForConditionalGeneration) else "Qwen3-VL"
    given = processed(kind, images) | {"mm_token_type_ids": (prompt == IMAGE).int()} if images else {}
    model.model.rope_deltas = None  # of the prompt before
    if ids[-1] == IMAGE:  # generate takes the tokens behind it for more of the image
        return _one_by_one(model, prompt, given, num_tokens)
    made = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), **given, max_new_tokens=num_tokens, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return made[0, len(ids) :].tolist()


def _one_by_one(model: Any, prompt: torch.Tensor, given: dict[str, Any], num_tokens: int) -> list[int]:
    """Each token by a forward over all before it."""
    ids, kinds = prompt, given.pop("mm_token_type_ids")
    for _ in range(num_tokens):
        with torch.inference_mode():
            out = model(input_ids=ids, mm_token_type_ids=kinds, **given, use_cache=False)
        model.model.rope_deltas = None
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
        kinds = torch.nn.functional.pad(kinds, (0, 1))
    return ids[0, prompt.shape[1] :].tolist()
