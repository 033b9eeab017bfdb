"""``nearfar score`` and ``nearfar compare`` of rankings: verdicts, refusals with names, files that are written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from nearfar.cli import app
from nearfar.errors import NearfarError
from nearfar.lab.rankings import Judged, RankingOptions, compare_rankings, describe_rankings, score_file
from nearfar.lab.table import comparison_tables
from nearfar.metrics import paired_difference, score_ranking

OPTIONS = RankingOptions(metrics=("nDCG@5", "MAP", "recall@5"), bootstrap=100)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    qrels = {f"q{i}": {f"d{j}": int(rng.integers(0, 3)) for j in range(10)} for i in range(120)}
    (tmp_path / "qrels.json").write_text(json.dumps(qrels))
    for name, skill in (("weak.json", 0.2), ("strong.json", 1.5), ("same.json", 0.2)):
        own = np.random.default_rng(sum(map(ord, name)))
        lists = {
            q: {f"d{j}": float(skill * grades.get(f"d{j}", 0) + own.standard_normal()) for j in range(30)}
            for q, grades in qrels.items()
        }
        (tmp_path / name).write_text(json.dumps(lists))
    return tmp_path


def judged(folder: Path) -> Judged:
    return Judged.read(folder / "qrels.json", OPTIONS)


@pytest.mark.slow
def test_a_comparison_is_that_of_the_scores(folder):
    paths = [folder / name for name in ("weak.json", "strong.json", "same.json")]
    comparison = compare_rankings(paths, judged(folder), OPTIONS)
    qrels = json.loads((folder / "qrels.json").read_text())
    weak, strong = (score_ranking(json.loads(path.read_text()), qrels, OPTIONS.metrics) for path in paths[:2])
    for name in OPTIONS.metrics:
        expected = paired_difference(strong[name], weak[name], metric=name)
        got = comparison.differences["strong.json"][name]
        assert (got.value, got.low, got.high) == pytest.approx((expected.value, expected.low, expected.high))
        assert comparison.needed["strong.json"][name] < 120
    assert set(comparison.together["strong.json"].values()) == {"better"}
    assert set(comparison.together["same.json"].values()) == {"not distinguishable"}
    assert comparison.judged_together == 6
    assert comparison.needed["same.json"]["MAP"] > 120
    words = "\n".join(describe_rankings(comparison))
    assert "strong.json is better than weak.json by nDCG@5" in words
    assert "same.json is not distinguishable from weak.json" in words
    assert "this one would take about" in words
    assert next(table.title.plain for table in comparison_tables(comparison)).startswith("arms")  # type: ignore[union-attr]
    other = compare_rankings(paths[:2], judged(folder), OPTIONS, "strong")
    assert other.differences["weak.json"]["MAP"].verdict == "worse"
    assert other.worse == ["weak.json"]
    with pytest.raises(NearfarError, match="did you mean 'strong"):
        compare_rankings(paths[:2], judged(folder), OPTIONS, "strng.json")


@pytest.mark.slow
def test_other_queries_are_refused_with_their_names(folder):
    lists = json.loads((folder / "strong.json").read_text())
    del lists["q7"], lists["q9"]
    (folder / "fewer.json").write_text(json.dumps(lists))
    paths = [folder / "weak.json", folder / "fewer.json"]
    refused = compare_rankings(paths, judged(folder), OPTIONS)
    assert "2 only in weak.json (q7, q9)" in refused.refused["fewer.json"]
    assert "--missing zero" in refused.refused["fewer.json"]
    assert not refused.differences
    assert refused.worse == ["fewer.json"]
    zero = compare_rankings(paths, judged(folder), RankingOptions(**{**OPTIONS.__dict__, "missing": "zero"}))
    skip = compare_rankings(paths, judged(folder), RankingOptions(**{**OPTIONS.__dict__, "missing": "skip"}))
    n = zero.differences["fewer.json"]["MAP"].n
    assert skip.differences["fewer.json"]["MAP"].n == n - 2
    assert "2 judged queries are not in all rankings and left out (q7, q9)" in skip.notes[0]
    for given, options, words in (
        ([paths[0]], OPTIONS, "at least two rankings"),
        ([paths[0], paths[0]], OPTIONS, "is given twice"),
        (paths, RankingOptions(missing="x"), "refuse, zero or skip"),
    ):
        with pytest.raises(NearfarError, match=words):
            compare_rankings(given, judged(folder), options)


@pytest.mark.slow
def test_the_commands(folder, monkeypatch):
    monkeypatch.chdir(folder)
    runner = CliRunner()
    arguments = [
        "score",
        "weak.json",
        "--qrels",
        "qrels.json",
        "-m",
        "MAP",
        "--documents",
        "30",
        "-o",
        "s.json",
    ]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "MAP" in result.output
    assert "weak.json: 120 queries, 30 documents each." in result.output
    written = json.loads((folder / "s.json").read_text())[0]
    assert written["estimates"]["MAP"]["protocol"]["gallery"] == 30
    assert len(written["per_query"]["MAP"]) == 120
    arguments = ["compare", "weak.json", "strong.json", "--qrels", "qrels.json", "-o", "c.json"]
    result = runner.invoke(app, [*arguments, "--fail-on-worse"])
    assert result.exit_code == 0, result.output
    assert "queries that" in result.output
    assert "better" in result.output
    assert json.loads((folder / "c.json").read_text())["needed"]["strong.json"]["nDCG@10"] > 1
    result = runner.invoke(
        app, ["compare", "strong.json", "weak.json", "--qrels", "qrels.json", "--fail-on-worse"]
    )
    assert result.exit_code == 1
    without = runner.invoke(app, ["compare", "weak.json", "strong.json"])
    assert "is compared with --qrels FILE" in str(without.exception)
    missing = runner.invoke(app, ["score", "weak.json"])
    assert isinstance(missing.exception, NearfarError)
    assert "--qrels FILE" in str(missing.exception)


@pytest.mark.slow
def test_a_folder_of_beir_gives_the_chance_level(folder):
    (folder / "qrels").mkdir()
    qrels = json.loads((folder / "qrels.json").read_text())
    lines = [f"{q}\t{d}\t{g}\n" for q, ds in qrels.items() for d, g in ds.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    (folder / "corpus.jsonl").write_text("".join(f'{{"_id": "d{j}", "text": "x"}}\n' for j in range(29)))
    (folder / "queries.jsonl").write_text("".join(f'{{"_id": "{q}", "text": "x"}}\n' for q in qrels))
    with pytest.raises(NearfarError, match="more than the 29"):
        score_file(folder / "weak.json", Judged.read(folder, OPTIONS), OPTIONS)
    (folder / "corpus.jsonl").write_text(
        "".join(f'{{"_id": "d{j}", "text": "x"}}\n' for j in range(40) if j != 29)
    )
    scored = score_file(folder / "weak.json", Judged.read(folder, OPTIONS), OPTIONS)
    assert scored.estimates["MAP"].protocol["gallery"] == 39
    assert any("ranked documents are not in the collection (d29)" in note for note in scored.notes)
