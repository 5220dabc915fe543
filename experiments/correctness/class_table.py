"""The page that says of every causal language model class whether the engine runs it, and else why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers

HEAD = """# Model classes

Which causal language model classes of transformers {version} the engine runs, and the line with which it refuses the
others: {counts}.

    kvarena check model_classes --jobs 2 --write docs/models.md

Of each class a random checkpoint is run greedily in three settings, `paged x continuous` in a pool that preempts,
`contiguous x static` and `paged_prefix x chunked` with shared prefixes, and its tokens are compared with transformers'
own `generate`.

It is fp32, has 4 layers where its config allows, windows and attention chunks of 8 tokens, selections
of 4 keys and temperature steps of 4; prompts have 13 to 40 tokens.

## Limits

- Random weights of a few layers: that a class is equal says nothing of a checkpoint's quality, nor of 16 bits.
- Text alone: towers for pictures or sound are not tried here; InternVL's is, below.
- Plain weights. Packed ones (AWQ, GPTQ, compressed-tensors) are read for every class here, dequantised where no kernel
  takes them ([serving.md](serving.md#quantised-weights)); tests hold Llama, Qwen2 and Mixtral against transformers.
- One version of transformers; another one may add classes, or change them.

{by_hand}## Classes

- **equal**: the same tokens in all three. A limit on the context stands beside it.
- **refused**: the line comes at load, before any request.
- **not made**: there is no small checkpoint to try, or transformers itself cannot generate with it.

| class | model type | result | why |
|---|---|---|---|
"""
BY_HAND, CLASSES = "## Images\n", "## Classes\n"


@dataclass(frozen=True)
class Outcome:
    """What became of a class.

    Attributes:
        name: the class.
        model_type: of its config.
        result: `equal`, `refused`, `different` or `not made` (no small checkpoint, or transformers cannot run it).
        why: the engine's own line, or what differs; empty when equal without a limit.
        num_tokens: distinct tokens of the reference: a model that repeats one would hide most faults.
    """

    name: str
    model_type: str
    result: str
    why: str = ""
    num_tokens: int = 0


def write_table(path: Path, rows: Sequence[Outcome]) -> None:
    """Write the page; what stands on it by hand between `## Images` and `## Classes` stays."""
    found = Counter(row.result for row in rows)
    counts = ", ".join(
        f"{found[result]} {result}" for result in ("equal", "refused", "not made", "different") if found[result]
    )
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    by_hand = page[page.index(BY_HAND) : page.index(CLASSES)] if BY_HAND in page else ""
    lines = [HEAD.format(version=transformers.__version__, counts=counts, by_hand=by_hand)]
    for row in rows:
        why = row.why.removeprefix(f"it ({row.name}) cannot be run: ").replace("|", "\\|")
        lines.append(f"| {row.name} | `{row.model_type}` | {row.result} | {why} |\n")
    path.write_text("".join(lines), encoding="utf-8")
