"""How much KV beams share: those of a model, and those for which the simulator draws the numbers.

    kvarena check drawn_beams [--model DIR] [--prompts 12] [--long-prompts 5] [--drawn-prompts 100]

Prompts are pieces of the standard library's docstrings, the text that the demo model knows; two lengths of prompt and
output are Alpaca's and ShareGPT's means. Shared: blocks of 16 that sharing saves over those that the beams would own
without, mean over a search's steps. Prints one JSON line per length and width; exit code 0.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from kvarena.engine.checkpoints.directory import resolve_directory
from kvarena.engine.core import Engine
from kvarena.engine.request import Request, SamplingParams, expand
from kvarena.experiments.building.build import build_engine
from kvarena.experiments.models.train_demo import standard_library_docstrings
from kvarena.experiments.settings.compose import compose_cell
from kvarena.experiments.tools import say, tool_parser

WIDTHS = (2, 4, 6)
LENGTHS = {"alpaca": (20, 58), "sharegpt": (161, 338)}  # prompt and output, in tokens


def main(argv: Sequence[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--model", default="models/demo", help="a model directory with a tokenizer")
    parser.add_argument("--prompts", type=int, default=12, help="of the shorter length, computed")
    parser.add_argument("--long-prompts", type=int, default=5, help="of the longer length, computed")
    parser.add_argument("--drawn-prompts", type=int, default=100, help="of each length, drawn")
    args = parser.parse_args(argv)
    text = _text(args.model)
    for name, (num_prompt, num_output) in LENGTHS.items():
        count = args.prompts if name == "alpaca" else args.long_prompts
        for width in WIDTHS:
            sizes = (num_prompt, num_output, width)
            computed = list(shares(_engine(args.model, width), text, count, *sizes))
            drawn = list(shares(_engine(args.model, width, "runner=simulated"), text, args.drawn_prompts, *sizes))
            say({"lengths": name, "prompt": num_prompt, "output": num_output, "width": width}
                | _percent("computed", computed) | _percent("drawn", drawn))  # fmt: skip
    return 0


def _text(model: str) -> list[int]:
    """Tokens of all docstrings, in an order by chance."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_directory(model))
    texts = [text for _, text in standard_library_docstrings()]
    random.Random(0).shuffle(texts)
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]


def _engine(model: str, width: int, *more: str) -> Engine:
    config, _ = compose_cell(
        [f"model.path={model}", "allocator=paged", "kv_cache.num_slots=16384", "allocator.block_size=16",
         "engine.max_model_len=2048", f"sampling.beams={width}", *more]
    )  # fmt: skip
    return build_engine(config).engine


def shares(
    engine: Engine, text: Sequence[int], count: int, num_prompt: int, num_output: int, width: int
) -> Iterator[float]:
    """Of each of `count` prompts the share of blocks that its beams save, mean over the steps in which all run."""
    rng = random.Random(1)
    for i in range(count):
        start = rng.randrange(len(text) - num_prompt)
        params = SamplingParams(max_tokens=num_output, beams=width, ignore_eos=True)
        for beam in expand(Request(f"prompt-{i}", list(text[start : start + num_prompt]), params)):
            engine.add(beam)
        found = []
        while engine.has_work:
            step = engine.step()
            if step is not None and len(step.plan.scheduled) == width:
                saved = step.usage.shared_saved
                found.append(saved / (step.usage.owned + saved))
        yield float(np.mean(found))


def _percent(name: str, found: list[float]) -> dict[str, Any]:
    values = 100 * np.array(found)
    return {name: round(float(values.mean()), 1), f"{name}_deviation": round(float(values.std()), 1)}
