"""Fifty clients at a time: how long they wait beside one client alone, and whether each gets its own answer.

A server is started as a user would (`nearfar serve RUN`, a process of its own). One client asks one request after the
other; then fifty clients ask at a time, each its next question as soon as the last is answered. Questions differ, and
every answer is compared with that to the same question asked alone: none may be lost, and none be another's.

    python benchmarks/serve.py RUN                          # /search in the run's own data, fifty clients, 10 s
    python benchmarks/serve.py RUN --path /embed --clients 200

What is reported: the time of a request alone (median, 95th percentile), that of fifty clients, requests a second, and
the ratio of the 95th percentile with fifty clients to the median of one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

#: by how much a number of an answer may differ: passes of other sizes round differently
TOLERANCE = 1e-4


class Client:
    """One connection that is kept; no library between it and the clock."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def ask(self, path: str, body: bytes) -> tuple[int, bytes, float]:
        """Status, answer and seconds."""
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        began = time.perf_counter()
        self.writer.write(head.encode() + body)
        answered = await self.reader.readuntil(b"\r\n\r\n")
        lines = answered.decode("latin-1").split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length"))
        data = await self.reader.readexactly(length)
        return int(lines[0].split()[1]), data, time.perf_counter() - began


def same(first: Any, second: Any) -> bool:
    """Whether two answers are the same within rounding; hits whose scores are equal may change places."""
    if isinstance(first, dict) and "hits" in first:
        scores = [np.array([hit["score"] for hit in each["hits"]]) for each in (first, second)]
        if len(scores[0]) != len(scores[1]) or not np.allclose(*scores, atol=TOLERANCE):
            return False
        known = {hit["position"]: hit["score"] for hit in first["hits"]}
        least = scores[0][-1] if len(scores[0]) else 0.0
        return all(
            abs(known.get(hit["position"], least) - hit["score"]) < TOLERANCE for hit in second["hits"]
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return abs(first - second) < TOLERANCE if isinstance(first, float) else bool(first == second)


async def alone(
    port: int, path: str, bodies: Sequence[bytes], warm: int = 10
) -> tuple[list[float], list[Any]]:
    """Seconds of every request, asked one after the other, and the answers."""
    async with Client(port) as client:
        for body in bodies[:warm]:
            await client.ask(path, body)
        seconds, answers = [], []
        for body in bodies:
            status, data, took = await client.ask(path, body)
            if status != 200:
                raise SystemExit(f"{path}: {status} {data.decode()[:300]}")
            seconds.append(took)
            answers.append(json.loads(data))
    return seconds, answers


async def together(
    port: int, path: str, bodies: Sequence[bytes], answers: Sequence[Any], clients: int, duration: float
) -> dict[str, Any]:
    """Many clients at a time, each answer compared with that of the same question alone."""
    taken: list[float] = []
    received: list[tuple[int, bytes]] = []
    refused = 0
    end = time.perf_counter() + duration

    async def one(number: int) -> None:
        nonlocal refused
        async with Client(port) as client:
            at = number
            while time.perf_counter() < end:
                which = at % len(bodies)
                status, data, took = await client.ask(path, bodies[which])
                if status == 200:
                    taken.append(took)
                    received.append((which, data))
                else:
                    refused += 1
                at += 17

    began = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(clients)))
    seconds = time.perf_counter() - began
    wrong = sum(not same(answers[which], json.loads(data)) for which, data in received)  # after the clock
    return {"seconds": taken, "rate": len(taken) / seconds, "refused": refused, "wrong": wrong}


def questions(path: str, describe: dict[str, Any], count: int, k: int) -> list[bytes]:
    """Different texts for a view that reads texts."""
    view = next(
        (
            name
            for name, each in describe["views"].items()
            if each["form"] == "text" and each["kind"] == "text"
        ),
        None,
    )
    if view is None:
        raise SystemExit("this benchmark asks texts, and no view of this run reads any")
    words = [
        "near",
        "far",
        "red",
        "blue",
        "bright",
        "small",
        "old",
        "round",
        "battery",
        "camera",
        "acid",
        "water",
    ]
    rng = np.random.default_rng(0)
    bodies = []
    for number in range(count):
        text = " ".join(rng.choice(words, 8)) + f" {number}"
        body: dict[str, Any] = {"query": text, "tower": view, "k": k}
        if path == "/embed":
            body = {"values": [text], "tower": view}
        elif path == "/predict":
            body = {"values": [text]}
        bodies.append(json.dumps(body).encode())
    return bodies


def milliseconds(seconds: Sequence[float], share: float) -> float:
    return 1000 * float(np.quantile(seconds, share))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--path", default="/search", choices=["/search", "/embed", "/predict"])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument(
        "--serve", nargs="*", default=[], help="further arguments of nearfar serve, such as gallery=FILE"
    )
    arguments = parser.parse_args()
    further = [f"--{each}" for each in arguments.serve]
    command = [sys.executable, "-m", "nearfar.cli", "serve", arguments.run, "--port", "0", *further]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = next((line for line in server.stdout if "http://" in line), None)
        if address is None:
            raise SystemExit("the server did not start")
        port = int(address.split("http://")[1].split("/")[0].rsplit(":", 1)[1])
        import urllib.request

        with urllib.request.urlopen(f"http://127.0.0.1:{port}/describe") as response:
            describe = json.load(response)
        bodies = questions(arguments.path, describe, arguments.questions, arguments.k)
        single, answers = asyncio.run(alone(port, arguments.path, bodies))
        many = asyncio.run(
            together(port, arguments.path, bodies, answers, arguments.clients, arguments.seconds)
        )
    finally:
        server.terminate()
        server.wait(60)
    median, tail = milliseconds(single, 0.5), milliseconds(many["seconds"], 0.95)
    print(f"{arguments.path} of {describe['name']} ({describe['system']}), gallery {describe['gallery']:,}")
    print(
        f"one client:  median {median:.1f} ms, p95 {milliseconds(single, 0.95):.1f} ms, {1000 / median:.0f} a second"
    )
    print(
        f"{arguments.clients} clients: median {milliseconds(many['seconds'], 0.5):.1f} ms, p95 {tail:.1f} ms, "
        f"{many['rate']:.0f} a second; {len(many['seconds'])} answers, {many['wrong']} wrong, {many['refused']} refused"
    )
    print(f"p95 of {arguments.clients} clients over the median of one: {tail / median:.2f}")


if __name__ == "__main__":
    main()
