"""The documentation as a site: complete, without a dead link, and nothing on it from elsewhere."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("losses", "functional", "batching", "metrics", "doctor", "towers", "serving", "mining")


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return None


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_its_place_in_the_reference(package: str) -> None:
    page = (DOCS / "api" / f"{package}.md").read_text()
    shown = [name.rsplit(".", 1)[1] for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)]
    public = importlib.import_module(f"nearfar.{package}").__all__
    assert sorted(shown) == sorted(public)


def test_every_module_of_an_integration_is_in_the_reference() -> None:
    page = (DOCS / "api" / "integrations.md").read_text()
    folder = ROOT / "src" / "nearfar" / "integrations"
    modules = {
        path.stem for path in folder.iterdir() if (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    shown = set(re.findall(r"^::: nearfar\.integrations\.(\w+)$", page, re.MULTILINE))
    assert shown == {name for name in modules if not name.startswith("_")}


def test_only_the_install_page_says_how_an_extra_is_installed() -> None:
    """What works depends on where nearfar comes from; other pages name the extra and link there."""
    pages = [ROOT / "README.md", *DOCS.rglob("*.md"), *(ROOT / "skills").rglob("*.md")]
    assert [page.name for page in pages if "nearfar[" in page.read_text()] == ["install.md"]


def test_examples_of_docstrings_get_fences() -> None:
    pytest.importorskip("griffe", reason="needs the extra docs")
    path = DOCS / "_extensions" / "doctests.py"
    module = runpy.run_path(str(path))
    text = "A sum:\n>>> 1 + 1\n2\n\nNo more.\n\n    >>> 3\n    3"
    fenced = "A sum:\n\n```pycon\n>>> 1 + 1\n2\n```\n\nNo more.\n\n    ```pycon\n    >>> 3\n    3\n    ```"
    assert module["fenced"](text) == fenced


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr + built.stdout
    return folder


@pytest.mark.slow
def test_the_site_is_whole_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert {"index.html", "doctor.html", "choose.html", "answers.html", "loss.html"} <= {
        p.name for p in pages
    }
    assert not (site / "_extensions").exists()
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?([^\"' >]+)|<link[^>]*rel=[\"']?stylesheet[^>]*href=[\"']?([^\"' >]+)"
    )
    for page in pages:
        text = page.read_text()
        foreign = [
            one for pair in loads.findall(text) for one in pair if one.startswith(("http:", "https:", "//"))
        ]
        assert foreign == [], page
    losses = (site / "api" / "losses.html").read_text()
    assert "InfoNCELoss" in losses
    assert "&gt;&gt;&gt;" in losses  # examples are code
    links = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text())
    assert links
    assert all((site / link).exists() for link in links)


@pytest.fixture(scope="module")
def page(site: Path) -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives a browser")
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine")
    with driver.sync_playwright() as playwright:
        flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        yield browser.new_page()
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "batch", "says"),
    [
        ("8.317766", "", "ln 4,096"),
        ("4.16 4.158 4.159", "64", "guesses among the rows of its batch"),
        ("6.2383", "64", "8 times the batch"),
        (".6931", "", "yes-or-no"),
        ("0", "", "Nothing is learned"),
        ("1.2", "64", "Below ln 64"),
        ("5", "64", "worse than guessing"),
        ("-.4", "", "not negative"),
        ("nothing", "", ""),
    ],
)
def test_a_pasted_loss_is_explained(page: Any, site: Path, loss: str, batch: str, says: str) -> None:
    page.goto((site / "loss.html").as_uri())
    page.fill("#loss", loss)
    page.fill("#batch", batch)
    answer = page.inner_text("#answer")
    assert says in answer if says else answer == ""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_site_is_searched_in_the_browser(page: Any, site: Path, width: int) -> None:
    handler = partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.set_viewport_size({"width": width, "height": 844})
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        if not page.is_visible("input[name=query]"):
            page.click("label.md-header__button[for=__search]")
        page.fill("input[name=query]", "hardness")
        # the index is built in the browser: seconds, and many of them where other tests hold the cores
        page.wait_for_selector(".md-search-result__item a", state="attached", timeout=120_000)
        results = page.eval_on_selector_all(
            ".md-search-result__item a", "links => links.map(link => link.href)"
        )
        assert any("batching.html" in link for link in results)
        server.shutdown()
