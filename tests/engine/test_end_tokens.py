"""A text ends at the tokenizer's own end token too, wherever the tokenizer's files say so."""

from __future__ import annotations

import json
import shutil

import pytest
from checkpoints import write_checkpoint

from kvarena.engine.models import load_model
from kvarena.engine.models.sizes import model_sizes
from tests import tokenizer_kinds

END = "<|turn|>"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Both configs say 0."""
    directory = tmp_path_factory.mktemp("llama")
    write_checkpoint(directory, vocab_size=300, num_hidden_layers=1, eos_token_id=0)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return directory


def edited(directory, name, **values):
    file = directory / name
    held = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({key: value for key, value in (held | values).items() if value is not ...}))


def as_saved(directory):
    pass


def as_object(directory):
    edited(directory, "tokenizer_config.json", eos_token={"content": END, "special": True})


def in_the_map(directory):
    edited(directory, "tokenizer_config.json", eos_token=...)
    edited(directory, "special_tokens_map.json", eos_token=END)


def in_the_decoder(directory):
    decoder = {str(tokenizer_kinds.llama().convert_tokens_to_ids(END)): {"content": END, "special": True}}
    edited(directory, "tokenizer_config.json", eos_token=END, added_tokens_decoder=decoder)


@pytest.mark.parametrize("says", (as_saved, as_object, in_the_map, in_the_decoder), ids=lambda says: says.__name__)
def test_the_tokenizers_own_end(bare, tmp_path, says):
    directory = shutil.copytree(bare, tmp_path / "model")
    tokenizer = tokenizer_kinds.llama()
    tokenizer.eos_token = END
    tokenizer.save_pretrained(directory)
    says(directory)
    end = tokenizer.convert_tokens_to_ids(END)
    assert load_model(directory).spec.eos_token_ids == {0, end}
    assert load_model(directory, load_format="dummy").spec.eos_token_ids == {0, end}
    assert model_sizes(directory).spec.eos_token_ids == {0, end}


def test_an_ordinary_piece_and_the_classs_own_default(bare, tmp_path):
    """An end that is a piece of a vocabulary in a list; and one that no file names, but the tokenizer's class does."""
    directory = shutil.copytree(bare, tmp_path / "model")
    tokenizer = tokenizer_kinds.unigram()
    tokenizer.save_pretrained(directory)
    edited(directory, "tokenizer_config.json", eos_token=".")
    edited(directory, "tokenizer.json", added_tokens=[])
    assert load_model(directory).spec.eos_token_ids == {0, tokenizer.convert_tokens_to_ids(".")}
    tokenizer_kinds.llama().save_pretrained(directory)
    edited(directory, "tokenizer_config.json", eos_token=..., tokenizer_class="LlamaTokenizer")
    assert load_model(directory).spec.eos_token_ids == {0, tokenizer_kinds.SPECIAL["</s>"]}


def test_none_and_one_beyond_the_logits(bare, tmp_path):
    directory = shutil.copytree(bare, tmp_path / "model")
    tokenizer_kinds.llama().save_pretrained(directory)
    edited(directory, "tokenizer_config.json", eos_token=None)
    assert load_model(directory).spec.eos_token_ids == {0}
    edited(directory, "tokenizer_config.json", eos_token="<far>", added_tokens_decoder={"5000": {"content": "<far>"}})
    assert load_model(directory).spec.eos_token_ids == {0}


def test_the_generation_config_counts_for_dummy_weights_too(bare, tmp_path):
    directory = shutil.copytree(bare, tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    for load_format in ("auto", "dummy"):
        assert load_model(directory, load_format=load_format).spec.eos_token_ids == {7, 9}
