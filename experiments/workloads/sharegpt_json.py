"""ShareGPT conversations: a JSON list of `{"conversations": [{"from": "human", "value": text}, ...]}`.

The first question is the prompt, tokenised as it is; the length of the answer to it is the output length. That is what
the serving benchmarks of vLLM and SGLang do, and so is the default of leaving out what is shorter than 4 tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from kvarena.engine.checkpoints.directory import is_model_name, located, resolve_directory
from kvarena.engine.checks import check_bool, check_int
from kvarena.engine.errors import ConfigError, TraceError
from kvarena.experiments.workloads.parts.base import LengthTable, LimitedWorkload
from kvarena.experiments.workloads.parts.reading import fail, open_trace, trace_path
from kvarena.experiments.workloads.parts.seeds import Purpose, generator

_CHUNK = 256
_ASKERS = ("human", "user")


class ShareGPTJsonWorkload(LimitedWorkload):
    """First questions of ShareGPT conversations, as exact token ids.

    Args:
        path: the JSON file; `.gz` is decompressed.
        tokenizer: a tokenizer.json or the folder that holds one, relative to the working directory, else to the
            project's root; must be the model's. Special tokens written out in a text are taken as text.
        num_requests: conversations to take; None takes all that fit.
        shuffle: take them in an order drawn from the seed; false is the file's order.
        min_len: leave out prompts and outputs of fewer tokens.
        common: see LimitedWorkload.

    Raises:
        ConfigError: an option out of range, or a tokenizer that cannot be read or has ids outside the vocabulary.
        TraceError: a malformed file, from the first use of the workload.
    """

    name = "sharegpt_json"

    def __init__(
        self,
        *,
        path: str | None,
        tokenizer: str | None,
        num_requests: int | None = None,
        shuffle: bool = True,
        min_len: int = 4,
        **common: Any,
    ) -> None:
        super().__init__(num_requests=num_requests, **common)
        self.path = trace_path(path)
        if not tokenizer:
            raise ConfigError("workload.tokenizer=null: texts need one; set it to the folder of the model's tokenizer")
        self._tokenizer_path = Path(tokenizer).expanduser()
        self._shuffle = check_bool("workload.shuffle", shuffle)
        self._min_len = check_int("workload.min_len", min_len, 1)
        self._prompts: list[list[int]] = []

    @property
    def source(self) -> str:  # type: ignore[override]
        """The file's name."""
        return f"file {self.path.name}"

    def _build(self) -> LengthTable:
        left_out: Counter[str] = Counter()
        pairs = []
        num_mended = 0
        for pair in read_first_turns(self.path):
            if pair is None:
                left_out["conversations without a question and an answer"] += 1
            else:
                whole = _whole(pair[0]), _whole(pair[1])
                num_mended += whole != pair
                pairs.append(whole)
        order = np.arange(len(pairs))
        if self._shuffle:
            order = generator(self.seed, Purpose.STRUCTURE).permutation(len(pairs))
        output_lens: list[int] = []
        for prompt, output_len in self._tokenize([pairs[index] for index in order]):
            if len(prompt) < self._min_len or output_len < self._min_len:
                left_out[f"of fewer than {self._min_len} tokens"] += 1
                continue
            kept = self._limits.apply(len(prompt), output_len)
            if kept is not None:
                self._prompts.append(prompt[: kept[0]])
                output_lens.append(kept[1])
                if len(output_lens) == self.num_requests:
                    break
        self._check_enough(len(output_lens))
        notes = [self._limits.note(), *(f"dropped {count} {why}" for why, count in left_out.items())]
        if num_mended:
            notes.append(f"read {num_mended} with half a character, as U+FFFD")
        return LengthTable(
            np.array([len(prompt) for prompt in self._prompts], dtype=np.int64),
            np.array(output_lens, dtype=np.int64),
            notes=tuple(note for note in notes if note),
        )

    def _check_enough(self, num: int) -> None:
        if num == 0:
            raise TraceError(f"{self.path}: no conversation is left; check workload.min_len and the length limits")
        if self.num_requests is not None and num < self.num_requests:
            raise ConfigError(
                f"workload.num_requests={self.num_requests}, but {self.path} gives {num} requests; ask for fewer"
            )

    def _tokenize(self, pairs: list[tuple[str, str]]) -> Iterator[tuple[list[int], int]]:
        """(prompt ids, output length) of each pair, chunk by chunk."""
        tokenizer = self._load_tokenizer()
        for start in range(0, len(pairs), _CHUNK):
            chunk = pairs[start : start + _CHUNK]
            prompts = tokenizer.encode_batch([prompt for prompt, _ in chunk], add_special_tokens=False)
            outputs = tokenizer.encode_batch([output for _, output in chunk], add_special_tokens=False)
            for prompt, output in zip(prompts, outputs, strict=True):
                if prompt.ids and max(prompt.ids) >= self.vocab_size:
                    raise ConfigError(
                        f"workload.tokenizer={self._tokenizer_path} gives token {max(prompt.ids)}, outside the model's "
                        f"vocabulary of {self.vocab_size}; take the model's own tokenizer"
                    )
                yield prompt.ids, len(output.ids)

    def _load_tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        # As model.path is looked for, from which the default comes.
        given = self._tokenizer_path
        path = resolve_directory(given) if is_model_name(given) else located(given)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"workload.tokenizer: {file} cannot be read as a tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    def prompt(self, row: int) -> list[int]:
        """The token ids of one row's prompt."""
        self.table  # noqa: B018  (tokenises at first use)
        return list(self._prompts[row])


def read_first_turns(path: Path) -> Iterator[tuple[str, str] | None]:
    """(question, answer) that each conversation begins with, after any system message; None where there is none.

    Raises:
        TraceError: the file is not a JSON list of conversations.
    """
    text = _read_text(path)
    decoder = json.JSONDecoder()
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        _bad(path, text, position, "expected a JSON list of conversations")
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        try:
            record, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            _bad(path, text, error.pos, f"not JSON: {error.msg}")
        except (ValueError, RecursionError) as error:
            _bad(path, text, position, f"not JSON that can be read: {error}")
        yield _first_turn(path, text, position, record)
        position = _skip_space(text, end)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
            if text[position : position + 1] == "]":
                _bad(path, text, position, "not JSON: a comma before the end of the list")
        elif text[position : position + 1] != "]":
            _bad(path, text, position, "not JSON: expected ',' or ']' after a conversation")
    if text[position + 1 :].strip():
        _bad(path, text, _skip_space(text, position + 1), "not JSON: text after the end of the list")


def _read_text(path: Path) -> str:
    with open_trace(path) as file:
        try:
            data = file.read()
        except (OSError, EOFError) as error:
            raise TraceError(f"{path}: line 1, column 1: the file cannot be read: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fail(path, line, error.start - data.rfind(b"\n", 0, error.start), "not UTF-8")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _bad(path: Path, text: str, position: int, message: str) -> NoReturn:
    fail(path, text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position), message)


def _first_turn(path: Path, text: str, position: int, record: Any) -> tuple[str, str] | None:
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list):
        _bad(path, text, position, 'a conversation must be an object with a list "conversations"')
    for turn in turns:
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("from"), str)
            or not isinstance(turn.get("value"), str)
        ):
            _bad(path, text, position, 'each turn of a conversation must have the texts "from" and "value"')
    if turns and turns[0]["from"] == "system":
        turns = turns[1:]
    if len(turns) < 2 or turns[0]["from"] not in _ASKERS or turns[1]["from"] in _ASKERS:
        return None
    return turns[0]["value"], turns[1]["value"]


def _whole(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair (half an emoji, `\\ud83d`), which no tokenizer takes."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
