"""A tiny trained run of pictures and words, a gallery with hostile texts, and a real server in a thread."""

from __future__ import annotations

import csv
import http.client
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from nearfar.config.compose import compose_config
from nearfar.launch import run_one
from nearfar.systems import check_config

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
COLORS = {"red": (200, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 200), "yellow": (230, 210, 40)}
SHADES = ("pale", "dark", "plain")
#: what a page must show as it is, and a browser must not run
HOSTILE = [
    "<script>window.hurt=1</script>",
    "<img src=x onerror=window.hurt=2>",
    '"><svg onload=window.hurt=3>',
    "javascript:window.hurt=4",
    "{{7*7}} ${7*7} </textarea><b>bold</b>",
    "\u202eesrever\u202c and \u0000 never".replace("\u0000", ""),
]


def picture(color: str, shade: str, seed: int = 0) -> np.ndarray:
    """A patch of one colour with some noise, 40 × 40."""
    rng = np.random.default_rng(seed)
    base = np.array(COLORS[color], np.float64)
    base = {"pale": 0.5 * base + 127, "dark": 0.55 * base, "plain": base}[shade]
    return np.clip(base + rng.normal(0, 8, (40, 40, 3)), 0, 255).astype(np.uint8)


def write_table(folder: Path, repeats: int = 6, also: str = "") -> Path:
    """``train.csv`` of pictures and words: twelve kinds, ``repeats`` of each; ``also`` ends every text."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", "words"])
        for number in range(repeats):
            for color in COLORS:
                for shade in SHADES:
                    name = f"{color}_{shade}_{number}.png"
                    Image.fromarray(picture(color, shade, number)).save(folder / name)
                    writer.writerow([name, f"a {shade} patch of {color} paint, number {number}{also}"])
    return path


def write_gallery(folder: Path) -> Path:
    """A table to search in, with ids, prices, places on slides and hostile texts."""
    path = folder / "gallery.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "picture", "words", "price", "note", "slide", "x", "y"])
        for i, color in enumerate(COLORS):
            for j, shade in enumerate(SHADES):
                number = 3 * i + j
                hostile = HOSTILE[number % len(HOSTILE)]
                name = f"{color}_{shade}_0.png"
                words = f"a {shade} patch of {color} paint {hostile}"
                writer.writerow(
                    [f"{number}{hostile}", name, words, number, hostile, f"S{i % 2}{hostile}", 10 * i, 7 * j]
                )
    return path


def train_pictures(folder: Path, *more: str, also: str = "") -> Path:
    """A run that knows these colours, trained in a few seconds."""
    table = write_table(folder / "data", also=also)
    overrides = [
        "experiment=pairs", f"data.train={table}", f"runs_dir={folder}", "name=patches", "views=[picture,words]",
        "towers.picture.encoder=colors", "towers.picture.size=32", "text_encoder.dims=16", "text_encoder.min_df=1",
        "text_encoder.max_df=1.0", "embedding_dim=16", "epochs=8", "batch_size=24", "lr=0.02", "bootstrap=0",
        "trainer.accelerator=cpu", "trainer.threads=1", "report=false", "trainer.probe_rows=16", *more,
    ]  # fmt: skip
    run = run_one(check_config(compose_config(overrides)), overrides, False, QUIET)
    assert run is not None
    return run.path


class Asker:
    """Asks a server, one connection for each question."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        raw: bytes | None = None,
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, answer (JSON where it is) and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if data is not None else {}
        sent |= dict(headers or {})
        try:
            connection.request(method or ("GET" if data is None else "POST"), path, data, sent)
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        known = {name.lower(): value for name, value in response.getheaders()}
        if known.get("content-type", "").startswith("application/json"):
            return response.status, json.loads(answer, parse_constant=_no_constant), known
        return response.status, answer, known


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@contextmanager
def serving(app: Any) -> Iterator[Asker]:
    """The application behind a real server on a free port, stopped as by a signal."""
    import uvicorn

    from nearfar.serving.listen import BoundedHeads

    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, http=BoundedHeads, log_level="critical", timeout_graceful_shutdown=20
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for _ in range(400):
        if server.started:
            break
        threading.Event().wait(0.05)
    assert server.started
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Asker(port)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
