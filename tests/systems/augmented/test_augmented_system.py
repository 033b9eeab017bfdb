"""Two views of each item: what is contrasted, MoCo's keys and queue, deterministic evaluation, resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from nearfar.config.compose import compose_config, read_config
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.systems import build_system
from nearfar.training.run_folder import RunFolder

pytest.importorskip("sklearn")
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    "epochs=1",
    "batch_size=64",
    "embedding_dim=8",
    "hidden=16",
    "bootstrap=100",
    "image_encoder=small",
    "image_encoder.features=32",
    "data.limit=128",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
]

pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


def overrides(*more: str) -> list[str]:
    own = [text for text in SMALL if "features" not in text or "image_encoder=colors" not in more]
    every = ["experiment=augmented", *own, *more]
    return list({text.split("=")[0]: text for text in every}.values())


def run(tmp_path: Path, *more: str) -> RunFolder:
    every = overrides(f"runs_dir={tmp_path / 'runs'}", "name=run", *more)
    return run_one(compose_config(every), every, False, QUIET)


def prepared(*more: str) -> Any:
    system = build_system(compose_config(overrides(*more)))
    system.prepare(lambda line: None)
    return system


def modelled(*more: str) -> tuple[Any, Any]:
    system = prepared(*more)
    torch.manual_seed(0)
    return system, system.build_model()


@pytest.mark.parametrize("loss", ["simclr", "moco"])
def test_both_forms_end_to_end(loss: str, tmp_path: Path) -> None:
    metrics = run(tmp_path, f"loss={loss}", "epochs=2", "trainer.evaluate_start=true").read_json(
        "metrics.json"
    )
    test = metrics["splits"]["test"]
    for name in ("R@1", "MAP@R", "knn/accuracy", "probe/accuracy"):
        assert {name, f"pixels/{name}"} <= set(test)
        assert name in metrics["gain"]["test"]
    for name in ("second_view/R@1", "second_view/MRR"):
        assert test[name]["value"] >= 0
        assert metrics["gain"]["test"][name]["paired"] is True
    assert metrics["monitor"] == "second_view/MRR"


def test_nt_xent_against_a_loop() -> None:
    system, model = modelled("temperature=0.3")
    batch = system.datasets["train"].__getitems__(list(range(12)))
    embeddings = system.encode(model.train(), batch)
    loss = system.loss_of(model, embeddings, batch).loss.item()
    rows = torch.nn.functional.normalize(
        torch.cat([embeddings["first"], embeddings["second"]]).double(), dim=1
    )
    similar = (rows @ rows.T / 0.3).fill_diagonal_(-torch.inf)
    terms = [-similar[i, (i + 12) % 24] + similar[i].logsumexp(0) for i in range(24)]
    assert loss == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


def test_moco_against_a_loop() -> None:
    system, model = modelled("loss=moco", "loss.queue=20", "loss.momentum=0.9", "temperature=0.3")
    model.train()
    keys = model.get_submodule("keys")
    trained = [p for module in (model.tower("image"), model.heads["image"]) for p in module.parameters()]
    for key, parameter in zip(keys.parameters(), trained, strict=True):
        assert torch.equal(key, parameter)
        assert not key.requires_grad
    queue: list[tuple[torch.Tensor, int]] = []
    for step in range(4):
        positions = [(5 * step + i) % 17 for i in range(8)]  # items come again while they are in the queue
        batch = system.datasets["train"].__getitems__(positions)
        embeddings = system.encode(model, batch)
        before = [key.clone() for key in keys.parameters()]
        loss = system.loss_of(model, embeddings, batch).loss
        first, own = (torch.nn.functional.normalize(embeddings[n].double(), dim=1) for n in ("first", "key"))
        assert not embeddings["key"].requires_grad
        terms = []
        for i, position in enumerate(positions):
            negatives = [own[j] for j in range(8) if j != i]
            negatives += [
                torch.nn.functional.normalize(row, dim=0) for row, item in queue if item != position
            ]
            logits = torch.stack([own[i], *negatives]) @ first[i] / 0.3
            terms.append(logits.logsumexp(0) - logits[0])
        assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)
        queue = [*queue, *zip(embeddings["key"].double(), positions, strict=True)][-20:]
        for key, old, parameter in zip(keys.parameters(), before, trained, strict=True):
            torch.testing.assert_close(key, 0.9 * old + 0.1 * parameter)
        loss.backward()
        with torch.no_grad():
            for parameter in trained:
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    model.eval()
    before = [key.clone() for key in keys.parameters()]
    batch = system.datasets["train"].__getitems__([0, 1, 2])
    system.loss_of(model, system.encode(model, batch), batch)
    assert all(torch.equal(a, b) for a, b in zip(before, keys.parameters(), strict=True))
    assert not {id(p) for p in keys.parameters()} & {
        id(p) for group in system.parameter_groups(model) for p in group["params"]
    }


def test_training_views_change_with_the_epoch_and_those_of_evaluation_do_not() -> None:
    system, model = modelled()
    train, test = system.datasets["train"], system.datasets["test"]
    first = train.__getitems__([3, 4]).tensor("first")
    assert torch.equal(train.__getitems__([3, 4]).tensor("first"), first)
    train.set_epoch(1)
    assert not torch.equal(train.__getitems__([3, 4]).tensor("first"), first)
    views = test.__getitems__([3, 4])
    assert torch.equal(test.__getitems__([3, 4]).tensor("second"), views.tensor("second"))
    assert not torch.equal(views.tensor("first"), views.tensor("second"))
    plain = system._plain_train.__getitems__([0])
    assert "first" not in plain
    judged = system.embed(model.eval(), views)["image"]
    torch.testing.assert_close(judged, model.tower("image")(views["image"]))


def write_texts(path: Path) -> Path:
    random = np.random.default_rng(0)
    words = ["star", "rocket", "tank", "army", "kiss", "heart", "sea", "boat", "tree", "leaf"]
    rows = [{"text": " ".join(random.choice(words, 6))} for _ in range(80)]
    rows[1] = rows[0]  # copies are no negatives of each other
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_texts_are_two_passes_under_dropout_and_need_no_labels(tmp_path: Path) -> None:
    table = write_texts(tmp_path / "texts.jsonl")
    more = [f"data.train={table}", "text_encoder=words", "text_encoder.dims=16", "text_encoder.hidden=16"]
    more += ["text_encoder.vectors=false", "batch_size=16", "data.test_fraction=0.2"]
    system, model = modelled(*more)
    batch = system.datasets["train"].__getitems__([0, 1, 2, 3])
    embeddings = system.encode(model.train(), batch)
    assert not torch.equal(embeddings["first"], embeddings["second"])
    model.eval()
    state = torch.get_rng_state()
    once, again = system.embed(model, batch), system.embed(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert torch.equal(once["first"], again["first"])
    assert not torch.equal(once["first"], once["second"])
    groups = system.datasets["train"].tensor("group:text")
    assert len(groups.unique()) < len(groups) or "train" not in system.splits
    metrics = run(tmp_path, *more, "trainer.evaluate_start=true").read_json("metrics.json")
    names = {"second_view/R@1", "second_view/MRR"}
    assert set(metrics["splits"]["test"]) == names == set(metrics["before_training"]["test"])


def test_frozen_pictures_have_dropout_and_say_so(tmp_path: Path) -> None:
    lines: list[str] = []
    system = build_system(compose_config(overrides("image_encoder=colors")))
    system.prepare(lines.append)
    assert any("two passes under dropout, 0.1" in line for line in lines)
    run(tmp_path, "image_encoder=colors")
    with pytest.raises(NearfarError, match=r"the same view twice.*view_dropout=0\.1"):
        prepared("image_encoder=colors", "view_dropout=0").build_model()


@pytest.mark.parametrize("loss", ["simclr", "moco"])
def test_a_resumed_run_is_the_uninterrupted_one(loss: str, tmp_path: Path) -> None:
    from nearfar.training.checkpoint import Checkpoint

    more = [f"loss={loss}", "epochs=2", "trainer.checkpoint_steps=1"]
    more += ["loss.queue=100"] if loss == "moco" else []
    whole = run(tmp_path / "whole", *more)
    part = run(tmp_path / "part", *more, "trainer.max_steps=3")
    rest = run(tmp_path / "rest", *more, f"resume_from={part.path}")
    a, b = (Checkpoint.load(folder.path / "checkpoints" / "last.ckpt") for folder in (whole, rest))
    for name, tensor in a.model.items():
        assert torch.equal(torch.as_tensor(b.model[name]), torch.as_tensor(tensor)), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["memory=10"], r"loss=moco \(loss\.queue\)"),
        (["loss.momentum=2", "loss=moco"], "loss.momentum=2"),
        (["augment.crop=0"], "augment.crop=0"),
        (["view_dropout=1"], "view_dropout=1"),
        (["sampler=balanced"], "no such sampler"),
    ],
)
def test_wrong_options(more: list[str], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        read_config(compose_config(overrides(*more)))


def test_every_change_turned_off_is_an_error() -> None:
    off = ["augment.crop=1", "augment.flip=0", "augment.jitter=0", "augment.grey=0"]
    with pytest.raises(NearfarError, match="every change is turned off"):
        prepared(*off)
