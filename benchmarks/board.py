"""How long the board takes to start, and to show the table of many runs for the first time and again.

Runs are copies of one synthetic finished run (the doctor's tests have it) under the configuration of `experiment=pairs`
with different seeds and learning rates: what a sweep leaves. The server is a new process; its table is asked for by
HTTP: the first answer, the answer in which every run is read, and one when nothing has changed. The browser is headless
Chromium on a page of 1,400 pixels: from the request to a table with a row for each run.

    OMP_NUM_THREADS=1 python benchmarks/board.py               # 500 runs
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from doctor_runs import converged, write_run
from nearfar.config.compose import compose_config
from nearfar.doctor import diagnose


def write_runs(root: Path, count: int) -> None:
    """A sweep of finished runs."""
    first = write_run(converged(np.random.default_rng(0)), root / "first")
    first.write_json("doctor.json", diagnose(first.path).to_dict())
    for number in range(count):
        overrides = ["experiment=pairs", f"seed={number % 5}", f"lr={1e-4 * (1 + number // 5):.4g}"]
        if not number:
            base = OmegaConf.to_container(compose_config(overrides), resolve=True)
        target = root / f"lr={number // 5},seed={number % 5}"
        shutil.copytree(first.path, target)
        content = dict(base) | {"seed": number % 5, "lr": 1e-4 * (1 + number // 5), "overrides": overrides}
        (target / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    shutil.rmtree(first.path)


def ask(address: str) -> dict[str, Any]:
    """The table by HTTP."""
    with urllib.request.urlopen(f"{address}api/runs") as response:
        content: dict[str, Any] = json.load(response)
    return content


def browse(address: str, count: int) -> float | None:
    """Seconds until every row is on the page; None where there is no browser."""
    browser = next(
        (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
    )
    if browser is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        chromium = driver.chromium.launch(executable_path=browser, args=flags)
        page = chromium.new_page(viewport={"width": 1400, "height": 900})
        page.goto("about:blank")
        began = time.perf_counter()
        page.goto(address, wait_until="commit")
        page.wait_for_selector(f"#rows tbody tr:nth-child({count})")
        seconds = time.perf_counter() - began
        chromium.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        write_runs(root, options.runs)
        figures: dict[str, list[float]] = {}
        for _ in range(options.repeats):
            began = time.perf_counter()
            command = [sys.executable, "-m", "nearfar.cli", "board", str(root), "--port", "0"]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                assert server.stdout is not None
                address = re.search(r"http://\S+/", server.stdout.readline())
                assert address is not None
                figures.setdefault("start", []).append(time.perf_counter() - began)
                began = time.perf_counter()
                answer = ask(address[0])
                figures.setdefault("first answer", []).append(time.perf_counter() - began)
                assert len(answer["rows"]) == options.runs
                while answer["unread"]:
                    answer = ask(address[0])
                figures.setdefault("every run is read", []).append(time.perf_counter() - began)
                began = time.perf_counter()
                ask(address[0])
                figures.setdefault("again", []).append(time.perf_counter() - began)
                seconds = browse(address[0], options.runs)
                if seconds is not None:
                    figures.setdefault("page in the browser", []).append(seconds)
            finally:
                server.terminate()
                server.wait()
    for name, values in figures.items():
        print(
            f"{name:<20} {min(values):.2f} s (best of {len(values)}; all: {', '.join(f'{v:.2f}' for v in values)})"
        )


if __name__ == "__main__":
    main()
