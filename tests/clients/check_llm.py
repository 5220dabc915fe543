"""Simon Willison's `llm`, unmodified, its command and its Python, against a running server.

KVARENA_URL=http://127.0.0.1:8000 KVARENA_KEY=KEY python -m pytest --noconftest tests/clients/check_llm.py
"""

from __future__ import annotations

import json
import os

import pytest
import yaml
from click.testing import CliRunner

URL, KEY = os.environ["KVARENA_URL"], os.environ["KVARENA_KEY"]
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 9}}, "required": ["age"]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The settings of a user who knows one model."""
    model = {"model_id": "demo", "model_name": "demo", "api_base": f"{URL}/v1", "api_key_name": "ours"}
    more = {"supports_tools": True, "supports_schema": True}
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump([model | more]), encoding="utf-8")
    (tmp_path / "keys.json").write_text(json.dumps({"ours": KEY}), encoding="utf-8")
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    return tmp_path


def _said(*arguments):
    from llm.cli import cli

    done = CliRunner().invoke(cli, ["prompt", "-m", "demo", "-o", "temperature", "0", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_streams_goes_on_and_logs(folder):
    streamed = _said("Hello!")
    assert streamed.strip() and _said("Hello!", "--no-stream") == streamed
    assert _said("-c", "And now?").strip()
    from llm.cli import cli

    logged = json.loads(CliRunner().invoke(cli, ["logs", "--json", "-n", "0"]).output)
    assert len(logged) == 3 and {row["model"] for row in logged} == {"demo"}


def test_a_schema_holds(folder):
    assert json.loads(_said("Who?", "--schema", json.dumps(SCHEMA)))["age"] <= 9


def test_a_tool_is_offered_and_what_it_says_comes_back(folder):
    import llm

    def age_of(known: bool) -> str:
        """The age."""
        return "7"

    model = llm.get_model("demo")
    chain = model.chain("Hello!", tools=[age_of], options={"temperature": 0})
    assert chain.text().strip()
    conversation = model.conversation()
    assert conversation.prompt("Hello!", temperature=0).usage().output > 0
    with pytest.raises(Exception, match="temperature"):
        model.prompt("Hello!", temperature=-1).text()
