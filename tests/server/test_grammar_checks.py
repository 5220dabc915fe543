"""Grammars are tried out in a worker: whatever the library does with one, the server goes on and says so with a 400."""

from __future__ import annotations

import asyncio
import json
import os

import msgpack
import psutil
import pytest
from transformers import AutoTokenizer

from kvarena.engine.errors import RequestError
from kvarena.engine.server.engine import grammar_worker
from kvarena.engine.server.engine.grammar_checks import ChecksBusy, GrammarChecks
from kvarena.engine.server.engine.grammars import tokenizer_json
from kvarena.experiments.benchmarks.under_attack import slow_patterns
from kvarena.experiments.fuzzing.random_constraints import GBNF


@pytest.fixture(scope="module")
def tokenizer():
    loaded = AutoTokenizer.from_pretrained("experiments/models/demo")
    return tokenizer_json(loaded), len(loaded), [loaded.eos_token_id]


@pytest.fixture(scope="module")
def run(tokenizer):
    """Runs tests on one loop with one worker."""
    with asyncio.Runner() as runner:

        async def make():
            return GrammarChecks(*tokenizer)

        checks = runner.run(make())
        yield lambda test: runner.run(test(checks))
        checks.close()
    # Of this process: the folder's server has a worker of its own.
    assert not [one for one in psutil.Process().children() if "grammar_worker" in " ".join(one.cmdline())]


def slow(number: int) -> str:
    """14 seconds of work."""
    return json.dumps(slow_patterns(number, 400))


# What the library's reader of GBNF raises at each: its own error, plain Exception, IndexError, RecursionError, ...
MISTAKES = (
    'root ::= "a', "root ::= [a", 'root ::= ("a"', 'root ::= "a"{', 'root ::= "a"{x}', "root ::= nowhere",
    'other ::= "a"', 'root ::= "a"\nroot ::= "b"', 'root ::= "\\x4"', 'root ::= "\\q"', "::=", "root ::=", "root ::= |",
    "root ::= *", 'root ::= "a"{3,1}', "root ::= root", "root ::= a\na ::= b\nb ::= a", "root ::= " + "(" * 5000,
    "root ::= [\\", "root ::= \\", 'root ::= "a" # note ::=', "root ::= [z-a]", 'root ::= "a"{99999999999999999999}',
)  # fmt: skip


def test_any_mistake_in_a_grammar_is_an_error_of_the_request(run):
    async def test(checks):
        for text in MISTAKES:
            try:
                await checks.check("grammar", text)
            except RequestError as error:
                assert "\n" not in str(error)
                assert "grammar cannot be used" in str(error)
        for kind, text in (("json", "NaN"), ("json", '{"type": 1}'), ("regex", "("), ("regex", "(" * 30000)):
            with pytest.raises(RequestError, match="cannot be used"):
                await checks.check(kind, text)

    run(test)


def test_grammars_without_mistakes_are_taken(run):
    async def test(checks):
        for text in GBNF:
            assert (await checks.check("grammar", text)).grammar

    run(test)


def test_slow_ones_hold_up_no_quick_one_and_end_with_their_clients(run):
    async def test(checks):
        await checks.check("regex", "a")
        worker = psutil.Process(checks._process.pid)
        tasks = [asyncio.create_task(checks.check("json", slow(i))) for i in range(6)]
        await asyncio.sleep(0)
        same = asyncio.create_task(checks.check("json", slow(0)))
        await asyncio.sleep(0)
        assert len(checks._jobs) == 6
        assert (await checks.check("regex", "[a-z]{1,20}")).kind == "regex"
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(checks._jobs) == 1  # the text that somebody else waits for, too
        same.cancel()
        await asyncio.gather(same, return_exceptions=True)
        await checks.check("regex", "b")  # behind the words that end the others
        assert not worker.children()

    run(test)


def test_what_takes_too_long_or_too_much_is_refused_once_and_for_all(run):
    async def test(checks):
        with pytest.raises(RequestError, match="longer than 1 s to compile"):
            await checks.check("json", slow(0))
        spent = psutil.Process(checks._process.pid).cpu_times()
        assert spent.children_user + spent.children_system < 10
        with pytest.raises(RequestError, match="longer than 1 s to compile"):
            await checks.check("json", slow(0))
        again = psutil.Process(checks._process.pid).cpu_times()
        assert again.children_user == spent.children_user

    run(test)


def test_a_worker_that_dies_is_replaced(run):
    async def test(checks):
        await checks.check("regex", "c")
        waits = asyncio.create_task(checks.check("json", slow(9)))
        await asyncio.sleep(0.1)
        checks._process.kill()
        with pytest.raises(ChecksBusy):
            await waits
        assert (await checks.check("regex", "dd")).grammar

    run(test)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (MemoryError(), "MiB to compile"),
        (BaseException("a panic"), "the grammar library failed on it"),
        (RequestError("no\udcff"), "no?"),
    ],
)
def test_whatever_the_library_raises_is_told(fault, says, tmp_path):

    def work(kind, text):
        raise fault

    path = tmp_path / "answer"
    pipe = os.open(path, os.O_CREAT | os.O_WRONLY)
    grammar_worker._child(grammar_worker.Job(1, "json", ""), pipe, work)
    os.close(pipe)
    error, grammar, _ = msgpack.unpackb(path.read_bytes())
    assert says in error
    assert not grammar
