"""A real server with a tiny trained run: answers, limits, hostile requests, many clients."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nearfar.data.chunks import NewData
from nearfar.errors import NearfarError
from served import COLORS, HOSTILE, SHADES, Asker, picture, serving, train_pictures, write_gallery

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from nearfar.serving.fill import file_source, open_gallery, own_source
from nearfar.serving.gallery import Gallery, StoreGallery
from nearfar.serving.limits import Limits
from nearfar.serving.messages import GalleryItem, SearchResponse
from nearfar.serving.server import build_app
from nearfar.serving.trained import Trained, load

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("module_cache")]
HEAD = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
WORDS = [f"a {shade} patch of {color} paint" for color in COLORS for shade in SHADES]


@pytest.fixture(scope="module")
def run(module_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pictures(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def trained(run: Path) -> Trained:
    return load(run, device="cpu")


@pytest.fixture(scope="module")
def gallery(run: Path, trained: Trained) -> Gallery:
    return Gallery.open(trained, file_source(trained, NewData(write_gallery(run.parent / "data"))))


@pytest.fixture(scope="module")
def ask(trained: Trained, gallery: Gallery) -> Iterator[Asker]:
    with serving(build_app(trained, gallery, limits=Limits(pixels=100_000, numbers=100))) as asker:
        yield asker


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_none(each) for name, each in value.items() if each is not None}
    return [without_none(each) for each in value] if isinstance(value, list) else value


def encoded(pixels: np.ndarray, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


# -- answers -------------------------------------------------------------------------------------------------
def test_what_is_served_is_described(ask: Asker) -> None:
    status, about, _ = ask("/describe")
    assert status == 200
    assert about["system"] == "pairs"
    assert {name: view["form"] for name, view in about["views"].items()} == {
        "picture": "picture",
        "words": "text",
    }
    assert ["words", "picture"] in about["searches"]
    assert about["predicts"] == {}
    assert about["gallery"] == 12
    assert about["results"]["metric"] == "picture_to_words/MRR"
    status, health, _ = ask("/health")
    assert (status, health["status"], health["waiting"]) == (200, "ok", 0)


def test_vectors_are_those_of_the_model(ask: Asker, trained: Trained) -> None:
    status, answer, headers = ask("/embed", {"values": WORDS, "tower": "words"})
    assert (status, answer["tower"], answer["dim"]) == (200, "words", 16)
    np.testing.assert_allclose(answer["vectors"], trained.embed(WORDS, "words"), atol=1e-5)
    assert headers["cache-control"] == "no-store"
    pixels = [picture("red", "plain", seed) for seed in range(3)]
    values = [{"image": encoded(each)} for each in pixels]
    status, answer, _ = ask("/embed", {"values": values})
    assert answer["tower"] == "picture"
    np.testing.assert_allclose(answer["vectors"], trained.embed(pixels, "picture"), atol=1e-5)
    status, again, _ = ask("/embed", {"values": [{"image": "data:image/png;base64," + values[0]["image"]}]})
    np.testing.assert_allclose(again["vectors"][0], answer["vectors"][0], atol=1e-5)


def test_hits_are_the_nearest_by_an_explicit_loop(ask: Asker, trained: Trained, gallery: Gallery) -> None:
    vectors = {view: trained.embed(list(gallery.items[view]), view) for view in ("picture", "words")}
    for target in vectors:
        for query in WORDS[::3]:
            status, answer, _ = ask("/search", {"query": query, "tower": "words", "target": target, "k": 5})
            assert status == 200
            cosines = vectors[target] @ trained.embed([query], "words")[0]
            scores = [hit["score"] for hit in answer["hits"]]
            np.testing.assert_allclose(scores, np.sort(cosines)[::-1][:5], atol=2e-5)
            for hit in answer["hits"]:
                assert abs(cosines[hit["position"]] - hit["score"]) < 2e-5
                assert hit["id"] == gallery.items.ids[hit["position"]]
                assert hit["shown"]["words"]["text"] == gallery.items["words"][hit["position"]]
            assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3, 4, 5]
            assert SearchResponse.model_validate(answer).model_dump(exclude_none=True) == without_none(answer)
            for hit in answer["hits"]:  # as the gallery shows it, also where it was written before
                shown = GalleryItem.model_validate(gallery.shown(hit["position"])).model_dump()
                assert {name: hit[name] for name in shown} == shown


def test_an_item_of_the_gallery_is_a_query_and_its_own_answer(ask: Asker) -> None:
    for position in (0, 7):
        status, answer, _ = ask(
            "/search", {"item": position, "tower": "picture", "target": "picture", "k": 1}
        )
        assert (status, answer["hits"][0]["position"]) == (200, position)
        assert answer["hits"][0]["score"] > 0.9999


def test_filters_pass_what_they_should(ask: Asker) -> None:
    question = {"query": WORDS[0], "tower": "words", "k": 12}
    status, answer, _ = ask("/search", question | {"where": ["price<4"]})
    assert sorted(hit["position"] for hit in answer["hits"]) == [0, 1, 2, 3]
    status, answer, _ = ask("/search", question | {"where": ["price in 2,5", "x<5"]})
    assert [hit["position"] for hit in answer["hits"]] == [2]
    status, answer, _ = ask("/search", question | {"where": ["price>1000"]})
    assert (status, answer["hits"]) == (200, [])
    for wrong, reason in (
        ("pirce<4", "did you mean 'price'?"),
        ("price<cheap", "not a number"),
        ("nonsense", "condition"),
    ):
        status, answer, _ = ask("/search", question | {"where": [wrong]})
        assert status == 422
        assert reason in answer["error"]


def test_pictures_of_the_gallery_are_drawn_anew(ask: Asker) -> None:
    _, page, _ = ask("/gallery?start=3&count=4")
    assert (page["total"], [item["position"] for item in page["items"]]) == (12, [3, 4, 5, 6])
    item = page["items"][0]
    assert item["columns"]["note"] == HOSTILE[3]
    assert item["spot"] == {"slide": f"S1{HOSTILE[3]}", "x": 10.0, "y": 0.0}
    status, data, headers = ask("/" + item["shown"]["picture"]["url"])
    assert (status, headers["content-type"], headers["x-content-type-options"]) == (
        200,
        "image/png",
        "nosniff",
    )
    assert Image.open(io.BytesIO(data)).size == (40, 40)
    drawn = {item["position"] for item in ask("/gallery?draw=true&count=12")[1]["items"]}
    assert drawn == set(range(12))
    _, about, _ = ask("/describe")
    assert len(about["slides"]) > 1
    for path in (
        "/gallery/999/0",
        "/gallery/0/1",
        "/gallery/0/9",
        "/gallery/-1/0",
        "/gallery/x/0",
        "/gallery/slide?name=T",
    ):
        assert ask(path)[0] == 422, path


def test_slides_have_their_spots(ask: Asker, gallery: Gallery) -> None:
    from urllib.parse import quote

    for name in ask("/describe")[1]["slides"]:
        status, slide, _ = ask(f"/gallery/slide?name={quote(name)}")
        assert status == 200
        expected = [i for i in range(12) if gallery.items["slide"][i] == name]
        assert slide["positions"] == expected
        assert slide["x"] == [10 * (i // 3) for i in expected]


# -- what is wrong -------------------------------------------------------------------------------------------
WRONG: list[tuple[str, Any, str]] = [
    ("/embed", {"values": ["a"], "tower": "wrods"}, "did you mean 'words'?"),
    ("/embed", {"values": []}, "at least 1"),
    ("/embed", {}, "required"),
    ("/embed", {"values": "a"}, "array"),
    ("/embed", {"values": [None]}, "a text, a list of numbers"),
    ("/embed", {"values": [True]}, "a text, a list of numbers"),
    ("/embed", {"values": ["a"], "path": "x"}, "path: Extra inputs"),
    ("/embed", {"values": [{"image": "x", "file": "/etc/passwd"}]}, "Extra inputs"),
    ("/embed", {"values": [1.5], "tower": "words"}, "a text, a list of numbers"),
    ("/embed", {"values": [[1.0, 2.0]], "tower": "words"}, "a text is needed"),
    ("/embed", {"values": ["a"] * 257, "tower": "words"}, "257 values"),
    ("/embed", {"values": ["a" * 100_001], "tower": "words"}, "100,001 characters"),
    ("/embed", {"values": ["/etc/passwd"], "tower": "picture"}, "a picture is needed"),
    ("/embed", {"values": [{"image": "/etc/passwd"}]}, "base64"),
    ("/embed", {"values": [{"image": "../../../etc/passwd"}]}, "base64"),
    ("/embed", {"values": [{"image": "file:///etc/passwd"}]}, "base64"),
    ("/embed", {"values": [{"image": "data:text/html,<b>"}]}, "base64"),
    ("/embed", {"values": [{"image": base64.b64encode(b"<svg onload=x>").decode()}]}, "no picture"),
    ("/embed", {"values": [{"image": base64.b64encode(b"%!PS-Adobe").decode()}]}, "no picture"),
    ("/search", {"tower": "words"}, "one of the two"),
    ("/search", {"query": "a", "item": 1}, "one of the two"),
    ("/search", {"query": "a", "k": 0}, "greater than or equal to 1"),
    ("/search", {"query": "a", "k": 10**6}, "at most 200"),
    ("/search", {"query": "a", "k": "5"}, "integer"),
    ("/search", {"query": "a", "k": 1e3}, "integer"),
    ("/search", {"query": "a", "target": "nothing"}, "known: picture, words"),
    ("/search", {"query": [1.0], "tower": "words"}, "a text is needed"),
    ("/search", {"item": 99, "tower": "words"}, "no item at position 99"),
    ("/predict", {"values": ["a"]}, "predicts nothing"),
    ("/gallery?count=1000", None, "100"),
]


@pytest.mark.parametrize(("path", "body", "reason"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_refused_with_the_reason(ask: Asker, path: str, body: Any, reason: str) -> None:
    status, answer, _ = ask(path, body)
    assert status == 422
    assert set(answer) == {"error", "problems"}
    assert reason in json.dumps(answer, ensure_ascii=False)
    assert "Traceback" not in str(answer)
    assert "root:" not in str(answer)


def test_a_text_that_looks_like_a_path_is_a_text(ask: Asker, trained: Trained) -> None:
    for text in ("/etc/passwd", "../../etc/shadow", "red_plain_0.png", "file:///etc/passwd", "C:\\Windows"):
        status, answer, _ = ask("/embed", {"values": [text], "tower": "words"})
        assert status == 200
        np.testing.assert_allclose(answer["vectors"], trained.embed([text], "words"), atol=1e-5)


def test_one_bad_value_fails_alone(ask: Asker, trained: Trained) -> None:
    status, answer, _ = ask("/embed", {"values": [WORDS[0], " ", WORDS[1]], "tower": "words"})
    assert status == 200
    assert answer["vectors"][1] is None
    np.testing.assert_allclose(
        [answer["vectors"][0], answer["vectors"][2]], trained.embed(WORDS[:2], "words"), atol=1e-5
    )
    assert [each["where"] for each in answer["problems"]] == ["values.1"]
    good, bad = {"image": encoded(picture("red", "plain"))}, {"image": "AAAA"}
    status, answer, _ = ask("/embed", {"values": [bad, good]})
    assert (status, answer["vectors"][0]) == (200, None)
    assert answer["vectors"][1] is not None
    status, answer, _ = ask("/embed", {"values": [bad, bad]})
    assert (status, len(answer["problems"])) == (422, 2)


RAW: list[tuple[bytes, int]] = [
    (b"", 422),
    (b"{", 400),
    (b"\xff\xfe{}", 400),
    (b'{"values": [NaN], "tower": "words"}', 422),
    (b'{"values": [[NaN]], "tower": "words"}', 422),
    (b'{"values": [[Infinity]], "tower": "words"}', 422),
    (b'{"values": [[1e999]], "tower": "words"}', 422),
    (b'{"values": ["a"], "tower": "words", "values": 3}', 422),
    (b"[" * 100_000, 400),
    (b'{"values":' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400),
    (b'{"values": ["\\ud800"], "tower": "words"}', 422),
    (b'{"values": ["a\\u0000b"], "tower": "words"}', 422),
    (b'{"values": [[' + b"1," * 200 + b"1]]}", 422),
    (b'{"query": "a", "tower": "words", "k": 100000000000000000000000000000}', 422),
    (b"9" * 10_000, 422),
    (b"null", 422),
]


@pytest.mark.parametrize(("raw", "wanted"), RAW, ids=lambda value: str(value)[:40])
def test_hostile_bodies_are_refused(ask: Asker, raw: bytes, wanted: int) -> None:
    path = "/search" if b"query" in raw else "/embed"
    status, answer, _ = ask(path, raw=raw)
    assert status == wanted or {status, wanted} == {400, 422}
    assert answer["error"]
    assert ask("/health")[0] == 200


def test_pictures_that_claim_too_much_are_not_decoded(ask: Asker) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 10**7)) + chunk(b"IEND", b"")
    began = time.monotonic()
    status, answer, _ = ask("/embed", {"values": [{"image": base64.b64encode(bomb).decode()}]})
    assert (status, time.monotonic() - began < 5) == (422, True)
    assert "60000 × 60000 pixels" in answer["error"]
    broken = base64.b64decode(encoded(picture("red", "plain")))[:-30]
    status, answer, _ = ask("/embed", {"values": [{"image": base64.b64encode(broken).decode()}]})
    assert status == 422


def test_requests_that_are_too_large_are_refused(ask: Asker) -> None:
    status, answer, _ = ask("/embed", raw=b" " * (9 * 2**20))
    assert status == 413
    assert "8,388,608" in answer["error"]
    # without a stated length it is counted as it comes
    with socket.create_connection(("127.0.0.1", ask.port), timeout=30) as line:
        line.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(40):
            line.sendall(f"{2**18:x}\r\n".encode() + b" " * 2**18 + b"\r\n")
        line.sendall(b"0\r\n\r\n")
        assert b" 413 " in line.recv(65_536)
    assert ask("/health")[0] == 200


def test_only_own_names_and_own_pages_are_answered(ask: Asker) -> None:
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil",
        "",
        "a b",
        "[::1",
        f"127.0.0.1:{ask.port}@evil",
    ):
        status, _, _ = ask("/describe", headers={"Host": host})
        assert status in (400, 421), host
    for host in ("localhost", f"localhost:{ask.port}", "[::1]:80", "LOCALHOST"):
        assert ask("/health", headers={"Host": host})[0] == 200, host
    body = {"values": ["a"], "tower": "words"}
    assert ask("/embed", body, headers={"Origin": "https://evil.example"})[0] == 403
    assert ask("/embed", body, headers={"Origin": "null"})[0] == 403
    assert ask("/embed", body, headers={"Origin": f"http://127.0.0.1:{ask.port}"})[0] == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert ask("/embed", body, headers={"Content-Type": kind})[0] == 415
    assert ask("/embed", body, headers={"Content-Encoding": "gzip"})[0] == 415
    status, _, headers = ask("/embed", method="OPTIONS", headers={"Access-Control-Request-Method": "POST"})
    assert status == 405
    assert not [name for name in headers if name.startswith("access-control")]


def test_addresses_that_do_not_exist_read_no_files(ask: Asker) -> None:
    for path in (
        "/page/../server.py", "/page/..%2fserver.py", "/page/%2e%2e/server.py", "/page//etc/passwd", "/page/app.py",
        "/../../etc/passwd", "/gallery/0/../../describe.txt", "/.git/config", "/nothing",
    ):  # fmt: skip
        status, answer, _ = ask(path)
        assert status in (404, 422), path
        assert "error" in answer
    assert ask("/embed")[0] == 405
    assert ask("/describe", method="DELETE", headers={"Content-Type": "application/json"})[0] == 405


def test_pages_and_all_answers_have_their_policies(ask: Asker) -> None:
    for path in ("/", "/docs", "/page/app.js", "/page/style.css", "/openapi.json", "/describe", "/nothing"):
        _, _, headers = ask(path)
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    _, page, _ = ask("/")
    assert b"<script" in page
    assert b"http://" not in page
    assert b"https://" not in page
    _, api, _ = ask("/openapi.json")
    assert {"/embed", "/search", "/predict", "/health"} <= set(api["paths"])
    assert api["paths"]["/embed"]["post"]["requestBody"]["content"]["application/json"]["schema"]


# -- many at a time ------------------------------------------------------------------------------------------
def test_fifty_clients_get_their_own_answers(ask: Asker, trained: Trained) -> None:
    texts = [
        f"a {shade} patch of {color} paint, number {i}"
        for i in range(25)
        for color, shade in (("red", "pale"), ("blue", "dark"))
    ]
    expected = trained.embed(texts, "words")
    mixed = [picture(color, "plain", 100 + i) for i, color in enumerate([*COLORS] * 3)]
    pixels = trained.embed(mixed, "picture")
    failures: list[str] = []

    def client(number: int) -> None:
        for turn in range(6):
            i = (number * 7 + turn * 13) % len(texts)
            status, answer, _ = ask("/embed", {"values": [texts[i]], "tower": "words"})
            if status != 200 or not np.allclose(answer["vectors"][0], expected[i], atol=1e-5):
                failures.append(f"text {i}: {status}")
            if turn % 3 == 0:
                j = (number + turn) % len(mixed)
                status, answer, _ = ask("/embed", {"values": [{"image": encoded(mixed[j])}]})
                if status != 200 or not np.allclose(answer["vectors"][0], pixels[j], atol=1e-5):
                    failures.append(f"picture {j}: {status}")
            if turn % 2:
                status, answer, _ = ask("/embed", {"values": [texts[i], ""], "tower": "words"})
                if (
                    status != 200
                    or answer["vectors"][1] is not None
                    or not np.allclose(answer["vectors"][0], expected[i], atol=1e-5)
                ):
                    failures.append(f"half {i}: {status}")

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(client, range(50)))
    assert not failures
    assert ask("/health")[1]["requests"] == 0


class Slow:
    """A trained run whose passes take their time."""

    def __init__(self, trained: Trained, seconds: float) -> None:
        self.trained, self.seconds = trained, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trained, name)

    def vectors(self, values: Any, view: str) -> Any:
        time.sleep(self.seconds)
        if any(value == "fail" for value in values):
            raise RuntimeError("a secret of the server at /home/user")
        return self.trained.vectors(values, view)


def test_too_much_at_a_time_is_told_to_come_again(trained: Trained) -> None:
    slow: Any = Slow(trained, 0.5)
    with (
        serving(build_app(slow, limits=Limits(requests=8, waiting=6), batch=2)) as ask,
        ThreadPoolExecutor(20) as pool,
    ):
        answers = list(
            pool.map(lambda i: ask("/embed", {"values": [f"text {i}"], "tower": "words"}), range(20))
        )
        assert ask("/health")[0] == 200
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 6
    assert all(int(headers["retry-after"]) >= 1 for status, _, headers in answers if status == 503)


def test_what_takes_too_long_is_broken_off(trained: Trained) -> None:
    slow: Any = Slow(trained, 1.0)
    with serving(build_app(slow, limits=Limits(seconds=0.3))) as ask:
        status, answer, _ = ask("/embed", {"values": ["a text"], "tower": "words"})
        assert (status, "0.3 seconds" in answer["error"]) == (504, True)
        with socket.create_connection(("127.0.0.1", ask.port), timeout=10) as line:  # a body that never comes
            line.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
            assert b" 504 " in line.recv(65_536)


def test_the_servers_own_failures_tell_nothing_of_it(trained: Trained) -> None:
    slow: Any = Slow(trained, 0.0)
    with serving(build_app(slow)) as ask:
        status, answer, _ = ask("/embed", {"values": ["fail"], "tower": "words"})
        assert status == 500
        assert "secret" not in str(answer)
        assert "/home" not in str(answer)
        assert ask("/embed", {"values": ["a"], "tower": "words"})[0] == 200


def test_stopping_answers_what_was_asked(trained: Trained) -> None:
    slow: Any = Slow(trained, 0.8)
    answers: list[int] = []
    with serving(build_app(slow)) as ask:
        thread = threading.Thread(
            target=lambda: answers.append(ask("/embed", {"values": ["a text"], "tower": "words"})[0])
        )
        thread.start()
        time.sleep(0.3)
    thread.join(10)
    assert answers == [200]


# -- the gallery of a run ------------------------------------------------------------------------------------
def test_the_runs_own_data_is_a_gallery(trained: Trained) -> None:
    own = Gallery.open(trained, own_source(trained), ["picture"])
    assert len(own) == 72
    assert own.targets == ["picture"]
    with pytest.raises(NearfarError, match="did you mean 'picture'"):
        Gallery.open(trained, own_source(trained), ["pictures"])


def test_a_store_that_was_filled_before_is_served_as_it_is(
    trained: Trained, gallery: Gallery, run: Path, tmp_path: Path
) -> None:
    source = file_source(trained, NewData(run.parent / "data" / "gallery.csv"))
    open_gallery(trained, source, "picture", place=f"{tmp_path}/kept.faiss").close()
    kept = StoreGallery(trained, open_gallery(trained, None, None, place=f"{tmp_path}/kept.faiss"))
    assert (len(kept), kept.targets, kept.slides) == (12, ["picture"], [])
    with serving(build_app(trained, kept)) as ask, serving(build_app(trained, gallery)) as other:
        question = {"query": WORDS[4], "tower": "words", "target": "picture", "k": 5, "where": ["price<9"]}
        hits, expected = (each("/search", question)[1]["hits"] for each in (ask, other))
        assert [hit["id"] for hit in hits] == [hit["id"] for hit in expected]
        np.testing.assert_allclose(
            [hit["score"] for hit in hits], [hit["score"] for hit in expected], atol=1e-5
        )
        assert hits[0]["shown"]["words"]["text"] == expected[0]["shown"]["words"]["text"]
        assert ask("/" + hits[0]["shown"]["picture"]["url"])[2]["content-type"] == "image/png"
        again = {"item": hits[0]["position"], "tower": "picture", "target": "picture", "k": 1}
        assert ask("/search", again)[1]["hits"][0]["id"] == hits[0]["id"]
        assert len(ask("/gallery?draw=true&count=8")[1]["items"]) >= 1
        status, answer, _ = ask("/gallery/11111/0")
        assert (status, "too long ago" in answer["error"]) == (422, True)


def test_without_a_gallery_there_is_embedding_alone(trained: Trained) -> None:
    with serving(build_app(trained)) as ask:
        assert ask("/embed", {"values": ["a"], "tower": "words"})[0] == 200
        status, answer, _ = ask("/search", {"query": "a", "tower": "words"})
        assert (status, "--gallery" in answer["error"]) == (422, True)
        assert ask("/gallery")[0] == 422
        assert ask("/describe")[1]["gallery"] == 0
