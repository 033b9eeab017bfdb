"""Loops with faults that people make, watched by ``Monitor``: what no loss shows, the weights do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from nearfar.doctor import Diagnosis
from nearfar.errors import NearfarError
from nearfar.integrations._weight_movement import WeightMovement
from nearfar.integrations.pytorch import Monitor, retrieval_scores

ROWS, BATCH = 96, 24


class Towers(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, 8))
        self.key = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 8))
        self.head = nn.Linear(8, 8)

    def embed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return normalize(self.head(self.query(x)), dim=1), normalize(self.head(self.key(y)), dim=1)


def watched(
    folder: Path,
    *,
    model: Towers | None = None,
    held: Callable[[Towers], Iterable[nn.Parameter]] = lambda model: model.parameters(),
    embed: Callable[[Towers, Tensor, Tensor], tuple[Tensor, Tensor]] = Towers.embed,
    decay: float = 1.0,
    copies: int = 1,
    evaluate_in_training: bool = False,
) -> Diagnosis:
    """The findings on a loop of six epochs, which does all right but for what is asked for."""
    torch.manual_seed(7)
    model = model or Towers()
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS // copies, 6, generator=draw).repeat(copies, 1)
    x, y = hidden @ torch.randn(6, 10, generator=draw), hidden @ torch.randn(6, 10, generator=draw)
    optimizer = torch.optim.Adam(held(model), lr=5e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)

    def evaluate() -> Any:
        model.train(evaluate_in_training)
        return retrieval_scores(
            *model.embed(x[: ROWS // copies], y[: ROWS // copies]), ks=(1,), bootstrap=100
        )

    watch = Monitor(model, None, folder, evaluate=evaluate, config={"batch_size": BATCH}, log_every=1)
    for _ in range(6):
        for batch in torch.randperm(ROWS, generator=draw).split(BATCH):
            queries, keys = embed(model, x[batch], y[batch])
            logits = queries @ keys.T / 0.1
            target = torch.arange(len(batch))
            loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss, logits=logits, lr=optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        watch.epoch()
    return watch.finish()


@pytest.mark.slow
def test_a_healthy_loop_and_a_tower_frozen_on_purpose_are_silent(tmp_path: Path) -> None:
    assert watched(tmp_path / "all").healthy
    model = Towers(dropout=0.1)
    model.key.requires_grad_(False)
    assert watched(tmp_path / "frozen", model=model).healthy


@pytest.mark.slow
def test_a_head_that_the_optimiser_lacks_is_named(tmp_path: Path) -> None:
    diagnosis = watched(tmp_path / "run", held=lambda m: [*m.query.parameters(), *m.key.parameters()])
    assert [f.id for f in diagnosis.of("warning", "error")] == ["weights-unmoved"]
    assert "2 of 10 weights" in diagnosis[0].evidence["text"]
    assert "head.weight, head.bias" in diagnosis[0].evidence["text"]
    assert diagnosis[0].override == ""  # a loop of one's own has no options of nearfar train


@pytest.mark.slow
def test_a_tower_whose_embeddings_are_detached_is_named(tmp_path: Path) -> None:
    def detached(model: Towers, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return model.embed(x, y)[0], model.embed(x, y)[1].detach()

    diagnosis = watched(tmp_path / "run", embed=detached)
    assert [f.id for f in diagnosis.of("warning")] == ["weights-without-gradient"]
    assert "key.0.weight" in diagnosis[0].evidence["text"]


@pytest.mark.slow
def test_a_schedule_that_ends_in_its_first_epoch_is_named(tmp_path: Path) -> None:
    ids = watched(tmp_path / "run", decay=0.01).ids
    assert ids[:2] == ["weights-stopped", "learning-rate-gone"]


@pytest.mark.slow
def test_copies_among_the_keys_are_seen_in_the_logits(tmp_path: Path) -> None:
    diagnosis = watched(tmp_path / "run", copies=4)
    assert "duplicates" in diagnosis.ids
    assert "mask_duplicates" not in str(diagnosis[diagnosis.ids.index("duplicates")])


@pytest.mark.slow
def test_an_evaluation_in_training_mode_is_named_where_that_matters(tmp_path: Path) -> None:
    noisy = watched(tmp_path / "noisy", model=Towers(dropout=0.3), evaluate_in_training=True)
    assert "evaluated-in-training-mode" in noisy.ids
    assert watched(tmp_path / "plain", evaluate_in_training=True).healthy  # nothing differs


# -- the parts -----------------------------------------------------------------------------------------------
def test_what_moves_without_a_gradient_and_what_is_barely_graded_are_no_faults() -> None:
    """A moving average; a bias before a BatchNorm, whose gradient is rounding; rows of a table that no batch used."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(50, 6),
            "body": nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)),
            "average": nn.Linear(6, 3),
        }
    )
    optimizer = torch.optim.SGD([*model["table"].parameters(), *model["body"].parameters()], 0.05)
    movement = WeightMovement(model)
    for step in range(8):
        optimizer.zero_grad()
        model["body"](model["table"](torch.arange(4) + 5 * step)).square().mean().backward()
        looked = movement.look()
        optimizer.step()
        with torch.no_grad():
            for weight in model["average"].parameters():
                weight.mul_(0.99)
        if step:
            assert looked["weights_moved"] == pytest.approx(1.0, abs=0.2)
    summary = movement.summary()
    assert (summary["weights_unmoved"], summary["weights_without_gradient"]) == (0, 0), summary


def test_logits_are_described_as_by_a_loop_over_rows(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    watch = Monitor(model, None, tmp_path / "run", log_every=1)
    logits = torch.tensor([[3.0, 1.0, 3.0, 0.0], [0.5, 2.0, 0.5, 1.0], [1.0, 0.0, 1.0, -4.0]])
    watch.step(1.0, logits=logits)
    record = list(watch.folder.log())[-1]
    chosen = [math.exp(row[i]) / sum(math.exp(each) for each in row) for i, row in enumerate(logits.tolist())]
    assert record["p_positive"] == pytest.approx(sum(chosen) / 3, abs=1e-6)
    assert (record["candidates"], record["largest_logit"]) == (4, 4.0)
    assert record["duplicate_keys"] == pytest.approx(2 / 3)  # the first key and the third
    assert record["uniform_level"] == pytest.approx(math.log(4))
    watch.step(1.0, logits=torch.ones(3, 3))  # one direction: no copies
    assert "duplicate_keys" not in list(watch.folder.log())[-1]
    with pytest.raises(NearfarError, match=r"logits of shape \(4, 3\): a matrix \(n, m\) is needed"):
        watch.step(1.0, logits=logits.T)
