"""The page in a headless browser, at the width of a desk and of a phone: a real server, a real tiny run."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lazily import Lazily
from nearfar.data.chunks import NewData
from served import HOSTILE, Asker, picture, serving, train_pictures, write_gallery
from tiny_runs import train

pytest.importorskip("fastapi", reason="needs the extra serve")

from nearfar.serving.fill import file_source, own_source
from nearfar.serving.gallery import Gallery
from nearfar.serving.limits import Limits
from nearfar.serving.server import build_app
from nearfar.serving.trained import load

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
def ask(module_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    run = train_pictures(tmp_path_factory.mktemp("page"))
    trained = load(run, device="cpu")
    gallery = Gallery.open(trained, file_source(trained, NewData(write_gallery(run.parent / "data"))))
    with serving(build_app(trained, gallery, limits=Limits(pixels=50_000))) as asker:
        yield asker


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # root has no sandbox in a container; elsewhere it stays on
        flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        chromium = driver.chromium.launch(executable_path=BROWSER, args=flags)
        yield chromium
        chromium.close()


class Opened:
    """A page, and everything that went wrong on it."""

    def __init__(self, browser: Any, port: int, size: dict[str, int], scheme: str, path: str = "/") -> None:
        self.context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.foreign: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        self.page.on("dialog", lambda dialog: (self.wrong.append("a dialog"), dialog.dismiss()))
        self.page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((f"http://127.0.0.1:{port}/", "blob:", "data:"))
                else self.foreign.append(request.url)
            ),
        )
        self.page.goto(f"http://127.0.0.1:{port}{path}")

    def search(self, text: str) -> None:
        self.page.get_by_label("Query: words").fill(text)
        self.page.get_by_role("button", name="Search").click()
        self.page.wait_for_selector(".card")

    def until(self, condition: str) -> None:
        """Wait until this holds; asked from outside, as the page itself evaluates no texts."""
        for _ in range(200):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(condition)

    def harmless(self) -> None:
        """Nothing of the gallery ran, nothing came from elsewhere, nothing is wider than the page."""
        self.page.wait_for_load_state("networkidle")
        assert self.page.evaluate("window.hurt") is None
        assert (
            self.page.evaluate(
                "document.querySelectorAll('#results script, #results b[onerror], .card svg[onload]').length"
            )
            == 0
        )
        own = self.page.viewport_size
        for size in (DESK, PHONE, own):
            self.page.set_viewport_size(size)
            assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), size
        assert self.wrong == []
        assert self.foreign == []


@pytest.fixture
def opened(request: pytest.FixtureRequest, browser: Any, ask: Asker) -> Iterator[Opened]:
    """The page on a desk, or as a test asks; that nothing is too wide is looked at in both widths at the end."""
    page = Opened(browser, ask.port, *getattr(request, "param", (DESK, "light")))
    yield page
    page.context.close()


on_a_phone = pytest.mark.parametrize("opened", [(PHONE, "dark")], ids=["phone"], indirect=True)
on_both = pytest.mark.parametrize(
    "opened", [(DESK, "light"), (PHONE, "dark")], ids=["desk", "phone"], indirect=True
)


@on_a_phone
def test_a_text_finds_pictures_and_hostile_texts_stay_texts(opened: Opened) -> None:
    page = opened.page
    opened.search("a pale patch of red paint")
    cards = page.locator(".card")
    assert cards.count() == 12
    assert page.locator(".card img").count() >= 12
    page.locator(".card img").first.scroll_into_view_if_needed()
    opened.until("document.querySelector('.card img').naturalWidth === 40")
    whole = page.locator("#results").inner_text()
    for text in HOSTILE[:5]:
        assert text in whole
    assert page.title() == "patches · nearfar"
    assert "MRR" in page.locator("#about").inner_text()
    opened.harmless()


@on_both
def test_the_slide_shows_the_hits_and_a_click_searches(opened: Opened) -> None:
    page = opened.page
    opened.search("a dark patch of blue paint")
    page.wait_for_selector(".slide canvas")
    assert "spots are hits" in page.locator(".slide canvas").first.get_attribute("aria-label")
    canvas = page.locator(".slide canvas").first
    canvas.scroll_into_view_if_needed()
    size = canvas.bounding_box()
    canvas.click(position={"x": 24 / 900 * size["width"] + 1, "y": 24 / 900 * size["width"] + 1})
    page.wait_for_selector(".chosen")
    page.wait_for_selector("#results[aria-busy=false] .card")
    opened.harmless()


def test_a_dropped_picture_is_searched_and_a_wrong_one_is_explained(opened: Opened, tmp_path: Path) -> None:
    page = opened.page
    page.locator("#views label", has_text="picture").click()
    buffer = io.BytesIO()
    Image.fromarray(picture("green", "plain", 5)).save(buffer, "PNG")
    page.locator("input[type=file]").set_input_files(
        {"name": "green.png", "mimeType": "image/png", "buffer": buffer.getvalue()}
    )
    page.get_by_label("Look for").select_option("picture")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector(".card")
    assert "green" in page.locator(".card .words").first.inner_text()
    large = io.BytesIO()
    Image.fromarray(np.zeros((400, 400, 3), np.uint8)).save(large, "PNG")
    page.locator("input[type=file]").set_input_files(
        {"name": "large.png", "mimeType": "image/png", "buffer": large.getvalue()}
    )
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector("#problem:not([hidden])")
    assert "400 × 400 pixels" in page.locator("#problem").inner_text()
    opened.wrong = [
        text for text in opened.wrong if "422" not in text
    ]  # the browser says so of every refusal
    opened.harmless()


@on_a_phone
def test_an_item_of_the_gallery_becomes_the_query(opened: Opened) -> None:
    page = opened.page
    page.wait_for_selector("#input textarea")
    page.get_by_role("button", name="Pick from the gallery").click()
    page.wait_for_selector(".picker li button")
    assert page.locator(".picker li").count() == 12
    page.locator(".picker li button").first.click()
    page.wait_for_selector(".card")
    assert "from the gallery" in page.locator(".chosen").inner_text()
    page.get_by_role("button", name="More like this").nth(2).click()
    page.wait_for_selector(".card")
    page.get_by_role("button", name="Use something else").click()
    page.wait_for_selector("#input textarea")
    opened.harmless()


@on_both
def test_all_of_it_works_by_keyboard(opened: Opened) -> None:
    page = opened.page
    page.wait_for_selector("#input textarea")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert "go" in reached
    assert "draw" in reached
    page.locator("#input textarea").focus()
    page.keyboard.type("a plain patch of yellow paint")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".card")
    page.locator("#views input:checked").focus()
    for wanted in ("picture", "words"):
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("document.activeElement.value") == wanted
    outline = page.evaluate(
        "(document.getElementById('go').focus(), getComputedStyle(document.getElementById('go')).outlineStyle)"
    )
    assert outline != ""
    opened.harmless()


def test_everything_to_fill_in_has_a_name(opened: Opened) -> None:
    opened.search("a plain patch of red paint")
    for size in (DESK, PHONE):
        opened.page.set_viewport_size(size)
        unnamed = opened.page.evaluate(
            """() => [...document.querySelectorAll("input, textarea, select, button, canvas, img")].filter((node) =>
                node.offsetParent !== null && !(node.labels?.length || node.getAttribute("aria-label") || node.alt
                || node.textContent.trim())).map((node) => node.outerHTML)"""
        )
        assert unnamed == []
    assert opened.page.evaluate("document.documentElement.lang") == "en"


def test_filters_and_wrong_ones(opened: Opened) -> None:
    page = opened.page
    page.get_by_label("Only where").fill("price<3")
    opened.search("a plain patch of red paint")
    assert page.locator(".card").count() == 3
    page.get_by_label("Only where").fill("pirce<3")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector("#problem:not([hidden])")
    assert "did you mean 'price'?" in page.locator("#problem").inner_text()


@on_a_phone
def test_an_empty_query_is_not_sent(opened: Opened) -> None:
    opened.page.get_by_role("button", name="Search").click()
    opened.page.wait_for_selector("#problem:not([hidden])")
    assert "Type a query first" in opened.page.locator("#problem").inner_text()
    opened.harmless()


def test_the_page_of_the_api(browser: Any, ask: Asker) -> None:
    opened = Opened(browser, ask.port, PHONE, "light", "/docs")
    opened.page.wait_for_selector(".api details")
    text = opened.page.locator("main").inner_text()
    for path in ("/embed", "/search", "/predict", "/health"):
        assert path in text
    opened.page.locator("summary", has_text="/search").click()
    assert "curl" in opened.page.locator("details[open] pre").first.inner_text()
    opened.harmless()
    opened.context.close()


# -- predictions ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def predicting(module_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Asker]]:
    """A server of each system whose predictions look different."""
    folder = tmp_path_factory.mktemp("predicting")
    with ExitStack() as stack:
        askers = {}
        for system, more in (
            ("aspects", []),
            ("relations", ["categories=true"]),
            ("detector", []),
            ("tissue", []),
        ):
            trained = load(train(system, folder, *more, name=system), device="cpu")
            gallery = None
            if system == "tissue":
                gallery = Gallery.open(trained, own_source(trained))
            askers[system] = stack.enter_context(serving(build_app(trained, gallery)))
        yield askers


@pytest.fixture(scope="module")
def photo() -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"name": "photo.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "dark"), (PHONE, "light")], ids=["desk", "phone"])
def test_two_boxes_are_drawn_and_their_relation_is_seen(
    browser: Any, predicting: dict[str, Asker], photo: dict[str, Any], size: dict[str, int], scheme: str
) -> None:
    opened = Opened(browser, predicting["relations"].port, size, scheme)
    page = opened.page
    page.locator("input[type=file]").set_input_files(photo)
    page.wait_for_selector(".editor img")
    opened.until("document.querySelector('.editor img').naturalWidth === 128")
    page.locator(".editor img").scroll_into_view_if_needed()
    frame = page.locator(".editor img").bounding_box()
    for left, top, right, bottom in ((0.1, 0.1, 0.5, 0.5), (0.3, 0.4, 0.9, 0.9)):
        page.mouse.move(frame["x"] + left * frame["width"], frame["y"] + top * frame["height"])
        page.mouse.down()
        page.mouse.move(frame["x"] + right * frame["width"], frame["y"] + bottom * frame["height"], steps=4)
        page.mouse.up()
    edges = [
        page.get_by_label(f"Second object, {edge} in pixels").input_value() for edge in ("left", "right")
    ]
    assert [abs(int(edge) - wanted) <= 2 for edge, wanted in zip(edges, (38, 115), strict=True)] == [
        True,
        True,
    ]
    page.get_by_label("Name of the first object").fill("cup")
    page.get_by_label("Name of the second object").fill("table")
    page.get_by_role("button", name="Predict").click()
    page.wait_for_selector(".prediction .bars li")
    heading = page.locator(".prediction h3").inner_text()
    assert heading.startswith("cup ")
    assert heading.endswith(" table")
    assert page.locator(".photo rect").count() == 4  # each box and what sets it off
    opened.harmless()
    opened.context.close()


def test_predictions_are_seen(browser: Any, predicting: dict[str, Asker], photo: dict[str, Any]) -> None:
    opened = Opened(browser, predicting["aspects"].port, PHONE, "light")
    opened.page.locator("textarea").fill(
        "the <b>battery</b> lasts, the camera is poor <script>window.hurt=1</script>"
    )
    opened.page.get_by_role("button", name="Predict").click()
    opened.page.wait_for_selector(".prediction .bars li")
    assert "<b>battery</b>" in opened.page.locator(".quote").inner_text()
    assert "negative" in opened.page.locator(".bars .bar").first.get_attribute("aria-label")
    opened.harmless()
    opened.context.close()

    opened = Opened(browser, predicting["detector"].port, PHONE, "light")
    opened.page.locator("input[type=file]").set_input_files(photo)
    opened.page.get_by_role("button", name="Predict").click()
    opened.page.wait_for_selector(".photo rect")
    opened.page.get_by_label("Least score of a box").fill("0")
    assert opened.page.locator(".photo .at").count() == 5
    opened.harmless()
    opened.context.close()

    opened = Opened(browser, predicting["tissue"].port, PHONE, "light")
    opened.page.locator("input[type=file]").set_input_files(photo)
    opened.page.get_by_role("button", name="Predict").click()
    opened.page.wait_for_selector(".prediction .bars li")
    assert "Highest of" in opened.page.locator(".prediction h3").inner_text()
    opened.page.locator("#modes label", has_text="Search").click()
    opened.page.get_by_role("button", name="Pick from the gallery").click()
    opened.page.locator(".picker li button").first.click()
    opened.page.wait_for_selector(".slides canvas")
    opened.harmless()
    opened.context.close()
