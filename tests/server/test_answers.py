"""How an answer is written and ended, without a server: a client that leaves, a stream's bytes, a choice that fails."""

from __future__ import annotations

import asyncio
import json

import pytest

from kvarena.engine.request import SamplingParams
from kvarena.engine.server.api.answers import DONE, Disconnected, EventStream, collect, while_connected
from kvarena.engine.server.api.completions import CompletionAnswer
from kvarena.engine.server.api.protocol import CompletionRequest
from kvarena.engine.server.front.groups import ChoiceFailed, EngineGone


class Stream:
    """Tokens are their letters."""

    def copy(self):
        return self

    def add(self, token_ids):
        return "".join(map(chr, token_ids))

    def flush(self):
        return ""

    pending = ""


class Client:
    eos_token_ids = frozenset({0})

    def __init__(self):
        self.ended, self.longest = [], []

    def abort(self, choices, reason):
        self.ended += [(choice.index, reason) for choice in choices if not choice.ended]

    def count_answer(self, num_tokens):
        self.longest.append(num_tokens)


def answer_of(client, n=1, **fields):
    req = CompletionRequest(prompt="x", stream=True, n=n, **fields)
    made = CompletionAnswer(client, req, "m", 0.0, detokenizer=None)
    made.add_prompt([1, 2], SamplingParams(n=n), Stream())
    return made


def give(answer, index, text, ended="", stop_token=None):
    choice = answer.choices[index]
    choice.tokens += map(ord, text)
    choice.ended, choice.stop_token = ended, stop_token
    answer.dirty.append(choice)
    answer.wake()


async def stays():
    await asyncio.Event().wait()


async def leaves():
    return {"type": "http.disconnect"}


def shown(sent):
    body = b"".join(message["body"] for message in sent[1:])
    assert body.endswith(DONE)
    return [json.loads(line[6:]) for line in body.removesuffix(DONE).decode().split("\n\n") if line]


async def streamed(answer, receive=stays):
    sent = []

    async def send(message):
        sent.append(message)

    state = {"send": send, "status": 0}
    await EventStream(answer, "id")({"type": "http", "state": state}, receive, None)
    return sent


async def within(work):
    return await asyncio.wait_for(work, 60)


def test_a_stream_ends_with_a_reason_for_each_choice_its_usage_and_done():
    async def run():
        client = Client()
        answer = answer_of(client, n=2, stream_options={"include_usage": True}, stop="c")
        give(answer, 0, "abcd")
        give(answer, 1, "xy.", "stop", ord("."))
        sent = await within(streamed(answer))
        assert [sent[0]["status"], sent[-1]["more_body"]] == [200, False]
        first, second, usage = shown(sent)
        assert first["choices"][0] | {"logprobs": 0} == {
            "index": 0, "text": "ab", "logprobs": 0, "finish_reason": "stop", "stop_reason": "c", "token_ids": None,
            "prompt_token_ids": None,
        }  # fmt: skip
        assert second["choices"][0]["text"] == "xy"  # the token that ended it is not shown
        assert second["choices"][0]["stop_reason"] == ord(".")
        assert usage["usage"]["completion_tokens"] == 6  # a stop string's tokens count as far as they were used
        assert usage["usage"]["prompt_tokens"] == 2
        assert client.ended[0] == (0, "stop")
        assert client.longest == [3]

    asyncio.run(run())


def test_a_client_that_leaves_frees_what_its_stream_had():
    async def run():
        client = Client()
        sent = await within(streamed(answer_of(client), leaves))
        assert len(sent) <= 1
        assert client.ended == [(0, "abort")]

    asyncio.run(run())


def test_an_engine_that_is_gone_ends_a_stream_with_its_error():
    async def run():
        answer = answer_of(Client())
        answer.fail(EngineGone("it has ended"))
        [event] = shown(await within(streamed(answer)))
        assert event["error"]["code"] == "engine_dead"

    asyncio.run(run())


def test_a_choice_that_failed_is_an_error_and_frees_the_others():
    async def run():
        client = Client()
        answer = answer_of(client, n=2)
        give(answer, 0, "a", "error")
        with pytest.raises(ChoiceFailed):
            await within(collect(answer))
        assert client.ended == [(1, "abort")]

    asyncio.run(run())


def test_who_leaves_ends_the_work_and_who_cancels_it_is_no_client_that_left():
    async def run():
        ended = []

        async def work():
            try:
                await stays()
            except asyncio.CancelledError:
                ended.append(True)
                raise

        async def fails():
            raise ValueError

        with pytest.raises(Disconnected):
            await within(while_connected(leaves, work()))
        task = asyncio.create_task(while_connected(stays, work()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(task)
        assert len(ended) == 2
        with pytest.raises(ValueError):
            await within(while_connected(stays, fails()))
        assert await within(while_connected(stays, asyncio.sleep(0, 5))) == 5
        assert len(asyncio.all_tasks()) <= 2  # this one, and a watcher that has been told to end

    asyncio.run(run())


def test_arguments_of_a_call_reach_a_message_as_they_were_written():
    """Numbers of any size, too: a grammar allows them."""
    from kvarena.engine.server.api.protocol import ChatCompletionRequest
    from kvarena.engine.server.api.turn import Reading
    from kvarena.engine.server.forms.calls import NamedParser
    from kvarena.engine.server.messages.answer import MessageAnswer

    def body(text):
        req = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}])
        reading = Reading(lambda: NamedParser("f"), None, len)
        answer = MessageAnswer(Client(), req, "m", 0.0, reading=reading, max_tokens=9)
        answer.add_prompt([1, 2], SamplingParams(), Stream())
        give(answer, 0, text, "length")
        return json.loads(asyncio.run(within(collect(answer))).body)["content"][0]

    big = '{"x": 123456789012345678901234567890}'
    assert body(big)["input"] == json.loads(big)
    assert body('{"x": 12') == {"type": "text", "text": '{"x": 12'}  # cut: no call that a client could make


def test_the_first_event_of_a_chat_has_no_tokens_and_says_so():
    from kvarena.engine.server.api.chat import ChatAnswer
    from kvarena.engine.server.api.protocol import ChatCompletionRequest
    from kvarena.engine.server.api.turn import Reading

    def ids(asked):
        messages = [{"role": "user", "content": "x"}]
        req = ChatCompletionRequest(messages=messages, stream=True, return_token_ids=asked)
        answer = ChatAnswer(Client(), req, "m", 0.0, reading=Reading(lambda: None, None, len))
        answer.add_prompt([1, 2], SamplingParams(), Stream())
        [choice] = json.loads(answer.begin().decode().removeprefix("data: "))["choices"]
        return choice["token_ids"]

    assert ids(True) == []
    assert ids(False) is None


@pytest.mark.parametrize("api", ("responses", "messages"))
def test_text_that_goes_on_is_shown_the_same_whichever_way_it_takes(api):
    """The short way of text that nothing is read in, and the way through a parser that finds nothing."""
    from kvarena.engine.server.api.protocol import ChatCompletionRequest
    from kvarena.engine.server.api.turn import Reading
    from kvarena.engine.server.forms.texts import TaggedParser
    from kvarena.engine.server.messages.answer import MessageAnswer
    from kvarena.engine.server.responses.answer import ResponseAnswer
    from kvarena.engine.server.responses.protocol import ResponsesRequest

    kept = {"asked": ResponsesRequest(input="x"), "response_id": "resp", "stores": False, "on_state": lambda _: None}

    def events(make_parser):
        req = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], stream=True)
        common = (Client(), req, "m", 0.0)
        reading = Reading(make_parser, None, len)
        answer = (
            ResponseAnswer(*common, reading=reading, **kept)
            if api == "responses"
            else MessageAnswer(*common, reading=reading, max_tokens=9)
        )
        answer.add_prompt([1, 2], SamplingParams(), Stream())
        made = answer.begin()
        choice = answer.choices[0]
        for text in ("ab", "", 'c"d', "\n"):
            choice.tokens = [ord(letter) for letter in text]
            made += answer.delta(choice, *choice.advance())
        choice.tokens, choice.ended = [101], "length"
        made += answer.delta(choice, *choice.advance()) + answer.ending()
        shown = [json.loads(line[6:]) for line in made.decode().split("\n") if line.startswith("data: ")]
        return shown, [event["delta"] for event in shown if "delta" in event["type"]]

    (short, deltas), (read, _) = events(lambda: None), events(lambda: TaggedParser(frozenset("f")))
    assert [event["type"] for event in short] == [event["type"] for event in read]
    assert len({str(delta) for delta in deltas}) >= 4
    hidden = {"item_id", "item", "response", "message"}
    for one, other in zip(short, read, strict=True):
        assert {key: one[key] for key in one.keys() - hidden} == {key: other[key] for key in other.keys() - hidden}
