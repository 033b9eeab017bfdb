"""The board behind a real server: what it answers is what the commands say, and nothing is written into the runs."""

from __future__ import annotations

import hashlib
import io
import json
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
from nearfar.board.discover import key_of
from nearfar.board.embedding_map import colour_column, methods
from nearfar.board.server import POLICY, build_board
from nearfar.lab.compare import compare_runs
from nearfar.lab.explain_run import explain_run
from nearfar.lab.report import comparison_record
from nearfar.serving.trained import load
from nearfar.training.run_folder import RunFolder
from served import HOSTILE, Asker, serving, train_pictures

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("module_cache")]


@pytest.fixture(scope="module")
def root(module_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board")
    run = train_pictures(folder / "trained", also=f" {HOSTILE[1]}")
    mixed(folder / "runs")
    run.rename(folder / "runs" / "patches")
    reseeded(folder / "runs" / "patches", 1, folder / "runs" / "again")
    return folder / "runs"


@pytest.fixture(scope="module")
def ask(root: Path) -> Iterator[Asker]:
    with serving(build_board(root)) as asker:
        yield asker


def done(ask: Asker, path: str, body: Any) -> dict[str, Any]:
    """The end of a piece of work."""
    status, job, _ = ask(path, body)
    assert status == 200, job
    for _ in range(600):
        if job["state"] in ("done", "failed"):
            return job
        time.sleep(0.05)
        job = ask(f"/api/jobs/{job['id']}")[1]
    raise AssertionError(job)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*")
            if p.is_file() and not p.is_symlink()}  # fmt: skip


def test_pages_have_a_policy_and_are_not_sent_twice(ask: Asker) -> None:
    for path in ("/", "/run/abc", "/compare", "/page/plotly.js", "/page/serving-parts.js", "/page/board.css"):
        status, body, headers = ask(path)
        assert (status, headers["content-security-policy"]) == (200, POLICY), path
        assert headers["x-content-type-options"] == "nosniff"
        assert ask(path, headers={"If-None-Match": headers["etag"]})[0] == 304
        if path.endswith("js"):
            assert headers["content-type"].startswith("text/javascript")
            assert len(body) > 100
    assert "script-src 'self';" in POLICY
    assert "unsafe-eval" not in POLICY


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/page/../server.py", 404, "nothing at this address"),
        ("/page/%2e%2e%2fserver.py", 404, "nothing at this address"),
        ("/api/runs/..%2f..%2fetc", 404, "nothing at this address"),
        ("/api/runs/0123456789", 422, "removed or renamed"),
        ("/api/jobs/none", 422, "ask for it again"),
        ("/api/runs/0123456789/secrets", 404, "nothing at this address"),
        ("/use/0123456789/describe", 404, "nothing at this address"),
    ],
)
def test_what_is_not_there(ask: Asker, path: str, status: int, says: str) -> None:
    answer = ask(path)
    assert answer[0] == status
    assert says in answer[1]["error"]


def test_other_sites_and_names_are_refused(ask: Asker) -> None:
    assert ask("/api/runs", headers={"Host": "evil.example"})[0] == 421
    assert ask("/api/runs", headers={"Origin": "http://evil.example"})[0] == 403
    assert (
        ask("/api/compare", raw=b"runs=1", headers={"Content-Type": "application/x-www-form-urlencoded"})[0]
        == 415
    )
    assert ask("/api/compare", {"runs": ["a"] * 61})[0] == 422
    assert ask("/api/compare", {"runs": "a"})[0] == 422


def test_an_unchanged_table_is_not_sent_again(ask: Asker) -> None:
    for _ in range(200):
        _, answer, headers = ask("/api/runs")
        if not answer["judging"]:
            break
        time.sleep(0.05)
    assert {row["name"] for row in answer["rows"]} >= {
        "patches",
        "again",
        HOSTILE_NAME,
        "hf",
        "light/version_0",
    }
    assert ask("/api/runs", headers={"If-None-Match": ask("/api/runs")[2]["etag"]})[0] == 304
    assert "no-cache" in headers["cache-control"]


def test_a_comparison_is_that_of_the_command(ask: Asker, root: Path) -> None:
    names = ["patches", "again", "hf", HOSTILE_NAME]
    job = done(ask, "/api/compare", {"runs": [key_of(name) for name in names]})
    assert job["state"] == "done", job
    expected = comparison_record(compare_runs([root / "patches", root / "again"]))
    assert job["result"]["record"] == json.loads(json.dumps(expected))
    assert job["result"]["left_out"] == {
        "hf": "a log of a different trainer (Hugging Face trainer_state.json) has no scores of single items to pair",
        HOSTILE_NAME: "it is not finished",
    }
    few = done(ask, "/api/compare", {"runs": [key_of("patches"), key_of("hf")]})
    assert "at least two finished runs" in few["problem"]


def test_two_arms_get_paired_verdicts(ask: Asker, root: Path) -> None:
    other = reseeded(root / "patches", 0, root / "arm")
    text = (other.path / "config.yaml").read_text()
    other.write_text("config.yaml", text.replace("lr: 0.02", "lr: 0.01", 1))
    try:
        time.sleep(1.1)  # a look at the folders holds for a second
        job = done(ask, "/api/compare", {"runs": [key_of("patches"), key_of("arm")], "baseline": "lr=0.02"})
        assert job["state"] == "done", job
        expected = compare_runs([root / "patches", root / "arm"], baseline="lr=0.02")
        assert job["result"]["record"] == json.loads(json.dumps(comparison_record(expected)))
        assert expected.together["lr=0.01"]
        assert job["result"]["judged_together"] == expected.judged_together
    finally:
        shutil.rmtree(other.path)


def test_a_batch_is_explained_as_the_command_does(ask: Asker, root: Path) -> None:
    job = done(ask, f"/api/runs/{key_of('patches')}/explain", {"batch": 2})
    expected = explain_run(root / "patches", 2)
    result = job["result"]
    assert [pair["name"] for pair in result["pairs"]] == list(expected)
    for pair in result["pairs"]:
        for row, own in zip(pair["rows"], expected[pair["name"]], strict=True):
            assert row["p_positive"] == pytest.approx(own.p_positive)
            assert [other["position"] for other in row["negatives"]] == [
                other.position for other in own.negatives
            ]
            assert row["shown"]["picture"] or HOSTILE[1] in row["shown"]["text"]
    beyond = done(ask, f"/api/runs/{key_of('patches')}/explain", {"batch": 10**6})
    assert "an epoch of this run has the batches 1 to" in beyond["problem"]
    foreign = done(ask, f"/api/runs/{key_of('hf')}/explain", {"batch": 1})
    assert "no model that nearfar can load" in foreign["problem"]


def test_a_map_has_the_items_and_their_vectors(ask: Asker, root: Path) -> None:
    key = key_of("patches")
    stored = ask(f"/api/runs/{key}/map")[1]
    assert stored["methods"] == methods()
    assert {view["name"] for view in stored["stored"]["views"]} == {"picture", "words"}
    assert ask(f"/api/runs/{key}/map/picture?row=0&view=picture")[0] == 422
    result = done(ask, f"/api/runs/{key}/map", {"method": "pca"})["result"]
    trained = load(root / "patches", device="cpu")
    texts = next(view["texts"] for view in result["views"] if view["name"] == "words")
    assert all(text.endswith(HOSTILE[1]) for text in texts)
    words = trained.embed(texts, "words")
    view = next(view for view in result["views"] if view["name"] == "words")
    plane = np.stack([view["x"], view["y"]], 1)
    # principal components keep the order of inner products along them: each axis is a linear function of the vectors
    fitted, *_ = np.linalg.lstsq(np.c_[words, np.ones(len(words))], plane, rcond=None)
    assert np.allclose(np.c_[words, np.ones(len(words))] @ fitted, plane, atol=1e-3)
    columns = {column["name"]: column["values"] for column in result["columns"]}
    assert "cosine with the partner" in columns
    scores = RunFolder(root / "patches").read_arrays("per_item.npz")
    split = result["split"]
    by_id = dict(
        zip(scores[f"{split}/ids"].tolist(), scores[f"{split}/picture_to_words/MRR"].tolist(), strict=True)
    )
    assert columns["picture → words MRR"] == [pytest.approx(by_id[each]) for each in result["ids"]]
    status, content, headers = ask(f"/api/runs/{key}/map/picture?row=1&view=picture")
    assert (status, headers["content-type"], content[:4]) == (200, "image/png", b"\x89PNG")
    assert ask(f"/api/runs/{key}/map/picture?row=99999&view=picture")[0] == 422
    assert "no projection 'no'" in done(ask, f"/api/runs/{key}/map", {"method": "no"})["problem"]


def test_the_parquet_of_a_map_is_what_embedding_atlas_reads(ask: Asker) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    key = key_of("patches")
    result = done(ask, f"/api/runs/{key}/map", {"method": "tsne" if "tsne" in methods() else "pca"})["result"]
    status, content, headers = ask(f"/api/runs/{key}/map/points.parquet?method={result['method']}")
    assert status == 200
    assert headers["content-disposition"] == f'attachment; filename="patches-{result["method"]}.parquet"'
    table = parquet.read_table(io.BytesIO(content)).to_pydict()
    n = len(result["ids"])
    assert table["id"] == result["ids"] * 2
    assert table["view"] == [view["name"] for view in result["views"] for _ in range(n)]
    assert table["x"] == pytest.approx([x for view in result["views"] for x in view["x"]], abs=1e-4)
    for view, picture in zip(table["view"], table["picture"], strict=True):
        assert (picture is not None) == (view == "picture")
        assert picture is None or picture["bytes"][:4] == b"\x89PNG"


def test_an_opened_run_answers_as_the_served_one(ask: Asker, root: Path) -> None:
    key = key_of("patches")
    before = contents(root)
    job = done(ask, f"/api/runs/{key}/use", {})
    assert job["result"] == {"address": f"/use/{key}/", "note": None}
    page = f"/use/{key}/"
    assert b"<title>nearfar</title>" in ask(page)[1]
    assert ask(f"{page}page/app.js")[0] == 200
    status, answer, _ = ask(f"{page}search", {"query": "a pale patch of red paint", "tower": "words", "k": 3})
    assert status == 200, answer
    hits = load(root / "patches", device="cpu").search("a pale patch of red paint", tower="words", k=3)
    assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in hits]
    assert ask(f"{page}search", {"query": "x"}, headers={"Origin": "http://evil.example"})[0] == 403
    added = contents(root).keys() - before.keys()
    # Trained.search keeps its gallery beside the run; the board itself has written nothing
    assert all(name.startswith("patches/galleries/") for name in added)


def test_nothing_is_written_into_the_folder(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "runs", symlinks=True)
    shutil.rmtree(copy / "patches" / "galleries", ignore_errors=True)
    before = contents(copy)
    with serving(build_board(copy)) as ask:
        key = key_of("patches")
        for part in ("", "/examples", "/sections", "/files", "/map"):
            assert ask(f"/api/runs/{key}{part}")[0] == 200
        for path, body in (
            (f"/api/runs/{key}/map", {}),
            (f"/api/runs/{key}/use", {}),
            ("/api/compare", {"runs": [key, key_of("again")]}),
        ):
            assert done(ask, path, body)["state"] == "done"
        ask("/api/runs")
    assert contents(copy) == before


def test_columns_to_colour_by() -> None:
    assert colour_column(np.arange(3)) == ("number", [0.0, 1.0, 2.0])
    assert colour_column(["a", None, "b"]) == ("class", ["a", "", "b"])
    assert colour_column([float("nan"), 1.0]) == ("number", [None, 1.0])
    assert colour_column([str(i) for i in range(100)]) is None
    assert colour_column(np.zeros((3, 2))) is None
    assert colour_column([[1, 2], [3]]) is None
