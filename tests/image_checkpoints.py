"""Small random InternVL checkpoints in both formats that are found on disk, and the native class's own greedy tokens.

Tiles of 56 pixels in patches of 14: 16 patches, 4 tokens a tile. Files are laid out as the originals': sharded
safetensors with an index, config.json with all that such files hold, tokenizer and image processor.
"""

from __future__ import annotations

import base64
import io
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

TILE, TILE_TOKENS, MAX_TILES = 56, 4, 4
ADDED = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
VOCAB = 280
NATIVE_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<IMG_CONTEXT>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "你是书生，短。"
# As the checkpoints' own file, with a system message that stands in no table.
CONVERSATION = f"""
import dataclasses
raise RuntimeError("nobody's code runs")
register_conv_template(
    Conversation(
        name='internlm2-chat',
        system_template='<|im_start|>system\\n{{system_message}}',
        # a comment
        system_message='{SYSTEM}',
        roles=('<|im_start|>user\\n', '<|im_start|>assistant\\n'),
        sep_style=SeparatorStyle.MPT,
        sep='<|im_end|>',
    )
)
"""


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise in large patches: two pictures differ everywhere."""
    rough = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.NEAREST)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_uri(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def image_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(image)}}


def native_model(text: str = "llama", *, seed: int = 0, **overrides: Any) -> InternVLForConditionalGeneration:
    """A random model. The image token is the last of `ADDED`, which lie behind a byte-level vocabulary."""
    common = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    common |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vision |= {"image_size": TILE, "patch_size": 14, "attention_bias": True, "layer_scale_init_value": 0.5}
    torch.manual_seed(seed)
    config = InternVLConfig(
        text_config={"model_type": text} | common | overrides,
        vision_config=vision,
        image_token_id=259 + len(ADDED) - 1,
        image_seq_length=TILE_TOKENS,
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
    )
    model = InternVLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=0.5)
    model.tie_weights()
    return model


def bytes_tokenizer() -> Tokenizer:
    """A token a byte, from id 3 on."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {char: i + 3 for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def write_native(directory: Path, model: InternVLForConditionalGeneration) -> Path:
    """As `save_pretrained` and the hub's `-hf` repositories have it."""
    model.save_pretrained(directory, max_shard_size="100KB")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_tokenizer(), bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": list(ADDED)})
    tokenizer.chat_template = NATIVE_TEMPLATE
    tokenizer.save_pretrained(directory)
    values = {"image_processor_type": "GotOcr2ImageProcessorFast", "size": {"height": TILE, "width": TILE},
              "crop_to_patches": False, "min_patches": 1, "max_patches": MAX_TILES, "resample": 3,
              "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(values))
    return directory


def write_original(directory: Path, model: InternVLForConditionalGeneration, architecture: str) -> Path:
    """As the repositories with remote code have it: `architecture` InternLM2ForCausalLM, Qwen2ForCausalLM, Llama..."""
    directory.mkdir(parents=True, exist_ok=True)
    text: Any = model.config.text_config
    packed = architecture == "InternLM2ForCausalLM"
    tensors = original_tensors(model, packed)
    write_shards(directory, tensors)
    llm = {key: value for key, value in text.to_dict().items() if key not in ("rope_parameters", "head_dim", "dtype")}
    llm |= {"architectures": [architecture], "model_type": "internlm2" if packed else text.model_type, "bias": False,
            "rope_theta": text.rope_parameters["rope_theta"], "attn_implementation": "flash_attention_2",
            "torch_dtype": "bfloat16", "temperature": 1.0, "top_k": 50, "_name_or_path": "internlm/x",
            "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}}  # fmt: skip
    if packed:
        llm |= {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    vision: Any = model.config.vision_config
    tower = {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "hidden_size": vision.hidden_size,
             "intermediate_size": vision.intermediate_size, "num_hidden_layers": vision.num_hidden_layers,
             "num_attention_heads": vision.num_attention_heads, "image_size": TILE, "patch_size": 14, "qkv_bias": True,
             "qk_normalization": False, "norm_type": "layer_norm", "layer_norm_eps": 1e-6, "hidden_act": "gelu",
             "use_flash_attn": True, "drop_path_rate": 0.1, "initializer_factor": 1.0}  # fmt: skip
    config = {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "llm_config": llm,
              "vision_config": tower, "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": TILE,
              "max_dynamic_patch": MAX_TILES, "min_dynamic_patch": 1, "ps_version": "v2", "select_layer": -1,
              "template": "internlm2-chat" if packed else "Hermes-2", "use_thumbnail": True, "pad2square": False,
              "torch_dtype": "float32", "tie_word_embeddings": False,
              "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
                           "AutoModel": "modeling_internvl_chat.InternVLChatModel"}}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"crop_size": TILE, "size": TILE, "do_resize": True, "image_mean": [0.485, 0.456, 0.406],
                    "image_std": [0.229, 0.224, 0.225], "feature_extractor_type": "CLIPFeatureExtractor"})
    )  # fmt: skip
    for name in ("configuration_internvl_chat.py", "modeling_internvl_chat.py", "tokenization_internlm2.py"):
        (directory / name).write_text('raise RuntimeError("nobody\'s code runs")\n')
    (_write_pieces if packed else _write_qwen)(directory)
    return directory


def original_tensors(model: InternVLForConditionalGeneration, packed: bool) -> dict[str, torch.Tensor]:
    """The native class's tensors under the original's names; `packed`: the language model as InternLM2."""
    text: Any = model.config.text_config
    kv = text.num_key_value_heads
    made = {}
    state = model.state_dict()
    for name, tensor in state.items():
        if name.startswith("model.vision_tower."):
            rest = name.removeprefix("model.vision_tower.")
            if re.search(r"attention\.[kv]_proj", rest):
                continue
            if ".q_proj" in rest:
                tensor = torch.cat([state[name.replace("q_proj", f"{which}_proj")] for which in "qkv"])
            for ours, theirs in (("encoder.layer.", "encoder.layers."), ("cls_token", "class_embedding"),
                                 ("position_embeddings", "position_embedding"), ("lambda_", "ls"),
                                 ("patch_embeddings.projection", "patch_embedding"), ("attention.q_proj", "attn.qkv"),
                                 ("attention.projection_layer", "attn.proj"), ("layernorm_before", "norm1"),
                                 ("layernorm_after", "norm2")):  # fmt: skip
                rest = rest.replace(ours, theirs)
            made["vision_model." + rest] = tensor
        elif "multi_modal_projector" in name:
            place = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}[name.split(".")[2]]
            made[f"mlp1.{place}.{name.rpartition('.')[2]}"] = tensor
        else:
            rest = name.replace("model.language_model.", "model.")
            if packed:
                if re.search(r"[kv]_proj", rest):
                    continue
                if "q_proj" in rest:
                    q, k, v = (
                        state[name.replace("q_proj", f"{which}_proj")].view(kv, -1, 16, tensor.shape[1])
                        for which in "qkv"
                    )
                    tensor = torch.cat([q, k, v], 1).reshape(-1, tensor.shape[1])
                for ours, theirs in (("self_attn.q_proj", "attention.wqkv"), ("self_attn.o_proj", "attention.wo"),
                                     ("mlp.gate_proj", "feed_forward.w1"), ("mlp.up_proj", "feed_forward.w3"),
                                     ("mlp.down_proj", "feed_forward.w2"), ("input_layernorm", "attention_norm"),
                                     ("post_attention_layernorm", "ffn_norm"), ("embed_tokens", "tok_embeddings"),
                                     ("lm_head", "output")):  # fmt: skip
                    rest = rest.replace(ours, theirs)
            made["language_model." + rest] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in made.items()}


def write_shards(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = sorted(tensors)
    half = len(names) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_pieces(directory: Path) -> None:
    """InternLM2's: SentencePiece with byte fallback, and added tokens behind it."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    proto = ModelProto()
    spec = proto.trainer_spec
    spec.model_type, spec.byte_fallback = 2, True
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 0, 1, 2, -1
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    for text, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
        proto.pieces.add(piece=text, score=0.0, type=kind)
    for i in range(256):
        proto.pieces.add(piece=f"<0x{i:02X}>", score=0.0, type=6)
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
    (directory / "conversation.py").write_text(CONVERSATION)
    values = {"tokenizer_class": "InternLM2Tokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>", "chat_template": "{{ messages[0]['content'] }}",
              "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}}  # fmt: skip
    _write_settings(directory, values, 259)


def _write_qwen(directory: Path) -> None:
    """Qwen2's: vocab.json and merges.txt."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {char: i + 3 for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    values = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "</s>", "unk_token": None,
              "errors": "replace", "chat_template": "{{ messages[0]['content'] }}"}  # fmt: skip
    _write_settings(directory, values, 259)


def _write_settings(directory: Path, values: dict[str, Any], first: int) -> None:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(first + i): {"content": token} | flags for i, token in enumerate(ADDED)}
    (directory / "tokenizer_config.json").write_text(json.dumps(values | {"added_tokens_decoder": added}))


def processed(images: list[Image.Image]) -> tuple[torch.Tensor, list[int]]:
    """The library's own pixel values of images, and tiles of each."""
    processor = GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE}, crop_to_patches=True, min_patches=1, max_patches=MAX_TILES,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], do_convert_rgb=True,
    )  # fmt: skip
    made = processor(images=images, return_tensors="pt")
    return made["pixel_values"], made["num_patches"].tolist()


def expected_tokens(
    model: InternVLForConditionalGeneration, ids: list[int], images: list[Image.Image], num_tokens: int
) -> list[int]:
    """Greedy tokens of the native class for a prompt with its placeholders."""
    prompt = torch.tensor([ids])
    pixels = {"pixel_values": processed(images)[0]} if images else {}
    made = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), **pixels, max_new_tokens=num_tokens, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return made[0, len(ids) :].tolist()


@cache
def shared_model(text: str = "llama") -> InternVLForConditionalGeneration:
    """One model for all tests of a process."""
    return native_model(text)
