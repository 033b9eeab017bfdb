"""Expression of new slides and patches: what a run said of its test slide, every layout, AnnData files, bad input."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import nearfar
from nearfar.config.compose import compose_config, read_config
from nearfar.data.chunks import NewData
from nearfar.data.slides.shard_dataset import read_shards
from nearfar.data.slides.shards import ShardOptions, write_shards
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.metrics.correlation import pearson_estimate
from nearfar.serving import Trained
from nearfar.serving.export import export_run
from nearfar.serving.stream import embed_file, predict_file
from nearfar.systems import build_system
from nearfar.systems.tissue.evaluation import chosen_genes
from nearfar.training.run_folder import RunFolder
from tissue_files import GENES, plain_strings, slide_data, write_h5ad, write_outs, write_st

pytest.importorskip("anndata")
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    "experiment=medium_spatial",
    "epochs=2",
    "batch_size=16",
    "hidden=16",
    "embedding_dim=8",
    "retrieve=5",
    "data.genes=9",
    "data.neighbors=3",
    "variable_genes=6",
    "expressed_genes=3",
    "bootstrap=0",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
    "trainer.log_every=2",
]
CUT = ShardOptions(patch=40, pixels=32, genes=None, min_counts=1, neighbors=3, val=("C",), test=("D",))
SLIDES = {"A": 1, "B": 2, "C": 3, "D": 4}

pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tissue")
    write_shards(write_st(place / "slides", SLIDES), place / "shards", CUT)
    return place / "shards"


def train(place: Path, shards: Path, *more: str) -> RunFolder:
    every = [*SMALL, f"data.dir={shards}", f"runs_dir={place}", "name=run", *more]
    every = list({o.split("=")[0]: o for o in every}.values())
    return run_one(compose_config(every), every, False, QUIET)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> RunFolder:
    return train(tmp_path_factory.mktemp("runs"), shards, "image_encoder=small", "image_encoder.features=16")


@pytest.fixture(scope="module")
def trained(run: RunFolder) -> Trained:
    return nearfar.load(run.path, device="cpu")


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """A folder with the test slide alone."""
    return write_st(tmp_path / "new", {"D": 4})


def read(path: Path) -> Any:
    import anndata

    with plain_strings():
        return anndata.read_h5ad(path)


def said_and_predicted(run: RunFolder, predicted: np.ndarray, genes: Sequence[str]) -> None:
    """The correlations of the run's metrics and per_item.npz, from predicted expression of its test slide."""
    system: Any = build_system(read_config(run.config(), saved=True))
    data = system.load_data(lambda _: None)
    assert list(genes) == data.genes
    metrics = run.read_json("metrics.json")["splits"]["test"]
    train, test = data.splits["train"], data.splits["test"]
    chosen = chosen_genes(train.expression, system.config.variable_genes, system.config.expressed_genes)
    with np.load(run.path / "per_item.npz") as per_item:
        assert per_item["test/ids"].tolist() == list(test.ids)
        for kind, columns in chosen.items():
            name = f"gene_pearson/{kind}"
            estimate, values, _ = pearson_estimate(
                predicted[:, columns],
                test.expression[:, columns],
                test.slides,
                name,
                split="",
                protocol={},
                resamples=0,
            )
            assert estimate.value == pytest.approx(metrics[name]["value"], abs=1e-6)
            np.testing.assert_allclose(per_item[f"test/{name}"], values, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ["image_encoder=small", "image_encoder.features=16"],
        ["image_encoder=colors"],
        ["image_encoder=small", "image_frozen=true", "image_encoder.features=16", "gene_encoder=sentence",
         "sentence_genes=4"],
    ],
    ids=["trained", "colours", "frozen with sentences"],
)  # fmt: skip
def test_prediction_is_what_the_evaluation_said(
    tmp_path: Path, shards: Path, new: Path, options: list[str]
) -> None:
    run = train(tmp_path / "runs", shards, *options)
    trained = nearfar.load(run.path, device="cpu")
    written = predict_file(trained, NewData(new), tmp_path / "out.h5ad")
    assert written.rows == 20
    data = read(tmp_path / "out.h5ad")
    said_and_predicted(run, data.layers["X_predicted"], data.var_names.tolist())
    assert data.obs["slide"].tolist() == ["D"] * 20
    test = read_shards(shards, ["D"], genes=data.var_names.tolist())
    np.testing.assert_allclose(data.obsm["spatial"], test.positions)
    np.testing.assert_allclose(data.X, test.expression, atol=1e-6)
    assert data.obsm["X_nearfar"].shape == (20, 8)
    assert not list(tmp_path.glob(".*"))
    # The shards of the slide have the same patches, to the last pixel.
    write_shards(new, tmp_path / "again", ShardOptions(**{**vars(CUT), "val": (), "test": ()}))
    predict_file(trained, NewData(tmp_path / "again"), tmp_path / "shards.h5ad")
    other = read(tmp_path / "shards.h5ad")
    assert np.array_equal(other.layers["X_predicted"], data.layers["X_predicted"])
    assert np.array_equal(other.obsm["X_nearfar"], data.obsm["X_nearfar"])


def test_a_table_of_expression(trained: Trained, run: RunFolder, new: Path, tmp_path: Path) -> None:
    predict_file(trained, NewData(new), tmp_path / "out.parquet")
    pandas = pytest.importorskip("pandas")
    table = pandas.read_parquet(tmp_path / "out.parquet")
    genes = trained.system.reading.genes  # type: ignore[attr-defined]
    assert table.columns.tolist() == ["id", "row", "slide", "x", "y", *genes]
    said_and_predicted(run, table[list(genes)].to_numpy(), genes)
    few = trained.predict(NewData(new, rows=3))
    np.testing.assert_allclose(few[genes[0]], table[genes[0]], atol=1e-5)


@pytest.mark.parametrize("layout", ["visium", "visium file", "space ranger"])
def test_other_layouts(trained: Trained, new: Path, tmp_path: Path, layout: str) -> None:
    expected = trained.predict(NewData(new))
    genes = list(trained.system.reading.genes)  # type: ignore[attr-defined]
    if layout == "space ranger":
        folder = write_outs(tmp_path / "D" / "outs", 4).parent.parent
        got = trained.predict(NewData(folder))
        assert len(got) >= 18  # the picture is a small one, and a spot lies outside of tissue
        assert got["slide"][0] == "D"
        return
    folder = tmp_path / "visium"
    write_h5ad(folder / "D.h5ad", 4)
    shutil.copy(new / "images" / "D.jpg", folder / "D.jpg")
    path = folder if layout == "visium" else folder / "D.h5ad"
    if layout == "visium file":
        write_h5ad(folder / "E.h5ad", 3)
    got = trained.predict(NewData(path))
    order = [expected.ids.index(name) for name in got.ids]
    for gene in genes:
        np.testing.assert_allclose(got[gene], np.array(expected[gene])[order], atol=1e-6)


def test_patches_that_are_pictures(trained: Trained, shards: Path, tmp_path: Path) -> None:
    tissue = read_shards(shards, ["D"], genes=list(trained.system.reading.genes))  # type: ignore[attr-defined]
    (tmp_path / "patches").mkdir()
    for at in range(6):
        Image.fromarray(tissue.patches[at]).save(tmp_path / "patches" / f"{at}.png")
    (tmp_path / "patches" / "6.png").write_bytes(b"nothing")
    (tmp_path / "table.csv").write_text("id,image\n" + "".join(f"s{at},{at}.png\n" for at in range(6)))
    expected = trained.predict({"image": tissue.patches[:6]})
    of_folder = trained.predict(tmp_path / "patches")
    of_table = trained.predict(NewData(tmp_path / "table.csv", images=tmp_path / "patches"))
    assert of_table.ids == [f"s{at}" for at in range(6)]
    for gene in tissue.genes:
        np.testing.assert_allclose(of_folder[gene], expected[gene], atol=1e-6)
        np.testing.assert_allclose(of_table[gene], expected[gene], atol=1e-6)
    assert len(of_folder.rejections) == 1
    written = predict_file(trained, NewData(tmp_path / "patches"), tmp_path / "out.h5ad")
    data = read(tmp_path / "out.h5ad")
    assert written.rows == data.n_obs == 6
    assert "spatial" not in data.obsm
    assert data.X is None


def test_expression_is_embedded_whatever_the_order_of_genes(
    trained: Trained, shards: Path, tmp_path: Path
) -> None:
    genes = list(trained.system.reading.genes)  # type: ignore[attr-defined]
    tissue = read_shards(shards, ["D"], genes=genes)
    expected = trained.embed(np.asarray(tissue.expression), tower="gene")
    with plain_strings():
        data = slide_data(4)
        mixed = data[:, GENES[::-1]].copy()
        mixed.write_h5ad(tmp_path / "mixed.h5ad")
        bare = mixed.copy()
        del bare.obsm["spatial"]
        bare.write_h5ad(tmp_path / "bare.h5ad")
        bare[:, [name for name in bare.var_names if name != genes[2]]].copy().write_h5ad(
            tmp_path / "less.h5ad"
        )
    for name in ("mixed", "bare"):
        embed_file(trained, NewData(tmp_path / f"{name}.h5ad"), tmp_path / "v.npz", towers=["gene"])
        with np.load(tmp_path / "v.npz") as arrays:
            order = [list(tissue.ids).index(f"D/{spot.split('/')[-1]}") for spot in arrays["ids"]]
            np.testing.assert_allclose(arrays["gene"], expected[order], atol=1e-5)
    with pytest.raises(NearfarError, match=f"1 of the 9 genes of the run are missing \\({genes[2]}\\)"):
        trained.predict(NewData(tmp_path / "less.h5ad"))
    with pytest.raises(NearfarError, match=r"1 of the 9 genes.*--set missing_genes=zero"):
        embed_file(trained, NewData(tmp_path / "less.h5ad"), tmp_path / "v.npz")
    zero = NewData(tmp_path / "less.h5ad", options={"missing_genes": "zero"})
    embed_file(trained, zero, tmp_path / "v.npz")
    with np.load(tmp_path / "v.npz") as arrays:
        assert arrays["gene"].shape == (20, 8)
        assert np.isfinite(arrays["gene"]).all()
    with pytest.raises(NearfarError, match=r"expression is predicted from patches, and .*does not say where"):
        trained.predict(NewData(tmp_path / "bare.h5ad"))


def test_runs_without_references_or_towers(run: RunFolder, shards: Path, new: Path, tmp_path: Path) -> None:
    expected = nearfar.load(run.path, "cpu").predict(NewData(new))
    gene = next(iter(set(expected.columns) & set(GENES)))
    old = tmp_path / "old"
    shutil.copytree(run.path, old)
    for gone in ("references", "towers"):
        shutil.rmtree(old / gone)
        np.testing.assert_allclose(
            nearfar.load(old, "cpu").predict(NewData(new))[gene], expected[gene], atol=1e-5
        )
    (old / "tissue.json").unlink()
    np.testing.assert_allclose(
        nearfar.load(old, "cpu").predict(NewData(new))[gene], expected[gene], atol=1e-5
    )
    moved = shards.with_name("elsewhere")
    shards.rename(moved)
    try:
        with pytest.raises(NearfarError, match=r"did not keep all that new slides need.*no such folder"):
            nearfar.load(old, "cpu")
        assert nearfar.load(run.path, "cpu").predict(NewData(new))[gene] == expected[gene], (
            "kept with the run"
        )
    finally:
        moved.rename(shards)


def test_an_exported_folder_predicts_the_same(
    trained: Trained, run: RunFolder, new: Path, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    export_run(run.path, tmp_path / "model")
    again = nearfar.load(tmp_path / "model", "cpu").predict(NewData(new))
    assert again.columns == trained.predict(NewData(new)).columns


def test_references_of_more_bytes_are_read_from_the_data(
    tmp_path: Path, shards: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nearfar.systems.tissue.evaluation.MOST_BYTES", 100)
    run = train(tmp_path, shards, "image_encoder=colors")
    assert not (run.path / "references").exists()
    predict_file(nearfar.load(run.path, "cpu"), NewData(new), tmp_path / "out.h5ad")
    data = read(tmp_path / "out.h5ad")
    said_and_predicted(run, data.layers["X_predicted"], data.var_names.tolist())


def test_bad_input(trained: Trained, run: RunFolder, shards: Path, new: Path, tmp_path: Path) -> None:
    def fails(source: NewData | Path, message: str) -> None:
        with pytest.raises(NearfarError, match=message):
            trained.predict(source)

    fails(tmp_path / "nowhere", "no such file or folder")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", r"empty|no picture|nothing")
    write_shards(new, tmp_path / "wide", ShardOptions(patch=48, pixels=32, genes=None, min_counts=1))
    fails(tmp_path / "wide", "patches show 48 pixels, and those that the run was trained on show 40 pixels")
    write_h5ad(tmp_path / "alone" / "D.h5ad", 4)
    fails(tmp_path / "alone", "slide D has no picture.*nearfar embed --tower gene")
    fails(NewData(new, options={"missing_genes": "mean"}), "missing_genes=mean: refuse or zero")
    fails(NewData(new, options={"gene": "x"}), "read without an option 'gene'")
    shutil.copytree(run.path, tmp_path / "damaged")
    expression = tmp_path / "damaged" / "references" / "expression.npy"
    expression.write_bytes(expression.read_bytes()[:200])
    with pytest.raises(NearfarError, match=r"expression\.npy cannot be read"):
        nearfar.load(tmp_path / "damaged", "cpu")
    np.save(expression, np.zeros((3, 2), np.float32))
    with pytest.raises(NearfarError, match="do not belong to"):
        nearfar.load(tmp_path / "damaged", "cpu")
    about = json.loads((run.path / "tissue.json").read_text())
    for change in ({"size": {"height": 0, "width": 32}}, {"patch": {"jpg_quality": "x"}}, {"size": None}):
        (tmp_path / "damaged" / "tissue.json").write_text(json.dumps(about | change))
        with pytest.raises(NearfarError, match=r"tissue\.json"):
            nearfar.load(tmp_path / "damaged", "cpu")


def test_spots_that_cannot_be_used_are_counted(trained: Trained, tmp_path: Path) -> None:
    spoiled = write_st(tmp_path / "spoiled", {"D": 4}, spoiled=True)
    got = trained.predict(NewData(spoiled))
    assert len(got) == 21, "a spot without counts has a patch all the same"
    assert got.rejections.counts["no picture"] == 1
    assert sum(got.rejections.counts.values()) >= 5
    fewer = trained.predict(NewData(spoiled, options={"min_counts": "1"}))
    assert len(fewer) == 20
    assert fewer.rejections.counts["fewer than 1 counts"] == 1


def test_a_run_on_generated_slides_asks_for_the_size_of_patches(tmp_path: Path, new: Path) -> None:
    every = [*SMALL, "data.slides=4", "data.side=6", "data.generated_genes=12", "image_encoder=colors"]
    every += [f"runs_dir={tmp_path}", "name=run", "data.genes=12"]
    every = list({o.split("=")[0]: o for o in every}.values())
    run = run_one(compose_config(every), every, False, QUIET)
    trained = nearfar.load(run.path, "cpu")
    system: Any = build_system(read_config(run.config(), saved=True))
    system.prepare(lambda _: None)
    test = system.data.splits["test"]
    predicted = trained.predict({"image": test.patches, "gene": test.expression})
    said_and_predicted(run, np.stack([predicted[gene] for gene in test.genes], axis=1), test.genes)
    with pytest.raises(NearfarError, match=r"trained on generated slides.*--set patch=PIXELS"):
        trained.predict(NewData(new))
    assert json.loads((run.path / "tissue.json").read_text())["size"] == {"height": 32, "width": 32}
