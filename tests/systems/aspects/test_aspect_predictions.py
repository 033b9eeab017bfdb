"""Aspects of new reviews: what a run says of its own test rows, files of all kinds, runs of version 0.1, ensembles."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import nearfar
from nearfar.cli import app
from nearfar.config.compose import compose_config
from nearfar.data.chunks import NewData
from nearfar.data.reviews.aspect_data import read_reviews
from nearfar.data.reviews.labels import LabelScheme
from nearfar.errors import NearfarError
from nearfar.lab.ensemble import write_ensemble
from nearfar.launch import run_one
from nearfar.metrics.aspect_scores import Decision, score_split
from nearfar.serving.export import export_run
from nearfar.systems.aspects.report import read_scheme, write_scheme
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.run_folder import RunFolder
from tiny_aspects import split_folder

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    "epochs=2",
    "lr=0.01",
    "batch_size=32",
    "bootstrap=100",
    "text_encoder.dims=16",
    "text_encoder.hidden=16",
    "text_encoder.vectors=false",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
    "trainer.eval_batch_size=16",
]

pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_folder(tmp_path_factory.mktemp("data"), n=200)


def run(place: Path, folder: Path, *overrides: str) -> RunFolder:
    every = [
        "experiment=aspects",
        "data=visfd",
        f"data.dir={folder}",
        *SMALL,
        f"runs_dir={place}",
        *overrides,
    ]
    every = list({o.split("=")[0]: o for o in every}.values())
    return run_one(compose_config(every), every, False, QUIET)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> RunFolder:
    return run(
        tmp_path_factory.mktemp("runs"), folder, "name=run", "thresholds=aspect", "contrastive=jaccard"
    )


def truth_of(folder: Path, aspects: list[str], split: str = "Test") -> np.ndarray:
    """Codes of a file in the form of UIT-ViSFD, read here by hand."""
    words = {"Negative": 1, "Neutral": 2, "Positive": 3}
    codes = []
    with (folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            labels = dict(part.strip("{}").split("#") for part in row["label"].split(";") if part)
            codes.append([words.get(labels.get(aspect, ""), 0) for aspect in aspects])
    return np.array(codes)


def codes_of(columns: dict[str, list[Any]], aspects: list[str]) -> np.ndarray:
    """The predicted codes: from the columns of polarities, which the readable column repeats."""
    words = ["", "negative", "neutral", "positive"]
    codes = np.array([[words.index(word) for word in columns[f"{a} polarity"]] for a in aspects]).T
    readable = [
        ";".join(f"{a}#{words[code].capitalize()}" for a, code in zip(aspects, row, strict=True) if code)
        for row in codes
    ]
    assert columns["aspects"] == readable
    return codes


def assert_as_judged(predictions: Any, place: RunFolder, folder: Path) -> None:
    """What is predicted of the test file is what the run counted there, review by review and score by score."""
    layout, metrics = place.read_json("dataset_layout.json"), place.read_json("metrics.json")
    aspects, truth = layout["aspects"], truth_of(folder, layout["aspects"])
    codes = codes_of(predictions.columns, aspects)
    parts = ("negative", "neutral", "positive")
    polarities = np.stack(
        [np.stack([predictions[f"{a} {word}"] for word in parts], axis=1) for a in aspects], axis=1
    )
    mentioned = np.stack([predictions[f"{a} mentioned"] for a in aspects], axis=1)
    np.testing.assert_allclose(polarities.sum(axis=2), mentioned, atol=1e-6)
    probabilities = np.concatenate([(1 - mentioned)[..., None], polarities], axis=2)
    scheme = read_scheme(place.path, 0.3)[0]
    scores = score_split(truth, codes, scheme, probabilities, bootstrap=0)
    per_item = np.load(place.path / "per_item.npz")
    assert [name.partition(":")[2] for name in per_item["test/ids"]] == [
        identity.removeprefix("row") for identity in predictions.ids
    ]
    for name in ("aspect/F1_micro", "sentiment/F1_micro", "sentiment/F1_macro", "exact_match"):
        assert scores.estimates[name].value == metrics["splits"]["test"][name]["value"]
        np.testing.assert_array_equal(scores.per_item[name].astype(np.float32), per_item[f"test/{name}"])
    for name in ("polarity/accuracy", "calibration/ECE"):
        assert scores.estimates[name].value == pytest.approx(
            metrics["splits"]["test"][name]["value"], abs=1e-7
        )


def test_predictions_are_what_the_evaluation_counted(finished: RunFolder, folder: Path) -> None:
    trained = nearfar.load(finished.path, device="cpu")
    assert (trained.views, trained.kind(), trained.dim) == (["text"], "text", 32)
    predictions = trained.predict(folder / "Test.csv")
    assert len(predictions) == 40
    assert_as_judged(predictions, finished, folder)
    thresholds = finished.read_json("metrics.json")["decision"]["thresholds"]
    for aspect, limit in thresholds.items():
        answered = [word != "" for word in predictions[f"{aspect} polarity"]]
        assert answered == [p >= limit for p in predictions[f"{aspect} mentioned"]]
    about = trained.describe()
    assert about["system"] == "aspects"
    assert about["data"]["aspects"] == list(thresholds)


def test_the_command_writes_a_table_and_lists_what_it_could_not_read(
    finished: RunFolder, folder: Path, tmp_path: Path
) -> None:
    rows = list(csv.DictReader((folder / "Test.csv").open(encoding="utf-8")))
    mine = tmp_path / "mine.csv"
    with mine.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(["review_id", "stars", "review"])
        out.writerows([[f"r{i}", 3, row["comment"]] for i, row in enumerate(rows)])
        out.writerows([["r-empty", 1, " "], ["r-none", 1, "N/A"]])
    target = tmp_path / "out" / "predictions.csv"
    result = CliRunner().invoke(
        app, ["predict", str(finished.path), str(mine), "-o", str(target), "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    assert "2 rows rejected" in result.output
    written = list(csv.DictReader(target.open(encoding="utf-8")))
    assert [row["id"] for row in written] == [f"r{i}" for i in range(40)]
    direct = nearfar.load(finished.path, device="cpu").predict(folder / "Test.csv")
    assert [row["aspects"] for row in written] == direct["aspects"]
    for row, p in zip(written, direct["SCREEN mentioned"], strict=True):
        assert float(row["SCREEN mentioned"]) == pytest.approx(p, rel=1e-6)


def test_texts_from_python(finished: RunFolder, folder: Path) -> None:
    trained = nearfar.load(finished.path, device="cpu")
    texts = [row["comment"] for row in csv.DictReader((folder / "Test.csv").open(encoding="utf-8"))]
    assert trained.predict(texts)["aspects"] == trained.predict(folder / "Test.csv")["aspects"]
    vectors = trained.embed(texts)
    assert vectors.shape == (40, 32)
    review = trained.outputs(trained.items_of(texts))["review"]
    np.testing.assert_allclose(vectors, torch.nn.functional.normalize(review, dim=1), atol=1e-6)
    with pytest.raises(NearfarError, match="empty text 1"):
        trained.predict(["good screen", " "])
    with pytest.raises(NearfarError, match="predicts each item by itself"):
        trained.predict(texts, gallery=texts)


def test_a_missing_column_names_those_that_are_there(finished: RunFolder, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("id,headline,stars\n1,good,5\n")
    trained = nearfar.load(finished.path, device="cpu")
    with pytest.raises(NearfarError, match=r"'id', 'headline', 'stars'.*--column text=HEADER"):
        trained.predict(file)
    chosen = trained.predict(NewData(file, {"text": "headline"}))
    assert chosen.ids == ["1"]


# -- runs of version 0.1 -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory, finished: RunFolder) -> RunFolder:
    """The run as version 0.1 wrote it: a text encoder without a tower, no aspects.json, other names of weights."""
    place = RunFolder(tmp_path_factory.mktemp("old") / "run")
    shutil.copytree(finished.path, place.path)
    shutil.move(place.path / "towers" / "text" / "encoder", place.path / "text_encoder")
    shutil.rmtree(place.path / "towers")
    (place.path / "aspects.json").unlink()
    environment = place.read_json("environment.json")
    environment.pop("format")
    place.write_json("environment.json", environment)
    for name in ("best", "last"):
        path = place.checkpoints / f"{name}.ckpt"
        state = Checkpoint.load(path)
        state.model = {
            key.replace("encoder.network.", "encoder."): value for key, value in state.model.items()
        }
        state.save(path)
    return place


def test_a_run_of_version_01_predicts(old: RunFolder, folder: Path) -> None:
    assert_as_judged(nearfar.load(old.path, device="cpu").predict(folder / "Test.csv"), old, folder)


def test_without_metrics_an_aspect_is_mentioned_from_one_half_on(old: RunFolder, tmp_path: Path) -> None:
    place = RunFolder(Path(shutil.copytree(old.path, tmp_path / "cut")))
    (place.path / "metrics.json").unlink()
    scheme, decision = read_scheme(place.path, 0.3)
    assert decision.kind == "none"
    assert set(decision.thresholds) == {0.5}
    kept = old.read_json("metrics.json")["decision"]["polarity_weights"]
    assert decision.weights == tuple(tuple(kept[name]) for name in scheme.aspects)
    predictions = nearfar.load(place.path, device="cpu").predict(["the screen is great"])
    assert (predictions["SCREEN polarity"][0] != "") == (predictions["SCREEN mentioned"][0] >= 0.5)
    (place.path / "dataset_layout.json").unlink()
    with pytest.raises(NearfarError, match="Copy the whole folder"):
        nearfar.load(place.path)


def test_a_run_without_a_checkpoint_says_what_to_do(finished: RunFolder, tmp_path: Path) -> None:
    place = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "begun")))
    shutil.rmtree(place.checkpoints)
    with pytest.raises(NearfarError, match=r"no checkpoint in this folder\. A run writes its first one"):
        nearfar.load(place.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aspects": "BATTERY"}, "list is expected"),
        ({"pairs": ["LENS positive"]}, "'LENS positive' is of none of its aspects"),
        ({"decision": {"kind": "one", "thresholds": {"BATTERY": 0.5}}}, "thresholds are not those"),
        ({"decision": {"kind": "one", "thresholds": {"BATTERY": "x"}}}, "a number is expected"),
    ],
)
def test_a_damaged_scheme_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    scheme = LabelScheme.of(["BATTERY", "SCREEN"], np.array([[1, 3], [3, 2]]))
    decision = Decision("aspect", (0.25, 0.7), "val", ((1.0, 1.25, 0.1), (1.0, 2.0, 3.0)))
    write_scheme(tmp_path, scheme, decision)
    assert read_scheme(tmp_path, 0.0) == (scheme, decision)
    path = tmp_path / "aspects.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(NearfarError, match=message):
        read_scheme(tmp_path, 0.0)


# -- ensembles -----------------------------------------------------------------------------------------------
def test_an_ensemble_predicts_by_the_average(finished: RunFolder, folder: Path, tmp_path: Path) -> None:
    other = run(tmp_path, folder, "name=other", "thresholds=aspect", "contrastive=jaccard", "seed=1")
    made = write_ensemble([finished.path, other.path], tmp_path / "both")
    trained = nearfar.load(made.path, device="cpu")
    assert trained.dim == 64
    assert len(trained.members) == 2
    predictions = trained.predict(folder / "Test.csv")
    assert_as_judged(predictions, made, folder)
    one, two = (
        nearfar.load(each.path, device="cpu").predict(folder / "Test.csv") for each in (finished, other)
    )
    mean = [(a + b) / 2 for a, b in zip(one["PRICE mentioned"], two["PRICE mentioned"], strict=True)]
    np.testing.assert_allclose(predictions["PRICE mentioned"], mean, atol=1e-6)
    export_run(made.path, tmp_path / "out", "safetensors")
    assert (
        nearfar.load(tmp_path / "out", device="cpu").predict(folder / "Test.csv").columns
        == predictions.columns
    )
    (made.path / "aspects.json").unlink()  # as an ensemble of version 0.1 has none
    assert (
        nearfar.load(made.path, device="cpu").predict(folder / "Test.csv")["aspects"]
        == predictions["aspects"]
    )


def test_an_exported_folder_predicts_the_same(finished: RunFolder, folder: Path, tmp_path: Path) -> None:
    trained = nearfar.load(finished.path, device="cpu")
    export_run(finished.path, tmp_path / "out", "safetensors")
    exported = nearfar.load(tmp_path / "out", device="cpu").predict(folder / "Test.csv")
    assert exported.columns == trained.predict(folder / "Test.csv").columns


@pytest.mark.parametrize("train", ["full", "head", "lora"])
def test_pretrained_encoders(train: str, folder: Path, tmp_path: Path) -> None:
    """A BERT of two layers with random weights and a vocabulary of letters; its folder is gone when it predicts."""
    transformers = pytest.importorskip("transformers")
    if train == "lora":
        pytest.importorskip("peft")
    model = tmp_path / "tiny"
    model.mkdir()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", ".", *letters, *("##" + c for c in letters)]
    (model / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(model / "vocab.txt")).save_pretrained(model)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(model)
    own = [option for option in SMALL if not option.startswith("text_encoder.")]
    every = [
        "experiment=aspects",
        "data=visfd",
        f"data.dir={folder}",
        *own,
        f"runs_dir={tmp_path}",
        "name=run",
    ]
    every += ["text_encoder=pretrained", f"text_encoder.model={model}", f"text_encoder.train={train}"]
    place = run_one(compose_config(every), every, False, QUIET)
    if train != "head":  # a frozen encoder is kept by its name
        shutil.rmtree(model)
    assert_as_judged(nearfar.load(place.path, device="cpu").predict(folder / "Test.csv"), place, folder)


# -- files ---------------------------------------------------------------------------------------------------
def reviews(path: Path, rows: int = 100) -> Iterator[tuple[list[str], list[str], dict[str, int]]]:
    for items in read_reviews(NewData(path, rows=rows), ["text"], ["review_id"]):
        yield items.ids, items.texts("text"), dict(items.rejections.counts)


def test_xml_and_corpora_need_no_labels(tmp_path: Path) -> None:
    xml = tmp_path / "new.xml"
    xml.write_text(
        "<Reviews><Review><sentences>"
        '<sentence id="a"><text>Good food</text></sentence><sentence id="b"><text> </text></sentence>'
        '<sentence id="c" OutOfScope="TRUE"><text>Hm</text></sentence><sentence id="d"><text>Slow</text></sentence>'
        "</sentences></Review></Reviews>"
    )
    assert list(reviews(xml)) == [(["a", "d"], ["Good food", "Slow"], {"out of scope": 1, "empty text": 1})]
    vlsp = tmp_path / "new.txt"
    vlsp.write_text("#1\nPhòng sạch\n{ROOMS#CLEANLINESS, positive}\n\n#2\nXa\n", encoding="utf-8")
    assert list(reviews(vlsp)) == [(["#1", "#2"], ["Phòng sạch", "Xa"], {})]
    parts = list(reviews(xml, rows=1))
    assert [ids for ids, _, _ in parts] == [["a"], [], ["d"]]
    lines = tmp_path / "lines.txt"
    lines.write_text("Good food\nSlow service\n")
    assert [texts for _, texts, _ in reviews(lines)] == [["Good food", "Slow service"]]
    xml.write_text("<Reviews/>")
    with pytest.raises(NearfarError, match="no <sentence> with a <text>"):
        list(reviews(xml))
