"""OpenAI's agent kit, unmodified, against a running server: 20 tools, 30 turns, each of them a call.

    KVARENA_URL=http://127.0.0.1:8000 KVARENA_KEY=KEY python -m pytest --noconftest tests/clients/check_agents.py

The server serves models/demo as `demo` with a context of 8,192 tokens. Every call is forced (`tool_choice="required"`)
and held to its tool's schema by a library of its own; every turn sends the whole history back.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter

import jsonschema
import openai
import pytest
from agents import (
    Agent,
    FunctionTool,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    ToolsToFinalOutputResult,
    set_tracing_disabled,
)

URL, KEY = os.environ["KVARENA_URL"], os.environ["KVARENA_KEY"]
NUM_TOOLS, TURNS = 20, 30
# An untrained model writes free strings without end: the schemas bound them, as an enumeration or a pattern does.
ARGUMENTS = (
    {"path": {"type": "string", "maxLength": 12}, "line": {"type": "integer", "minimum": 1, "maximum": 999}},
    {"mode": {"enum": ["read", "write", "append"]}, "force": {"type": "boolean"}},
    {"ids": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 1, "maxItems": 3}},
    {"where": {
        "type": "object", "properties": {"x": {"type": "number"}, "unit": {"enum": ["m", "km"]}},
        "required": ["unit"], "additionalProperties": False}},
    {"day": {"type": "string", "pattern": "^[0-9]{4}-[0-1][0-9]$"}},
)  # fmt: skip

set_tracing_disabled(True)


class Workbench:
    """The tools, and what was called."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.extra = {"seed": 0}  # another one each turn: else a small model says the same again and again
        self.tools = [self._tool(f"tool_{number}", ARGUMENTS[number % len(ARGUMENTS)]) for number in range(NUM_TOOLS)]

    def _tool(self, name, properties):
        needed = [key for key in properties if key != "force"]
        schema = {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}

        async def invoke(_, arguments: str) -> str:
            jsonschema.validate(json.loads(arguments), schema)
            self.called.append(name)
            self.extra["seed"] = len(self.called)
            return f"{name} is done, the {len(self.called)}th."

        return FunctionTool(name, f"Does what {name} does.", schema, invoke, strict_json_schema=False)

    def agent(self, model) -> Agent:
        def ends(_, results):
            return ToolsToFinalOutputResult(is_final_output=len(self.called) >= TURNS, final_output=len(self.called))

        settings = ModelSettings(
            tool_choice="required", parallel_tool_calls=False, temperature=2.0, max_tokens=300, extra_body=self.extra,
            include_usage=True,
        )  # fmt: skip
        return Agent(
            "worker", instructions="Use your tools.", model=model, tools=self.tools, model_settings=settings,
            tool_use_behavior=ends, reset_tool_choice=False,
        )  # fmt: skip


@pytest.mark.parametrize("is_streamed", (False, True), ids=("whole", "streamed"))
@pytest.mark.parametrize("kind", (OpenAIChatCompletionsModel, OpenAIResponsesModel), ids=("chats", "responses"))
def test_thirty_turns_of_twenty_tools(kind, is_streamed):
    bench = Workbench()

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as client:
            agent = bench.agent(kind("demo", client))
            if not is_streamed:
                return await Runner.run(agent, "Begin.", max_turns=TURNS + 1)
            result = Runner.run_streamed(agent, "Begin.", max_turns=TURNS + 1)
            kinds = Counter([event.type async for event in result.stream_events()])
            assert kinds["run_item_stream_event"] >= 2 * TURNS, kinds  # a call and its output
            return result

    result = asyncio.run(run())
    assert int(result.final_output) == TURNS == len(bench.called)
    assert len(set(bench.called)) > NUM_TOOLS // 3, Counter(bench.called)
    usage = result.context_wrapper.usage
    assert usage.requests == TURNS
    history = result.to_input_list()
    outputs = [item["call_id"] for item in history if item.get("type") == "function_call_output"]
    calls = [item["call_id"] for item in history if item.get("type") == "function_call"]
    assert outputs == calls and len(set(calls)) == TURNS
    assert usage.input_tokens_details.cached_tokens > 0.8 * usage.input_tokens
