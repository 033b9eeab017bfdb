"""What stands before every request: who may ask, how much may be sent, how long it may take."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from nearfar.errors import NearfarError
from nearfar.serving.batcher import Busy

__all__ = ["PAGE_POLICY", "Budget", "Guard", "Limits", "local_hosts"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: what a page may do: its own scripts and styles, pictures of its own or in its memory, requests to its own server
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_NAME = re.compile(r"[a-z0-9._-]+")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"content-security-policy", PAGE_POLICY.encode()),
)


@dataclass(frozen=True)
class Limits:
    """The most that a server takes.

    Attributes:
        body: bytes of a request.
        values: values of a request.
        characters: of a text.
        numbers: of a value that is numbers.
        pixels: of a picture, as the head of its file states them, before it is decoded.
        hits: of a query.
        requests: worked on at a time; to further ones it is said to come again.
        waiting: values that wait for the model.
        memory: bytes of all bodies that are worked on at a time, and a tenth of the pixels of their pictures.
        seconds: from the first byte of a request to its answer.

    >>> Limits(values=0)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: values=0: a number above 0 is needed.
    """

    body: int = 8 * 2**20
    values: int = 256
    characters: int = 100_000
    numbers: int = 100_000
    pixels: int = 25_000_000
    hits: int = 200
    requests: int = 256
    waiting: int = 2048
    memory: int = 64 * 2**20
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for each in fields(self):
            if not getattr(self, each.name) > 0:
                raise NearfarError(f"{each.name}={getattr(self, each.name)}: a number above 0 is needed.")
        if self.memory < self.body:
            raise NearfarError(f"memory={self.memory} is less than one request may have (body={self.body}).")


class Budget:
    """So much of something at a time; what does not fit is `Busy`.

    >>> bytes_at_once = Budget(10, "bytes")
    >>> with bytes_at_once.taking(8):
    ...     with bytes_at_once.taking(4):
    ...         pass
    Traceback (most recent call last):
    nearfar.serving.batcher.Busy: the server has as many bytes at hand as it takes (10); try again later
    """

    def __init__(self, most: int, what: str) -> None:
        self.most, self.what, self.used = most, what, 0

    def take(self, amount: int) -> None:
        """Take so much; whoever takes gives it back."""
        if self.used + amount > self.most:
            raise Busy(
                f"the server has as many {self.what} at hand as it takes ({self.most}); try again later"
            )
        self.used += amount

    def give(self, amount: int) -> None:
        """Give back what was taken."""
        self.used -= amount

    @contextmanager
    def taking(self, amount: int) -> Iterator[None]:
        """So much for the time of a block."""
        self.take(amount)
        try:
            yield
        finally:
            self.give(amount)


def local_hosts(host: str, more: Collection[str] = ()) -> frozenset[str]:
    """The names under which a server at ``host`` may be asked: its own, those of this machine's own address, and
    ``more``. ``*`` among them allows every name.

    A page from elsewhere can give its own name the address 127.0.0.1 and then read what a local server answers; the
    name that it asks for gives it away.

    >>> sorted(local_hosts("127.0.0.1", ["models.example.org"]))
    ['127.0.0.1', '::1', 'localhost', 'models.example.org']
    """
    names = {name.strip().strip("[]").casefold() for name in ("localhost", "127.0.0.1", "::1", *more)}
    own = host.strip("[]").casefold()
    try:
        if ipaddress.ip_address(
            own
        ).is_unspecified:  # every address of this machine, which are not known by name
            return frozenset(names)
    except ValueError:
        pass
    return frozenset(names | {own})


class Guard:
    """An ASGI application in front of a second one, which only sees what it may.

    Refused as JSON, with the reason: a ``Host`` header that is not one of ``hosts``, requests from pages of other
    sites, bodies that are no JSON, too large or too slow, and more requests than are worked on at a time. A body is
    read in full before the application is called. An answer that takes too long is broken off.
    """

    def __init__(self, app: App, limits: Limits, hosts: Collection[str]) -> None:
        self.app, self.limits, self.hosts = app, limits, hosts
        self.bodies = Budget(limits.memory, "bytes of requests")
        self.requests = Budget(limits.requests, "requests")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # the server closes a web socket that nobody accepts
        answer = _Answer(send)
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            if refusal[0] == 413:
                await self._drain(receive)
            await answer.refuse(*refusal)
            return
        try:
            with self.requests.taking(0 if scope["path"] == "/health" else 1):
                await self._within_limits(scope, headers, receive, answer)
        except Busy as busy:
            await answer.refuse(503, str(busy), retry_after=busy.retry_after)

    async def _within_limits(
        self, scope: Scope, headers: dict[bytes, list[bytes]], receive: Receive, answer: _Answer
    ) -> None:
        taken = 0
        try:
            async with asyncio.timeout(self.limits.seconds):
                body = b""
                if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                    parts: list[bytes] = []
                    stated = int(headers.get(b"content-length", [b"0"])[0])
                    self.bodies.take(stated)
                    taken, size = stated, 0
                    while True:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            return
                        part = message.get("body", b"")
                        size += len(part)
                        if size > self.limits.body:
                            parts.clear()
                            await self._drain(receive)
                            await answer.refuse(413, self._too_large())
                            return
                        if size > taken:
                            self.bodies.take(size - taken)
                            taken = size
                        parts.append(part)
                        if not message.get("more_body"):
                            break
                    body = b"".join(parts)
                await self.app(scope, _replayed(body, receive), answer.pass_on)
        except TimeoutError:
            await answer.refuse(
                504, f"no answer within {self.limits.seconds:g} seconds; ask for less at a time"
            )
        finally:
            self.bodies.give(taken)

    async def _drain(self, receive: Receive) -> None:
        """Read on for a while and keep nothing: who still sends does not read that it was too much."""
        left = 4 * self.limits.body
        try:
            async with asyncio.timeout(min(10.0, self.limits.seconds)):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body"):
                        return
        except TimeoutError:
            return

    def _too_large(self) -> str:
        return f"a request may have {self.limits.body:,} bytes; send fewer values, or smaller pictures"

    def _refusal(self, scope: Scope, headers: dict[bytes, list[bytes]]) -> tuple[int, str] | None:
        """Status and reason where a request is refused by its head."""
        host = _host(headers.get(b"host", []))
        if host is None or ("*" not in self.hosts and host not in self.hosts):
            return (
                421,
                "this server is not asked under this name (Host header); --allow-host NAME allows a name",
            )
        origin = headers.get(b"origin")
        if origin is not None:
            _, _, name = origin[0].partition(b"://")
            if len(origin) > 1 or name.lower() != headers[b"host"][0].lower():
                return 403, "requests from pages of other sites are not answered"
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        kind = headers.get(b"content-type", [b""])[0].split(b";")[0].strip().lower()
        if kind != b"application/json" or b"content-encoding" in headers:
            return 415, "a request is JSON, not compressed: Content-Type: application/json"
        length = headers.get(b"content-length", [b"0"])
        if len(length) > 1 or not length[0].isdigit():
            return 400, "Content-Length is no number"
        if int(length[0]) > self.limits.body:
            return 413, self._too_large()
        return None


class _Answer:
    """Passes an answer on with the headers of all answers, or gives one of its own where none has begun."""

    def __init__(self, send: Send) -> None:
        self.send, self.begun = send, False

    async def pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            known = {name.lower() for name, _ in message.get("headers", [])}
            more = [pair for pair in _HEADERS if pair[0] not in known]
            message["headers"] = [*message.get("headers", []), *more]
        await self.send(message)

    async def refuse(self, status: int, reason: str, retry_after: int | None = None) -> None:
        if self.begun:
            raise RuntimeError(reason)  # half an answer cannot be taken back: the server cuts the connection
        body = json.dumps({"error": reason, "problems": []}, ensure_ascii=False).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),  # what of the body was not read is not read any more
        ]
        if retry_after is not None:
            headers.append((b"retry-after", str(retry_after).encode()))
        await self.pass_on({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body that was read, and then waits for the end of the connection."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _host(values: list[bytes]) -> str | None:
    """The name in a Host header without its port; None where there is not exactly one that can be read."""
    if len(values) != 1:
        return None
    text = values[0].decode("latin-1").strip().casefold()
    if text.startswith("["):
        name, bracket, rest = text[1:].partition("]")
        return name if bracket and (not rest or (rest[0] == ":" and rest[1:].isdigit())) else None
    name, colon, port = text.partition(":")
    return name if _NAME.fullmatch(name) and (not colon or port.isdigit()) else None
