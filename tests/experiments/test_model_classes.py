"""Model classes of transformers: equal tokens or a refusal, as docs/models.md has it."""

import re
from pathlib import Path

import pytest

from kvarena.experiments.correctness.class_table import Outcome, write_table
from kvarena.experiments.correctness.model_classes import check_class, main
from kvarena.experiments.correctness.small_configs import class_names

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
