"""Pairs end to end by the command's own functions: tables, missing views, shared towers, losses, resume, bad input."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from nearfar.config.compose import compose_config
from nearfar.errors import NearfarError
from nearfar.lab.report import write_report
from nearfar.launch import launch, run_one
from nearfar.systems import build_system, check_config
from nearfar.systems.pairs.system import PairSystem
from nearfar.towers import load_tower
from nearfar.training.run_folder import RunFolder
from run_files import records

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    *("text_encoder.dims=16", "text_encoder.min_df=1", "text_encoder.max_df=1.0", "embedding_dim=8"),
    *(
        "epochs=2",
        "batch_size=16",
        "bootstrap=0",
        "trainer.accelerator=cpu",
        "trainer.threads=1",
        "trainer.evaluate_start=false",
        "report=false",
    ),
    "trainer.probe_rows=16",
]
pytestmark = [pytest.mark.usefixtures("module_cache")]
NOUNS = ["river", "stone", "cloud", "forest", "harbour", "candle", "ladder", "mirror", "needle", "orchard"]
PLACES = ["near the hill", "far from the town", "under the bridge", "above the sea", "behind the mill"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty titles, texts that hold their words, prices, and texts that are wrong; some texts are missing."""
    path = tmp_path_factory.mktemp("data") / "train.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["title", "text", "price", "wrong", "topic"])
        for i, noun in enumerate(NOUNS):
            for j, place in enumerate(PLACES):
                text = "" if (i, j) == (3, 2) else f"it tells of a {noun} that lies {place}"
                writer.writerow([f"{noun} {place}", text, 10 * i + j, f"a {NOUNS[i - 1]} {place}", noun])
    return path


def options(table: Path, tmp_path: Path, *more: str) -> list[str]:
    return ["experiment=pairs", f"data.train={table}", f"runs_dir={tmp_path}", *SMALL, *more]


def train(table: Path, tmp_path: Path, *more: str) -> RunFolder:
    overrides = options(table, tmp_path, *more)
    folder = run_one(check_config(compose_config(overrides)), overrides, False, QUIET)
    assert folder is not None
    return folder


def prepared(table: Path, tmp_path: Path, *more: str) -> PairSystem:
    system = build_system(check_config(compose_config(options(table, tmp_path, *more))))
    assert isinstance(system, PairSystem)
    system.prepare(lambda text: None)
    return system


@pytest.mark.slow
def test_two_columns_train_and_beat_the_start(table: Path, tmp_path: Path) -> None:
    more = ("epochs=6", "lr=0.01", "data.val_fraction=0.4", "trainer.evaluate_start=true")
    run = train(table, tmp_path, "views=[title,text]", *more)
    metrics = run.read_json("metrics.json")
    assert metrics["monitor"] == "title_to_text/MRR"
    (split,) = metrics["splits"]
    scores, start = metrics["splits"][split], metrics["before_training"][split]
    assert scores["title_to_text/MRR"]["value"] > start["title_to_text/MRR"]["value"]
    assert metrics["gain"][split]["title_to_text/MRR"]["low"] > 0
    assert scores["nearest_training/title_to_text/MRR"]["control"] is True
    layout = run.read_json("dataset_layout.json")
    assert layout["splits"]["train"]["rejections"]["by_reason"] == {"fewer than two views": 1}
    assert "TF-IDF" in layout["views"]["title"]
    tower = load_tower(run.path / "towers" / "title")
    assert tower.read(["a river near the hill"]).batch(torch.tensor([0])) is not None
    assert "title" in write_report(run).read_text()


@pytest.mark.slow
def test_a_run_repeats_and_resumes_bit_for_bit(table: Path, tmp_path: Path) -> None:
    more = (
        "views=[title,text,price]",
        "memory=20",
        "loss=clip",
        "sampler=hard",
        "hardness_k=5",
        "neighbors=title",
    )
    whole = train(table, tmp_path / "a", *more, "epochs=3")
    again = train(table, tmp_path / "b", *more, "epochs=3")
    assert records(whole) == records(again)
    train(table, tmp_path / "c", *more, "epochs=3", "name=part", "trainer.max_steps=4")
    launch(
        [
            f"resume_from={tmp_path / 'c' / 'part'}",
            "trainer.max_steps=null",
            "name=whole",
            f"runs_dir={tmp_path / 'c'}",
        ]
    )
    resumed = RunFolder(tmp_path / "c" / "whole")
    assert resumed.read_json("metrics.json")["splits"] == whole.read_json("metrics.json")["splits"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("loss=clip", "views=[title,text]"),
        ("loss=siglip", "views=[title,text]"),
        ("loss=supcon", "positives=topic", "views=[title,text]", "sampler=balanced"),
        ("views=[title,text,price]", "anchor=title"),
        ("views=[title,text]", "share=true", "head=mlp", "hidden=12"),
        ("views=[title,text]", "negatives.text=wrong"),
        ("views=[title,text]", "sampler=hard", "hardness_k=5", "false_negative_threshold=0.95"),
        ("views=[title,text]", "memory=30", "false_negative_threshold=0.9", "mask_duplicates=false"),
        ("views=[title,text]", "towers.text.encoder=words", "towers.text.dims=8", "towers.text.hidden=8"),
        ("views=[title,text]", "trainer.cached_chunk=5"),
        ("views=[title,price]", "towers.title.train=frozen"),
    ],
    ids=lambda more: " ".join(more),
)
def test_whatever_the_library_can_do_is_an_option(table: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    run = train(table, tmp_path, "name=run", "epochs=1", *more)
    losses = [record["train_loss"] for record in run.log() if record["kind"] == "epoch"]
    assert len(losses) == 1
    assert np.isfinite(losses).all()


@pytest.mark.slow
def test_cached_chunks_give_the_same_loss(table: Path, tmp_path: Path) -> None:
    plain = train(table, tmp_path / "a", "views=[title,text]")
    cached = train(table, tmp_path / "b", "views=[title,text]", "trainer.cached_chunk=5")
    losses = [[r["train_loss"] for r in run.log() if r["kind"] == "epoch"] for run in (plain, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_view_that_some_items_lack_is_contrasted_where_it_is(table: Path, tmp_path: Path) -> None:
    system = prepared(table, tmp_path, "views=[title,text,price]")
    train_items = system.splits["train"]
    assert not train_items.present("text").all()
    batch = system.datasets["train"].__getitems__(list(range(len(train_items))))
    assert batch.tensor("present:text").tolist() == train_items.present("text").tolist()
    embeddings = system.encode(system.build_model().eval(), batch)
    missing = ~batch.tensor("present:text")
    assert float(embeddings["text"][missing].abs().sum()) == 0.0  # type: ignore[attr-defined]


def test_shared_views_have_one_tower_and_one_head(table: Path, tmp_path: Path) -> None:
    model = prepared(table, tmp_path, "views=[title,text]", "share=true").build_model()
    assert model.tower("title") is model.tower("text")
    assert sum(p.numel() for p in model.parameters()) == 16 * 8 + 8


@pytest.mark.slow
def test_the_pairs_that_are_held_out_share_no_text(table: Path, tmp_path: Path) -> None:
    splits = prepared(table, tmp_path, "views=[title,topic]", "data.val_fraction=0.3").splits
    assert not set(splits["train"]["topic"]) & set(splits["val"]["topic"])


@pytest.mark.slow
def test_files_that_share_items_are_a_leak(table: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    system = prepared(table, tmp_path, "views=[title,topic]", f"data.val={table}")
    system.announce_shared(lines.append)
    assert lines == [
        "train and val share 50 whole items (split leak), 50 values of 'title', 10 values of 'topic'"
    ]
    assert system.layout()["leaks"] == {
        "train/val": {"item": {"shared": 50, "rows": 50, "first": ["row2", "row3", "row4"]}}
    }
    apart = prepared(table, tmp_path, "views=[title,text]")
    assert apart.layout()["leaks"] == {}


@pytest.mark.parametrize("names", [("a.b", "a_b"), ("a b", "a_b")])
def test_views_that_would_have_one_name_on_disk_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    path = tmp_path / "train.csv"
    path.write_text(",".join(names) + "\n" + "".join(f"word {i},text {i}\n" for i in range(40)))
    with pytest.raises(NearfarError, match="rename one of these columns"):
        prepared(path, tmp_path)


@pytest.mark.slow
def test_columns_may_be_called_as_modules_call_their_methods(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("keys,training\n" + "".join(f"word {i},text {i}\n" for i in range(40)))
    system = prepared(path, tmp_path)
    model = system.build_model()
    batch = system.datasets["train"].__getitems__([0, 1])
    assert set(system.encode(model, batch)) == {"keys", "training"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("views=[title,txt]",), "has no column 'txt'"),
        (("views=[title]",), "experiment=labels"),
        (("views=[title,text]", "loss=supcon"), "loss=supcon needs positives=COLUMN"),
        (("views=[title,text]", "positives=topic"), "is for loss=supcon"),
        (("views=[title,text]", "share=true", "towers.text.encoder=words"), "none can be shared"),
        (("views=[title,text]", "towers.txt.encoder=words"), r"towers\.txt: no view has this name"),
        (("views=[title,text]", "towers.text.tower=imge"), "did you mean 'image'"),
        (("views=[title,text]", "towers.text.tower=image"), "picture|no item has two views"),
        (("views=[title,text]", "negatives.text=wrong", "memory=10"), "cannot be combined"),
        (
            ("views=[title,text]", "negatives.text=wrong", "loss=siglip"),
            "negatives: further negatives are for",
        ),
        (("views=[title,text]", "anchor=price"), "anchor=price: no view has this name"),
        (
            ("views=[title,text]", "sampler=hard", "towers.title.encoder=words", "neighbors=title"),
            "the tower of 'title' has none",
        ),
        ((), "say which are contrasted"),
        (("views=[title,text]", "towers.text=3"), "a kind of tower"),
        (("views=[title,text]", "text_encoder.dim=3"), "has no option 'dim'; did you mean 'dims'"),
        (("views=[title,text]", "learn_temperature=true", "temperature=0.001"), "kept at .01 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_trained_says_why(
    table: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(NearfarError, match=message):
        prepared(table, tmp_path, *more)


@pytest.mark.slow
def test_a_run_that_starts_from_trained_weights_is_judged_against_them(table: Path, tmp_path: Path) -> None:
    more = ("views=[title,text]", "lr=0.01", "data.val_fraction=0.4", "name=run")
    first = train(table, tmp_path / "a", *more, "epochs=3")
    second = train(
        table,
        tmp_path / "b",
        *more,
        "epochs=1",
        f"init_from={first.path}",
        "lr=1e-9",
        "trainer.evaluate_start=true",
    )
    start = second.read_json("metrics.json")["before_training"]["val"]["title_to_text/MRR"]["value"]
    trained = first.read_json("metrics.json")["splits"]["val"]["title_to_text/MRR"]["value"]
    assert start == pytest.approx(trained)
