"""The shipped demo model is a normal model directory that answers in real words."""

import json
import re
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvarena.experiments.models import train_demo

DEMO = Path(__file__).resolve().parents[1] / "experiments" / "models" / "demo"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO).eval()


@pytest.fixture(scope="module")
def answer(model, tokenizer):
    def run(text, max_new_tokens=48):
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])

    return run


def test_the_directory_is_complete_and_small():
    assert {path.name for path in DEMO.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 5_000_000


def test_the_architecture_is_the_documented_one(model, tokenizer):
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (128, 4, 2)
    assert config.max_position_embeddings == tokenizer.model_max_length == train_demo.MAX_LEN
    assert len(tokenizer) == config.vocab_size == train_demo.VOCAB_SIZE
    assert sum(p.numel() for p in model.parameters()) == 1_000_576
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.convert_tokens_to_ids([train_demo.END, train_demo.IM_START, train_demo.IM_END]) == [0, 1, 2]
    assert model.generation_config.eos_token_id == [2, 0]


def test_it_writes_real_words(answer):
    sources = Path(sysconfig.get_path("stdlib")).glob("*.py")
    vocabulary = set(re.findall(r"[a-z]{3,}", " ".join(p.read_text(errors="ignore") for p in sources).lower()))
    text = " ".join(answer(prompt) for prompt in ("Return the ", "The license ", "This function is "))
    words = re.findall(r"[a-z]{3,}", text.lower())
    assert len(words) > 30
    assert sum(word in vocabulary for word in words) >= 0.9 * len(words)


def test_a_chat_answer_ends_by_itself(answer, tokenizer):
    messages = [{"role": "user", "content": "Hello!"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    assert answer(prompt).startswith("Hello!")
    assert answer(prompt).endswith("<|im_end|>")


def test_training_text_has_the_chat_template_s_form(tokenizer):
    turns = [("system", "a"), ("user", "b"), ("assistant", "c")]
    rendered = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    assert train_demo.chat(turns) == rendered


@pytest.mark.parametrize("text", ["héllo wörld", "日本語 and العربية", "🙂🚀 x\ty\r\n z", " leading, trailing ", "é"])
def test_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_is_a_function_of_seed_and_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        train_demo, "standard_library_docstrings", lambda: [train_demo.Docstring("m.f", "Return the value. " * 80)] * 40
    )
    monkeypatch.setattr(train_demo, "license_texts", list)
    monkeypatch.setattr(train_demo, "VOCAB_SIZE", 300)
    losses = []
    for seed in ("0", "0", "1"):
        train_demo.main(["--steps", "2", "--seed", seed, "--out", str(tmp_path / seed)])
        losses.append(json.loads(capsys.readouterr().out.splitlines()[-1])["loss"])
    assert losses[0] == losses[1] != losses[2]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "0").config.vocab_size == 300
