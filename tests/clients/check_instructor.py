"""instructor, unmodified, against a running server: models of pydantic out of chats, responses and messages.

KVARENA_URL=http://127.0.0.1:8000 KVARENA_KEY=KEY python -m pytest --noconftest tests/clients/check_instructor.py
"""

from __future__ import annotations

import os
from typing import Literal

import anthropic
import instructor
import openai
import pytest
from pydantic import BaseModel, Field

URL, KEY = os.environ["KVARENA_URL"], os.environ["KVARENA_KEY"]
HELLO = [{"role": "user", "content": "Who?"}]


class Person(BaseModel):
    """Someone."""

    age: int = Field(ge=0, le=99)
    kind: Literal["friend", "stranger"]
    tags: list[Literal["old", "young"]] = Field(max_length=2)


def _client(mode):
    made = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
    return instructor.from_openai(made, mode=mode)


@pytest.mark.parametrize("mode", (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA), ids=("tools", "schema"))
def test_a_person_out_of_a_chat_and_its_stream(mode):
    request = {"model": "demo", "messages": HELLO, "max_tokens": 200, "max_retries": 0, "temperature": 0}
    whole, raw = _client(mode).chat.completions.create_with_completion(response_model=Person, **request)
    assert 0 <= whole.age <= 99 and raw.usage.completion_tokens > 0
    partial = list(_client(mode).chat.completions.create_partial(response_model=Person, **request))
    assert partial[-1].model_dump() == whole.model_dump()


def test_a_person_out_of_a_response():
    client = _client(instructor.Mode.RESPONSES_TOOLS)
    whole = client.responses.create(
        model="demo", input="Who?", response_model=Person, max_output_tokens=200, max_retries=0, temperature=0
    )
    assert 0 <= whole.age <= 99


def test_a_person_out_of_a_message():
    made = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
    client = instructor.from_anthropic(made, mode=instructor.Mode.ANTHROPIC_TOOLS)
    whole = client.messages.create(
        model="demo", messages=HELLO, response_model=Person, max_tokens=200, max_retries=0,
        extra_body={"temperature": 0},
    )  # fmt: skip
    assert 0 <= whole.age <= 99
