"""Rows per second of ``nearfar.load(run).embed`` and ``nearfar embed`` against a bare loop over the same encoder.

    python benchmarks/embedding.py [--rows 2000] [--rounds 5] [--threads 1]

A run with MiniLM (weights of a package, trained for one step) and one with a small network over pictures; the bare loop
calls tokenizer and network (or Pillow and network) batch by batch, without checks, files or progress. By turns, in one
process; the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch.nn.functional import normalize

import nearfar
from nearfar.config.compose import compose_config
from nearfar.data.chunks import NewData
from nearfar.launch import run_one
from nearfar.serving.stream import embed_file
from nearfar.systems import check_config

WORDS = [f"word{i}" for i in range(3000)]
BATCH = 256
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115


def train(folder: Path, *overrides: str) -> Any:
    common = (
        "epochs=1",
        "bootstrap=0",
        "trainer.probe_rows=0",
        "trainer.accelerator=cpu",
        "trainer.max_steps=1",
    )
    given = [
        "experiment=pairs",
        f"runs_dir={folder}",
        *common,
        f"trainer.eval_batch_size={BATCH}",
        *overrides,
    ]
    run = run_one(check_config(compose_config(given)), given, False, QUIET)
    assert run is not None
    return nearfar.load(run.path, "cpu")


def texts(n: int, rng: np.random.Generator) -> list[str]:
    return [" ".join(rng.choice(WORDS, rng.integers(4, 30))) for _ in range(n)]


def bare_text(trained: Any, values: list[str]) -> np.ndarray:
    """Tokens of a batch, the network, the head; rows in order of length, as sentence-transformers takes them."""
    tower = trained.system.towers["text"]
    tokenizer, _ = tower.parts()
    module, head = trained.model.tower("text"), trained.model.heads["text"]
    order = sorted(range(len(values)), key=lambda i: -len(values[i]))
    rows = np.empty((len(values), trained.dim), np.float32)
    with torch.inference_mode():
        for start in range(0, len(values), BATCH):
            at = order[start : start + BATCH]
            tokens = tokenizer(
                [values[i] for i in at],
                truncation=True,
                padding=True,
                max_length=tower.encoder.max_length,
                return_tensors="pt",
            )
            hidden = module.network(
                **{k: tokens[k] for k in ("input_ids", "attention_mask")}
            ).last_hidden_state
            weights = tokens["attention_mask"][..., None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
            rows[at] = normalize(head(pooled), dim=1).numpy()
    return rows


def bare_pictures(trained: Any, files: list[Path]) -> np.ndarray:
    module, head = trained.model.tower("image"), trained.model.heads["image"]
    side = trained.system.towers["image"]._pixels
    rows = []
    with torch.inference_mode():
        for start in range(0, len(files), BATCH):
            pixels = []
            for path in files[start : start + BATCH]:
                with Image.open(path) as image:
                    pixels.append(
                        np.asarray(image.convert("RGB").resize(side[::-1], Image.Resampling.BILINEAR))
                    )
            batch = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
            rows.append(normalize(head(module(batch)), dim=1).numpy())
    return np.concatenate(rows)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def compare(name: str, ways: dict[str, Callable[[], Any]], rows: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        names = list(ways) if turn % 2 else list(ways)[::-1]
        results = {way: timed(ways[way]) for way in names}
        if turn:  # the first does not count
            for way, (taken, _) in results.items():
                seconds[way].append(taken)
    bare = seconds.pop("bare loop")
    print(f"{name}: bare loop {rows / median(bare):,.0f} rows a second")
    for way, taken in seconds.items():
        ratio = median(b / t for b, t in zip(bare, taken, strict=True))
        print(f"  {way}: {rows / median(taken):,.0f} rows a second, {ratio:.3f} of the bare loop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = folder / "small.csv"
        small.write_text(
            "\n".join(
                ["text,other", *(f"{a},{b}" for a, b in zip(texts(64, rng), texts(64, rng), strict=True))]
            )
        )
        trained = train(
            folder,
            f"data.train={small}",
            "views=[text,other]",
            "batch_size=8",
            "text_encoder=minilm",
            "text_encoder.train=full",
            "share=true",
        )
        values = texts(arguments.rows, rng)
        table = folder / "new.csv"
        table.write_text("\n".join(["text", *values]))
        np.testing.assert_allclose(
            bare_text(trained, values[:50]), trained.embed(values[:50], "text"), atol=1e-5
        )
        ways = {
            "bare loop": lambda: bare_text(trained, values),
            "embed": lambda: trained.embed(values, "text"),
            "nearfar embed": lambda: embed_file(trained, NewData(table), folder / "out.parquet"),
        }
        compare("MiniLM, texts of 4 to 30 words", ways, arguments.rows, arguments.rounds)
        files = []
        for i in range(arguments.rows):
            files.append(folder / f"{i}.png")
            Image.fromarray(rng.integers(0, 256, (120, 160, 3)).astype(np.uint8)).save(files[-1])
        table = folder / "pictures.csv"
        table.write_text(
            "\n".join(
                ["image,name", *(f"{file.name},{value}" for file, value in zip(files, values, strict=True))]
            )
        )
        trained = train(
            folder,
            f"data.train={table}",
            "views=[image,name]",
            "batch_size=32",
            "image_encoder=small",
            "name=pictures",
        )
        ways = {
            "bare loop": lambda: bare_pictures(trained, files),
            "embed": lambda: trained.embed(files, "image"),
            "nearfar embed": lambda: embed_file(
                trained, NewData(table), folder / "out.parquet", towers=["image"]
            ),
        }
        compare("small network, PNG of 160 × 120 pixels", ways, arguments.rows, arguments.rounds)


if __name__ == "__main__":
    main()
