"""Safetensors: a run of every system comes back with the same vectors and outputs; damaged and foreign folders."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

import nearfar
import tiny_runs
from nearfar.config.registry import systems
from nearfar.errors import NearfarError
from nearfar.lab.ensemble import write_ensemble
from nearfar.serving.export import export_run
from nearfar.training.run_folder import RunFolder

pytestmark = [pytest.mark.usefixtures("module_cache")]

#: what pickles begin with, in a file or as a member of an archive
PICKLED = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def no_pickle(folder: Path) -> None:
    """Nothing below a folder is a pickle, holds one, or is code."""
    for path in (each for each in folder.rglob("*") if each.is_file()):
        assert path.suffix not in (".pkl", ".pickle", ".bin", ".pt", ".ckpt", ".py", ".joblib"), path
        assert path.read_bytes()[:2] not in PICKLED, path
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    content = archive.read(member)
                    assert content[:2] not in PICKLED, (path, member)
                    if member.endswith(".npy"):
                        np.lib.format.read_magic(archive.open(member))
                        assert b"'|O'" not in content[:200], (path, member)


def no_place(folder: Path, *places: Path) -> None:
    """No file names a folder of this machine."""
    known = [str(place) for place in (*places, Path.cwd(), Path.home(), os.environ["NEARFAR_CACHE"])]
    for path in (each for each in folder.rglob("*") if each.is_file()):
        content = path.read_bytes()
        for place in known:
            assert place.encode() not in content, (path, place)


@pytest.mark.slow
@pytest.mark.parametrize("system", sorted(systems()))
def test_every_system_comes_back_as_it_was(system: str, tmp_path: Path) -> None:
    run = tiny_runs.train(system, tmp_path)
    trained = nearfar.load(run, "cpu")
    exported = export_run(run, tmp_path / "out" / "model")
    moved = tmp_path / "elsewhere"
    shutil.move(exported.folder, moved)
    before = {
        view: trained.embed(tiny_runs.values_of(trained.system.towers[view], tmp_path), view)
        for view in trained.views
    }
    pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    found = None if trained.views else trained.predict(list(pictures))
    shutil.rmtree(run)  # nothing of the run is needed
    again = nearfar.load(moved, "cpu")
    assert again.views == trained.views
    assert again.config.system == system
    for view, vectors in before.items():
        values = tiny_runs.values_of(again.system.towers[view], tmp_path)
        assert np.array_equal(again.embed(values, view), vectors), view
    if found is not None:
        assert list(again.predict(list(pictures))) == list(found)
        assert len(found)
    for (name, one), (other, two) in zip(
        trained.model.state_dict().items(), again.model.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(one, two), name
    about = again.describe()
    assert about["system"] == system
    assert again.name == "run"
    assert about["results"]["splits"]
    no_pickle(moved)
    no_place(moved, tmp_path)
    content = yaml.safe_load((moved / "config.yaml").read_text())
    assert content["overrides"] == []
    assert (moved / "README.md").read_text().startswith("---\nlibrary_name: nearfar\n")


@pytest.mark.slow
def test_frozen_networks_come_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the model is gone, and a package is not installed: the exported model needs neither."""
    bert = tiny_runs.tiny_bert(tmp_path / "private" / "bert")
    run = tiny_runs.train(
        "pairs", tmp_path, "text_encoder=transformer", f"text_encoder.model={bert}", "embedding_dim=8"
    )
    trained = nearfar.load(run, "cpu")
    texts = ["a river", "the stone near the hill"]
    before = trained.embed(texts, "title")
    folder = export_run(run, tmp_path / "model").folder
    assert (folder / "towers" / "title" / "encoder" / "model" / "model.safetensors").is_file()
    no_pickle(folder)
    no_place(folder, tmp_path)
    shutil.rmtree(bert)
    again = nearfar.load(folder, "cpu")
    assert np.array_equal(again.embed(texts, "title"), before)
    # an exported folder is exported again
    second = export_run(folder, tmp_path / "second").folder
    assert np.array_equal(nearfar.load(second, "cpu").embed(texts, "title"), before)
    damaged = folder / "towers" / "title" / "encoder" / "model" / "config.json"
    damaged.write_text("{")
    with pytest.raises(NearfarError, match=r"encoder/model: the text model in this folder cannot be read"):
        nearfar.load(folder, "cpu").embed(texts, "title")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "lora"])
def test_trained_texts_and_shared_towers(how: str, tmp_path: Path) -> None:
    bert = tiny_runs.tiny_bert(tmp_path / "bert")
    run = tiny_runs.train(
        "pairs", tmp_path, "text_encoder=transformer", f"text_encoder.model={bert}", f"text_encoder.train={how}",
        "views=[title,text]", "share=true",
    )  # fmt: skip
    trained = nearfar.load(run, "cpu")
    texts = ["a river", "the stone near the hill"]
    folder = export_run(run, tmp_path / "model").folder
    manifest = json.loads((folder / "nearfar.json").read_text())
    assert any(name.startswith("towers.text.") for name in manifest["shared"])
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not any(name.startswith("towers.text.") for name in file.keys())  # noqa: SIM118
    shutil.rmtree(bert)
    again = nearfar.load(folder, "cpu")
    assert again.system.towers["title"] is again.system.towers["text"]
    for view in ("title", "text"):
        assert np.array_equal(again.embed(texts, view), trained.embed(texts, view))


@pytest.mark.slow
def test_ensembles(tmp_path: Path) -> None:
    runs = [tiny_runs.train("pairs", tmp_path, f"seed={seed}", name=f"run{seed}") for seed in (0, 1)]
    ensemble = write_ensemble(runs, tmp_path / "runs" / "both", lambda _: None).path
    folder = export_run(ensemble, tmp_path / "model").folder
    trained, again = nearfar.load(ensemble, "cpu"), nearfar.load(folder, "cpu")
    assert len(again.members) == 2
    assert np.array_equal(again.embed(["a river"], "title"), trained.embed(["a river"], "title"))
    no_place(folder, tmp_path)
    assert "An ensemble of 2 models" in (folder / "README.md").read_text()
    with pytest.raises(NearfarError, match="ensemble of 2 models, and --format onnx holds one"):
        export_run(ensemble, tmp_path / "graph", "onnx")
    manifest = folder / "nearfar.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"members": ["../runs/run0"]}))
    with pytest.raises(NearfarError, match="does not lie in this folder"):
        nearfar.load(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.train("pairs", tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    return export_run(run, tmp_path / "model").folder


@pytest.mark.slow
def test_damaged_and_foreign_folders(folder: Path, run: Path) -> None:
    def broken(name: str, content: bytes | None) -> str:
        path = folder / name
        kept = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(NearfarError) as caught:
            nearfar.load(folder)
        path.write_bytes(kept)
        return str(caught.value)

    weights = (folder / "model.safetensors").read_bytes()
    manifest = json.loads((folder / "nearfar.json").read_text())
    assert "model.safetensors: no such file" in broken("model.safetensors", None)
    assert "model.safetensors is not as it was written" in broken("model.safetensors", weights[:-9])
    assert "nearfar.json: not valid JSON" in broken("nearfar.json", b"{")
    assert "nearfar.json: format is missing" in broken("nearfar.json", b"{}")
    assert "config.yaml" in broken("config.yaml", b"system: [")
    assert "has no config.yaml" in broken("config.yaml", None)
    assert "views.json" in broken("towers/views.json", b"[]")
    assert "tower.json is missing" in broken("towers/title/tower.json", None)
    newer = json.dumps(manifest | {"format": 99}).encode()
    assert "format 99, and this version of nearfar reads formats up to" in broken("nearfar.json", newer)
    other = json.dumps(manifest | {"kind": "onnx"}).encode()
    assert "was exported as onnx, for use without nearfar" in broken("nearfar.json", other)
    unchecked = json.dumps(manifest | {"files": {}}).encode()
    (folder / "nearfar.json").write_bytes(unchecked)
    assert "model.safetensors: not a readable file of weights" in broken("model.safetensors", weights[:-9])
    (folder / "model.safetensors").write_bytes(weights)
    assert "the weights do not fit" in broken(
        "config.yaml", (folder / "config.yaml").read_bytes().replace(b"embedding_dim: 8", b"embedding_dim: 9")
    )
    system = (folder / "config.yaml").read_bytes().replace(b"system: pairs", b"system: labels")
    assert "config.yaml" in broken("config.yaml", system)
    assert nearfar.load(folder).views == ["title", "price"]


@pytest.mark.slow
def test_what_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(NearfarError, match="did you mean 'onnx'"):
        export_run(run, tmp_path / "a", "onx")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(NearfarError, match="full is not empty"):
        export_run(run, tmp_path / "full")
    with pytest.raises(NearfarError, match=r"mine.txt is no folder"):
        export_run(run, tmp_path / "full" / "mine.txt")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "metrics.json").unlink()
    with pytest.raises(NearfarError, match=r"has not finished: it has no metrics\.json"):
        export_run(unfinished, tmp_path / "a")
    with pytest.raises(NearfarError, match="no such run"):
        export_run(tmp_path / "missing", tmp_path / "a")
    with pytest.raises(NearfarError, match="has no view 'titel': did you mean 'title'"):
        export_run(run, tmp_path / "a", "onnx", tower="titel")
    with pytest.raises(NearfarError, match="--tower is for graphs"):
        export_run(run, tmp_path / "a", tower="title")
    with pytest.raises(
        NearfarError,
        match=r"'title' cannot be exported as a graph: character n-grams .* exported: --tower price\.$",
    ):
        export_run(run, tmp_path / "a", "onnx")
    with pytest.raises(
        NearfarError, match="TF-IDF of character n-grams, which sentence-transformers cannot express"
    ):
        export_run(run, tmp_path / "a", "sentence-transformers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "unfinished"]  # nothing was left


@pytest.mark.slow
def test_results_without_values_of_items(run: Path, folder: Path) -> None:
    layout = json.loads((folder / "dataset_layout.json").read_text())
    assert layout["splits"]["train"]["source"] == "train.csv"
    assert "first" not in json.dumps(layout)
    assert (
        json.loads((folder / "metrics.json").read_text())["splits"]
        == RunFolder(run).read_json("metrics.json")["splits"]
    )
    assert "platform" not in json.loads((folder / "environment.json").read_text())
