"""The page of a run: verdict first, findings with evidence, curves with their levels, the map."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.lab.report import embedding_map, write_report
from nearfar.lab.summary import run_verdict
from nearfar.training.fit import project, write_map
from nearfar.training.run_folder import RunFolder
from nearfar.training.sections import Picture, Section, Table, write_sections
from toy_system import toy_config, train

pytestmark = pytest.mark.slow  # real runs

FINDING = {
    "id": "loss-at-chance",
    "severity": "error",
    "title": "The loss stays at the level of guessing.",
    "evidence": {"text": "4.15 nats at step 60; ln 64 = 4.16.", "loss": 4.15},
    "cause": "Rows and partners are <misaligned>.",
    "override": "lr=1e-3",
    "advice": "Check the rows.",
    "then": ["lr=1e-4"],
    "source": "ln of the candidates",
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    train(tmp_path / "run", toy_config(seed=0, epochs=2))
    folder = RunFolder(tmp_path / "run")
    folder.write_json("environment.json", {"python": "3.11"})
    return folder


def test_the_verdict_stands_first_and_findings_have_evidence(run: RunFolder) -> None:
    (run.path / "doctor.json").unlink(missing_ok=True)
    assert "has not judged this run" in run_verdict(run).health
    note = FINDING | {"id": "duplicates", "severity": "note", "title": "Copies.", "override": "", "then": []}
    run.write_json("doctor.json", {"findings": [note, FINDING], "unjudged": []})
    verdict = run_verdict(run)
    assert verdict.kind == "bad"
    assert [f.id for f in verdict.findings] == ["loss-at-chance", "duplicates"]
    run.append({"kind": "step", "epoch": 2, "step": 99, "loss": 1.0, "uniform_level": 4.2, "floor": 0.5})
    page = write_report(run).read_text()
    places = [
        page.index(words) for words in ("Guessing scores", "1 error", "ln 64 = 4.16", "<h2>Results", "<svg")
    ]
    assert places == sorted(places)
    for words in (
        "<code>lr=1e-3</code>",
        "<code>lr=1e-4</code>",
        "&lt;misaligned&gt;",
        "ln of the candidates",
    ):
        assert words in page, words
    assert "floor of the loss" in page
    for outside in ("http://", "https://", "<script", "src=", "<link"):
        assert outside not in re.sub(r"https?://www\.w3\.org", "", page), outside


def test_a_bare_list_of_findings_and_none_at_all(run: RunFolder) -> None:
    (run.path / "doctor.json").write_text(json.dumps([FINDING | {"evidence": "a sentence"}]))
    assert run_verdict(run).findings[0].text == "a sentence"
    (run.path / "doctor.json").write_text(json.dumps({"findings": [], "unjudged": [{"id": "x"}]}))
    assert "no warning and no error. 1 rules could not be judged" in run_verdict(run).health


def test_a_result_that_guessing_reaches_is_said(run: RunFolder) -> None:
    metrics = run.read_json("metrics.json")
    e = metrics["splits"]["val"][metrics["monitor"]]
    e |= {"value": 0.05, "low": 0.03, "high": 0.08, "chance": 0.05}
    run.write_json("metrics.json", metrics)
    assert run_verdict(run).kind == "bad"
    assert "nothing shows that the model learned" in run_verdict(run).result
    e |= {"chance": 0.2}
    run.write_json("metrics.json", metrics)
    assert "worse than guessing" in run_verdict(run).result


def test_probes_are_drawn(run: RunFolder) -> None:
    for step in (2, 4):
        run.append(
            {
                "kind": "probe",
                "epoch": 1,
                "step": step,
                "texts/effective_rank": 5.0,
                "texts/rank_limit": 7.0,
                "texts/mean_cosine": 0.1,
                "texts/uniformity": -2.0,
                "alignment": 1.0,
                "modality_gap": 0.3,
                "val_loss": 2.0,
                "train_loss_same_composition": 1.9,
            }
        )
    page = write_report(run).read_text()
    for words in (
        "Effective rank",
        "most that is possible",
        "validation, random batches",
        "uniformity, texts",
    ):
        assert words in page, words


def test_the_map_is_the_projection_on_two_components(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    texts, molecules = torch.randn(2, 40, 8, generator=generator)
    outputs = {
        "texts": texts,
        "molecules": molecules,
        "other": torch.randn(40, 3),
        "labels": torch.arange(40),
    }
    projected = project(outputs)
    assert projected is not None
    assert sorted(projected) == ["explained", "view/molecules", "view/texts"]
    units = np.concatenate(
        [t.numpy() / np.linalg.norm(t.numpy(), axis=1, keepdims=True) for t in (texts, molecules)]
    )
    values, vectors = np.linalg.eigh(np.cov(units.T))
    expected = (units - units.mean(0)) @ vectors[:, ::-1][:, :2]
    got = np.concatenate([projected["view/texts"], projected["view/molecules"]])
    assert np.abs(got) == pytest.approx(np.abs(expected), abs=1e-4)
    assert float(projected["explained"]) == pytest.approx(values[-2:].sum() / values.sum())
    assert project({"labels": torch.arange(3)}) is None
    assert project({"texts": torch.full((4, 4), float("nan"))}) is None
    collapsed = project({"texts": torch.ones(5, 4)})
    assert collapsed is not None
    assert np.isfinite(collapsed["view/texts"]).all()
    folder = RunFolder(tmp_path)
    assert embedding_map(folder) is None
    write_map(folder, outputs)
    drawn = embedding_map(folder)
    assert drawn is not None
    assert (drawn.rows, drawn.links) == (40, 40)
    write_map(folder, {"texts": texts})
    alone = embedding_map(folder)
    assert alone is not None
    assert (alone.rows, alone.links) == (40, 0)  # one view has no partners


def test_a_system_shows_tables_and_pictures_of_its_own(run: RunFolder) -> None:
    page = write_report(run).read_text()
    assert "<figure>" not in page
    table = Table(["true", "on", "under"], [["on", 7, 1], ["<under>", 0.25, None]], "Confusion.", shaded=True)
    pictures = [Picture(b"\xff\xd8\xff\xe0", "a photo"), Picture("<svg id='own'></svg>", "a drawing")]
    write_sections(run, [Section("Where it errs", "Rows are truth.", [table], pictures)])
    page = write_report(run).read_text()
    for words in (
        "<h2>Where it errs</h2>",
        "rgba(37, 99, 168, 0.48)",
        "&lt;under&gt;",
        "0.250",
        "–",
        "data:image/jpeg;base64,/9j/4A==",
        "<svg id='own'></svg>",
        "a drawing",
    ):
        assert words in page, words
    with pytest.raises(NearfarError, match="row 0 has 1 cells, and there are 2 columns"):
        Table(["a", "b"], [[1]])


def test_a_baseline_stands_beside_its_metric_and_a_gallery_only_where_there_is_one(run: RunFolder) -> None:
    metrics = run.read_json("metrics.json")
    assert "<th>gallery</th>" in write_report(run).read_text()
    name = metrics["monitor"]
    for estimate in metrics["splits"]["val"].values():
        del estimate["protocol"]["gallery"]
    run.write_json("metrics.json", metrics | {"baselines": {name: 0.4321}})
    page = write_report(run).read_text()
    assert "<th>gallery</th>" not in page
    assert "<th>baseline</th>" in page
    assert "<td>0.432</td>" in page


def test_baselines_by_split_and_with_a_name(run: RunFolder) -> None:
    metrics = run.read_json("metrics.json")
    name = metrics["monitor"]
    entry = {"value": 0.4321, "name": "a simpler model"}
    run.write_json("metrics.json", metrics | {"baselines": {"val": {name: entry}}})
    assert write_report(run).read_text().count("<td>0.432</td>") == 1
    run.write_json("metrics.json", metrics | {"baselines": {"test": {name: entry}}})
    assert "<th>baseline</th>" not in write_report(run).read_text()
