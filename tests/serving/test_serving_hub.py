"""The hub: pushing and loading against a server on this machine that keeps what it is sent in a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from typer.testing import CliRunner

import nearfar
import tiny_runs
from nearfar.cli import app
from nearfar.errors import NearfarError
from nearfar.serving.export import export_run
from nearfar.serving.exported import download, is_hub_name, push

pytestmark = [pytest.mark.usefixtures("module_cache")]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as uploading and downloading a small model need."""

    store: Path
    requests: list[str]
    private: dict[str, bool]

    def log_message(self, *_: Any) -> None: ...

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "X-Repo-Commit": COMMIT,
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.requests.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_writes":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            self.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            (self.store / name).mkdir(parents=True, exist_ok=True)
            return self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        if self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\nlibrary_name: nearfar\n")
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            for line in filter(None, body.split(b"\n")):
                entry = json.loads(line)
                if entry["key"] == "file":
                    path = self.store / name / entry["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(entry["value"]["content"]))
            return self.answer(
                {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
            )
        return self.answer({"error": "not here"}, 404)

    def do_GET(self) -> None:
        self.requests.append(self.path)
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.store / parts[2] / parts[3]
            if not folder.is_dir():
                return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            if "tree" in parts:
                files = [
                    {
                        "type": "file",
                        "path": name,
                        "oid": _digest(folder / name),
                        "size": (folder / name).stat().st_size,
                    }
                    for name in _names(folder)
                ]
                return self.answer(files)
            siblings = [{"rfilename": name} for name in _names(folder)]
            about = {
                "id": "/".join(parts[2:4]),
                "sha": COMMIT,
                "siblings": siblings,
                "tags": [],
                "private": False,
            }
            return self.answer(about)
        if len(parts) > 4 and parts[2] == "resolve":
            path = self.store / parts[0] / parts[1] / "/".join(parts[4:])
            if path.is_file():
                return self.answer(path.read_bytes(), headers={"ETag": f'"{_digest(path)}"'})
        return self.answer({"error": "not here"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub of its own, and a cache of downloads of its own."""
    import huggingface_hub
    from huggingface_hub import constants, hf_api

    handler = type("TestHub", (Hub,), {"store": tmp_path / "hub", "requests": [], "private": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name in ("ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.setattr(constants, name, address, raising=False)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    yield handler
    server.shutdown()
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.train("pairs", tmp_path_factory.mktemp("pairs"))


@pytest.mark.slow
def test_pushed_and_loaded_by_name(
    hub: type[Hub], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(
        app, ["export", str(run), str(tmp_path / "out"), "--push", "me/titles", "--private"]
    )
    assert result.exit_code == 0, (result.output, result.exception, hub.requests)
    assert "uploaded: " in result.output
    assert hub.private == {"me/titles": True}
    assert _names(hub.store / "me" / "titles") == _names(tmp_path / "out")
    (hub.store / "me" / "titles" / "harmful.py").write_text("raise SystemExit")
    (hub.store / "me" / "titles" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    monkeypatch.chdir(tmp_path)
    trained = nearfar.load("me/titles", "cpu")
    expected = nearfar.load(run, "cpu").embed(["a river"], "title")
    assert np.array_equal(trained.embed(["a river"], "title"), expected)
    assert not any(
        "harmful" in each or "pytorch_model" in each for each in hub.requests if "/resolve/" in each
    )
    with pytest.raises(
        NearfarError, match="me/other: there is no such run or folder here, and it cannot be fetched"
    ):
        nearfar.load("me/other")


@pytest.mark.slow
def test_what_the_hub_refuses(
    hub: type[Hub], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_run(run, tmp_path / "out").folder
    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    with pytest.raises(NearfarError, match=r"the hub did not take it .*hf upload me/titles"):
        push(folder, "me/titles")


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(
    hub: type[Hub], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own connection errors are no OSError."""
    folder = export_run(run, tmp_path / "out").folder
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        with pytest.raises(NearfarError, match=r"the hub did not take it .*hf upload me/titles .* --private"):
            push(folder, "me/titles", private=True)


@pytest.mark.slow
def test_a_token_is_asked_for_before_anything_is_computed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out"), "--push", "me/titles"])
    assert "needs a token of the Hugging Face hub that may write" in str(result.exception)
    assert not (tmp_path / "out").exists()
    with pytest.raises(NearfarError, match="has the form OWNER/NAME"):
        push(tmp_path, "titles")


def test_names_and_missing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_hub_name("org-1/some.model_v2")
    assert not any(map(is_hub_name, ("a", "a/b/c", "../a", "/a/b", "~/a", "a/", "")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(
        NearfarError, match="runs/gone: no such run or checkpoint"
    ):  # and nothing is downloaded
        nearfar.load("runs/gone")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *_, **__: (_ for _ in ()).throw(OSError("no route to host")),
    )
    with pytest.raises(
        NearfarError, match=r"cannot be fetched from the Hugging Face hub \(no route to host\)"
    ):
        download("me/titles")
