"""Structured output without a server."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvarena.engine.server.engine import compiled
from kvarena.engine.server.engine.compiled import make_compiler
from kvarena.engine.server.engine.grammars import to_grammar


@pytest.fixture(autouse=True)
def _logging(monkeypatch, caplog):
    """A Hydra job in the same process switches the loggers off that it finds, and raises the root's level."""
    monkeypatch.setattr(compiled.logger, "disabled", False)
    caplog.set_level(logging.WARNING, logger=compiled.logger.name)


def _word_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "yes": 2, "no": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def test_a_tokenizer_without_bytes_means_no_structured_output_and_not_no_server(caplog):
    assert make_compiler(_word_level(), 4, frozenset({0})) is None
    assert "structured output is not available with this model" in caplog.text


def test_a_model_without_an_end_of_sequence_cannot_end_a_grammar(caplog):
    assert make_compiler(AutoTokenizer.from_pretrained("experiments/models/demo"), 6144, frozenset()) is None
    assert "no end-of-sequence token" in caplog.text


def test_a_choice_bars_every_other_token():
    tokenizer = AutoTokenizer.from_pretrained("experiments/models/demo")
    compile_grammar = make_compiler(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))
    constraint = compile_grammar("regex", to_grammar("regex", "b")).start()
    mask = np.zeros(-(-len(tokenizer) // 32), dtype=np.int32)
    constraint.fill(mask)
    allowed = [i for i in range(len(tokenizer)) if mask[i // 32] >> (i % 32) & 1]
    assert {tokenizer.decode([token]) for token in allowed} == {"b"}


AMBIGUOUS = 'start: r\nr: "a"* r+ r+ | /\\s/+ | "b"'


def test_no_mask_of_an_ambiguous_grammar_is_slow():
    tokenizer = AutoTokenizer.from_pretrained("experiments/models/demo")
    compile_grammar = make_compiler(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))
    grammar = compile_grammar("grammar", to_grammar("grammar", AMBIGUOUS))
    mask = np.zeros(-(-len(tokenizer) // 32), dtype=np.int32)
    for seed in range(4):
        constraint, rng = grammar.start(), np.random.default_rng(seed)
        for _ in range(24):
            start = time.thread_time()
            constraint.fill(mask)
            assert time.thread_time() - start < 0.1
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            if constraint.failure or (token := int(rng.choice(allowed))) == tokenizer.eos_token_id:
                break
            constraint.accept(token)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "grammar",
    [
        "start: r\nr: /]*/ r",  # forces ] for ever
        'start: "a" r | "b"\nr: /]+/ r',
        "start: r\nr: X{400}\nX: /]{4000}/",  # 1.6 million of them
        '%llguidance {"no_forcing": false}\nstart: r\nr: /]+/ r',
        'start: a "x"\na: %lark {\n%llguidance {"no_forcing": false}\nstart: r\nr: /]+/ r\n}',
    ],
)
def test_a_text_that_is_forced_without_end_is_not_written_out(grammar):
    tokenizer = AutoTokenizer.from_pretrained("experiments/models/demo")
    compile_grammar = make_compiler(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))
    constraint = compile_grammar("grammar", to_grammar("grammar", grammar)).start()
    mask = np.zeros(-(-len(tokenizer) // 32), dtype=np.int32)
    for _ in range(30):
        constraint.fill(mask)
        assert not constraint.failure
        token = int(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0])
        constraint.accept(token)
