"""Long texts: the work is bounded by what could be admitted, and nobody waits for a text much longer than his own."""

import asyncio
import re
import threading

import pytest
from server_harness import PATIENCE, ROOT

from kvarena.engine.server.shared.errors import ApiError
from kvarena.engine.server.text.tokenization import TokenizerService

CONTEXT = 512


@pytest.fixture
def service(monkeypatch):
    made = TokenizerService(str(ROOT / "experiments" / "models" / "demo"))
    made.given = []
    encode = made._encode

    def counted(text, special):
        made.given.append(len(text))
        return encode(text, special)

    monkeypatch.setattr(made, "_encode", counted)
    return made


@pytest.mark.parametrize("unit", ["ab ", " " * 128, "x", "\n", "the allocator and "])
def test_what_a_prompt_costs_is_bounded_by_the_context(service, unit):
    """14 MB of it are refused after a few pieces, whatever a token holds; the number is called a bound."""
    text = unit * (14_000_000 // len(unit))
    with pytest.raises(ApiError) as refused:
        asyncio.run(service.encode(text, True, CONTEXT))
    assert refused.value.status == 400
    assert re.search(
        rf"maximum context length is {CONTEXT} tokens.* at least {CONTEXT + 1} tokens", refused.value.message
    )
    per_token = 32_768 / len(service.tokenizer.encode(unit * (32_768 // len(unit)), add_special_tokens=False))
    assert sum(service.given) <= 2 * CONTEXT * per_token + 2 * 32_768


def test_a_long_text_that_fits_is_tokenized_exactly(service):
    """More than eight characters a token: its pieces are counted first, and then it is tokenized as a whole."""
    text = " " * 300_000 + "the end"
    ids = service.tokenizer.encode(text, add_special_tokens=False)
    assert len(text) > 8 * len(ids)
    assert asyncio.run(service.encode(text, False, len(ids))) == ids
    assert service.given[-1] == len(text) and len(service.given) > 9


@pytest.mark.parametrize("long", ["prompt", "counted"])
def test_nobody_waits_for_a_text_much_longer_than_his_own(service, monkeypatch, long):
    """A prompt of 9.5k characters is tokenized while one of millions stands still."""
    begun, go_on, encode = threading.Event(), threading.Event(), service._encode

    def slow(text, special):
        if "long" in text:
            begun.set()
            assert go_on.wait(PATIENCE)
        return encode(text, special)

    monkeypatch.setattr(service, "_encode", slow)

    async def both():
        text = "long" * 500_000
        work = service.encode(text, True, CONTEXT) if long == "prompt" else service.encode_any(text, True)
        other = asyncio.ensure_future(work)
        await asyncio.to_thread(begun.wait, PATIENCE)
        ids = await asyncio.wait_for(service.encode("ab " * 3167, True, 1 << 20), PATIENCE)
        assert ids and not other.done()
        go_on.set()
        return await asyncio.gather(other, return_exceptions=True)

    (answer,) = asyncio.run(both())
    assert isinstance(answer, ApiError if long == "prompt" else list)


def test_two_oversize_prompts_take_turns(service):
    """Of several that are counted none is counted to its end before another one begins."""

    async def three():
        texts = [unit * 400_000 for unit in ("ab ", "cd ", "ef ")]
        return await asyncio.gather(*(service.encode(t, True, 100_000) for t in texts), return_exceptions=True)

    seen, encode = [], service._encode
    service._encode = lambda text, special: seen.append(text[:2].strip()) or encode(text, special)
    asyncio.run(three())
    assert len(set(seen[:3])) == 3
