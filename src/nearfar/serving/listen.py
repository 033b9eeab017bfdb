"""A server on an address of this machine: what answers behind `nearfar serve` and `nearfar board`."""

from __future__ import annotations

import gc
import socket
import sys
from collections.abc import Callable

import uvicorn

from nearfar.errors import NearfarError
from nearfar.serving.limits import Guard
from nearfar.serving.protocol import BoundedHeads

__all__ = ["serve"]


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
