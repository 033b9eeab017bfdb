"""A server on an address of this machine: what answers behind `nearfar serve` and `nearfar board`.

HTTP/1.1 on a connection is uvicorn's parser in C, with bounds on the size and time of a request's head.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
from collections.abc import Callable
from typing import Any, ClassVar, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nearfar.errors import NearfarError
from nearfar.serving.limits import Guard

__all__ = ["BoundedHeads", "serve"]


class BoundedHeads(HttpToolsProtocol):
    """Cuts connections whose request lines and headers are longer than ``head_bytes``, or take ``head_seconds``.

    The parser itself keeps whatever comes before the end of the head. Bodies are the application's to bound.
    """

    head_bytes: ClassVar[int] = 32_768
    head_seconds: ClassVar[float] = 20.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        one = _OneWrite(cast(asyncio.Transport, transport), self.loop)
        super().connection_made(cast(asyncio.Transport, one))
        self._head, self._within = 0, True
        self._late: asyncio.TimerHandle | None = self.loop.call_later(self.head_seconds, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._within:
            self._head += len(data)
            if self._head > self.head_bytes and self._unfinished(data):
                self.send_400_response("The head of the request is too long.")
                return
        super().data_received(data)

    def _unfinished(self, data: bytes) -> bool:
        """Whether the head goes on beyond its bound; what follows its end is a body."""
        end = data.find(b"\r\n\r\n")
        return end < 0 or self._head - len(data) + end > self.head_bytes

    def on_message_begin(self) -> None:
        self._within = True
        if self._late is None:
            self._late = self.loop.call_later(self.head_seconds, self._too_late)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head, self._within = 0, False
        self._in_time()
        super().on_headers_complete()

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
        if not self.transport.is_closing():
            self.transport.close()


class _OneWrite:
    """A transport that sends what is written in one turn of the event loop with one call to the system.

    uvicorn writes the head of an answer and its body one after the other; the second call takes as long as the first,
    and wakes who reads too early.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._send)
        self._parts.append(data)

    def close(self) -> None:
        self._send()
        self._transport.close()

    def _send(self) -> None:
        if self._parts:
            parts, self._parts = self._parts, []
            self._transport.write(b"".join(parts))


def serve(
    app: Guard, host: str = "127.0.0.1", port: int = 8000, ready: Callable[[str], None] = lambda address: None
) -> None:
    """Answer until the process is told to stop (Ctrl-C, SIGTERM); what is asked by then is answered first.

    Args:
        app: what is answered with, and what is refused before it.
        host, port: where to listen; port 0 takes a free one.
        ready: called once with the address of the page.

    Raises:
        NearfarError: an address that cannot be used.
    """
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=256
        )
    except OSError as error:
        raise NearfarError(
            f"{host}:{port} cannot be used ({error.strerror or error}): name a different one with --host or --port."
        ) from None
    name = f"[{host}]" if ":" in host else host
    with listening:
        config = uvicorn.Config(
            app,
            http=BoundedHeads,
            log_level="warning",
            server_header=False,
            proxy_headers=False,  # who asks is not told apart by what a header says
            timeout_keep_alive=15,
            timeout_graceful_shutdown=int(app.limits.seconds) + 1,
        )
        sys.setswitchinterval(
            0.001
        )  # requests and the model's thread take turns sooner: no answer waits 5 ms
        gc.collect()
        gc.freeze()  # what is loaded stays: to look through it again and again delays answers
        ready(f"http://{name}:{listening.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[listening])
