"""ShareGPT JSON: exact token ids of the first question, filters that are counted, errors with line and column."""

import gzip
import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from kvarena.engine.errors import ConfigError, TraceError
from kvarena.experiments.workloads.sharegpt_json import ShareGPTJsonWorkload

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture
def tokenizer(tmp_path):
    vocab = {"<unk>": 0, "<eos>": 1} | {word: i + 2 for i, word in enumerate([*WORDS, "<", "eos", ">"])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.add_special_tokens([AddedToken("<eos>", special=True)])
    (tmp_path / "model").mkdir()
    tok.save(str(tmp_path / "model" / "tokenizer.json"))
    return str(tmp_path / "model")


def chat(*turns, start=0):
    names = ["human", "gpt"]
    return {"id": "x", "conversations": [{"from": names[(start + i) % 2], "value": v} for i, v in enumerate(turns)]}


def text(num, first=0):
    return " ".join(WORDS[(first + i) % 60] for i in range(num))


def build(tmp_path, tokenizer, records, **options):
    path = tmp_path / "chats.json"
    path.write_text(records if isinstance(records, str) else json.dumps(records, indent=1))
    base = {"path": str(path), "tokenizer": tokenizer, "seed": 0, "vocab_size": 100, "shuffle": False}
    return ShareGPTJsonWorkload(**(base | options))


def test_question_and_answer_become_exact_lengths(tmp_path, tokenizer):
    records = [chat(text(5), text(9), text(30)), chat(text(6, 3), text(4))]
    items = build(tmp_path, tokenizer, records).items()
    assert [(item.prompt_token_ids, item.output_len) for item in items] == [
        ([2, 3, 4, 5, 6], 9),
        ([5, 6, 7, 8, 9, 10], 4),
    ]
    assert items[0].arrival_time is None


def test_filters_are_counted(tmp_path, tokenizer):
    records = [
        chat(text(5), text(9)),
        chat(text(5)),
        chat(text(5), text(5), start=1),
        chat(text(3), text(9)),
        chat(text(9), text(1)),
        chat(text(50), text(9)),
        {"conversations": [{"from": "system", "value": "s"}, *chat(text(7), text(8))["conversations"]]},
    ]
    workload = build(tmp_path, tokenizer, records, max_prompt_len=20)
    assert [(len(i.prompt_token_ids), i.output_len) for i in workload.items()] == [(5, 9), (7, 8)]
    for part in (
        "dropped 1 of 3 (max_prompt_len 20)",
        "dropped 2 conversations without a question and an answer",
        "dropped 2 of fewer than 4 tokens",
    ):
        assert part in workload.description
    clipped = build(tmp_path, tokenizer, records, max_prompt_len=20, on_exceed="clip").items()
    assert [len(item.prompt_token_ids) for item in clipped] == [5, 20, 7]


def test_shuffle_follows_the_seed(tmp_path, tokenizer):
    records = [chat(text(5, i), text(5)) for i in range(40)]
    first = [build(tmp_path, tokenizer, records, shuffle=True, seed=s, num_requests=20).items() for s in (1, 1, 2)]
    assert first[0] == first[1]
    assert first[0] != first[2]
    in_order = build(tmp_path, tokenizer, records).items()
    everything = build(tmp_path, tokenizer, records, shuffle=True).items()
    assert sorted(i.prompt_token_ids for i in everything) == sorted(i.prompt_token_ids for i in in_order)
    assert everything[:20] == build(tmp_path, tokenizer, records, shuffle=True, num_requests=20).items()


def test_special_tokens_in_a_text_are_text(tmp_path, tokenizer):
    items = build(tmp_path, tokenizer, [chat("w1 <eos> w2", text(5))]).items()
    assert items[0].prompt_token_ids == [3, 62, 63, 64, 4]


def test_gzip(tmp_path, tokenizer):
    path = tmp_path / "chats.json.gz"
    path.write_bytes(gzip.compress(json.dumps([chat(text(5), text(5))]).encode()))
    assert len(build(tmp_path, tokenizer, [], path=str(path)).items()) == 1


@pytest.mark.parametrize(
    ("data", "place", "what"),
    [
        ("", "line 1, column 1", "expected a JSON list"),
        ('{"id": 1}', "line 1, column 1", "expected a JSON list"),
        ('[\n{"id": "x", "conver', "line 2, column 13", "not JSON"),
        ('[\n{"id": "x"}]', "line 2, column 1", '"conversations"'),
        ('[\n {"conversations": [{"from": "human"}]}]', "line 2, column 2", '"from" and "value"'),
        ('[{"conversations": []}', "line 1, column 23", "expected ',' or ']'"),
        ('[{"conversations": []},\n]', "line 2, column 1", "a comma before the end"),
        ('[{"conversations": []}] 7', "line 1, column 25", "text after the end"),
        ("[" * 100_000, "line 1, column", "not JSON"),
        ("[]", "chats.json", "no conversation is left"),
    ],
)
def test_broken_files(tmp_path, tokenizer, data, place, what):
    with pytest.raises(TraceError) as error:
        build(tmp_path, tokenizer, data).items()
    message = str(error.value)
    assert place in message
    assert what in message
    assert "chats.json" in message
    assert "\n" not in message


def test_bad_options(tmp_path, tokenizer):
    records = [chat(text(5), text(5))]
    with pytest.raises(ConfigError, match=r"workload\.tokenizer=null"):
        build(tmp_path, None, records)
    with pytest.raises(ConfigError, match="cannot be read as a tokenizer"):
        build(tmp_path, str(tmp_path / "absent"), records).items()
    with pytest.raises(ConfigError, match="outside the model's vocabulary of 5"):
        build(tmp_path, tokenizer, records, vocab_size=5).items()
    with pytest.raises(ConfigError, match=r"num_requests=2, but .* gives 1 requests"):
        build(tmp_path, tokenizer, records, num_requests=2).items()


def test_half_an_emoji_is_read_and_counted(tmp_path, tokenizer):
    r"""`\ud83d` alone is JSON and no text: the tokenizer raised a TypeError."""
    halves = [
        chat(f"{text(5)} \ud83d", text(9)),
        chat(text(5), f"\ude00 {text(4)}"),
        chat(f"{text(5)} \U0001f600", text(9)),
    ]
    workload = build(tmp_path, tokenizer, json.dumps(halves))
    assert [(len(item.prompt_token_ids), item.output_len) for item in workload.items()] == [(6, 9), (5, 5), (6, 9)]
    assert "read 2 with half a character, as U+FFFD" in workload.description


def test_the_default_tokenizer_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"path": "chats.json", "vocab_size": 10**6}
    assert build(tmp_path, "models/demo", [chat("a b c d e f g h", "i j k l m n")], **options).items()
    with pytest.raises(ConfigError, match=r"workload.tokenizer: models/nope cannot be read"):
        build(tmp_path, "models/nope", [chat("a", "b")], **options).items()
