"""Heads of requests that are too long or never end, and the guard before the application, without a model."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from nearfar.errors import NearfarError
from nearfar.serving.limits import Guard, Limits, local_hosts
from nearfar.serving.listen import BoundedHeads, _OneWrite
from served import Asker, serving

POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with the size of the body."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    body = b""
    if scope["method"] == "POST":
        message = await receive()
        body = message["body"]
        assert not message["more_body"]
    answer = str(len(body)).encode()
    headers = [(b"content-length", str(len(answer)).encode()), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@pytest.fixture(scope="module")
def ask() -> Iterator[Asker]:
    limits = Limits(body=1000, memory=2000, seconds=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoundedHeads, "head_seconds", 0.6)
        with serving(Guard(echo, limits, local_hosts("127.0.0.1"))) as asker:
            yield asker


def sent(port: int, *parts: bytes, wait: float = 0.0) -> bytes:
    """What comes back until the connection is closed, or nothing comes for three seconds."""
    with socket.create_connection(("127.0.0.1", port), timeout=3) as line:
        answer = b""
        try:
            for part in parts:
                line.sendall(part)
                time.sleep(wait)
            while data := line.recv(65_536):
                answer += data
        except (TimeoutError, ConnectionResetError, BrokenPipeError):
            pass
        return answer


def test_bodies_arrive_whole_and_are_bounded(ask: Asker) -> None:
    assert ask("/", raw=b"x" * 1000)[:2] == (200, 1000)
    assert ask("/", raw=b"x" * 1001)[0] == 413
    assert ask("/", raw=b"")[:2] == (200, 0)
    head = POST + b"Content-Type: application/json\r\nContent-Length: 6\r\nConnection: close\r\n\r\n"
    assert sent(ask.port, head, b"ab", b"cd", b"ef", wait=0.05).endswith(b"\r\n\r\n6")


def test_head_and_body_of_an_answer_are_one_write() -> None:
    written: list[bytes] = []

    class Transport:
        closed = False

        def write(self, data: bytes) -> None:
            assert not self.closed
            written.append(data)

        def close(self) -> None:
            self.closed = True

        def is_closing(self) -> bool:
            return self.closed

    async def answers() -> None:
        both = _OneWrite(Transport(), asyncio.get_running_loop())
        both.write(b"head ")
        both.write(b"body")
        assert written == []
        await asyncio.sleep(0)
        assert written == [b"head body"]
        both.write(b"last")
        both.close()  # what was written before goes out before the end
        assert written == [b"head body", b"last"]
        assert both.is_closing()
        await asyncio.sleep(0)

    asyncio.run(answers())
    assert written == [b"head body", b"last"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"y" * 60_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(6000)),
        b"GET /" + b"a" * 60_000,
    ],
    ids=["one header", "many headers", "address"],
)
def test_heads_that_are_too_long_are_cut(ask: Asker, head: bytes) -> None:
    began = time.monotonic()
    answer = sent(ask.port, *[head[i : i + 8000] for i in range(0, len(head), 8000)])
    assert answer == b"" or b" 400 " in answer
    assert time.monotonic() - began < 2.5
    assert ask("/")[0] == 200


def test_heads_that_never_end_are_cut(ask: Asker) -> None:
    for head in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: y"):
        began = time.monotonic()
        assert sent(ask.port, head) == b""
        assert 0.3 < time.monotonic() - began < 2.5
    # the second request of a connection, too
    first = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    began = time.monotonic()
    assert sent(ask.port, first, b"GET / HT", wait=0.1).count(b"HTTP/1.1 200") == 1
    assert time.monotonic() - began < 2.5


def test_what_is_no_http_gets_400(ask: Asker) -> None:
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ):
        answer = sent(ask.port, data)
        assert answer == b"" or b" 400 " in answer
    two_hosts = b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\nConnection: close\r\n\r\n"
    assert b" 421 " in sent(ask.port, two_hosts)
    without = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"
    assert b" 421 " in sent(ask.port, without)
    both = b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    smuggled = POST + both + b"GET /x HTTP/1.1\r\n\r\n"
    assert b" 200 " not in sent(ask.port, smuggled)


def test_names_of_a_server() -> None:
    assert "localhost" in local_hosts("0.0.0.0")
    assert "0.0.0.0" not in local_hosts("0.0.0.0")
    assert "192.168.1.5" in local_hosts("192.168.1.5")
    assert "*" in local_hosts("127.0.0.1", ["*"])


def test_every_name_where_that_is_asked_for() -> None:
    with serving(Guard(echo, Limits(), local_hosts("127.0.0.1", ["*"]))) as ask:
        assert ask("/", headers={"Host": "anything.example"})[0] == 200
        assert ask("/", headers={"Host": "no name"})[0] in (400, 421)


def test_bodies_at_a_time_are_bounded() -> None:
    entered = 0

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        nonlocal entered
        entered += 1
        await asyncio.sleep(0.2)
        await echo(scope, receive, send)

    async def one(guard: Guard, size: int) -> int:
        statuses: list[int] = []

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        async def receive() -> Any:
            return {"type": "http.request", "body": b"x" * size, "more_body": False}

        kind = (b"content-type", b"application/json")
        headers = [(b"host", b"localhost"), kind, (b"content-length", str(size).encode())]
        await guard({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive, send)
        return statuses[0]

    async def run() -> list[int]:
        guard = Guard(slow, Limits(body=1000, memory=2500), local_hosts("127.0.0.1"))
        statuses = await asyncio.gather(*(one(guard, 1000) for _ in range(5)))
        assert (guard.bodies.used, guard.requests.used) == (0, 0)
        return list(statuses)

    assert sorted(asyncio.run(run())) == [200, 200, 503, 503, 503]
    assert entered == 2


def test_limits_are_checked() -> None:
    with pytest.raises(NearfarError, match="body=0"):
        Limits(body=0)
    with pytest.raises(NearfarError, match="less than one request"):
        Limits(body=100, memory=10)
