"""``nearfar serve`` as a user types it: the address, stopping, what cannot be served."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from nearfar.serving.search import Hit, Hits
from processes import SECONDS, command, started_command
from served import train_pictures, write_gallery

pytest.importorskip("fastapi", reason="needs the extra serve")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("module_cache")]


@pytest.fixture(scope="module")
def run(module_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pictures(tmp_path_factory.mktemp("command"))


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the address that it printed."""
    command = [sys.executable, "-m", "nearfar.cli", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line.strip())
            if "http://" in line:
                break
        else:
            raise AssertionError((lines, process.communicate()[1]))
        yield process, lines[-1].split()[1]
    finally:
        process.kill()
        process.communicate()


@contextmanager
def forked(folder: Path, *arguments: str) -> Iterator[tuple[str, str]]:
    """The same without the seconds of the imports: the address, and all that was printed until then."""
    output = folder / "output"
    process = started_command("serve", *arguments, "--port", "0", stdout=output, stderr=output)
    try:
        end = time.monotonic() + SECONDS
        while "http://" not in (text := output.read_text() if output.exists() else ""):
            assert process.is_alive(), text
            assert time.monotonic() < end, text
            time.sleep(0.05)
        line = next(line for line in text.splitlines() if "http://" in line)
        yield line.split()[1], text
    finally:
        process.kill()
        process.join()


def get(address: str) -> object:
    with urllib.request.urlopen(address, timeout=30) as response:
        return json.load(response)


def test_it_answers_until_it_is_told_to_stop(run: Path) -> None:
    gallery = write_gallery(run.parent / "data")
    with started(str(run), "--gallery", str(gallery), "--target", "picture", "--device", "cpu") as (
        process,
        address,
    ):
        about = get(f"{address}describe")
        assert isinstance(about, dict)
        assert (about["gallery"], about["searches"]) == (12, [["picture", "picture"], ["words", "picture"]])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_without_the_runs_data_it_says_so_and_embeds(run: Path, tmp_path: Path) -> None:
    import shutil

    alone = shutil.copytree(run, tmp_path / "alone", ignore=shutil.ignore_patterns("galleries"))
    config = (alone / "config.yaml").read_text()
    (alone / "config.yaml").write_text(config.replace(f"{run.parent}/data/train.csv", "/no/such/train.csv"))
    with forked(tmp_path, str(alone), "--device", "cpu") as (address, text):
        assert any("nothing to search in" in line and "--gallery" in line for line in text.splitlines())
        about = get(f"{address}describe")
        assert isinstance(about, dict)
        assert about["gallery"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gallery", "no_such_file.csv"], "no such file"),
        (["--gallery", "a.csv", "--store", "b.faiss"], "one of them"),
        (["--store", "no_such_store.faiss"], "--gallery DATA --store no_such_store.faiss"),
        (["--target", "pictures"], "did you mean 'picture'?"),
        (["--host", "203.0.113.7", "--no-gallery"], "--host or --port"),
    ],
)
def test_what_cannot_be_served_is_an_error_with_advice(run: Path, arguments: list[str], message: str) -> None:
    done = command("serve", str(run), *arguments, "--device", "cpu")
    whole = done.stdout + done.stderr
    assert done.returncode == 2
    assert message in whole
    assert "Traceback" not in whole


def test_a_port_that_is_taken(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = command("serve", str(run), "--no-gallery", "--port", port, "--device", "cpu")
    assert done.returncode == 2
    assert "name a different one with --host or --port" in done.stderr + done.stdout


def test_long_values_of_hits_leave_room_for_the_place_and_the_cosine() -> None:
    row = {
        "name": "a kettle of red enamel, " * 8,
        "photo": "/a/long/way/" * 8 + "kettle.png",
        "shop": "north",
    }
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(Hits("kettle", [Hit(1, 0.512, "id-of-a-kettle", row)], "name", "name", {}).table())
    line = next(line for line in console.export_text().splitlines() if "0.512" in line)
    assert [cell.strip() for cell in line.split("│")[1:4]] == ["1", "0.512", "id-of-a-kettle"]
