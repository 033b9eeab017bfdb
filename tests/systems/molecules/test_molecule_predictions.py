"""New molecules and texts: ranks as evaluated, every kind of file, canonical SMILES, what cannot be read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import nearfar
from nearfar.cli import app
from nearfar.config.compose import compose_config
from nearfar.data.chunks import NewData
from nearfar.launch import run_one
from nearfar.training.run_folder import RunFolder
from tiny_molecules import pairs, split_files, write

pytest.importorskip("rdkit")
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    "epochs=2",
    "batch_size=16",
    "embedding_dim=16",
    "fingerprint_hidden=32",
    "fingerprint_bits=128",
    "bootstrap=100",
    "text_encoder.dims=32",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
    "trainer.eval_batch_size=32",
]

pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    split_files(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> RunFolder:
    every = ["experiment=molecules", *SMALL, f"runs_dir={tmp_path_factory.mktemp('runs')}", "name=run"]
    every += [f"data.{name}={data / f'{name}.tsv'}" for name in ("train", "val", "test")]
    return run_one(compose_config(every), every, False, QUIET)


def assert_as_judged(place: Path, data: Path) -> None:
    predictions = nearfar.load(place, device="cpu").predict(data / "test.tsv")
    per_item, metrics = np.load(place / "per_item.npz"), RunFolder(place).read_json("metrics.json")
    assert per_item["test/ids"].tolist() == predictions.ids
    for name in ("text_to_molecule", "molecule_to_text"):
        for metric in ("R@1", "MRR"):
            values = np.array(predictions[f"{name}/{metric}"])
            np.testing.assert_array_equal(values.astype(np.float32), per_item[f"test/{name}/{metric}"])
            assert values.mean() == metrics["splits"]["test"][f"{name}/{metric}"]["value"]
        assert (
            np.median(predictions[f"{name}/rank"])
            == metrics["splits"]["test"][f"{name}/median_rank"]["value"]
        )


def test_ranks_are_those_of_the_evaluation(finished: RunFolder, data: Path) -> None:
    assert_as_judged(finished.path, data)


def test_a_run_of_version_01(finished: RunFolder, data: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(finished.path, tmp_path / "old"))
    shutil.move(place / "towers" / "text" / "encoder", place / "text_encoder")
    shutil.rmtree(place / "towers")
    assert_as_judged(place, data)


def test_molecules_are_read_however_they_are_written(finished: RunFolder, tmp_path: Path) -> None:
    trained = nearfar.load(finished.path, device="cpu")
    rows = [("OCC", "the alcohol of ethane"), ("C1CC", "no molecule"), ("Nc1ccccc1", "the amine of benzene")]
    rows += [("C" * n, f"chain of {n}") for n in range(3, 10)]
    table = write(tmp_path / "new.tsv", rows)
    bare = tmp_path / "bare.csv"
    bare.write_text("".join(f"{smiles},{text}\n" for smiles, text in rows))
    listed = tmp_path / "list.smi"
    listed.write_text("".join(f"{smiles} {text}\n" for smiles, text in rows))
    seen = {}
    for path in (table, bare, listed):
        (items,) = trained.new_items(path)
        assert items["molecule"][:3] == ["CCO", None, "Nc1ccccc1"], path
        assert items["text"] == [text for _, text in rows]
        assert items.rejections.counts == {"molecule: unparsable SMILES": 1}
        assert "C1CC" in items.rejections.summary()
        seen[path.name] = items.ids[:3]
    assert seen == {
        "new.tsv": ["0", "1", "2"],
        "bare.csv": ["row1", "row2", "row3"],
        "list.smi": ["row1", "row2", "row3"],
    }
    by_view = tmp_path / "by_view.csv"
    by_view.write_text("molecule,text\n" + "".join(f"{smiles},{text}\n" for smiles, text in rows))
    (items,) = trained.new_items(by_view)
    assert items["molecule"][:3] == ["CCO", None, "Nc1ccccc1"]
    parts = list(trained.new_items(NewData(listed, rows=4)))
    assert [len(items) for items in parts] == [4, 4, 2]
    vectors = trained.embed(["CCO", "OCC"], tower="molecule")
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_embedding_by_the_command(finished: RunFolder, tmp_path: Path) -> None:
    file = tmp_path / "new.csv"
    file.write_text("smiles,name\nOCC,ethanol\nC1CC,\nCCN,N/A\n,benzene\n")
    target = tmp_path / "vectors.npz"
    arguments = ["embed", str(finished.path), str(file), "-o", str(target), "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "unparsable SMILES" in result.output
    arrays = np.load(target)
    assert arrays["ids"].tolist() == ["row2", "row4", "row5"]
    missing = {view: np.isnan(arrays[view]).all(axis=1).tolist() for view in ("molecule", "text")}
    assert missing == {"molecule": [False, False, True], "text": [False, True, False]}
    trained = nearfar.load(finished.path, device="cpu")
    np.testing.assert_allclose(arrays["molecule"][:2], trained.embed(["CCO", "CCN"], "molecule"), atol=1e-6)
    np.testing.assert_allclose(
        arrays["text"][[0, 2]], trained.embed(["ethanol", "benzene"], "text"), atol=1e-6
    )


def test_texts_ask_a_gallery_of_molecules(finished: RunFolder, tmp_path: Path) -> None:
    texts, molecules = tmp_path / "texts.csv", tmp_path / "molecules.smi"
    chosen = pairs()[:40]
    texts.write_text("id,description\n" + "".join(f"m{i},{text}\n" for i, (_, text) in enumerate(chosen[:6])))
    molecules.write_text("".join(f"{smiles} m{i}\n" for i, (smiles, _) in enumerate(chosen)))
    target = tmp_path / "answers.jsonl"
    arguments = ["predict", str(finished.path), str(texts), "-o", str(target), "--gallery", str(molecules)]
    result = CliRunner().invoke(app, [*arguments, "--k", "4", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    trained = nearfar.load(finished.path, device="cpu")
    cosines = trained.embed([text for _, text in chosen[:6]], "text") @ trained.embed(
        [smiles for smiles, _ in chosen], "molecule"
    ).T  # fmt: skip
    for row, own in zip(rows, cosines, strict=True):
        np.testing.assert_allclose(row["text_to_molecule/cosine"], np.sort(own)[::-1][:4], atol=1e-5)
        assert len(row["text_to_molecule/nearest"]) == 4
