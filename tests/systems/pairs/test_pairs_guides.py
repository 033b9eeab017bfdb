"""Guides, margins, lengths and corrected negatives as options of pairs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from nearfar.config.compose import compose_config
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.losses.views import ViewLoss
from nearfar.systems import build_system, check_config
from nearfar.systems.pairs.system import PairSystem
from nearfar.training.run_folder import RunFolder

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    *("text_encoder.dims=16", "text_encoder.min_df=1", "text_encoder.max_df=1.0", "embedding_dim=8"),
    *(
        "epochs=1",
        "batch_size=16",
        "bootstrap=100",
        "trainer.accelerator=cpu",
        "trainer.threads=1",
        "trainer.evaluate_start=false",
        "report=false",
    ),
    *("trainer.probe_rows=16", "views=[title,text]"),
]
NGRAM = ["guide.title.encoder=ngram", "guide.text.encoder=ngram"]
FITTED = [
    f"guide.{view}.{name}" for view in ("title", "text") for name in ("dims=8", "min_df=1", "max_df=1.0")
]
COLUMNS = ["guide.title=title_vector", "guide.text=text_vector"]
NOUNS = ["river", "stone", "cloud", "forest", "harbour", "candle", "ladder", "mirror"]
PLACES = ["near the hill", "far from the town", "under the bridge", "above the sea", "behind the mill"]
pytestmark = [pytest.mark.usefixtures("module_cache")]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty titles and texts with a second model's vectors of both, wrong texts, and a teacher's margins of these."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for i, noun in enumerate(NOUNS):
            for j, place in enumerate(PLACES):
                vector = rng.normal(size=4).round(3)
                row = {
                    "title": f"{noun} {place}",
                    "text": f"it tells of a {noun} that lies {place}",
                    "wrong": f"a {NOUNS[i - 1]} {place}",
                    "margin": None if (i, j) == (2, 1) else round(0.2 + 0.1 * j, 2),
                    "title_vector": vector.tolist(),
                    "text_vector": (vector + rng.normal(size=4).round(3) * 0.3).tolist(),
                }
                file.write(json.dumps(row) + "\n")
    return path


def config(table: Path, tmp_path: Path, *more: str) -> tuple[list[str], PairSystem]:
    overrides = ["experiment=pairs", f"data.train={table}", f"runs_dir={tmp_path}", *SMALL, *more]
    system = build_system(check_config(compose_config(overrides)))
    assert isinstance(system, PairSystem)
    return overrides, system


def prepared(table: Path, tmp_path: Path, *more: str) -> PairSystem:
    _, system = config(table, tmp_path, *more)
    system.prepare(lambda text: None)
    return system


def train(table: Path, tmp_path: Path, *more: str) -> RunFolder:
    overrides, _ = config(table, tmp_path, *more)
    folder = run_one(check_config(compose_config(overrides)), overrides, False, QUIET)
    assert folder is not None
    return folder


def step(system: PairSystem, rows: int = 12) -> tuple[ViewLoss, float, dict[str, float]]:
    batch = system.datasets["train"].__getitems__(list(range(rows)))
    output = system.loss_of(
        system.build_model().eval(), system.encode(system.build_model().eval(), batch), batch
    )
    assert isinstance(system.loss, ViewLoss)
    return system.loss, float(output.loss), dict(output.logs())


@pytest.mark.slow
def test_a_column_of_vectors_is_a_guide(table: Path, tmp_path: Path) -> None:
    system = prepared(table, tmp_path, *COLUMNS, "guide_margin=0.2", "mask_duplicates=false")
    batch = system.datasets["train"].__getitems__(list(range(12)))
    items = system.splits["train"]
    u, v = (
        torch.tensor([items[f"{view}_vector"][i] for i in range(12)], dtype=torch.float32)
        for view in ("title", "text")
    )
    assert torch.equal(batch.tensor("guide:title"), u)
    context = system.context(system.encode(system.build_model().eval(), batch), batch)
    mask = context.mask("title", "text")
    assert mask is not None
    cosines = torch.nn.functional.normalize(u, dim=1) @ torch.nn.functional.normalize(v, dim=1).T
    expected = cosines >= cosines.diagonal().unsqueeze(1) - 0.2
    left = mask.tile(slice(0, 12), slice(0, 12))
    assert torch.equal(left, expected)
    _, _, record = step(system)
    assert record["masked_per_row"] > 0
    assert record["masked_per_row"] + record["candidates"] == pytest.approx(12)


@pytest.mark.slow
def test_a_tower_is_a_guide_of_all_views_and_of_negatives(table: Path, tmp_path: Path) -> None:
    system = prepared(table, tmp_path, *NGRAM, *FITTED, "negatives.text=wrong", "guide_softness=0.1")
    batch = system.datasets["train"].__getitems__(list(range(12)))
    assert batch.tensor("guide:title").shape == batch.tensor("guide:text").shape == (12, 8)
    assert batch.tensor("negative_guide:text").shape == (12, 1, 8)
    same = torch.nn.functional.cosine_similarity(batch.tensor("guide:title"), batch.tensor("guide:text"))
    assert same.mean() > 0.3  # one space: fitted on both
    _, value, record = step(system)
    assert np.isfinite(value)
    assert 0 < record["masked_per_row"] < 12


def test_a_column_does_not_judge_negatives_and_says_so(table: Path, tmp_path: Path) -> None:
    said: list[str] = []
    _, system = config(table, tmp_path, *COLUMNS, "negatives.text=wrong")
    system.prepare(said.append)
    assert any("has no vectors of negatives.text" in text for text in said)


@pytest.mark.slow
def test_margins_and_distillation_are_terms(table: Path, tmp_path: Path) -> None:
    system = prepared(
        table,
        tmp_path,
        *COLUMNS,
        "negatives.text=wrong",
        "margins.text=margin",
        "distill=0.5",
        "guide_margin=null",
    )
    batch = system.datasets["train"].__getitems__(list(range(12)))
    margins = batch.tensor("margin:text")
    assert margins.shape == (12, 1)
    missing = [
        i
        for i, value in enumerate(system.splits["train"]["margin"])
        if value is None or np.isnan(float(value))
    ]
    assert [i for i in range(12) if torch.isnan(margins[i, 0])] == [i for i in missing if i < 12]
    _, value, record = step(system)
    terms = record["contrastive/weighted"] + record["distill/weighted"] + record["margin/weighted"]
    assert value == pytest.approx(terms, rel=1e-5)
    assert record["masked_per_row"] == 0


@pytest.mark.slow
def test_hard_and_debiased_negatives_are_options(table: Path, tmp_path: Path) -> None:
    loss, _, record = step(prepared(table, tmp_path, "loss.tau_plus=0.1", "loss.beta=0.5"))
    assert (loss.contrast.tau_plus, loss.contrast.beta) == (0.1, 0.5)  # type: ignore[union-attr]
    assert "debias_clamped" in record
    loss, *_ = step(prepared(table, tmp_path, "loss=clip", "loss.beta=0.5"))
    assert loss.contrast.beta == 0.5  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        (*COLUMNS, "guide_kind=relative", "guide_margin=0.05"),
        (*COLUMNS, "distill=1", "trainer.cached_chunk=5"),
        ("negatives.text=wrong", "margins.text=margin", "margin_weight=0.1", "trainer.cached_chunk=5"),
        ("loss.tau_plus=0.05", "loss.beta=0.2", "memory=20"),
        ("matryoshka=[2,4]", "memory=20"),
        ("loss=siglip", "matryoshka=4"),
    ],
    ids=lambda more: " ".join(more),
)
def test_runs(table: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    run = train(table, tmp_path, "name=run", *more)
    losses = [record["train_loss"] for record in run.log() if record["kind"] == "epoch"]
    assert np.isfinite(losses).all()


@pytest.mark.slow
def test_a_run_is_judged_at_each_length(table: Path, tmp_path: Path) -> None:
    run = train(
        table, tmp_path, "matryoshka=[2,4]", "name=run", "data.val_fraction=0.3", "trainer.log_every=1"
    )
    (scores,) = run.read_json("metrics.json")["splits"].values()
    for name in ("dim2/title_to_text/MRR", "dim4/text_to_title/R@1", "title_to_text/MRR"):
        assert scores[name]["low"] <= scores[name]["value"] <= scores[name]["high"]
        assert scores[name]["chance"] is not None
    steps = [record for record in run.log() if record["kind"] == "step"]
    assert {"dim2/raw", "dim4/raw", "contrastive/raw"} <= set(steps[-1])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("guide.title=title_vector",), "needs vectors of both views"),
        ((*COLUMNS, "memory=10"), "does not know earlier items"),
        ((*COLUMNS, "guide_margin=null"), "has no effect"),
        ((*COLUMNS, "loss=siglip"), "for loss=infonce and loss=clip"),
        (("distill=1",), "needs a teacher"),
        (("margins.text=margin",), "one for each"),
        (
            ("guide.title=title_vector", "guide.text=text_vectr"),
            "text_vectr'?; did you mean|no column 'text_vectr'",
        ),
        (("guide.title=title_vector", "guide.text=wrong"), "no vectors"),
        (("negatives.text=wrong", "margins.text=title"), "no numbers"),
        (("matryoshka=[4,4]",), "named twice"),
        (("matryoshka=[0]",), "lengths are needed"),
        (("loss.tau_plus=1.5",), "tau_plus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_says_why(table: Path, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        prepared(table, tmp_path, *more)


def test_a_length_beyond_the_embeddings(table: Path, tmp_path: Path) -> None:
    with pytest.raises(NearfarError, match="shorter lengths"):
        prepared(table, tmp_path, "matryoshka=[4,8]").build_model()
