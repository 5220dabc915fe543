"""The load client's connections: kept while the server keeps them, and never waiting for a server that is silent."""

import asyncio
import contextlib
import itertools

import httpx
import pytest
from waiting import PATIENCE

from kvarena.engine.request import SamplingParams
from kvarena.experiments.load.connection import HttpClient, in_turns
from kvarena.experiments.load.http_client import Answer, HttpServer

JSON = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(text: str) -> bytes:
    return f"{len(text):x}\r\n{text}\r\n".encode()


TOKEN = chunk('data: {"choices": [{"text": "x", "finish_reason": "length"}]}\n\n')
DONE = chunk("data: [DONE]\n\n")


class Peer:
    """A server that answers its n-th request with the n-th of `answers`: bytes, pauses, and None, which hangs up."""

    def __init__(self, *answers: tuple[bytes | float | None, ...]) -> None:
        self.answers, self.requests, self.num_connections = iter(answers), [], 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = next((int(line.split()[1]) for line in head.split(b"\r\n") if b"Content-Length" in line), 0)
                self.requests.append(head + await reader.readexactly(size))
                for part in next(self.answers):
                    if isinstance(part, bytes):
                        writer.write(part)
                    elif part is not None:
                        await asyncio.sleep(part)
                    else:
                        writer.close()
        writer.close()


def ask(peer: Peer, talk, **options):
    """What `talk` gives, given a client of the peer."""

    async def run():
        server = await asyncio.start_server(peer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with contextlib.closing(HttpClient(f"http://127.0.0.1:{port}/base/", {"X-Key": "k"}, **options)) as client:
            found = await talk(client)
        server.close()
        return found

    return asyncio.run(run())


async def twice(client: HttpClient):
    return [await client.request("GET", "/a?b=1") for _ in range(2)]


def test_a_connection_serves_again_while_the_server_keeps_it():
    closing = JSON.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n")
    for answers, options, expected in (
        ((JSON, JSON), {}, 1),
        ((closing, JSON), {}, 2),
        ((JSON, JSON), {"keeps": False}, 2),
    ):
        peer = Peer(*((answer,) for answer in answers))
        assert [(reply.status, bytes(reply.body)) for reply in ask(peer, twice, **options)] == [(200, b"{}")] * 2
        assert peer.num_connections == expected
        assert peer.requests[0].startswith(b"GET /base/a?b=1 HTTP/1.1\r\nHost: 127.0.0.1:")
        assert b"\r\nX-Key: k\r\n" in peer.requests[0]
        assert (b"Connection: close" in peer.requests[0]) is bool(options)


def test_a_connection_that_the_server_closed_meanwhile_is_not_used_again():
    async def talk(client):
        first = await client.request("GET", "/")
        await asyncio.sleep(0.05)
        return first.status, (await client.request("GET", "/")).status

    peer = Peer((JSON, 0.0, None), (JSON,))
    assert ask(peer, talk) == (200, 200)
    assert peer.num_connections == 2


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((PATIENCE,), TimeoutError, "nothing came for 0.1 s"),
        ((STREAM, TOKEN, PATIENCE), TimeoutError, "nothing came for 0.1 s"),
        ((STREAM, TOKEN, None), ConnectionError, "closed within the answer"),
        ((b"SSH-2.0\r\n\r\n",), ConnectionError, "the answer is no HTTP"),
        ((None,), ConnectionError, "closed within the answer"),
    ],
)  # fmt: skip
def test_what_is_no_whole_answer_raises(answer, error, message):
    with pytest.raises(error, match=message):
        ask(Peer(answer), twice, patience=0.1 if error is TimeoutError else PATIENCE)


def test_signs_of_life_keep_a_slow_answer_alive():
    """Patience is for silence, not for the whole answer."""
    slow = (STREAM, *itertools.chain.from_iterable((chunk("x"), 0.25) for _ in range(6)), END)
    [reply, _] = ask(Peer(slow, (JSON,)), twice, patience=1.0)
    assert reply.body == b"xxxxxx"


def test_an_answer_without_a_length_ends_with_its_connection():
    [reply, _] = ask(Peer((b"HTTP/1.1 200 OK\r\n\r\nab", 0.01, None), (JSON,)), twice)
    assert reply.body == b"ab"


def complete(peer: Peer, answer: Answer | None = None, **options) -> Answer:
    async def talk(client):
        return await HttpServer(client, "m", {}).complete([1, 2], SamplingParams(max_tokens=1), answer)

    return ask(peer, talk, **options)


def test_a_server_that_does_not_close_its_answer_is_not_waited_for():
    answer = complete(Peer((STREAM, TOKEN, DONE, PATIENCE, END)))
    assert (answer.error, answer.num_tokens) == ("", 1)
    assert answer.end - answer.start < PATIENCE


def test_a_stream_that_breaks_off_behind_its_end_is_whole_and_one_before_it_is_not():
    assert complete(Peer((STREAM, TOKEN, DONE, 0.01, None))).error == ""
    assert complete(Peer((STREAM, TOKEN, 0.01, None))).error.startswith("ConnectionError: ")
    assert complete(Peer((STREAM, TOKEN, END))).error == "the stream ended without a finish_reason and [DONE]"


def test_a_refusal_says_what_the_server_said():
    refusal = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 9\r\n\r\ntry later"
    answer = complete(Peer((refusal,)))
    assert (answer.error, answer.refused) == ("status 429: try later", True)


def test_who_hangs_up_leaves_no_connection_behind():
    peer = Peer((STREAM, TOKEN, 0.01, TOKEN, PATIENCE), (JSON,))
    answer = complete(peer, Answer(hang_up_after=1))
    assert (answer.is_cut, answer.error, len(answer.chunk_times)) == (True, "", 2)


def test_a_request_that_is_cancelled_closes_its_connection():
    async def talk(client):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.request("GET", "/")
        return (await client.request("GET", "/")).status, client

    peer = Peer((JSON[:-1], PATIENCE), (JSON,))
    assert ask(peer, talk)[0] == 200
    assert peer.num_connections == 2


def test_a_receiver_that_fails_is_told_as_it_is():
    class Broken:
        status = 0

        def receive(self, piece, now):
            raise LookupError("of mine")

    with pytest.raises(LookupError, match="of mine"):
        ask(Peer((JSON,)), lambda client: client.send("GET", "/", b"", Broken()))


@pytest.mark.parametrize("path", ["http://[::1", "http://localhost:abc/metrics", "ftp://x/y"])
def test_a_path_that_is_no_address_is_named(path):
    with pytest.raises(httpx.InvalidURL):
        HttpClient("http://h").message("GET", path)


def test_messages_name_the_host_as_the_address_does():
    assert HttpClient("https://a:b%20c@h:8443/v").message("POST", "/x", b"{}") == (
        b"POST /v/x HTTP/1.1\r\nHost: h:8443\r\nAuthorization: Basic YTpiIGM=\r\nContent-Length: 2\r\n\r\n{}"
    )
    assert HttpClient("http://h").message("GET", "http://[::1]:9/m").startswith(b"GET /m HTTP/1.1\r\nHost: [::1]:9\r\n")


def test_clients_take_turns_over_one_list():
    running, most, done = 0, 0, []

    async def send(item):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        done.append(item)

    asyncio.run(in_turns(3, iter(range(10)), send))
    assert (most, sorted(done)) == (3, list(range(10)))


def test_what_nobody_asked_for_ends_a_connection():
    async def talk(client):
        first = await client.request("GET", "/")
        for _ in range(10):  # each a round of the loop, however late: the peer writes, the client reads
            await asyncio.sleep(0.01)
        return bytes(first.body), bytes((await client.request("GET", "/")).body)

    peer = Peer((JSON, 0.01, JSON, PATIENCE), (JSON,))
    assert ask(peer, talk) == (b"{}", b"{}")
    assert peer.num_connections == 2


def test_a_request_on_a_connection_that_the_server_closes_under_it_goes_out_on_a_new_one():
    async def talk(client):
        return [(await client.request("POST", "/", b"{}")).status for _ in range(4)]

    peer = Peer(*[(JSON, None)] * 4)  # says nothing of closing, and closes
    assert ask(peer, talk) == [200] * 4
    assert len(peer.requests) == 4
    dead = Peer((JSON,), (None,), (None,))  # a new one that is closed, too, is an error
    with pytest.raises(ConnectionError, match="closed within the answer"):
        ask(dead, talk)
    assert len(dead.requests) == 3


def test_what_comes_behind_an_answer_is_not_taken_for_it():
    gone = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 2\r\n\r\nno"
    for more in (gone, gone[:30], b"what"):
        peer = Peer((JSON + more,), (JSON,))
        assert [(reply.status, bytes(reply.body)) for reply in ask(peer, twice)] == [(200, b"{}")] * 2
        assert peer.num_connections == 2


def test_a_compressed_answer_is_named():
    peer = Peer((JSON.replace(b"OK\r\n", b"OK\r\nContent-Encoding: gzip\r\n"),))
    with pytest.raises(ConnectionError, match="the answer is compressed \\(gzip\\)"):
        ask(peer, twice)


def test_an_answer_that_is_no_stream_is_shown():
    said = b'{"error": "no such model"}'
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(said)

    async def talk(client):
        return await HttpServer(client, "m", {}).complete([1], SamplingParams(max_tokens=1))

    assert "no such model" in ask(Peer((head + said,)), talk).error
