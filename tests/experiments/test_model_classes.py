"""Model classes of transformers: equal tokens or a refusal, as docs/models.md has it."""

import contextlib
import re
from pathlib import Path

import pytest

from kvarena.engine.fusions.detect import NotFusable, fuse
from kvarena.engine.fusions.ops import TorchOps
from kvarena.engine.models import load_model
from kvarena.experiments.correctness.class_table import Outcome, write_table
from kvarena.experiments.correctness.model_classes import check_class, main, write_small
from kvarena.experiments.correctness.small_configs import class_names, small_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
ROW = re.compile(r"^\| (\w+) \| `([\w.-]+)` \| (equal|refused|not made|different) \| (.*) \|$", re.MULTILINE)
# One of each kind: windows passed on, in the mask alone, mixed; chunks and temperature; sinks; soft caps; latents;
# shared layers; learned positions; an own mask; a selection of keys; state outside of attention.
IN_CI = {"mistral", "qwen2_moe", "phimoe", "gemma2", "llama4", "gpt_oss", "deepseek_v3", "gemma3n_text", "opt", "doge",
         "deepseek_v32", "mamba"}  # fmt: skip


def classes() -> list:
    return [
        pytest.param(name, kind, id=kind, marks=() if kind in IN_CI else pytest.mark.slow)
        for name, kind in class_names().items()
    ]


@pytest.mark.parametrize(("name", "model_type"), classes())
def test_tokens_are_transformers_or_the_model_is_refused_as_the_page_says(name, model_type):
    rows = {found[1]: found[3] for found in ROW.finditer(PAGE.read_text(encoding="utf-8"))}
    outcome = check_class(model_type, name)
    assert outcome.result != "different", outcome.why
    assert outcome.result == rows[name], outcome.why


def test_the_page_has_every_class():
    rows = {found[1]: found[2] for found in ROW.finditer(PAGE.read_text(encoding="utf-8"))}
    assert rows == class_names()
    assert len(IN_CI & set(rows.values())) == len(IN_CI)


FUSED = re.compile(r"^\| (`\w+`.*?) \| [^|]* \| (yes|attention|no) \| (yes|no) \|", re.MULTILINE)
FUSED_IN_CI = {"llama", "qwen3", "mixtral", "arcee", "gemma2", "phi3", "opt", "deepseek_v3", "gpt_oss", "llama4_text"}


def families() -> list:
    text = PAGE.read_text(encoding="utf-8")
    text = text[text.index("## Families") : text.index("## Classes")]
    return [
        pytest.param(kind, fused, graphs, id=kind, marks=() if kind in FUSED_IN_CI else pytest.mark.slow)
        for kinds, fused, graphs in FUSED.findall(text)
        for kind in re.findall(r"`(\w+)`", kinds)
    ]


@pytest.mark.parametrize(("kind", "fused", "graphs"), families())
def test_families_are_fused_as_the_page_says(kind, fused, graphs, tmp_path):
    write_small(small_config(kind), str(tmp_path))
    found = ("no", "no")
    with contextlib.suppress(NotFusable):
        found = ("yes", "yes") if fuse(load_model(tmp_path), TorchOps(), 256).is_capturable else ("attention", "no")
    assert found == (fused, graphs)


def test_the_families_of_the_page_are_all_read():
    kinds = {case.values[0] for case in families()}
    assert len(kinds) > 35 and kinds >= FUSED_IN_CI


def test_the_page_is_written_from_outcomes(tmp_path):
    page = tmp_path / "models.md"
    outcomes = [Outcome("A", "a", "equal"), Outcome("B", "b", "refused", "it (B) cannot be run: x | y")]
    write_table(page, outcomes)
    text = page.read_text()
    assert "1 equal, 1 refused." in text
    assert text.endswith("| A | `a` | equal |  |\n| B | `b` | refused | x \\| y |\n")
    page.write_text(text.replace("## Classes", "## Images\n\nBy {hand}.\n\n## Classes"))
    write_table(page, outcomes)
    assert page.read_text() == text.replace("## Classes", "## Images\n\nBy {hand}.\n\n## Classes")


def test_mistakes_in_the_command_are_lines(capsys):
    for argv, line in ((["--only", "nope"], "nope is no causal"), (["--only", "llama", "--write", "x"], "leave out")):
        with pytest.raises(SystemExit):
            main(argv)
        assert line in capsys.readouterr().err
