"""The board in a headless browser: a real server, a tiny run; width of a desk and of a phone, light and dark."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra board")
pytest.importorskip("plotly", reason="needs the extra board")

from board_runs import HOSTILE_NAME, mixed, reseeded
from doctor_runs import at_chance, write_run
from lazily import Lazily
from nearfar.board.discover import key_of
from nearfar.board.server import build_board
from nearfar.training.run_folder import RunFolder
from served import HOSTILE, serving, train_pictures

playwright = Lazily("playwright.sync_api", reason="needs playwright, which drives a browser")
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("module_cache"),
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine"),
]
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def root(module_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board")
    run = train_pictures(folder / "trained", also=f" {HOSTILE[0]}")
    mixed(folder / "runs")
    run.rename(folder / "runs" / "patches")
    other = reseeded(folder / "runs" / "patches", 0, folder / "runs" / "slower")
    text = (other.path / "config.yaml").read_text()
    other.write_text("config.yaml", text.replace("lr: 0.02", "lr: 0.01", 1))
    return folder / "runs"


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with serving(build_board(root)) as asker:
        yield f"http://127.0.0.1:{asker.port}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # root has no sandbox in a container; elsewhere it stays on
        flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        chromium = driver.chromium.launch(executable_path=BROWSER, args=flags)
        yield chromium
        chromium.close()


class Opened:
    """A page of the board, and everything that went wrong on it."""

    def __init__(self, browser: Any, address: str, size: dict[str, int], scheme: str) -> None:
        self.context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        self.page, self.address = self.context.new_page(), address
        self.page.set_default_timeout(90_000)
        self.wrong: list[str] = []
        self.foreign: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda text: self.wrong.append(text.text) if text.type == "error" else None)
        self.page.on("dialog", lambda dialog: (self.wrong.append("a dialog"), dialog.dismiss()))
        self.page.on(
            "request", lambda r: None if r.url.startswith((address, "data:")) else self.foreign.append(r.url)
        )

    def go(self, path: str) -> Any:
        """Open a page, in a second try where Chromium got stuck, as it may on cores with much more to do."""
        try:
            self.page.goto(self.address + path, wait_until="domcontentloaded", timeout=45_000)
        except playwright.TimeoutError:
            self.page.goto("about:blank")
            self.page.goto(self.address + path, wait_until="domcontentloaded")
        return self.page

    def harmless(self, refused: str | None = None) -> None:
        """Nothing of the runs ran, nothing came from elsewhere, nothing is wider than the page, all has a name.

        ``refused``: the status of answers that are meant to be refusals; the browser reports each, at any time.
        """
        assert self.page.evaluate("window.hurt") is None
        assert self.page.evaluate("document.querySelectorAll('body script, img[onerror]').length") == 0
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        unnamed = self.page.evaluate(
            """() => [...document.querySelectorAll("input, select, button, img")].filter((node) =>
            node.offsetParent !== null && !(node.labels?.length || node.getAttribute("aria-label") || node.alt
            || node.textContent.trim())).map((node) => node.outerHTML)"""
        )
        assert unnamed == []
        assert [text for text in self.wrong if refused is None or refused not in text] == []
        assert self.foreign == []


@pytest.fixture
def opened(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Opened]:
    """A page as a test asks: on a phone, where what is too wide shows first, or on a desk too, where it differs."""
    page = Opened(browser, address, *request.param)
    yield page
    page.context.close()


on_a_phone = pytest.mark.parametrize("opened", [(PHONE, "dark")], ids=["phone"], indirect=True)
on_both = pytest.mark.parametrize(
    "opened", [(DESK, "light"), (PHONE, "dark")], ids=["desk", "phone"], indirect=True
)


def names(page: Any) -> list[str]:
    return [text.strip() for text in page.locator("#rows tbody th").all_inner_texts()]


@on_both
def test_the_table_sorts_filters_and_shows_names_as_they_are(opened: Opened) -> None:
    page = opened.go("/")
    page.wait_for_selector("text=loss-at-chance")
    assert HOSTILE_NAME in names(page)
    assert "8 runs" in page.locator("#count").inner_text()
    page.locator("th[data-column=result] button").click()
    values = [float(text.split()[0]) for text in page.locator("#rows td.number:has(b)").all_inner_texts()]
    assert values == sorted(values, reverse=True)
    assert page.locator("th[aria-sort=descending]").get_attribute("data-column") == "result"
    page.locator("th[data-column=result] button").click()
    assert float(page.locator("#rows td.number:has(b)").first.inner_text().split()[0]) == min(values)
    for text, expected in (
        ("patch", {"patches"}), ("system=pairs", {"patches", "slower"}), ("loss-at-chance", {HOSTILE_NAME}),
        ("lr=0.01", {"slower"}), ("loss>4", {HOSTILE_NAME, "light/version_0"}), ("pairs seed=7", set()),
    ):  # fmt: skip
        page.get_by_label("Filter the runs").fill(text)
        assert set(names(page)) == expected, text
    page.get_by_label("Filter the runs").fill("")
    page.get_by_label("Status", exact=True).select_option("broken")
    assert names(page) == ["broken"]
    assert "metrics.json: not valid JSON" in page.locator("#below").inner_text()
    opened.harmless()


@on_a_phone
def test_a_selection_is_compared(opened: Opened) -> None:
    page = opened.go("/")
    for name in ("patches", "slower", "hf"):
        page.get_by_label(f"Select {name}", exact=True).check()
    page.get_by_role("button", name="Compare 3").click()
    page.wait_for_selector("#panel table")
    text = page.locator("#panel").inner_text()
    assert "paired difference" in text
    assert "together (Holm)" in text
    assert "hf: a log of a different trainer" in text
    page.wait_for_selector(".chart .scatterlayer .trace", state="attached")
    titles = page.locator(".chart figcaption").all_inner_texts()
    assert "Training loss" in titles
    page.get_by_label("Baseline").select_option("lr=0.01")
    page.wait_for_selector("text=lr=0.02 − lr=0.01")
    opened.harmless()


def test_a_run_is_followed_and_its_end_is_noticed(browser: Any, address: str, root: Path) -> None:
    run = at_chance(np.random.default_rng(1))
    later, run.records = run.records[4:], run.records[:4]  # too few steps for a judgement
    write_run(run, root / "live", finished=False)
    time.sleep(1.1)  # a look at the folders holds for a second
    opened = Opened(browser, address, DESK, "dark")
    page = opened.go(f"/run/{key_of('live')}")
    page.wait_for_selector(".chart .scatterlayer .trace", state="attached")
    assert "training" in page.locator("#about").inner_text()
    assert "loss-at-chance" not in page.locator("#panel").inner_text()
    for record in later:
        RunFolder(root / "live").append(record)
    page.wait_for_selector(".finding.error")
    assert "loss-at-chance" in page.locator("#panel").inner_text()
    assert "step 400" in page.locator("#about").inner_text()
    levels = " ".join(page.locator(".chart >> nth=0 >> .annotation-text").all_text_contents())
    assert "guessing" in levels
    assert "floor of the loss" in levels
    opened.harmless()
    shutil.rmtree(root / "live")
    page.wait_for_selector("#problem:not([hidden])")
    assert "removed or renamed" in page.locator("#problem").inner_text()
    assert page.locator(".chart").count() > 0  # what was seen last stays
    opened.context.close()


@on_a_phone
def test_parts_of_a_run(opened: Opened) -> None:
    page = opened.go(f"/run/{key_of('patches')}#results")
    page.wait_for_selector("tr.monitor")
    assert "before training" in page.locator("#panel").inner_text()
    page.locator("#tabs a", has_text="Examples").click()
    page.wait_for_selector(".example .item.right")
    assert page.locator(".example img").count()
    assert HOSTILE[0] in page.locator("#panel").inner_text()
    page.locator("#tabs a", has_text="A batch").click()
    page.get_by_role("button", name="Explain this batch").click()
    page.wait_for_selector(".example .item.right")
    assert HOSTILE[0] in page.locator("#panel").inner_text()
    page.locator("#tabs a", has_text="Files").click()
    page.wait_for_selector("pre")
    assert "embedding_dim: 16" in page.locator("pre").first.inner_text()
    opened.harmless()


@on_both
def test_the_map_is_coloured_zoomed_and_shows_its_items(opened: Opened) -> None:
    page = opened.go(f"/run/{key_of('patches')}#map")
    page.get_by_role("button", name="Load the items").click()
    page.wait_for_selector("a.button:not([hidden])")
    page.wait_for_selector(".plane .points path")
    page.get_by_label("Colour").select_option("cosine with the partner")
    page.wait_for_selector(".plane .colorbar")
    point = page.locator(".plane .points path").last
    point.scroll_into_view_if_needed()
    point.hover(force=True)
    page.wait_for_selector(".pinned img")
    assert HOSTILE[0] in page.locator(".pinned").inner_text()
    before = page.locator(".plane .points path").first.get_attribute("transform")
    page.locator(".modebar-btn[data-title='Zoom in']").click()
    for _ in range(100):  # asked from outside, as the page itself evaluates no texts
        if page.locator(".plane .points path").first.get_attribute("transform") != before:
            break
        page.wait_for_timeout(50)
    assert page.locator(".plane .points path").first.get_attribute("transform") != before
    with page.expect_download() as download:
        page.get_by_role("link", name="Parquet").click()
    assert download.value.suggested_filename == "patches-pca.parquet"
    opened.harmless()


def test_a_trained_run_is_asked_on_its_page(browser: Any, address: str) -> None:
    opened = Opened(browser, address, DESK, "light")
    page = opened.go(f"/run/{key_of('patches')}#use")
    page.get_by_role("button", name="Load the model").click()
    page.wait_for_selector("text=Open its page")
    page.goto(opened.address + page.locator("text=Open its page").get_attribute("href"))
    page.get_by_label("Query: words").fill("a pale patch of red paint")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector(".card")
    assert page.locator(".card").count() == 12
    opened.harmless()
    opened.context.close()


def test_a_broken_run_says_which_file(browser: Any, address: str) -> None:
    opened = Opened(browser, address, PHONE, "light")
    page = opened.go(f"/run/{key_of('broken')}")
    page.wait_for_selector("#problem:not([hidden])")
    assert "metrics.json: not valid JSON" in page.locator("#problem").inner_text()
    opened.harmless(refused="422")
    opened.context.close()


def test_all_of_the_table_works_by_keyboard(browser: Any, address: str) -> None:
    opened = Opened(browser, address, DESK, "light")
    page = opened.go("/")
    page.wait_for_selector("#rows tbody a")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the runs"
    page.locator("#rows tbody input").first.focus()
    page.keyboard.press("Space")
    key = page.evaluate("document.activeElement.dataset.key")
    assert page.locator(f"[data-key='{key}']").is_checked()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#about:not(:empty), #problem:not([hidden])")
    opened.context.close()
