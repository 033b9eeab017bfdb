"""Model cards: what they hold, that the hub reads them, that texts from data are harmless, that no place is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import nearfar
import tiny_runs
from nearfar.errors import NearfarError
from nearfar.serving.card import model_card
from nearfar.training.run_folder import RunFolder

pytestmark = [pytest.mark.usefixtures("module_cache")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.train("pairs", tmp_path_factory.mktemp("pairs"))


def card_of(run: Path, format: str = "safetensors", **more: str) -> str:
    return model_card(nearfar.load(run, "cpu"), format, {"tower": "title"}, **more)


def head(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.slow
def test_every_result_with_interval_and_chance(run: Path) -> None:
    card, folder = card_of(run), RunFolder(run)
    metrics = folder.read_json("metrics.json")
    for name, e in metrics["splits"]["val"].items():
        words = name.replace("_to_", " → ").replace("/", " ").replace("_", " ")
        row = next(line for line in card.splitlines() if line.startswith(f"| {words}"))
        assert f"{e['value']:.3f}" in row or f"{e['value']:.1f}" in row
        assert f"| {e['n']} |" in row
    assert "| metric | value | 95 % interval | chance | n | before training |" in card
    layout = folder.read_json("dataset_layout.json")
    for split in layout["splits"].values():
        assert split["split_hash"] in card
    assert layout["data_hash"] in card
    doctor = json.loads((run / "doctor.json").read_text())
    assert f"{len(doctor['unjudged'])} rules of the doctor could not be judged" in card
    for finding in doctor["findings"]:
        assert f"- **{finding['severity']}**: " in card
    assert "There was no test split" in card
    assert "No license is stated" in card
    assert str(run.parent.parent) not in card


@pytest.mark.slow
def test_the_hub_reads_the_metadata(run: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(card_of(run, license="apache-2.0"))
    assert card.data.library_name == "nearfar"
    assert card.data.license == "apache-2.0"
    assert card.data.model_name == "run"
    assert {each.metric_name for each in card.data.eval_results} >= {"title → price MRR"}
    assert "No license is stated" not in card.text
    for format, library in (("onnx", "onnx"), ("torch", "pytorch"), ("sentence-transformers",) * 2):
        assert head(card_of(run, format))["library_name"] == library


@pytest.mark.slow
def test_texts_from_data_are_harmless(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a|b"
    shutil.copytree(run, copy)
    layout = json.loads((copy / "dataset_layout.json").read_text())
    evil = "<script>alert(1)</script> | x |\n---\n# title [link](javascript:x) ```\n![](http://x/y.png)"
    layout["splits"] = {evil: layout["splits"]["train"] | {"source": f"/srv/private/{evil}"}}
    (copy / "dataset_layout.json").write_text(json.dumps(layout))
    doctor = json.loads((copy / "doctor.json").read_text())
    doctor["findings"] = [{"severity": "note", "title": evil, "evidence": {"text": f"read {copy}/x.csv"}}]
    (copy / "doctor.json").write_text(json.dumps(doctor))
    card = card_of(copy)
    assert "<script>" not in card
    assert "](" not in card.replace("\\]", "")
    assert card.count("\n---\n") == 1  # the end of the metadata
    assert "read x.csv" in card
    assert "/srv/private" not in card
    rows = [line for line in card.splitlines() if line.startswith("|") and "script" in line]
    assert len(rows) == 1
    assert rows[0].replace("\\|", "").count("|") == 6


@pytest.mark.slow
def test_a_run_without_doctor_or_with_damaged_files(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "doctor.json").unlink()
    assert "The doctor has not judged this run." in card_of(copy)
    (copy / "doctor.json").write_text("[")
    with pytest.raises(NearfarError, match=r"doctor\.json"):
        card_of(copy)
