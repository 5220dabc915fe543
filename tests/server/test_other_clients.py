"""Clients that others wrote, unmodified, and the README's. One that is not there is skipped.

Those that need an environment of their own have it from `make test-clients` (tests/clients).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from server_harness import KEY, PATIENCE, ROOT, RunningServer

CLIENTS, ENVIRONMENT = ROOT / "tests" / "clients", ROOT / ".venv-clients"


def _run_on(server, command, **more):
    # With the map of prices that it brings along, litellm fetches nothing from the internet.
    env = {"KVARENA_URL": server.url, "KVARENA_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"} | more
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=kept | env)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    server.assert_alive()


def _check(*names, only=""):
    """The command that runs files of tests/clients in their environment; nothing of it moves the server's."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        pytest.skip("make test-clients builds the environment of this test")
    return [
        python, "-m", "pytest", "-q", "--noconftest", "-W", "ignore", "-p", "no:cacheprovider", "-k", only,
        "-c", os.devnull, "--rootdir", CLIENTS, *(CLIENTS / f"check_{name}.py" for name in names),
    ]  # fmt: skip


def test_litellm_instructor_and_llm_in_an_environment_of_their_own(server):
    _run_on(server, _check("litellm", "instructor", "llm"))


@pytest.fixture(scope="module")
def roomy():
    """A server whose context holds what an agent says."""
    running = RunningServer("--max-model-len", "8192")
    yield running
    assert running.stop() == 0


@pytest.mark.parametrize(
    "only",
    (
        "(chats and whole) or (responses and streamed)",
        pytest.param("(chats and streamed) or (responses and whole)", marks=pytest.mark.slow),
    ),
)
def test_an_agent_kit_with_twenty_tools_over_thirty_turns(only, request):
    command = _check("agents", only=only)
    _run_on(request.getfixturevalue("roomy"), command)


def test_javascript_clients(server):
    folder = ENVIRONMENT / "js"
    if not (folder / "node_modules").exists():
        pytest.skip("make test-clients installs the clients of this test, where there is npm")
    _run_on(server, [shutil.which("node"), "--test", CLIENTS / "js" / "check_clients.mjs"], CLIENTS_JS=str(folder))


def test_the_readmes_client(server, capsys):
    pytest.importorskip("openai")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [block] = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "import openai" in block]
    for written, here in (("http://127.0.0.1:8000", server.url), ('"none"', repr(KEY))):
        assert written in block
        block = block.replace(written, here)
    exec(compile(block, "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 10


@pytest.fixture
def langchain(server):
    module = pytest.importorskip("langchain_openai")

    def make(**more):
        values = {"base_url": f"{server.url}/v1", "api_key": "test-key", "model": "demo", "temperature": 0}
        return module.ChatOpenAI(**values | {"max_retries": 0} | more)

    return make


def test_langchain_chat_stream_and_usage(langchain):
    chat = langchain()
    whole = chat.invoke("Hello!")
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream("Hello!")) == whole.content
    limited = langchain(max_tokens=2).invoke("Hello!")
    assert limited.response_metadata["finish_reason"] == "length"


def test_langchain_structured_output_and_tools(langchain):
    from pydantic import BaseModel, Field

    class Person(BaseModel):
        """A person."""

        age: int = Field(ge=0, le=99)
        known: bool

    person = langchain(max_tokens=100).with_structured_output(Person, method="json_schema").invoke("Who?")
    assert 0 <= person.age <= 99
    called = langchain(max_tokens=100).bind_tools([Person], tool_choice="Person").invoke("Who?")
    assert called.tool_calls[0]["name"] == "Person"
    assert set(called.tool_calls[0]["args"]) == {"age", "known"}


def test_langchain_recognises_an_overflow(langchain):
    from langchain_core.exceptions import ContextOverflowError

    with pytest.raises(ContextOverflowError):
        langchain().invoke("word " * 600)


@pytest.mark.parametrize(
    ("phases", "examples"),
    (("fuzzing", 5), pytest.param("examples,coverage,fuzzing,stateful", 100, marks=pytest.mark.slow)),
)
def test_schemathesis_finds_no_500_and_no_undocumented_answer(server, phases, examples):
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [
        sys.executable, "-c", "from schemathesis.cli import schemathesis as st; st()", "run",
        f"{server.url}/openapi.json", "-H", "Authorization: Bearer test-key", "--checks", checks,
        "--phases", phases, "--max-examples", str(examples), "--seed", "7",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    server.assert_alive()


def test_the_openapi_document_is_whole(server):
    document = server.client.get("/openapi.json").json()
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"]
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"):
        assert {"200", "400", "401", "404", "413", "503"} <= set(document["paths"][path]["post"]["responses"])
